//! What is found behind an endpoint becomes a VM, as it is.

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::by_hand::{ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, WAITING, able, backend, endpoint};
use crate::harness::{World, eventually, vmm_pid};

#[test]
fn a_running_vm_is_imported_with_its_vmms_configuration() {
    for kind in able("a_running_vm_is_imported_with_its_vmms_configuration", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        let path = bench.socket.display().to_string();
        assert_eq!(
            vm,
            path.trim_start_matches('/').replace('/', "-"),
            "the id is derived from the socket's path"
        );
        let info = bench.world.info(&vm);
        assert_eq!(info["state"], "VM_STATE_RUNNING", "{info:#}");
        assert_eq!(
            (vmm_pid(&info), info["backend_info"]["socket"].as_str()),
            (vmm.pid(), Some(path.as_str()))
        );
        let config = &info["config"];
        assert_eq!(config["cpu"]["vcpu_count"], 1, "{config:#}");
        assert_eq!(config["memory"]["size_bytes"], (64_u64 << 20).to_string(), "{config:#}");
        assert_eq!(config["boot"]["kernel_args"], "from=hand", "{config:#}");
        assert!(config["boot"]["kernel_path"].as_str().unwrap().ends_with("tiny-idle.elf"), "{config:#}");
        let events = bench.world.call("ListVmEvents", &json!({"vm_id": vm})).ok();
        assert_eq!(
            (&events["events"][0]["type"], &events["events"][0]["cause"]),
            (&json!("created"), &json!("imported"))
        );
        let backend = bench.backend();
        assert_eq!((&backend["endpoint_mode"], &backend["available"]), (&json!("attached"), &json!(true)));
    }
}

#[test]
fn a_paused_vm_is_imported_paused() {
    for kind in able("a_paused_vm_is_imported_paused", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let vmm = match kind {
            // Its CPUs have not been let go yet.
            ByHandProgram::Qemu => ByHandVmm::holds(kind, &bench.socket, &bench.guest(TinyGuest::Idle)),
            ByHandProgram::CloudHypervisor | ByHandProgram::Firecracker => {
                let vmm = bench.runs(TinyGuest::Idle);
                vmm.pause();
                vmm
            }
        };
        bench.world.start();
        let vm = bench.the_vm();
        assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_PAUSED");
        assert_eq!(bench.op("ResumeVm", &vm).ok()["state"], "VM_STATE_RUNNING");
        drop(vmm);
    }
}

#[test]
fn an_imported_vm_that_never_ran_can_be_booted() {
    for kind in able("an_imported_vm_that_never_ran_can_be_booted", &WAITING) {
        let mut bench = Bench::new(kind);
        let _vmm = ByHandVmm::holds(kind, &bench.socket, &bench.guest(TinyGuest::Idle));
        bench.world.start();
        let vm = bench.the_vm();
        assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_CREATED");
        bench.world.boot(&vm);
        eventually("its guest speaks", || bench.serial().contains(&TinyGuest::Idle.banner()));
    }
}

#[test]
fn a_vm_that_appears_later_is_imported() {
    for kind in able("a_vm_that_appears_later_is_imported", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        bench.world.start();
        let shown = bench.until_available(false);
        let reason = shown["reason"].as_str().unwrap();
        assert!(reason.contains(&endpoint(&bench.socket)) && reason.contains("start one there"), "{reason}");
        assert_eq!(bench.world.get("/_/health").status, 503);
        let _vmm = bench.runs(TinyGuest::Idle);
        let vm = bench.the_vm();
        bench.world.wait_for_state(&vm, "VM_STATE_RUNNING");
        bench.until_available(true);
        assert_eq!(bench.world.get("/_/health").status, 200);
    }
}

