//! A reader who does what the guide says, from top to bottom.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Pid;
use vmm_testkit::by_hand::{ByHandGuest as HandGuest, ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::libvirtd::{self, Libvirtd};

use crate::compare::answers;
use crate::guide::{Need, Place, Step};
use crate::harness::{linux, skipped};
use crate::repository;
use crate::terminal::{Terminal, pause};

/// Printed at the end of the guide.
pub(crate) const DONE: &str = "the guide was followed to its end";

/// How long something may take to come up: libvirtd may look at QEMU first.
const WAIT_TIMEOUT: Duration = Duration::from_secs(120);

/// The kernel that the guide names.
const KERNEL: &str = "/opt/kernels/vmlinux";
/// The disk.
const DISK: &str = "/var/lib/vms/vm.img";
/// Where `qemu:///system` is found.
const LIBVIRT_SOCKET: &str = "/run/libvirt/libvirt-sock";

/// Follows the guide. Only in the namespaces: it uses the guide's paths and its port.
pub(crate) fn follow(steps: &[Step]) {
    let mut reader = Reader::sit_down();
    let mut left_out = BTreeMap::<Need, usize>::new();
    for step in steps {
        if let Some(need) = step.needs.iter().find(|need| reader.missing.contains_key(need)) {
            *left_out.entry(*need).or_default() += 1;
            continue;
        }
        println!("{}: {}", step.at, step.text.lines().next().unwrap_or_default());
        reader.take(step);
    }
    reader.look_back();
    for (need, blocks) in left_out {
        skipped(&format!("{blocks} blocks of the migration guide ({need:?})"), &reader.missing[&need]);
    }
    println!("{DONE}");
}

struct Reader {
    /// The reader's.
    terminal: Terminal,
    settings: Terminal,
    vmm: Terminal,
    daemon: Option<Pid>,
    missing: BTreeMap<Need, String>,
    /// The Cloud Hypervisor that the ancestor has left, with its VM.
    cloud_hypervisor: Option<ByHandVmm>,
    libvirtd: Option<Libvirtd>,
}

impl Reader {
    /// Prepares the host as the guide finds it.
    fn sit_down() -> Self {
        let dir = Path::new("/tmp/guide");
        std::fs::create_dir(dir).unwrap();
        symlink(env!("CARGO_BIN_EXE_vmm-controlplane"), dir.join("vmm-controlplane")).unwrap();
        for name in ["scripts", ".cache"] {
            symlink(repository().join(name), dir.join(name)).unwrap();
        }
        // Progress meters are for people.
        std::fs::write(dir.join(".curlrc"), "silent\nshow-error\n").unwrap();
        std::fs::write(DISK, vec![0; 16 << 20]).unwrap();
        put_kernel(TinyGuest::Idle);

        let mut missing = BTreeMap::new();
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.err().map(|error| format!("/dev/kvm: {error}"));
        for (need, kind) in [
            (Need::CloudHypervisor, ByHandProgram::CloudHypervisor),
            (Need::Firecracker, ByHandProgram::Firecracker),
        ] {
            missing.extend(kind.missing().or_else(|| kvm.clone()).map(|why| (need, why)));
        }
        if linux().is_none() {
            missing.insert(Need::Linux, "the Linux guest is not there; `make setup` makes it".to_owned());
        }
        let libvirtd = match libvirtd::helper().and_then(|helper| Ok((helper, start_libvirtd()?))) {
            Ok((helper, libvirtd)) => {
                symlink(helper, dir.join("vmm-libvirt-helper")).unwrap();
                symlink(libvirtd.socket(), LIBVIRT_SOCKET).unwrap();
                Some(libvirtd)
            }
            Err(why) => {
                missing.insert(Need::Libvirt, why);
                None
            }
        };
        let cloud_hypervisor = (!missing.contains_key(&Need::CloudHypervisor)).then(|| {
            let kernel = TinyGuest::Idle.write_to(dir).unwrap();
            let guest = HandGuest { kernel, serial: dir.join("serial"), more: Vec::new() };
            ByHandVmm::runs(ByHandProgram::CloudHypervisor, Path::new("/tmp/ch.sock"), &guest)
        });

        let path = std::env::var("PATH").unwrap_or_default();
        let env = [
            ("HOME", dir.display().to_string()),
            ("LC_ALL", "C".to_owned()),
            ("PATH", format!("{}:{path}", dir.display())),
            ("VMCP_TINY_GUESTS", tiny_guests(dir).display().to_string()),
        ];
        let open = |name| Terminal::open(name, dir, &env);
        let (terminal, settings, vmm) = (open("reader"), open("daemon"), open("vmm"));
        Self { terminal, settings, vmm, daemon: None, missing, cloud_hypervisor, libvirtd }
    }

    /// Takes one step, and checks what comes of it.
    fn take(&mut self, step: &Step) {
        // Firecracker's guest has to obey Ctrl+Alt+Del, which costs CPU time; the others' halt.
        let firecracker = step.needs.contains(&Need::Firecracker);
        put_kernel(if firecracker { TinyGuest::Obey } else { TinyGuest::Idle });
        if step.stops || step.place == Place::Daemon {
            self.stop_daemon();
        }
        match step.place {
            Place::Daemon => {
                self.daemon = Some(self.settings.run_and_stay(&step.text));
                self.until_healthy(step);
            }
            Place::Vmm => {
                self.vmm.run_and_stay(&step.text);
                let socket = step.text.split_whitespace().last().unwrap();
                let deadline = Instant::now() + WAIT_TIMEOUT;
                while std::os::unix::net::UnixStream::connect(socket).is_err() {
                    let log = self.vmm.log();
                    assert!(Instant::now() < deadline, "{}: nothing serves {socket}: {log}", step.at);
                    pause();
                }
                if self.daemon.is_some() {
                    self.until_healthy(step);
                }
            }
            Place::Reader | Place::Settings => self.run(step),
        }
    }

    fn run(&mut self, step: &Step) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let terminal =
                if step.place == Place::Settings { &mut self.settings } else { &mut self.terminal };
            let (code, printed) = terminal.run(&step.text);
            let wrong = objection(step, code, &printed);
            let Some(wrong) = wrong else { return };
            // What has happened behind the daemon's back is seen a moment later.
            if !step.only_reads() || Instant::now() > deadline {
                panic!(
                    "{}: {wrong}\nprinted:\n{printed}\nthe daemon's log:\n{}",
                    step.at,
                    self.settings.log()
                );
            }
            pause();
        }
    }

    fn until_healthy(&mut self, step: &Step) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while self.terminal.run("curl --fail http://localhost:8080/_/health").0 != 0 {
            if Instant::now() > deadline {
                let page = self.terminal.run("curl http://localhost:8080/_/health").1;
                panic!("{}: not healthy: {page}\nthe daemon's log:\n{}", step.at, self.settings.log());
            }
            pause();
        }
    }

    fn stop_daemon(&mut self) {
        if let Some(pid) = self.daemon.take() {
            let code = self.settings.interrupt(pid);
            assert_eq!(code, 0, "Ctrl-C ends the daemon well:\n{}", self.settings.log());
        }
    }

    /// What nobody has asked for has not happened.
    fn look_back(&mut self) {
        if let Some(vmm) = &mut self.cloud_hypervisor {
            assert!(vmm.is_alive(), "the ancestor's Cloud Hypervisor lives");
            assert_eq!(vmm.runs_a_guest(), Some(true), "and runs the VM that was left running");
        }
        if let Some(libvirtd) = &self.libvirtd {
            assert_eq!(libvirtd.domains(), Vec::<String>::new(), "every domain was deleted again");
        }
    }
}

