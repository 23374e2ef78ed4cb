//! The life of a VM by `vmcp` alone, on each hypervisor.

use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{World, has_qemu, hypervisors};

trials![
    a_vm_passes_its_lifecycle_on_each_hypervisor,
    several_vms_are_handled_in_order,
    an_illegal_operation_is_refused_with_the_legal_ones,
    a_failed_boot_is_printed_with_its_reason,
];

fn a_vm_passes_its_lifecycle_on_each_hypervisor() {
    for backend in hypervisors("lifecycle::a_vm_passes_its_lifecycle_on_each_hypervisor") {
        let world = World::started(&[]);
        let kernel = world.kernel(TinyGuest::Idle).display().to_string();
        let created =
            world.run(&["create", "vm", "--backend", backend, "--memory", "64MiB", "--kernel", &kernel]);
        assert_eq!(created.ok(), "vm: created\n", "{backend}");
        assert_eq!(world.run(&["boot", "vm"]).ok(), "vm: running\n", "{backend}");
        assert_eq!(world.run(&["boot", "vm", "-o", "name"]).ok(), "vm\n", "{backend}");
        assert_eq!(world.run(&["pause", "vm"]).ok(), "vm: paused\n", "{backend}");
        let resumed = world.run(&["resume", "vm", "-o", "json"]).json();
        assert_eq!(resumed, json!({"success": true, "state": "VM_STATE_RUNNING"}), "{backend}");
        let rebooted = world.run(&["reboot", "vm", "--force"]).ok();
        assert!(rebooted.starts_with("vm: running"), "{backend}: {rebooted}");
        assert!(world.run(&["get", "vm"]).ok().contains("\npid "), "{backend}");
        let ended = world.run(&["shutdown", "vm", "--force"]).ok();
        assert!(ended.starts_with("vm: shutdown, the guest was ended by "), "{backend}: {ended}");
        assert_eq!(world.run(&["wait", "vm", "shutdown", "paused"]).ok().lines().count(), 1);
        assert_eq!(world.run(&["boot", "vm"]).ok(), "vm: running\n", "{backend}");
        assert_eq!(world.run(&["delete", "vm", "--force"]).ok(), "vm: deleted\n", "{backend}");
        assert_eq!(world.run(&["list", "-o", "name"]).ok(), "", "{backend}");
    }
}

fn several_vms_are_handled_in_order() {
    if !has_qemu("lifecycle::several_vms_are_handled_in_order") {
        return;
    }
    let world = World::started(&[]);
    world.create("a", TinyGuest::Idle);
    world.create("b", TinyGuest::Idle);
    // One that is not there does not keep the others from being served.
    let ran = world.run(&["boot", "a", "nobody", "b"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (15, "a: running\nb: running\n"), "{ran:#?}");
    assert!(ran.stderr.contains("nobody") && ran.stderr.contains("(not_found)"), "{ran:#?}");
    let documents = world.run(&["pause", "a", "b", "-o", "yaml"]).ok();
    assert_eq!(
        documents,
        "success: true\nstate: VM_STATE_PAUSED\n---\nsuccess: true\nstate: VM_STATE_PAUSED\n"
    );
    assert_eq!(world.run(&["delete", "a", "b", "--force", "-o", "name"]).ok(), "a\nb\n");
}

fn an_illegal_operation_is_refused_with_the_legal_ones() {
    let world = World::started(&[]);
    world.create("vm", TinyGuest::Idle);
    let error = world.run(&["pause", "vm"]).failed(19);
    assert!(error.contains("PauseVm is not legal") && error.contains("legal now: "), "{error}");
    assert!(error.contains("(failed_precondition)"), "{error}");
}

fn a_failed_boot_is_printed_with_its_reason() {
    let world = World::started(&[("UNKEY_VMCP_QEMU_BINARY", "/nonexistent/qemu")]);
    world.create("vm", TinyGuest::Idle);
    let error = world.run(&["boot", "vm"]).failed(19);
    assert!(error.contains("/nonexistent/qemu"), "{error}");
    let table = world.run(&["list"]).ok();
    assert!(table.contains("failed: boot-failed"), "{table}");
}
