//! A runtime folder that does not outlive the daemon, or is another one than before.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, hypervisors, is_alive, vmm_pid};
use crate::needs_qemu;
use crate::operator::{reconcile, run};

/// Creates and boots a VM, and returns its VMM's process id and the folder of its sockets.
fn running(world: &World, backend: &str) -> (u32, PathBuf) {
    world.create_on(backend, "vm", TinyGuest::Idle);
    world.boot("vm");
    let info = world.info("vm");
    let socket = Path::new(info["backend_info"]["socket"].as_str().unwrap());
    (vmm_pid(&info), socket.parent().unwrap().to_path_buf())
}

fn reason(info: &Value) -> &str {
    info["status"]["reason"].as_str().unwrap_or_default()
}

fn message(info: &Value) -> &str {
    info["status"]["message"].as_str().unwrap_or_default()
}

/// Returns true if `lines` has a warning with all these parts.
fn warns(lines: &[Value], parts: &[&str]) -> bool {
    lines.iter().any(|line| parts.iter().all(|part| line.to_string().contains(part)))
}

#[test]
fn sockets_lost_without_a_daemon_are_reported_and_force_ends_the_vm() {
    for backend in hypervisors("sockets_lost_without_a_daemon_are_reported_and_force_ends_the_vm") {
        let mut world = World::started(&[]);
        let (pid, folder) = running(&world, backend);
        world.stop(Signal::TERM);
        // As systemd does with RuntimeDirectory= when the daemon stops.
        fs::remove_dir_all(world.dir.path().join("run")).unwrap();
        let doctor = run(&world, &["doctor"]);
        assert!(doctor.out.contains("was removed or replaced since the last start"), "{}", doctor.out);
        world.start();
        let warned = ["was removed or replaced", "RuntimeDirectoryPreserve=yes"];
        assert!(warns(&world.warnings_at_start(), &warned), "{:?}", world.warnings_at_start());

        let info = world.info("vm");
        assert_eq!(
            (&info["state"], &info["status"]["phase"], reason(&info)),
            (&json!("VM_STATE_RUNNING"), &json!("unreachable"), "sockets-gone"),
            "{backend}: {info:#}"
        );
        let pid_shown = format!("process {pid}");
        for part in [folder.to_str().unwrap(), "os error 2", &pid_shown, "force", "UNKEY_VMCP_RUNTIME_DIR"] {
            assert!(message(&info).contains(part), "{backend}: {part} in {}", message(&info));
        }
        world.call("PauseVm", &json!({"vm_id": "vm"})).error("unavailable");
        world.call("ShutdownVm", &json!({"vm_id": "vm", "timeout_seconds": 1})).error("unavailable");
        assert!(is_alive(pid), "{backend}");
        let down = world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(down["state"], "VM_STATE_SHUTDOWN", "{backend}: {down}");
        assert!(!is_alive(pid), "{backend}");
        world.boot("vm");
        assert_eq!(reason(&world.info("vm")), "", "{backend}");
        let gone = world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(gone["left_behind"], Value::Null, "{backend}: {gone}");
        world.assert_nothing_left();
    }
}

#[test]
fn a_vm_with_sockets_lost_without_a_daemon_can_be_deleted_by_force() {
    for backend in hypervisors("a_vm_with_sockets_lost_without_a_daemon_can_be_deleted_by_force") {
        let mut world = World::started(&[]);
        let (pid, folder) = running(&world, backend);
        world.stop(Signal::KILL);
        fs::remove_dir_all(&folder).unwrap();
        world.start();
        assert_eq!(reason(&world.info("vm")), "sockets-gone", "{backend}");
        let gone = world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(gone["left_behind"], Value::Null, "{backend}: {gone}");
        assert!(!is_alive(pid), "{backend}");
        world.assert_nothing_left();
    }
}