/// What is wrong with the result of a step.
fn objection(step: &Step, code: i32, printed: &str) -> Option<String> {
    if (code != 0) != step.fails {
        return Some(format!("exit code {code}"));
    }
    if let Some(differs) = step.shown.as_ref().and_then(|shown| shown.differs(printed)) {
        return Some(differs);
    }
    // Calls that the guide makes must be answered, except the one whose refusal it shows.
    if step.methods().is_empty() {
        return None;
    }
    let Ok(mut answers) = answers(printed) else { return Some("an answer is no JSON".to_owned()) };
    if step.shown.as_ref().is_some_and(crate::compare::Shown::is_refusal) {
        answers.pop();
    }
    let refused = answers.iter().find(|answer| answer.get("code").is_some());
    refused.map(|answer| format!("refused: {answer}"))
}

fn start_libvirtd() -> Result<Libvirtd, String> {
    let ids = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if ids.split_whitespace().nth(1) != Some("0") {
        return Err("libvirtd needs root, and this is root of a user namespace only".to_owned());
    }
    Libvirtd::start()
}

/// Puts a kernel where the guide says that there is one.
fn put_kernel(guest: TinyGuest) {
    let new = format!("{KERNEL}.new");
    std::fs::write(&new, guest.elf()).unwrap();
    std::fs::rename(new, KERNEL).unwrap();
}

/// A program that makes the tiny guests, as `cargo run --bin tiny-guests` does, without building anything.
fn tiny_guests(dir: &Path) -> PathBuf {
    let made = dir.join("guests");
    std::fs::create_dir(&made).unwrap();
    for guest in TinyGuest::ALL {
        guest.write_to(&made).unwrap();
    }
    let program = dir.join("tiny-guests");
    std::fs::write(&program, format!("#!/bin/sh\nexec cp {}/*.elf \"$1\"\n", made.display())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    program
}
