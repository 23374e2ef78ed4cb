//! A hypervisor that is missing, dies, or hangs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, eventually, is_alive, signal, vmm_pid};
use crate::needs_qemu;

/// Writes a program that stands in for a broken QEMU. It answers `--version` like a real one.
fn broken_qemu(dir: &Path, body: &str) -> String {
    let path = dir.join("qemu-system-x86_64");
    let script = format!(
        "#!/bin/sh\ncase \"$1\" in --version|-version) echo 'QEMU emulator version 7.2.0'; exit 0;; esac\n{body}\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

#[test]
fn a_missing_hypervisor_fails_its_vms_only() {
    let world = World::started(&[("UNKEY_VMCP_QEMU_BINARY", "/nonexistent/qemu")]);
    let health = world.get("/_/health");
    assert_eq!((health.status, &health.body["status"]), (503, &json!("unhealthy")));
    assert!(health.body["reason"].as_str().unwrap().contains("/nonexistent/qemu"), "{}", health.body);
    let backends = world.call("ListBackends", &json!({})).ok();
    let qemu = backends["backends"].as_array().unwrap().iter().find(|entry| entry["name"] == "qemu").unwrap();
    assert!(qemu["available"].is_null(), "false is the default and left out: {qemu}");

    let created = world.create("vm", &world.tiny(TinyGuest::Idle));
    assert_eq!(created["warnings"][0]["field"], "backend", "CreateVm says what BootVm will meet: {created}");
    let message = world.call("BootVm", &json!({"vm_id": "vm"})).error("failed_precondition");
    assert!(message.contains("/nonexistent/qemu"), "{message}");
    let info = world.info("vm");
    assert_eq!((&info["state"], &info["status"]["phase"]), (&json!("VM_STATE_CREATED"), &json!("failed")));
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.assert_nothing_left();
}

#[test]
fn the_log_of_a_failed_hypervisor_is_in_the_error() {
    let folder = tempfile::tempdir().unwrap();
    let binary = broken_qemu(folder.path(), "echo 'qemu: the moon is in the wrong phase' >&2; exit 7");
    let world = World::started(&[("UNKEY_VMCP_QEMU_BINARY", &binary)]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let message = world.call("BootVm", &json!({"vm_id": "vm"})).error("failed_precondition");
    assert!(message.contains("the moon is in the wrong phase") && message.contains('7'), "{message}");
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.assert_nothing_left();
}

#[test]
fn a_hypervisor_that_never_answers_times_out_and_is_ended() {
    let folder = tempfile::tempdir().unwrap();
    // The folder's path stays among the arguments, so that the process can be found by its run folder as a real one can.
    let binary = broken_qemu(folder.path(), "while :; do sleep 1; done");
    let world = World::started(&[("UNKEY_VMCP_QEMU_BINARY", &binary)]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let message = world.call("BootVm", &json!({"vm_id": "vm"})).error("unavailable");
    assert!(message.contains("could not boot"), "{message}");
    assert_eq!(world.info("vm")["state"], "VM_STATE_CREATED");
    assert!(world.vmms().is_empty(), "nothing is left running");
}

#[test]
fn a_hanging_vm_delays_no_other_and_force_ends_it() {
    needs_qemu!();
    let world = World::started(&[]);
    for name in ["hung", "well"] {
        world.create(name, &world.tiny(TinyGuest::Idle));
        world.boot(name);
    }
    let pid = vmm_pid(&world.info("hung"));
    signal(pid, Signal::STOP);

    assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 2);
    assert_eq!(world.get("/_/health").status, 200);
    world.call("PauseVm", &json!({"vm_id": "well"})).ok();
    let message = world.call("PauseVm", &json!({"vm_id": "hung"})).error("unavailable");
    assert!(message.contains("hung"), "{message}");
    let info = world.info("hung");
    assert_eq!(
        (&info["state"], &info["status"]["phase"]),
        (&json!("VM_STATE_RUNNING"), &json!("unreachable"))
    );
    for method in ["PauseVm", "ShutdownVm", "RebootVm"] {
        world.call(method, &json!({"vm_id": "hung"})).error("unavailable");
    }
    // It comes back by itself …
    signal(pid, Signal::CONT);
    world.wait_for("hung", "reachable again", |info| info["status"]["phase"] != "unreachable");
    // … and when it hangs again, force ends it.
    signal(pid, Signal::STOP);
    world.call("DeleteVm", &json!({"vm_id": "hung", "force": true})).ok();
    assert!(!is_alive(pid));
    world.call("ShutdownVm", &json!({"vm_id": "well", "force": true})).ok();
    world.call("DeleteVm", &json!({"vm_id": "well"})).ok();
    world.assert_nothing_left();
}

#[test]
fn a_daemon_starts_beside_a_hanging_vm() {
    needs_qemu!();
    let mut world = World::started(&[]);
    world.create("hung", &world.tiny(TinyGuest::Idle));
    world.boot("hung");
    let pid = vmm_pid(&world.info("hung"));
    signal(pid, Signal::STOP);
    world.stop(Signal::KILL);
    world.start();
    let info = world.info("hung");
    assert_eq!(
        (&info["state"], &info["status"]["phase"]),
        (&json!("VM_STATE_RUNNING"), &json!("unreachable")),
        "{info:#}"
    );
    signal(pid, Signal::CONT);
    world.wait_for("hung", "reachable again", |info| info["status"]["phase"] == "running");
    signal(pid, Signal::STOP);
    assert_eq!(
        world.call("ShutdownVm", &json!({"vm_id": "hung", "force": true})).ok()["ended_by"],
        "sigkill"
    );
    eventually("the VMM is gone", || !is_alive(pid));
}
