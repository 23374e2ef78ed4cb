//! A process that we did not start: never touched without force, and with it only where it is proven.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::by_hand::{ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, able};
use crate::harness::{call, eventually, is_alive, pause};

/// Longer than a forced operation may take, on a machine that is not idle.
const FORCED_END_TIMEOUT: Duration = Duration::from_secs(15);

#[test]
fn no_operation_without_force_ends_a_process() {
    for kind in able("no_operation_without_force_ends_a_process", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        let operations = ["PauseVm", "PauseVm", "ResumeVm", "BootVm", "RebootVm", "DeleteVm", "GetVmInfo"];
        for operation in operations {
            bench.op(operation, &vm);
            assert!(vmm.is_alive(), "{operation} on {}", kind.backend());
        }
        bench.op("PauseVm", &vm);
        for seconds in [1, 1] {
            let answer = bench.shutdown(&vm, seconds);
            // Cloud Hypervisor can power its VM off and live; the others cannot.
            if kind != ByHandProgram::CloudHypervisor {
                let message = answer.error("deadline_exceeded");
                assert!(message.contains("another program started process"), "{message}");
            }
            assert!(vmm.is_alive(), "ShutdownVm on {}", kind.backend());
        }
        bench.op("DeleteVm", &vm);
        assert!(vmm.is_alive(), "DeleteVm on {}", kind.backend());
        for how in [Signal::TERM, Signal::KILL] {
            bench.world.stop(how);
            assert!(vmm.is_alive(), "the daemon ends by {how:?} on {}", kind.backend());
            bench.world.start();
            assert!(vmm.is_alive(), "the daemon starts on {}", kind.backend());
        }
    }
}

#[test]
fn no_operation_without_force_ends_a_stopped_vmm() {
    for kind in able("no_operation_without_force_ends_a_stopped_vmm", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        vmm.signal(Signal::STOP);
        for operation in ["PauseVm", "ResumeVm", "RebootVm", "BootVm", "DeleteVm"] {
            bench.op(operation, &vm);
            assert!(vmm.is_alive(), "{operation} on {}", kind.backend());
        }
        bench.shutdown(&vm, 1);
        assert!(vmm.is_alive(), "ShutdownVm on {}", kind.backend());
        bench.world.stop(Signal::KILL);
        bench.world.start();
        assert!(vmm.is_alive());
        let info = bench.world.info(&vm);
        assert_eq!(
            (&info["state"], &info["status"]["phase"]),
            (&json!("VM_STATE_RUNNING"), &json!("unreachable"))
        );
    }
}

#[test]
fn a_stopped_attached_vmm_does_not_shorten_the_guest_timeout() {
    const TEST: &str = "a_stopped_attached_vmm_does_not_shorten_the_guest_timeout";
    for (kind, guest, ended_by) in [
        (ByHandProgram::Qemu, TinyGuest::Button, "acpi"),
        (ByHandProgram::Firecracker, TinyGuest::Obey, "ctrl-alt-del"),
    ] {
        for kind in able(TEST, &[kind]) {
            let mut bench = Bench::new(kind);
            let mut vmm = bench.runs(guest);
            bench.world.start();
            let vm = bench.the_vm();
            vmm.signal(Signal::STOP);
            let (url, body) = (bench.world.url().to_owned(), json!({"vm_id": vm, "timeout_seconds": 60}));
            let shutting_down = std::thread::spawn(move || call(&url, "ShutdownVm", &body));
            // Longer than a single request to a VMM waits for its answer.
            let until = Instant::now() + Duration::from_secs(7);
            while Instant::now() < until {
                assert!(vmm.is_alive(), "{}", kind.backend());
                pause();
            }
            vmm.signal(Signal::CONT);
            let ended = shutting_down.join().unwrap().ok();
            assert_eq!(ended["ended_by"], ended_by, "{}: {ended}", kind.backend());
        }
    }
}

#[test]
fn force_ends_a_proven_attached_vmm() {
    for kind in able("force_ends_a_proven_attached_vmm", &ByHandProgram::ALL) {
        for (method, stands_still) in
            [("ShutdownVm", false), ("ShutdownVm", true), ("DeleteVm", false), ("DeleteVm", true)]
        {
            let mut bench = Bench::new(kind);
            let mut vmm = bench.runs(TinyGuest::Idle);
            bench.world.start();
            let vm = bench.the_vm();
            if stands_still {
                vmm.signal(Signal::STOP);
            }
            let asked = Instant::now();
            let answer = bench.force(method, &vm).ok();
            assert!(asked.elapsed() < FORCED_END_TIMEOUT, "{method} took {:?}", asked.elapsed());
            assert_eq!(answer["left_behind"], json!(null), "{method} on {}: {answer}", kind.backend());
            // Cloud Hypervisor ends the VM and lives, if it can.
            let lives = kind == ByHandProgram::CloudHypervisor && !stands_still;
            assert_eq!(vmm.is_alive(), lives, "{method} on {}", kind.backend());
            if lives {
                assert_eq!(vmm.runs_a_guest(), Some(false));
            }
            if method == "DeleteVm" {
                assert!(bench.vms().is_empty());
            } else {
                assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_SHUTDOWN");
            }
        }
    }
}

/// The VMM under another name than the hypervisor's.
fn renamed(bench: &Bench) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let program = std::env::split_paths(&path)
        .map(|dir| dir.join(bench.kind.program()))
        .find(|file| file.is_file())
        .unwrap();
    let copy = bench.world.dir.path().join("something-else");
    std::fs::copy(program, &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

#[test]
fn force_does_not_end_a_process_of_another_program() {
    for kind in able(
        "force_does_not_end_a_process_of_another_program",
        &[ByHandProgram::CloudHypervisor, ByHandProgram::Firecracker],
    ) {
        let mut bench = Bench::new(kind);
        let mut vmm = ByHandVmm::waits_as(kind, &renamed(&bench), &bench.socket);
        bench.world.start();
        bench.world.create("vm", &bench.world.tiny(TinyGuest::Idle));
        bench.world.boot("vm");
        vmm.signal(Signal::STOP);
        let refused = bench.force("ShutdownVm", "vm").error("failed_precondition");
        assert!(refused.contains("something-else"), "{refused}");
        assert!(vmm.is_alive());
        let deleted = bench.force("DeleteVm", "vm").ok();
        assert!(
            deleted["left_behind"][0]["message"].as_str().unwrap().contains("End it by hand"),
            "{deleted}"
        );
        assert!(vmm.is_alive(), "and the record is gone all the same");
    }
}

#[test]
fn force_does_not_end_another_vmm_on_the_socket() {
    for kind in able(
        "force_does_not_end_another_vmm_on_the_socket",
        &[ByHandProgram::CloudHypervisor, ByHandProgram::Firecracker],
    ) {
        let mut bench = Bench::new(kind);
        let mut first = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        first.signal(Signal::STOP);
        let mut second = bench.waits();
        let refused = bench.force("ShutdownVm", &vm).error("failed_precondition");
        assert!(refused.contains("listens on"), "{refused}");
        assert!(first.is_alive() && second.is_alive());
        let pid = first.pid();
        first.end();
        eventually("the first has gone", || !is_alive(pid));
        bench.world.wait_for_state(&vm, "VM_STATE_SHUTDOWN");
        assert!(second.is_alive());
    }
}
