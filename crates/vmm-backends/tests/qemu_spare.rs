//! Spare QEMUs, against a real one: the launch of their VM uses them, to the same effect as an
//! ordinary start, or they are gone.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

mod qemu_support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use qemu_support::{Bench, GUEST_REBOOT, NEVER, Run, WAIT_TIMEOUT, make_image, qemu};
use vmm_backends::qemu::convert::QemuMachine;
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::{
    Adoption, Backend, BackendErrorKind, Effect, ExitCause, GuestState, LadderOptions, LaunchRequest,
    SpareRequest, SpareVmms,
};
use vmm_core::config::{ConsoleConfig, StorageDevice};
use vmm_core::run_permit::RunPermit;
use vmm_core::state::EndedBy;
use vmm_host::process::{Lookup, Process, Signal, adopt, find_by_argument};
use vmm_testkit::guests::TinyGuest;

const MACHINES: [&str; 2] = ["q35", "microvm"];
const FORCE: LadderOptions = LadderOptions { guest_timeout: None };

/// A bench per machine; none where QEMU is missing, after saying that `test` is skipped.
async fn benches(test: &str, guest: TinyGuest) -> Vec<Bench> {
    let mut benches = Vec::new();
    for machine in MACHINES {
        let Some(backend) = qemu(test).await else { break };
        benches.push(Bench::new(backend, machine, guest, GUEST_REBOOT));
    }
    benches
}

fn request(bench: &Bench) -> SpareRequest {
    SpareRequest { uid: bench.uid, dir: bench.dir().to_path_buf(), console: bench.console_file() }
}

/// Starts a spare QEMU on a bench, and answers its process.
async fn start(bench: &Bench) -> Process {
    std::fs::write(bench.console_file(), "").unwrap();
    bench.backend.start_spare(request(bench)).await.unwrap();
    only_process(bench).await
}

