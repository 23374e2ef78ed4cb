//! What others do to a VM is seen, and told truly.

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::by_hand::ByHandProgram;
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, WAITING, able};
use crate::harness::eventually;

#[test]
fn a_pause_by_another_client_is_observed() {
    for kind in able("a_pause_by_another_client_is_observed", &WAITING) {
        let mut bench = Bench::new(kind);
        let vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        let seen_at = |info: &Value| info["status"]["observed_at"].as_str().unwrap().parse::<i64>().unwrap();
        let first = seen_at(&bench.world.info(&vm));
        bench.world.wait_for(&vm, "looked at again", |info| seen_at(info) > first);
        vmm.pause();
        let info = bench.world.wait_for_state(&vm, "VM_STATE_PAUSED");
        assert_eq!(info["status"]["reason"], "paused-from-outside");
        vmm.resume();
        bench.world.wait_for_state(&vm, "VM_STATE_RUNNING");
        // And paused by us, it is not taken for somebody else's doing.
        bench.op("PauseVm", &vm).ok();
        assert_ne!(bench.world.info(&vm)["status"]["reason"], "paused-from-outside");
    }
}

#[test]
fn an_end_and_a_boot_by_another_client_are_followed() {
    for kind in able("an_end_and_a_boot_by_another_client_are_followed", &[ByHandProgram::CloudHypervisor]) {
        let mut bench = Bench::new(kind);
        let vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        vmm.put("/api/v1/vm.shutdown", &json!(null));
        let info = bench.world.wait_for_state(&vm, "VM_STATE_SHUTDOWN");
        assert_eq!(info["status"]["phase"], "stopped", "{info:#}");
        vmm.boot();
        let info = bench.world.wait_for_state(&vm, "VM_STATE_RUNNING");
        assert_eq!(info["status"]["reason"], "started-from-outside");
        bench.op("PauseVm", &vm).ok();
    }
}

#[test]
fn a_new_vmm_on_the_same_socket_is_discovered() {
    for kind in able("a_new_vmm_on_the_same_socket_is_discovered", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        let uid = bench.world.info(&vm)["uid"].clone();
        vmm.end();
        let info = bench.world.wait_for_state(&vm, "VM_STATE_SHUTDOWN");
        assert_ne!(info["status"]["reason"], "", "{info:#}");
        assert!(bench.op("BootVm", &vm).error("unavailable").contains("start one there"));
        let vmm = bench.runs(TinyGuest::Idle);
        let info = bench.world.wait_for_state(&vm, "VM_STATE_RUNNING");
        assert_eq!((crate::harness::vmm_pid(&info), &info["uid"]), (vmm.pid(), &uid), "the same VM");
        bench.op("PauseVm", &vm).ok();
    }
}

#[test]
fn a_restarted_daemon_finds_its_attached_vms_again() {
    for kind in able("a_restarted_daemon_finds_its_attached_vms_again", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        let uid = bench.world.info(&vm)["uid"].clone();
        bench.world.stop(Signal::KILL);
        bench.world.start();
        let info = bench.world.info(&vm);
        assert_eq!((&info["state"], &info["uid"]), (&json!("VM_STATE_RUNNING"), &uid));
        bench.op("PauseVm", &vm).ok();
        bench.world.stop(Signal::KILL);
        bench.world.start();
        assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_PAUSED");
        bench.op("ResumeVm", &vm).ok();
        // What happens while no daemon watches is found out too.
        bench.world.stop(Signal::KILL);
        vmm.end();
        bench.world.start();
        assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_SHUTDOWN");
        bench.world.stop(Signal::KILL);
        let _vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        bench.world.wait_for_state(&vm, "VM_STATE_RUNNING");
        assert_eq!(bench.vms().len(), 1, "and nothing is there twice");
    }
}

#[test]
fn a_vm_of_this_program_is_adopted_with_its_console() {
    for kind in able("a_vm_of_this_program_is_adopted_with_its_console", &WAITING) {
        let mut bench = Bench::new(kind);
        let _vmm = bench.waits();
        bench.world.start();
        bench.world.create("vm", &bench.world.tiny(TinyGuest::Idle));
        bench.world.boot("vm");
        bench.world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
        bench.world.stop(Signal::KILL);
        bench.world.start();
        assert_eq!(bench.world.info("vm")["state"], "VM_STATE_RUNNING");
        if kind == ByHandProgram::CloudHypervisor {
            bench.op("RebootVm", "vm").ok();
            let console = bench.world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2);
            assert_eq!(console.matches(&TinyGuest::Idle.banner()).count(), 2, "nothing twice: {console}");
        }
    }
}

#[test]
fn a_stopped_attached_vmm_is_unreachable_until_it_continues() {
    for kind in able("a_stopped_attached_vmm_is_unreachable_until_it_continues", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        vmm.signal(Signal::STOP);
        bench.world.wait_for(&vm, "unreachable", |info| info["status"]["phase"] == "unreachable");
        assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_RUNNING", "the last proven state");
        bench.op("PauseVm", &vm).error("unavailable");
        vmm.signal(Signal::CONT);
        bench.world.wait_for(&vm, "reachable again", |info| info["status"]["phase"] == "running");
        bench.op("PauseVm", &vm).ok();
    }
}

#[test]
fn a_place_taken_by_another_vm_is_reported() {
    for kind in able("a_place_taken_by_another_vm_is_reported", &WAITING) {
        let mut bench = Bench::new(kind);
        bench.world.start();
        bench.world.create("mine", &bench.world.tiny(TinyGuest::Echo));
        let mut vmm = bench.runs(TinyGuest::Idle);
        bench.world.wait_for("mine", "told", |info| info["status"]["reason"] == "place-taken");
        assert_eq!(bench.world.info("mine")["state"], "VM_STATE_CREATED");
        bench.op("BootVm", "mine").error("failed_precondition");
        // Without it, the other one is imported.
        bench.op("DeleteVm", "mine").ok();
        eventually("the other one is listed", || {
            bench.vms().iter().any(|vm| vm["state"] == "VM_STATE_RUNNING")
        });
        assert!(vmm.is_alive());
    }
}

#[test]
fn a_boot_interrupted_by_a_crash_is_reported_truthfully() {
    for kind in able("a_boot_interrupted_by_a_crash_is_reported_truthfully", &WAITING) {
        for (point, runs) in [("launch.configured", false), ("launch.started", true)] {
            let mut bench = Bench::new(kind);
            let mut vmm = bench.waits();
            bench.world.set_env("FAILPOINTS", Some(&format!("{point}=return")));
            bench.world.start();
            bench.world.create("vm", &bench.world.tiny(TinyGuest::Idle));
            let url = bench.world.url().to_owned();
            let _ = crate::harness::try_call(&url, "BootVm", &json!({"vm_id": "vm"}));
            bench.world.await_end();
            assert_eq!(vmm.runs_a_guest(), Some(runs), "{point} on {}", kind.backend());
            bench.world.set_env("FAILPOINTS", None);
            bench.world.start();
            let state = if runs { "VM_STATE_RUNNING" } else { "VM_STATE_CREATED" };
            bench.world.wait_for_state("vm", state);
            assert_eq!(bench.vms().len(), 1, "it is there once");
            bench.world.boot("vm");
            bench.world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
            bench.op("PauseVm", "vm").ok();
            assert!(vmm.is_alive());
        }
    }
}
