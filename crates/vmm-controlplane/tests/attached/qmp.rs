//! A running QEMU: imported, and told by its events.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use serde_json::json;
use vmm_testkit::by_hand::{ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, able};
use crate::harness::eventually;

#[test]
fn a_creation_on_a_qmp_endpoint_is_refused() {
    for kind in able("a_creation_on_a_qmp_endpoint_is_refused", &[ByHandProgram::Qemu]) {
        let mut bench = Bench::new(kind);
        bench.world.start();
        let config = bench.world.tiny(TinyGuest::Idle);
        let refused = bench.world.call("CreateVm", &json!({"config": config})).error("unimplemented");
        assert!(refused.contains("UNKEY_VMCP_QEMU_ENDPOINT"), "{refused}");
        let judged = bench.world.call("ValidateVm", &json!({"config": config})).ok();
        assert_eq!(judged["violations"][0]["field"], "backend", "{judged}");
    }
}

#[test]
fn a_guest_behind_a_qmp_socket_is_shut_down() {
    for kind in able("a_guest_behind_a_qmp_socket_is_shut_down", &[ByHandProgram::Qemu]) {
        let mut bench = Bench::new(kind);
        let vmm = bench.runs(TinyGuest::Button);
        bench.world.start();
        let vm = bench.the_vm();
        eventually("it is up", || bench.serial().contains(&TinyGuest::Button.banner()));
        bench.op("RebootVm", &vm).ok();
        eventually("it is up again", || bench.serial().matches(&TinyGuest::Button.banner()).count() >= 2);
        bench.op("PauseVm", &vm).ok();
        let down = bench.shutdown(&vm, 60).ok();
        assert_eq!((&down["state"], &down["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("acpi")));
        assert!(bench.op("BootVm", &vm).error("unavailable").contains("vmm.sock"));
        drop(vmm);
        bench.op("DeleteVm", &vm).ok();
        assert!(bench.vms().is_empty());
    }
}

#[test]
fn changes_by_the_guest_are_reported_with_their_reason() {
    for kind in able("changes_by_the_guest_are_reported_with_their_reason", &[ByHandProgram::Qemu]) {
        let mut bench = Bench::new(kind);
        bench.world.start();
        let vmm = ByHandVmm::holds(kind, &bench.socket, &bench.guest(TinyGuest::PowerOff));
        let vm = bench.the_vm();
        bench.op("ResumeVm", &vm).ok();
        let info = bench.world.wait_for_state(&vm, "VM_STATE_SHUTDOWN");
        assert_eq!(info["status"]["reason"], "guest-power-off", "{info:#}");
        bench.op("DeleteVm", &vm).ok();
        drop(vmm);
        // A guest that resets itself goes on, and each reset is an event.
        let vmm = ByHandVmm::holds(kind, &bench.socket, &bench.guest(TinyGuest::Reset));
        let vm = bench.the_vm();
        bench.op("ResumeVm", &vm).ok();
        eventually("its resets are told", || {
            let events = bench.world.call("ListVmEvents", &json!({"vm_id": vm, "page_size": 1000})).ok();
            let all = events["events"].as_array().cloned().unwrap_or_default();
            all.iter().filter(|event| event["type"] == "guest-reset").count() >= 8
        });
        let info = bench.world.info(&vm);
        assert_eq!(info["state"], "VM_STATE_RUNNING", "nobody set a policy that would end it: {info:#}");
        drop(vmm);
    }
}

#[test]
fn the_vm_of_a_qemu_that_outlives_its_guest_is_shut_down() {
    for kind in able("the_vm_of_a_qemu_that_outlives_its_guest_is_shut_down", &[ByHandProgram::Qemu]) {
        let mut bench = Bench::new(kind);
        bench.world.start();
        let mut guest = bench.guest(TinyGuest::PowerOff);
        guest.more = vec!["-no-shutdown".to_owned()];
        let mut vmm = ByHandVmm::holds(kind, &bench.socket, &guest);
        let vm = bench.the_vm();
        bench.op("ResumeVm", &vm).ok();
        let info = bench.world.wait_for_state(&vm, "VM_STATE_SHUTDOWN");
        assert_eq!(info["status"]["reason"], "guest-power-off", "{info:#}");
        assert!(vmm.is_alive());
        bench.op("DeleteVm", &vm).ok();
        assert!(vmm.is_alive());
    }
}

#[test]
fn a_reset_that_would_end_qemu_is_refused() {
    for kind in able("a_reset_that_would_end_qemu_is_refused", &[ByHandProgram::Qemu]) {
        for words in [&["-no-reboot"][..], &["-action", "reboot=shutdown"]] {
            let mut bench = Bench::new(kind);
            let mut guest = bench.guest(TinyGuest::Idle);
            guest.more = words.iter().map(|word| (*word).to_owned()).collect();
            let mut vmm = ByHandVmm::runs(kind, &bench.socket, &guest);
            bench.world.start();
            let vm = bench.the_vm();
            let refused = bench.op("RebootVm", &vm).error("unavailable");
            assert!(refused.contains("would end it"), "{refused}");
            assert!(vmm.is_alive());
        }
    }
}

#[test]
fn a_reset_by_another_qmp_client_is_reported() {
    for kind in able("a_reset_by_another_qmp_client_is_reported", &[ByHandProgram::Qemu]) {
        let mut bench = Bench::new(kind);
        let monitor = bench.world.dir.path().join("second.sock");
        let mut guest = bench.guest(TinyGuest::Idle);
        guest.more = vec!["-qmp".to_owned(), format!("unix:{},server=on,wait=off", monitor.display())];
        let _vmm = ByHandVmm::runs(kind, &bench.socket, &guest);
        bench.world.start();
        let vm = bench.the_vm();
        let reported = |bench: &Bench| {
            let events = bench.world.call("ListVmEvents", &json!({"vm_id": vm, "page_size": 1000})).ok();
            let events = events["events"].as_array().cloned().unwrap_or_default();
            events.iter().filter(|event| event["cause"] == "reset-from-outside").count()
        };
        bench.op("RebootVm", &vm).ok();
        assert_eq!(reported(&bench), 0, "ours is none");
        let mut client = UnixStream::connect(&monitor).unwrap();
        for command in ["qmp_capabilities", "system_reset"] {
            writeln!(client, "{}", json!({"execute": command})).unwrap();
        }
        eventually("it is told", || reported(&bench) == 1);
        assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_RUNNING");
    }
}

#[test]
fn a_qmp_socket_held_by_another_client_is_reported() {
    for kind in able("a_qmp_socket_held_by_another_client_is_reported", &[ByHandProgram::Qemu]) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.runs(TinyGuest::Idle);
        let mut greeting = String::new();
        let client = UnixStream::connect(&bench.socket).unwrap();
        BufReader::new(&client).read_line(&mut greeting).unwrap();
        assert!(greeting.contains("QMP"), "{greeting}");
        bench.world.start();
        let shown = bench.until_available(false);
        let reason = shown["reason"].as_str().unwrap();
        assert!(reason.contains("one client at a time") || reason.contains("more clients"), "{reason}");
        assert!(bench.vms().is_empty());
        drop(client);
        let vm = bench.the_vm();
        bench.op("PauseVm", &vm).ok();
        assert!(vmm.is_alive());
    }
}