/// The one process that has the bench's folder in its arguments. It may still be about to get them.
async fn only_process(bench: &Bench) -> Process {
    let found = async {
        loop {
            let found = find_by_argument(bench.dir()).unwrap();
            if !found.is_empty() {
                break found;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let found = tokio::time::timeout(WAIT_TIMEOUT, found).await.expect("a process");
    let [found] = found.as_slice() else { panic!("{found:?}") };
    match adopt(&found.identity) {
        Lookup::Alive(process) => process,
        other => panic!("{other:?}"),
    }
}

/// Waits until a QEMU has come to reading from its input.
async fn waits(spare: &Process) {
    let stat = format!("/proc/{}/wchan", spare.pid());
    let reading = async {
        while !std::fs::read_to_string(&stat).unwrap_or_default().contains("pipe") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // A kernel that does not tell is believed to have been quick enough.
    let _ = tokio::time::timeout(Duration::from_millis(500), reading).await;
}

/// Waits until a process has taken a signal: one that is just reading would read on.
async fn is_still(process: &Process) {
    let stopped = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    };
    while !process.has_ended() && !stopped() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn ends(process: &Process) {
    process.wait_for(WAIT_TIMEOUT).await.expect("it ends");
}

#[tokio::test]
async fn a_launch_uses_the_spare_vmm() {
    for bench in benches("a_launch_uses_the_spare_vmm", TinyGuest::Idle).await {
        let spare = start(&bench).await;
        waits(&spare).await;
        assert!(!bench.dir().join("qmp.sock").exists(), "it has been told nothing");
        let mut run = bench.launch().await;
        assert_eq!((run.vmm.run().process.pid, bench.processes()), (spare.pid(), 1));
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        assert!(bench.console().starts_with(&TinyGuest::Idle.banner()), "no firmware before the guest");
        run.vmm.pause().await.unwrap();
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Paused);
        run.vmm.resume().await.unwrap();
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
        run.vmm.reset().await.unwrap();
        bench.console_shows(&TinyGuest::Idle.banner(), 2).await;
        run.no_event();
        assert_eq!(
            std::fs::read_to_string(bench.dir().join("qemu.log")).unwrap(),
            "",
            "nothing to complain of"
        );
        assert_eq!(run.vmm.shutdown(FORCE).await.unwrap(), EndedBy::Vmm);
        assert_eq!(run.gone().await.cause, ExitCause::Requested);
        assert_eq!(bench.processes(), 0);

        let again = bench.launch().await;
        assert_ne!(again.vmm.run().process.pid, spare.pid());
        bench.console_shows(&TinyGuest::Idle.banner(), 3).await;
        again.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_vm_on_a_spare_vmm_is_adopted() {
    for bench in benches("a_vm_on_a_spare_vmm_is_adopted", TinyGuest::Idle).await {
        start(&bench).await;
        let first = bench.launch().await;
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        let record = first.vmm.run().clone();
        drop(first);
        for known in [Some(record.clone()), None] {
            let adopted = bench.backend.adopt(bench.adoption(known)).await.unwrap();
            let Adoption::Alive { launched, guest } = adopted else { panic!("{adopted:?}") };
            let run = launched.vmm.run();
            assert_eq!((guest, &run.process), (GuestState::Running, &record.process));
            assert_eq!((&run.accelerator, &run.machine), (&record.accelerator, &record.machine));
        }
        bench.sweep().await;
        assert_eq!(bench.processes(), 0);
    }
}

#[tokio::test]
async fn a_launch_uses_a_spare_vmm_that_was_just_started() {
    for bench in benches("a_launch_uses_a_spare_vmm_that_was_just_started", TinyGuest::PowerOff).await {
        let spare = start(&bench).await;
        let mut run = bench.launch().await;
        assert_eq!(run.vmm.run().process.pid, spare.pid());
        assert_eq!(run.gone().await.cause, ExitCause::GuestPowerOff);
        bench.console_shows(&TinyGuest::PowerOff.banner(), 1).await;
    }
}

#[tokio::test]
async fn no_guest_runs_before_the_run_permit() {
    for bench in benches("no_guest_runs_before_the_run_permit", TinyGuest::Idle).await {
        let spare = start(&bench).await;
        let (issuer, permit) = RunPermit::pending();
        let launching = bench.backend.launch(LaunchRequest { permit, ..bench.request() });
        let opening = async {
            while !bench.dir().join("qmp.sock").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // Much longer than a guest that ran would take to say its first word.
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!((bench.processes(), bench.console().as_str()), (1, ""));
            issuer.grant();
        };
        let (launched, ()) = tokio::join!(launching, opening);
        let run = launched.unwrap();
        assert_eq!(run.vmm.run().process.pid, spare.pid());
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        run.vmm.kill().await.unwrap();

        waits(&start(&bench).await).await;
        let (_, permit) = RunPermit::pending();
        let called_off = bench.backend.launch(LaunchRequest { permit, ..bench.request() }).await.unwrap_err();
        assert_eq!((called_off.effect, bench.processes()), (Effect::NotApplied, 0), "{called_off}");
    }
}

#[tokio::test]
async fn a_dead_or_hanging_spare_vmm_does_not_fail_the_launch() {
    for bench in benches("a_dead_or_hanging_spare_vmm_does_not_fail_the_launch", TinyGuest::Idle).await {
        for signal in [Signal::KILL, Signal::STOP] {
            let spare = start(&bench).await;
            waits(&spare).await;
            spare.signal(signal).unwrap();
            is_still(&spare).await;
            let run = bench.launch().await;
            assert!(spare.has_ended(), "{signal:?}");
            assert_ne!(run.vmm.run().process.pid, spare.pid());
            assert_eq!(bench.processes(), 1);
            bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
            run.vmm.kill().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_vm_that_the_spare_file_cannot_carry_starts_a_new_process() {
    for mut bench in
        benches("a_vm_that_the_spare_file_cannot_carry_starts_a_new_process", TinyGuest::Idle).await
    {
        let plain = bench.config.clone();
        let edits: [fn(&mut Bench); 4] = [
            |bench| bench.config.boot.as_mut().unwrap().kernel_args = "a".repeat(1100),
            |bench| bench.config.boot.as_mut().unwrap().kernel_args = "a=\"b c\"".to_owned(),
            |bench| {
                let features = &mut bench.config.cpu.as_mut().unwrap().features;
                features.insert("qemu.model".to_owned(), "qemu64".to_owned());
            },
            |bench| bench.config.console = Some(ConsoleConfig { enabled: false, ..ConsoleConfig::default() }),
        ];
        for edit in edits {
            bench.config = plain.clone();
            edit(&mut bench);
            let spare = start(&bench).await;
            let console = bench.config.console.is_none().then(|| bench.console_file());
            let launched = bench.backend.launch(LaunchRequest { console, ..bench.request() }).await;
            let run = Run::from(launched.unwrap());
            assert!(spare.has_ended(), "{:?}", bench.config);
            assert_ne!(run.vmm.run().process.pid, spare.pid());
            assert_eq!((bench.processes(), run.vmm.probe().await.unwrap()), (1, GuestState::Running));
            run.vmm.kill().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_spare_vmm_writes_to_the_clients_console_file() {
    for bench in benches("a_spare_vmm_writes_to_the_clients_console_file", TinyGuest::Idle).await {
        let spare = start(&bench).await;
        let output = bench.dir().join("a file, of the client's");
        let request = LaunchRequest { console: Some(output.clone()), ..bench.request() };
        let run = Run::from(bench.backend.launch(request).await.unwrap());
        assert_eq!(run.vmm.run().process.pid, spare.pid());
        let shown = async {
            while !std::fs::read_to_string(&output).unwrap_or_default().contains(&TinyGuest::Idle.banner()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(WAIT_TIMEOUT, shown).await.expect("its first line");
        assert_eq!(bench.console(), "");
        run.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn an_error_on_a_spare_vmm_has_qemus_own_text() {
    for mut bench in benches("an_error_on_a_spare_vmm_has_qemus_own_text", TinyGuest::Idle).await {
        let nonsense = bench.dir().join("kernel");
        std::fs::write(&nonsense, "no kernel at all").unwrap();
        bench.config.boot.as_mut().unwrap().kernel_path = nonsense.to_str().unwrap().to_owned();
        let by_itself = bench.try_launch().await.err().unwrap();
        start(&bench).await;
        let reported = bench.try_launch().await.err().unwrap();
        assert_eq!((reported.kind, reported.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
        assert_eq!(reported.message, by_itself.message);
        assert_eq!(bench.processes(), 0);
    }
}

#[tokio::test]
async fn a_spare_vmm_takes_the_largest_number_of_disks() {
    for mut bench in benches("a_spare_vmm_takes_the_largest_number_of_disks", TinyGuest::Idle).await {
        let count = if QemuMachine::of(&bench.spec()) == Some(QemuMachine::Q35) { 64 } else { 23 };
        let path = bench.dir().join("disk");
        make_image(&path, "raw", 1 << 20);
        for index in 0..count {
            bench.add_disk(StorageDevice {
                id: format!("d{index}"),
                path: path.to_str().unwrap().to_owned(),
                read_only: true,
                ..StorageDevice::default()
            });
        }
        let spare = start(&bench).await;
        let run = bench.launch().await;
        assert_eq!(run.vmm.run().process.pid, spare.pid());
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        run.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_spare_vmm_can_be_dismissed_and_swept() {
    for bench in benches("a_spare_vmm_can_be_dismissed_and_swept", TinyGuest::Idle).await {
        let spare = start(&bench).await;
        bench.backend.dismiss_spare(bench.uid).await;
        bench.backend.dismiss_spare(bench.uid).await;
        assert!(spare.has_ended());
        let spare = start(&bench).await;
        let second = start_again(&bench, &spare).await;
        bench.sweep().await;
        assert!(second.has_ended());
        assert_eq!(bench.processes(), 0);
        // One that a launch has taken belongs to its VM.
        let taken = start(&bench).await;
        let run = bench.launch().await;
        bench.backend.dismiss_spare(bench.uid).await;
        assert!(!taken.has_ended());
        run.vmm.kill().await.unwrap();
    }
}

/// Starts another spare for the same VM, which ends the first.
async fn start_again(bench: &Bench, first: &Process) -> Process {
    let second = start(bench).await;
    assert!(first.has_ended());
    second
}

#[tokio::test]
async fn a_spare_vmm_ends_with_its_backend() {
    for mut bench in benches("a_spare_vmm_ends_with_its_backend", TinyGuest::Idle).await {
        let spare = start(&bench).await;
        bench.backend = QemuBackend::new(QemuOptions { kvm: KvmMode::Off, ..QemuOptions::default() });
        ends(&spare).await;
    }
}

#[tokio::test]
async fn a_spare_vmm_of_a_replaced_program_is_not_used() {
    let test = "a_spare_vmm_of_a_replaced_program_is_not_used";
    if qemu(test).await.is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("qemu");
    let install = |comment: &str| {
        let new = folder.path().join("new");
        std::fs::write(&new, format!("#!/bin/sh\n# {comment}\nexec qemu-system-x86_64 \"$@\"\n")).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&new, &binary).unwrap();
    };
    install("one");
    let backend = QemuBackend::new(QemuOptions { binary: binary.clone(), kvm: KvmMode::Off });
    let bench = Bench::new(backend, "microvm", TinyGuest::Idle, NEVER);
    let spare = start(&bench).await;
    install("two");
    let run = bench.launch().await;
    assert!(spare.has_ended());
    assert_ne!(run.vmm.run().process.pid, spare.pid());
    run.vmm.kill().await.unwrap();
    let spare = start(&bench).await;
    let run = bench.launch().await;
    assert_eq!(run.vmm.run().process.pid, spare.pid());
    run.vmm.kill().await.unwrap();
}

/// The folder of the spare that [`a_daemon_that_holds_a_spare`] starts.
const DAEMON_DIR: &str = "VMCP_TEST_SPARE_DIR";

/// Not a test: the daemon that [`a_spare_vmm_ends_with_a_killed_daemon`] kills.
#[tokio::test]
#[ignore = "started by another test"]
async fn a_daemon_that_holds_a_spare() {
    let Some(dir) = std::env::var_os(DAEMON_DIR) else { return };
    let dir = Path::new(&dir);
    let backend = QemuBackend::new(QemuOptions { kvm: KvmMode::Off, ..QemuOptions::default() });
    let uid = vmm_core::id::VmUid::new(uuid::Uuid::now_v7());
    let request = SpareRequest { uid, dir: dir.to_path_buf(), console: dir.join("console") };
    backend.start_spare(request).await.unwrap();
    std::fs::write(dir.join("started"), "").unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_spare_vmm_ends_with_a_killed_daemon() {
    let test = "a_spare_vmm_ends_with_a_killed_daemon";
    // A spare that waits, and one that has not come to it.
    for while_it_waits in [true, false] {
        let Some(backend) = qemu(test).await else { return };
        let bench = Bench::new(backend, "q35", TinyGuest::Idle, NEVER);
        let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_daemon_that_holds_a_spare", "--ignored"])
            .env(DAEMON_DIR, bench.dir())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let started = async {
            while !bench.dir().join("started").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let started = tokio::time::timeout(WAIT_TIMEOUT, started).await;
        if started.is_ok() && while_it_waits {
            waits(&only_process(&bench).await).await;
        }
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        started.expect("the daemon has started a spare");
        let gone = async {
            while bench.processes() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(WAIT_TIMEOUT, gone).await.expect("it ends by itself");
        let log = std::fs::read_to_string(bench.dir().join("qemu.log")).unwrap();
        assert!(log.contains("chardev:console"), "it says what it lacks: {log}");
    }
}
