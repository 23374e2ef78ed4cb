//! What a guest does by itself, and what kills it from outside.

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, signal, vmm_pid};
use crate::needs_qemu;

/// The number of a RestartMode, by its name on the wire.
fn policy(mode: &str, max_restarts: i32) -> serde_json::Value {
    json!({"mode": format!("RESTART_MODE_{mode}"), "max_restarts": max_restarts})
}

#[test]
fn a_power_off_ends_the_run() {
    needs_qemu!();
    let world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::PowerOff));
    world.boot("vm");
    let info = world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
    assert_eq!(
        (&info["status"]["phase"], &info["status"]["reason"]),
        (&json!("stopped"), &json!("guest-power-off"))
    );
    assert_eq!(info["backend_info"]["ended_by"], "guest");
    assert!(world.vmms().is_empty());
    assert_eq!(world.boot("vm")["success"], true, "it can be booted again");
}

#[test]
fn a_reset_ends_the_run_where_the_policy_says_never() {
    needs_qemu!();
    for machine in ["q35", "microvm"] {
        for guest in [TinyGuest::Reset, TinyGuest::TripleFault] {
            let world = World::started(&[]);
            let mut config = world.tiny(guest);
            config["boot"]["boot_options"] = json!({"qemu.machine": machine});
            config["restart_policy"] = policy("NEVER", 0);
            world.create("vm", &config);
            world.boot("vm");
            let info = world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
            assert_eq!(info["status"]["reason"], "guest-reset", "{machine} {}", guest.name());
            assert!(world.vmms().is_empty());
        }
    }
}

#[test]
fn endless_resets_of_the_guest_are_ended() {
    needs_qemu!();
    let world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Reset);
    config["restart_policy"] = policy("GUEST_REBOOT", 3);
    world.create("vm", &config);
    world.boot("vm");
    let info = world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
    assert_eq!(
        (&info["status"]["phase"], &info["status"]["reason"]),
        (&json!("failed"), &json!("restart-loop"))
    );
    assert!(
        world.console("vm").matches(&TinyGuest::Reset.banner()).count() >= 4,
        "first boot and three resets"
    );
    assert!(world.vmms().is_empty());
}

#[test]
fn a_killed_vmm_is_observed_with_its_signal() {
    needs_qemu!();
    let world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    for (number, name) in [(Signal::KILL, "SIGKILL"), (Signal::SEGV, "SIGSEGV")] {
        world.boot("vm");
        signal(vmm_pid(&world.info("vm")), number);
        let info = world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
        assert_eq!(
            (&info["status"]["phase"], &info["status"]["reason"]),
            (&json!("failed"), &json!("vmm-failed"))
        );
        assert!(info["status"]["message"].as_str().unwrap().contains(name), "{info:#}");
    }
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.assert_nothing_left();
}

#[test]
fn a_killed_vmm_is_started_again_under_its_policy() {
    needs_qemu!();
    let world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Idle);
    config["restart_policy"] = policy("ON_FAILURE", 0);
    world.create("vm", &config);
    world.boot("vm");
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
    let first = vmm_pid(&world.info("vm"));
    signal(first, Signal::KILL);
    let info = world.wait_for("vm", "running in a new process", |info| {
        info["state"] == "VM_STATE_RUNNING" && vmm_pid(info) != first
    });
    assert_eq!(info["status"]["restarts"], 1);
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2);
}