#[test]
fn sockets_lost_under_a_running_daemon_are_reported_before_it_stops() {
    for backend in hypervisors("sockets_lost_under_a_running_daemon_are_reported_before_it_stops") {
        let world = World::started(&[]);
        let (pid, folder) = running(&world, backend);
        fs::remove_dir_all(&folder).unwrap();
        let info = world.wait_for("vm", "told of as without sockets", |info| reason(info) == "sockets-gone");
        assert_eq!(info["state"], "VM_STATE_RUNNING", "{backend}: {info:#}");
        for part in [folder.to_str().unwrap(), "os error 2", "UNKEY_VMCP_RUNTIME_DIR"] {
            assert!(message(&info).contains(part), "{backend}: {part} in {}", message(&info));
        }
        assert!(is_alive(pid), "{backend}");
        let down = world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(down["state"], "VM_STATE_SHUTDOWN", "{backend}: {down}");
        assert!(!is_alive(pid), "{backend}");
        world.boot("vm");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn a_changed_runtime_directory_is_reported_and_the_old_one_works_again() {
    needs_qemu!();
    let mut world = World::started(&[]);
    let (pid, folder) = running(&world, "qemu");
    world.stop(Signal::TERM);
    let (before, other) = (world.dir.path().join("run"), world.dir.path().join("other"));
    world.set_env("UNKEY_VMCP_RUNTIME_DIR", other.to_str());
    world.start();
    let both = [before.to_str().unwrap(), other.to_str().unwrap()];
    assert!(warns(&world.warnings_at_start(), &both), "{:?}", world.warnings_at_start());
    let info = world.info("vm");
    assert_eq!(reason(&info), "sockets-gone", "{info:#}");
    assert!(message(&info).contains(folder.to_str().unwrap()), "{}", message(&info));
    world.stop(Signal::TERM);
    world.set_env("UNKEY_VMCP_RUNTIME_DIR", before.to_str());
    world.start();
    let info = world.wait_for("vm", "running again", |info| info["status"]["phase"] == "running");
    assert_eq!(vmm_pid(&info), pid);
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    world.assert_nothing_left();
}

#[test]
fn one_mistaken_start_in_a_runtime_directory_has_no_lasting_effect() {
    needs_qemu!();
    let mut right = World::started(&[]);
    let copy = right.dir.path().join("copy").display().to_string();
    assert_eq!(run(&right, &["backup", &copy]).code, 0);
    let (pid, _) = running(&right, "qemu");
    let runtime_dir = right.dir.path().join("run").display().to_string();
    let state_dir = |world: &World| world.dir.path().join("state").display().to_string();

    // Beside the right daemon, and again without it.
    let mut mistaken = World::new(&[("UNKEY_VMCP_RUNTIME_DIR", &runtime_dir)]);
    for beside in [true, false] {
        if !beside {
            right.stop(Signal::TERM);
        }
        mistaken.start();
        let warnings = mistaken.warnings_at_start();
        let named = [&state_dir(&right), &state_dir(&mistaken), &runtime_dir, "UNKEY_VMCP_RUNTIME_DIR"];
        assert!(warns(&warnings, &named), "{warnings:?}");
        mistaken.stop(Signal::TERM);
        let doctor = run(&right, &["doctor"]);
        assert!(doctor.out.contains(&state_dir(&mistaken)), "{}", doctor.out);
    }
    right.start();
    assert_eq!(vmm_pid(&right.info("vm")), pid);
    assert!(!warns(&right.warnings_at_start(), &[&state_dir(&mistaken)]), "{:?}", right.warnings_at_start());
    right.stop(Signal::TERM);

    // Whose the leftovers are stays proven, whichever daemon started last.
    mistaken.start();
    mistaken.stop(Signal::TERM);
    assert_eq!(run(&right, &["restore", &copy]).code, 0);
    let (code, ledger) = reconcile(&mistaken, &["--kill-orphans"]);
    assert_eq!(code, 3, "{ledger:#}");
    assert!(is_alive(pid) && ledger.to_string().contains(&state_dir(&right)), "{ledger:#}");
    let (code, ledger) = reconcile(&right, &["--kill-orphans"]);
    assert_eq!(code, 0, "{ledger:#}");
    assert!(!is_alive(pid));
    right.assert_nothing_left();
}

#[test]
fn the_first_line_of_a_subcommand_names_its_directories() {
    let world = World::started(&[]);
    let copy = world.dir.path().join("copy").display().to_string();
    for args in [&["doctor"][..], &["reconcile", "--dry-run"], &["backup", &copy]] {
        let done = run(&world, args);
        let first = done.out.lines().next().unwrap_or_default();
        for folder in ["state", "run"] {
            let path = world.dir.path().join(folder).display().to_string();
            assert!(first.contains(&path), "{args:?}: {path} in {}{}", done.out, done.err);
        }
    }
}

#[test]
fn a_subcommand_with_a_wrong_directory_names_the_one_of_the_daemon() {
    let world = World::started(&[]);
    let ours = |folder: &str| world.dir.path().join(folder).display().to_string();
    let (state, runtime) = (ours("state"), ours("run"));
    let elsewhere = tempfile::tempdir().unwrap();
    let wrong = |folder: &str| elsewhere.path().join(folder).display().to_string();
    let run = |variable: &str, args: &[&str]| {
        let output = world.command().env(variable, wrong("nothing")).args(args).output().unwrap();
        let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        out + &err
    };
    let copy = wrong("copy");
    for args in [&["reconcile", "--dry-run"][..], &["doctor"], &["backup", &copy]] {
        let reported = run("UNKEY_VMCP_STATE_DIR", args);
        assert!(
            reported.contains(&format!("there is no database in {}", wrong("nothing"))),
            "{args:?}: {reported}"
        );
        assert!(reported.contains(&format!("UNKEY_VMCP_STATE_DIR={state}")), "{args:?}: {reported}");
    }
    for args in [&["reconcile", "--dry-run"][..], &["doctor"]] {
        let reported = run("UNKEY_VMCP_RUNTIME_DIR", args);
        assert!(reported.contains(&format!("UNKEY_VMCP_RUNTIME_DIR={runtime}")), "{args:?}: {reported}");
    }
    // A restore into a new directory is legal, as on a new host, and tells what it may have missed.
    let backup = ours("backup");
    assert!(world.command().args(["backup", &backup]).status().unwrap().success());
    let reported = run("UNKEY_VMCP_STATE_DIR", &["restore", &backup]);
    assert!(reported.contains(&format!("UNKEY_VMCP_STATE_DIR={state}")), "{reported}");
    // Where nothing is known, the settings are named.
    let mut nowhere = world.command();
    for variable in ["UNKEY_VMCP_STATE_DIR", "UNKEY_VMCP_RUNTIME_DIR"] {
        nowhere.env(variable, wrong("nowhere"));
    }
    let output = nowhere.args(["reconcile", "--dry-run"]).output().unwrap();
    let reported = String::from_utf8(output.stdout).unwrap();
    assert!(reported.contains("with the daemon's settings (--config, or UNKEY_VMCP_STATE_DIR"), "{reported}");
}
