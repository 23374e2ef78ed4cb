//! What the test itself has on the host, and the daemon may not take for its own.
//!
//! ```text
//!   Stage, for all cases of a trial    the witness: a VMM started by hand, or a domain that virsh made
//!      └─ Hand, for one case           the VMM under test, where somebody else starts it: here the test
//! ```
//!
//! Of hypervisors that the daemon starts itself there is nothing of this: their witness is a VM
//! like the one under test.

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_testkit::by_hand::{ByHandGuest as Machine, ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::libvirtd::{self, Libvirtd};

use crate::case::WITNESS;
use crate::harness::World;
use crate::hypervisor::Backend;

/// A firmware that does little, where QEMU's package puts it.
const QBOOT: &str = "/usr/share/qemu/qboot.rom";
/// How long a QEMU may take to answer the test itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What stands through all cases of a trial.
pub(crate) struct Stage {
    pub(crate) hypervisor: Backend,
    /// Never touched by anybody: it ends with the stage.
    witness: Option<ByHandVmm>,
    pub(crate) libvirtd: Option<Libvirtd>,
    helper: PathBuf,
    dir: TempDir,
}

/// Stages that a trial has left as it found them, for the next one: a libvirtd takes seconds to
/// come up.
static LEFT: Mutex<Vec<Stage>> = Mutex::new(Vec::new());

impl Stage {
    /// Sets it, or takes one that another trial has left.
    ///
    /// # Errors
    /// Why that cannot be done here.
    pub(crate) fn set(hypervisor: Backend) -> Result<Rc<Self>, String> {
        let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
        let known = left.iter().position(|stage| stage.hypervisor == hypervisor);
        let known = known.map(|at| left.swap_remove(at));
        drop(left);
        known.map_or_else(|| Self::set_anew(hypervisor), Ok).map(Rc::new)
    }

    /// Leaves it to the next trial. One that a failed trial has left is taken down with it.
    pub(crate) fn leave(self: Rc<Self>) {
        LEFT.lock().unwrap_or_else(PoisonError::into_inner).extend(Rc::into_inner(self));
    }

    /// Takes all down.
    pub(crate) fn strike() {
        LEFT.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn set_anew(hypervisor: Backend) -> Result<Self, String> {
        if let Some(why) = hypervisor.missing() {
            return Err(why);
        }
        let dir = tempfile::Builder::new().prefix("vmst").tempdir().map_err(|error| error.to_string())?;
        let mut stage = Self { hypervisor, witness: None, libvirtd: None, helper: PathBuf::new(), dir };
        if let Some(kind) = hypervisor.by_hand() {
            let machine = machine(kind, stage.dir.path(), TinyGuest::Idle);
            stage.witness = Some(ByHandVmm::runs(kind, &stage.witness_socket(), &machine));
        } else if hypervisor == Backend::Libvirt {
            stage.helper = libvirtd::helper()?;
            let libvirtd = Libvirtd::start()?;
            libvirtd.run_foreign_domain(WITNESS, &TinyGuest::Idle.write_to(stage.dir.path()).unwrap());
            stage.libvirtd = Some(libvirtd);
        }
        Ok(stage)
    }

    fn witness_socket(&self) -> PathBuf {
        self.dir.path().join("witness.sock")
    }

    /// A world whose daemon knows what stands here, and is not started.
    pub(crate) fn world(&self) -> World {
        let mut world = self.hypervisor.world();
        if let Some(kind) = self.hypervisor.by_hand() {
            let sockets = [socket_in(&world), self.witness_socket()];
            let sockets = sockets.map(|socket| format!("unix://{}", socket.display()));
            world.set_env(kind.variable(), Some(&sockets.join(",")));
        }
        if let Some(libvirtd) = &self.libvirtd {
            let folder = self.helper.parent().unwrap().display();
            let path = format!("{folder}:{}", std::env::var("PATH").unwrap_or_default());
            world.set_env("PATH", Some(&path));
            world.set_env("UNKEY_VMCP_QEMU_ENDPOINT", Some(&libvirtd.uri()));
            world.set_env("UNKEY_VMCP_QEMU_IMPORT", Some("true"));
        }
        world
    }

    /// The name of the witness, where it was not the daemon that made it.
    pub(crate) fn witness(&self) -> Option<String> {
        match &self.witness {
            Some(witness) => Some(name_at(&witness.socket)),
            None => self.libvirtd.as_ref().map(|_| WITNESS.to_owned()),
        }
    }

    /// The QEMUs of a libvirtd beside the witness's, whose process is `witness`.
    pub(crate) fn qemus(&self, witness: u32) -> Vec<u32> {
        let mut qemus = self.libvirtd.as_ref().map(Libvirtd::qemus).unwrap_or_default();
        qemus.retain(|pid| *pid != witness);
        qemus
    }
}

/// The name of a VM that was found at `socket`.
pub(crate) fn name_at(socket: &Path) -> String {
    socket.display().to_string().trim_start_matches('/').replace('/', "-")
}

/// What a VMM started by hand is to run, with its files in `dir`.
fn machine(kind: ByHandProgram, dir: &Path, guest: TinyGuest) -> Machine {
    let mut more = Vec::new();
    // In software emulation the usual firmware takes most of a start.
    if kind == ByHandProgram::Qemu && Path::new(QBOOT).exists() {
        more.extend(["-bios".to_owned(), QBOOT.to_owned()]);
    }
    Machine { kernel: guest.write_to(dir).unwrap(), serial: dir.join("serial"), more }
}

fn socket_in(world: &World) -> PathBuf {
    world.dir.path().join("vm.sock")
}

/// The VMM under test, started by hand.
pub(crate) struct Hand {
    kind: ByHandProgram,
    pub(crate) socket: PathBuf,
    machine: Machine,
    vmm: RefCell<Option<ByHandVmm>>,
}

impl Hand {
    /// None is started yet. What it runs, if it is not the daemon that says so, is `guest`.
    pub(crate) fn new(kind: ByHandProgram, world: &World, guest: TinyGuest) -> Self {
        let dir = world.dir.path();
        // QMP serves one client, and that is the daemon: the test has a socket of its own.
        let monitor = format!("unix:{},server=on,wait=off", dir.join("monitor.sock").display());
        let mut machine = machine(kind, dir, guest);
        if kind == ByHandProgram::Qemu {
            machine.more.extend(["-qmp".to_owned(), monitor]);
        }
        Self { kind, socket: socket_in(world), machine, vmm: RefCell::new(None) }
    }

    /// Has one wait on the socket, if none lives there.
    pub(crate) fn wait(&self) {
        if self.pid().is_none() {
            *self.vmm.borrow_mut() = None;
            *self.vmm.borrow_mut() = Some(ByHandVmm::waits(self.kind, &self.socket));
        }
    }

    /// Starts one that runs a guest, in the place of whatever was there.
    pub(crate) fn come(&self) {
        // Before its successor takes the socket.
        *self.vmm.borrow_mut() = None;
        // Seen from the moment that it runs its guest, so that the daemon always finds the same.
        let hidden = self.socket.with_extension("new");
        let mut vmm = ByHandVmm::runs(self.kind, &hidden, &self.machine);
        std::fs::rename(&hidden, &self.socket).unwrap();
        vmm.socket.clone_from(&self.socket);
        *self.vmm.borrow_mut() = Some(vmm);
    }

    /// Its process, if it lives.
    pub(crate) fn pid(&self) -> Option<u32> {
        let mut vmm = self.vmm.borrow_mut();
        vmm.as_mut().and_then(|vmm| vmm.is_alive().then(|| vmm.pid()))
    }

    /// What its guest does, as it says itself: `running`, `paused`, or something else where none
    /// runs.
    pub(crate) fn guest_state(&self) -> String {
        if self.pid().is_none() {
            return "gone".to_owned();
        }
        let reported = match self.kind {
            ByHandProgram::Qemu => qmp_status(&self.machine.serial.with_file_name("monitor.sock")),
            ByHandProgram::CloudHypervisor | ByHandProgram::Firecracker => {
                self.vmm.borrow().as_ref().and_then(ByHandVmm::guest_state)
            }
        };
        reported.map_or_else(|| "silent".to_owned(), |state| state.to_lowercase())
    }

    /// What the serial port of a guest has said that the daemon has not started.
    pub(crate) fn serial(&self) -> String {
        std::fs::read_to_string(&self.machine.serial).unwrap_or_default()
    }
}

/// Asks QEMU on a socket of the test's own.
fn qmp_status(socket: &Path) -> Option<String> {
    let stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).ok()?;
    let mut said = BufReader::new(&stream).lines();
    said.next()?.ok()?;
    for command in ["qmp_capabilities", "query-status"] {
        writeln!(&stream, "{}", json!({"execute": command})).ok()?;
    }
    loop {
        let line: Value = serde_json::from_str(&said.next()?.ok()?).ok()?;
        if let Some(status) = line["return"]["status"].as_str() {
            return Some(status.to_owned());
        }
    }
}
