//! The host as the fake hypervisor sees it: its machines, and what is held against them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause, GuestState, LaunchRequest, VmmEvent};
use vmm_core::id::VmUid;
use vmm_core::store::{ProcessIdentity, RunRecord};

use super::control::MachineControl;
use super::script::{Act, Method, Scripts};

/// Above the highest pid that a kernel can give (2^22), so that no real process is ever meant.
const FIRST_PID: u32 = 5_000_000;
/// Events of one machine that may wait to be read.
const EVENTS: usize = 256;

/// The host as the fake hypervisor sees it. Clones are the same world; it outlives the backends in it.
#[derive(Clone, Debug, Default)]
pub struct World {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) scripts: Scripts,
    /// Living machines by pid.
    pub(super) machines: BTreeMap<u32, Machine>,
    /// The uids that processes without a guest wait for. Like machines they outlive a daemon that dies.
    pub(super) spares: BTreeSet<VmUid>,
    /// The uids of the machines that were such processes.
    pub(super) were_spares: BTreeSet<VmUid>,
    /// How the others ended.
    pub(super) ended: BTreeMap<u32, Exit>,
    pub(super) faults: Vec<String>,
    started: u32,
}

/// A process that holds a guest.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) uid: VmUid,
    pub(super) vm_id: String,
    pub(super) run: RunRecord,
    pub(super) guest: GuestState,
    /// Answers nothing; it can be killed all the same.
    pub(super) silent: bool,
    /// Cannot be proven to be the one on record.
    pub(super) unprovable: bool,
    /// Outlives SIGKILL.
    pub(super) unkillable: bool,
    /// Whether its guest ends when asked to.
    pub(super) obeys: bool,
    pub(super) resets: usize,
    pub(super) since: Instant,
    pub(super) samples: u64,
    /// Writable disks, by path.
    pub(super) writes: Vec<PathBuf>,
    pub(super) events: mpsc::Sender<VmmEvent>,
    pub(super) gone: watch::Sender<bool>,
}

impl World {
    /// Makes a world without machines.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells what the next call of `method` that nothing else is told for does. Several add up, first come first served.
    pub fn next(&self, method: Method, act: Act) {
        self.lock().scripts.push(method, act);
    }

    /// Tells what every call of `method` does that [`World::next`] says nothing about.
    pub fn always(&self, method: Method, act: Act) {
        self.lock().scripts.always(method, act);
    }

    /// Lets every method do again what it is for.
    pub fn behave(&self) {
        self.lock().scripts.clear();
    }

    /// How often `method` was called.
    pub fn calls(&self, method: Method) -> usize {
        self.lock().scripts.calls(method)
    }

    /// How many machines live.
    pub fn living(&self) -> usize {
        self.lock().machines.len()
    }

    /// The uids of the VMs whose machines live, oldest machine first.
    pub fn living_uids(&self) -> Vec<VmUid> {
        self.lock().machines.values().map(|machine| machine.uid).collect()
    }

    /// The uids that spare VMMs wait for, oldest first.
    pub fn spares(&self) -> Vec<VmUid> {
        self.lock().spares.iter().copied().collect()
    }

    /// Whether a VM's machine was a spare VMM before.
    pub fn was_spare(&self, uid: VmUid) -> bool {
        self.lock().were_spares.contains(&uid)
    }

    /// The living machine of the VM called `vm_id`, of its youngest creation.
    pub fn machine(&self, vm_id: &str) -> Option<MachineControl> {
        let inner = self.lock();
        let (pid, _) = inner.machines.iter().rev().find(|(_, machine)| machine.vm_id == vm_id)?;
        Some(MachineControl::new(self.clone(), *pid))
    }

    /// Ends every machine without a word, as the host's own end does.
    pub fn host_dies(&self) {
        let mut inner = self.lock();
        let pids: Vec<u32> = inner.machines.keys().copied().collect();
        for pid in pids {
            inner.end(pid, Exit { cause: ExitCause::Unknown, message: String::new() });
        }
    }

    /// What has happened that must never happen. Empty, unless the program under test is at fault.
    pub fn faults(&self) -> Vec<String> {
        self.lock().faults.clone()
    }

    /// Starts a machine for `request`.
    pub(super) fn start(&self, request: &LaunchRequest) -> (RunRecord, mpsc::Receiver<VmmEvent>) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let mut inner = self.lock();
        inner.started += 1;
        let pid = FIRST_PID + inner.started;
        let run = RunRecord {
            process: ProcessIdentity {
                pid,
                start_ticks: u64::from(inner.started),
                boot_id: vmm_host::process::boot_id().unwrap_or_default(),
                namespaces: None,
            },
            socket: request.dir.join("fake.sock"),
            version: "1.0".to_owned(),
            accelerator: "none".to_owned(),
            machine: String::new(),
            started_ms: 0,
            claims: Vec::new(),
            taps: Vec::new(),
        };
        let writes = request.spec.disks.iter().filter(|disk| !disk.read_only).map(|disk| disk.path.clone());
        let machine = Machine {
            uid: request.uid,
            vm_id: request.vm_id.to_string(),
            run: run.clone(),
            guest: GuestState::Running,
            silent: false,
            unprovable: false,
            unkillable: false,
            obeys: true,
            resets: 0,
            since: Instant::now(),
            samples: 0,
            writes: writes.collect(),
            events,
            gone: watch::Sender::new(false),
        };
        inner.hold_against(&machine);
        if inner.spares.remove(&request.uid) {
            inner.were_spares.insert(request.uid);
        }
        inner.machines.insert(pid, machine);
        (run, receiver)
    }

    /// A new reader of the events of machine `pid`; the old one hears no more.
    pub(super) fn listen(&self, pid: u32) -> mpsc::Receiver<VmmEvent> {
        let (events, receiver) = mpsc::channel(EVENTS);
        if let Some(machine) = self.lock().machines.get_mut(&pid) {
            machine.events = events;
        }
        receiver
    }

    /// Becomes ready once machine `pid` has ended.
    pub(super) async fn gone(&self, pid: u32) {
        let gone = self.lock().machines.get(&pid).map(|machine| machine.gone.subscribe());
        if let Some(mut gone) = gone {
            // A sender that is dropped went with its machine.
            let _ = gone.wait_for(|gone| *gone).await;
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Ends a machine, which tells of it. Answers false if it had ended before.
    pub(super) fn end(&mut self, pid: u32, exit: Exit) -> bool {
        let Some(machine) = self.machines.remove(&pid) else { return false };
        machine.gone.send_replace(true);
        // Nobody may listen any more.
        let _ = machine.events.try_send(VmmEvent::Gone(exit.clone()));
        self.ended.insert(pid, exit);
        true
    }

    /// Notes what must not be, now that `new` is about to start.
    fn hold_against(&mut self, new: &Machine) {
        for (pid, other) in &self.machines {
            if other.uid == new.uid {
                self.faults.push(format!("VM {} was started while its machine {pid} lives", new.vm_id));
            }
            for disk in new.writes.iter().filter(|disk| other.writes.contains(disk)) {
                self.faults.push(format!(
                    "{} is written by {} and {}",
                    disk.display(),
                    other.vm_id,
                    new.vm_id
                ));
            }
        }
    }
}