#[test]
fn an_endpoint_of_one_hypervisor_leaves_the_others_managed() {
    for kind in
        able("an_endpoint_of_one_hypervisor_leaves_the_others_managed", &[ByHandProgram::CloudHypervisor])
    {
        let mut bench = Bench::new(kind);
        let _vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let imported = bench.the_vm();
        for other in able(
            "an_endpoint_of_one_hypervisor_leaves_the_others_managed",
            &[ByHandProgram::Firecracker, ByHandProgram::Qemu],
        ) {
            assert_eq!(backend(&bench.world, other)["endpoint_mode"], "managed");
            let vm = other.backend();
            bench.world.create_on(vm, vm, TinyGuest::Idle);
            bench.world.boot(vm);
            bench.world.wait_for_console(vm, &TinyGuest::Idle.banner(), 1);
            bench.force("DeleteVm", vm).ok();
        }
        assert_eq!(bench.world.info(&imported)["state"], "VM_STATE_RUNNING");
        bench.world.assert_nothing_left();
    }
}

#[test]
fn each_socket_serves_one_vm() {
    for kind in able("each_socket_serves_one_vm", &WAITING) {
        let mut bench = Bench::new(kind);
        let second = bench.world.dir.path().join("second.sock");
        let both = format!("{}, {}", endpoint(&bench.socket), endpoint(&second));
        bench.world.set_env(kind.variable(), Some(&both));
        let (_first, _second) = (bench.runs(TinyGuest::Idle), ByHandVmm::waits(kind, &second));
        bench.world.start();
        let imported = bench.the_vm();
        let config = bench.world.tiny(TinyGuest::Idle);
        bench.world.create("mine", &config);
        let full = bench.world.call("CreateVm", &json!({"vm_id": "more", "config": config}));
        assert!(full.error("resource_exhausted").contains("second.sock"), "it names them");
        bench.world.boot("mine");
        let info = bench.world.info("mine");
        assert_eq!(info["backend_info"]["socket"], second.display().to_string());
        bench.force("DeleteVm", &imported).ok();
        bench.world.create("more", &config);
    }
}

#[test]
fn a_removed_endpoint_leaves_its_vms_unchanged() {
    for kind in able("a_removed_endpoint_leaves_its_vms_unchanged", &WAITING) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.runs(TinyGuest::Idle);
        bench.world.start();
        let vm = bench.the_vm();
        bench.world.stop(Signal::TERM);
        bench.world.set_env(kind.variable(), None);
        bench.world.start();
        let info = bench.world.info(&vm);
        assert_eq!(
            (&info["state"], &info["status"]["phase"]),
            (&json!("VM_STATE_RUNNING"), &json!("unreachable"))
        );
        assert_eq!(info["status"]["reason"], "endpoint-not-configured");
        bench.op("PauseVm", &vm).error("unavailable");
        bench.force("ShutdownVm", &vm).error("failed_precondition");
        assert!(vmm.is_alive());
        // And back.
        bench.world.stop(Signal::TERM);
        bench.world.set_env(kind.variable(), Some(&endpoint(&bench.socket)));
        bench.world.start();
        bench.world.wait_for(&vm, "reachable", |info| info["status"]["phase"] == "running");
        bench.op("PauseVm", &vm).ok();
    }
}

#[test]
fn managed_vms_run_on_after_an_endpoint_is_set() {
    for kind in able("managed_vms_run_on_after_an_endpoint_is_set", &[ByHandProgram::Firecracker]) {
        let mut world = World::new(&[("UNKEY_VMCP_BACKEND", kind.backend())]);
        world.start();
        world.create("managed", &world.tiny(TinyGuest::Idle));
        world.boot("managed");
        world.stop(Signal::TERM);
        let socket = world.dir.path().join("vmm.sock");
        world.set_env(kind.variable(), Some(&endpoint(&socket)));
        world.start();
        world.call("PauseVm", &json!({"vm_id": "managed"})).ok();
        world.call("ShutdownVm", &json!({"vm_id": "managed", "force": true})).ok();
        world.boot("managed");
        world.call("DeleteVm", &json!({"vm_id": "managed", "force": true})).ok();
        world.assert_nothing_left();
    }
}
