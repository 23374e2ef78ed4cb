//! A VM stays a QEMU of the daemon's own, or a domain, when the endpoint is set or unset later.

use super::*;

/// Stops the daemon as a crash does, and starts one whose endpoint is `uri`.
fn begin_anew(world: &mut World, uri: Option<&str>) {
    world.stop(Signal::KILL);
    world.set_env("UNKEY_VMCP_QEMU_ENDPOINT", uri);
    world.start();
}

/// Proves that the VM of `info` goes on in the same process, and that the daemon has a hand on it.
fn assert_goes_on(world: &World, vm_id: &str, before: &Value) {
    let now = world.wait_for(vm_id, "running", phase_is("running"));
    assert_eq!((&now["state"], vmm_pid(&now)), (&json!("VM_STATE_RUNNING"), vmm_pid(before)), "{now:#}");
    world.call("PauseVm", &json!({"vm_id": vm_id})).ok();
    world.call("ResumeVm", &json!({"vm_id": vm_id})).ok();
}

#[test]
fn a_changed_endpoint_neither_orphans_nor_changes_vms() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let uri = libvirtd.uri();
    let mut world = world(&helper, &uri, &[("UNKEY_VMCP_BACKEND", "qemu")]);
    world.set_env("UNKEY_VMCP_QEMU_ENDPOINT", None);
    world.start();
    let managed = run(&world, "managed", TinyGuest::Idle);
    // libvirt has no such machine.
    let mut config = world.tiny(TinyGuest::Idle);
    config["boot"]["boot_options"] = json!({"qemu.machine": "microvm"});
    world.create("microvm", &config);

    begin_anew(&mut world, Some(&uri));
    assert_goes_on(&world, "managed", &managed);
    world.boot("microvm");
    assert_eq!(world.info("microvm")["backend_info"]["machine"], "microvm");
    let domain = run(&world, "domain", TinyGuest::Idle);
    assert_eq!(libvirtd.domains(), ["domain"], "the others are none of libvirt's");

    begin_anew(&mut world, None);
    assert_goes_on(&world, "managed", &managed);
    assert_goes_on(&world, "domain", &domain);
    // What virsh does is seen as before, and a domain that is started again is one.
    libvirtd.virsh(&["suspend", "domain"]);
    world.wait_for_state("domain", "VM_STATE_PAUSED");
    world.call("ShutdownVm", &json!({"vm_id": "domain", "force": true})).ok();
    world.boot("domain");
    assert_eq!(libvirtd.virsh(&["domstate", "domain"]), "running");

    // Without libvirt what runs is not known, and what stays is named.
    libvirtd.freeze(true);
    begin_anew(&mut world, None);
    world.wait_for("domain", "unreachable", phase_is("unreachable"));
    libvirtd.freeze(false);
    world.wait_for("domain", "reachable", phase_is("running"));
    for name in ["managed", "microvm", "domain"] {
        let gone = world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
        assert_eq!(gone["left_behind"], Value::Null, "{name}: {gone}");
    }
    eventually("nothing is left", || libvirtd.domains().is_empty() && libvirtd.qemus().is_empty());
    world.assert_nothing_left();
}
