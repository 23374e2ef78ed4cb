//! A deletion without force ends no domain that runs, and takes no definition from one.

use super::*;
use crate::harness::try_call;

#[test]
fn an_interrupted_plain_deletion_does_not_end_a_domain_started_later() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let mut world = world(&helper, &libvirtd.uri(), &[("UNKEY_VMCP_QEMU_IMPORT", "true")]);
    stranger(&world, &libvirtd);
    world.start();
    run(&world, "ours", TinyGuest::Idle);
    for name in ["ours", "stranger"] {
        world.wait_for_state(name, "VM_STATE_RUNNING");
        world.call("ShutdownVm", &json!({"vm_id": name, "force": true})).ok();

        // The daemon dies in the deletion, and an operator starts the domain before the next daemon.
        world.stop(Signal::KILL);
        world.set_env("FAILPOINTS", Some("delete.intent-committed=return"));
        world.start();
        let url = world.url().to_owned();
        let _ = try_call(&url, "DeleteVm", &json!({"vm_id": name}));
        world.await_end();
        let qemus = libvirtd.qemus();
        libvirtd.virsh(&["start", name]);
        let mut started = libvirtd.qemus();
        started.retain(|pid| !qemus.contains(pid));
        world.set_env("FAILPOINTS", None);
        world.start();

        let found = world.wait_for_state(name, "VM_STATE_RUNNING");
        assert_eq!(vec![vmm_pid(&found)], started, "{name}: {found:#}");
        assert_eq!(libvirtd.virsh(&["domstate", name]), "running");
        let described = libvirtd.virsh(&["dominfo", name]);
        let persistent = described.lines().find(|line| line.starts_with("Persistent:")).unwrap();
        assert!(persistent.ends_with("yes"), "{name}: {described}");
        world.call("PauseVm", &json!({"vm_id": name})).ok();
        world.call("ResumeVm", &json!({"vm_id": name})).ok();
    }
    // The deletion without force succeeds once the domains do not run.
    for name in ["ours", "stranger"] {
        world.call("ShutdownVm", &json!({"vm_id": name, "force": true})).ok();
        world.call("DeleteVm", &json!({"vm_id": name})).ok();
    }
    assert_eq!(libvirtd.domains(), Vec::<String>::new());
}
