//! The daemon dies; the VMs do not, and what the next daemon says of them is true.

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, eventually, hypervisors, is_alive, signal, try_call, vmm_pid};
use crate::needs_qemu;

#[test]
fn a_terminated_daemon_closes_its_database() {
    needs_qemu!();
    for how in [Signal::TERM, Signal::INT] {
        let mut world = World::started(&[]);
        world.create("vm", &world.tiny(TinyGuest::Idle));
        world.boot("vm");
        let state = world.dir.path().join("state");
        let log = state.join("vmm-controlplane.db-wal");
        assert!(log.metadata().unwrap().len() > 0, "what was recorded last is in the log");
        world.stop(how);
        assert!(!log.exists(), "{how:?}: the log is in the database, so that a successor finds none");
        let lock = std::fs::read_to_string(state.join("vmm-controlplane.db.lock")).unwrap();
        assert!(lock.starts_with("closed: "), "{how:?}: the next start need not read all of it: {lock}");
        world.start();
        assert_eq!(world.info("vm")["state"], "VM_STATE_RUNNING");
        world.stop(Signal::KILL);
        assert!(log.exists(), "a daemon that is killed closes nothing");
        world.start();
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn vms_outlive_a_terminated_and_a_killed_daemon() {
    needs_qemu!();
    for how in [Signal::KILL, Signal::TERM, Signal::INT] {
        let mut world = World::started(&[]);
        for name in ["created", "running", "paused", "shutdown"] {
            world.create(name, &world.tiny(TinyGuest::Idle));
        }
        for name in ["running", "paused", "shutdown"] {
            world.boot(name);
        }
        world.call("PauseVm", &json!({"vm_id": "paused"})).ok();
        world.call("ShutdownVm", &json!({"vm_id": "shutdown", "force": true})).ok();
        let before = vmm_pid(&world.info("running"));
        let uid = world.info("running")["uid"].clone();

        let (code, _) = world.stop(how);
        assert_eq!(code, (how != Signal::KILL).then_some(0), "{how:?}");
        assert!(is_alive(before), "the VM goes on without its daemon");
        world.start();

        for (name, state) in [
            ("created", "VM_STATE_CREATED"),
            ("running", "VM_STATE_RUNNING"),
            ("paused", "VM_STATE_PAUSED"),
            ("shutdown", "VM_STATE_SHUTDOWN"),
        ] {
            assert_eq!(world.info(name)["state"], state, "{name} after {how:?}");
        }
        let info = world.info("running");
        assert_eq!((vmm_pid(&info), &info["uid"]), (before, &uid));
        assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 4);
        // And all of it still works.
        world.call("PauseVm", &json!({"vm_id": "running"})).ok();
        world.call("ResumeVm", &json!({"vm_id": "paused"})).ok();
        for name in ["created", "running", "paused", "shutdown"] {
            world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
        }
        world.assert_nothing_left();
    }
}

#[test]
fn a_vm_that_ended_without_a_daemon_is_shut_down() {
    needs_qemu!();
    let mut world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    world.boot("vm");
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
    let pid = vmm_pid(&world.info("vm"));
    world.stop(Signal::KILL);
    signal(pid, Signal::KILL);
    eventually("the VMM is gone", || !is_alive(pid));
    world.start();
    let info = world.info("vm");
    assert_eq!(info["state"], "VM_STATE_SHUTDOWN");
    assert!(!info["status"]["reason"].as_str().unwrap_or_default().is_empty(), "{info:#}");
    world.boot("vm");
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2);
}

#[test]
fn the_vmm_of_an_unrecorded_boot_is_ended_and_the_vm_is_unchanged() {
    for backend in hypervisors("the_vmm_of_an_unrecorded_boot_is_ended_and_the_vm_is_unchanged") {
        let mut world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Idle);
        let database =
            rusqlite::Connection::open(world.dir.path().join("state/vmm-controlplane.db")).unwrap();
        database.execute_batch("BEGIN IMMEDIATE").unwrap();
        let url = world.url().to_owned();
        let booting = std::thread::spawn(move || try_call(&url, "BootVm", &json!({"vm_id": "vm"})).is_err());
        eventually("the VMM is started while its intent waits", || !world.vmms().is_empty());
        world.stop(Signal::KILL);
        assert!(booting.join().unwrap(), "no answer came");
        drop(database);
        // A Firecracker reads its configuration from a pipe of the daemon, and ends with the daemon.
        if backend == "firecracker" {
            eventually("the VMM has ended by itself", || world.vmms().is_empty());
        } else {
            assert_eq!(world.vmms().len(), 1, "{backend}: it goes on without its daemon");
        }
        world.start();
        assert!(world.vmms().is_empty(), "{backend}: {:?}", world.vmms());
        assert_eq!(world.info("vm")["state"], "VM_STATE_CREATED", "{backend}");
        world.boot("vm");
        world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn an_end_during_the_adoption_is_observed() {
    needs_qemu!();
    let mut world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    world.boot("vm");
    let pid = vmm_pid(&world.info("vm"));
    world.stop(Signal::KILL);
    world.start();
    signal(pid, Signal::KILL);
    world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let second = world.command().output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let message = String::from_utf8_lossy(&second.stderr);
    assert!(message.contains(&world.pid().to_string()), "the holder is named: {message}");
    assert_eq!(world.info("vm")["state"], "VM_STATE_CREATED", "the first one goes on");
}

#[test]
fn a_new_vm_with_a_deleted_name_is_another_vm() {
    needs_qemu!();
    let mut world = World::started(&[]);
    let config = world.tiny(TinyGuest::Idle);
    let first = world.create("vm", &config);
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.stop(Signal::KILL);
    world.start();
    world.call("GetVmInfo", &json!({"vm_id": "vm"})).error("not_found");
    assert_ne!(world.create("vm", &config)["uid"], first["uid"]);
}
