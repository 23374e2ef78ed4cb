//! Spare VMMs, where the operator wants some: who runs a VM, what waits, and what stays of it however the daemon ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_host::process::find_by_argument;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{WAIT_TIMEOUT, World, eventually, hypervisors, is_alive, pause, vmm_pid};
use crate::operator::{item, items, reconcile, run};

const ONE: &[(&str, &str)] = &[("UNKEY_VMCP_SPARE_VMMS", "1")];

/// A spare VMM that waits.
struct Spare {
    pid: u32,
    folder: PathBuf,
}

fn config(world: &World, backend: &str) -> Value {
    let mut config = world.tiny(TinyGuest::Idle);
    if backend == "qemu" {
        config["boot"]["boot_options"] = json!({"qemu.machine": "microvm"});
    }
    config
}

/// Creates a VM and answers its run folder.
fn create(world: &World, backend: &str, vm_id: &str) -> PathBuf {
    let request = json!({"vm_id": vm_id, "backend": backend, "config": config(world, backend)});
    let created = world.call("CreateVm", &request).ok();
    world.dir.path().join("run/vms").join(created["uid"].as_str().unwrap().replace('-', ""))
}

/// A VM that runs, and answers its VMM's process id.
fn running(world: &World, backend: &str, vm_id: &str) -> u32 {
    create(world, backend, vm_id);
    world.boot(vm_id);
    vmm_pid(&world.info(vm_id))
}

fn delete(world: &World, vm_id: &str) {
    world.call("DeleteVm", &json!({"vm_id": vm_id, "force": true})).ok();
}

/// Whether a folder has the mark of a spare VMM.
fn is_marked(folder: &Path) -> bool {
    let mut entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.any(|entry| entry.file_name().to_string_lossy().starts_with("spare-"))
}

fn marked(world: &World) -> Vec<PathBuf> {
    let mut folders = world.run_folders();
    folders.retain(|folder| is_marked(folder));
    folders
}

/// Waits until a spare VMM is there that is not in one of the folders `but`.
#[track_caller]
fn spare(world: &World, but: &[&Path]) -> Spare {
    let find = || {
        let folder = marked(world).into_iter().find(|folder| !but.contains(&folder.as_path()))?;
        let pid = find_by_argument(&folder).unwrap().first()?.identity.pid;
        is_alive(pid).then_some(Spare { pid, folder })
    };
    let deadline = Instant::now() + WAIT_TIMEOUT;
    loop {
        if let Some(spare) = find() {
            return spare;
        }
        assert!(Instant::now() < deadline, "no spare VMM ever waits; processes: {:?}", world.vmms());
        pause();
    }
}

/// Creates a VM that a spare VMM is given to. CreateVm starts nothing for it.
#[track_caller]
fn create_with_spare(world: &World, backend: &str, vm_id: &str, but: &[&Path]) -> Spare {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    loop {
        let waits = spare(world, but);
        let before = world.vmms();
        let folder = create(world, backend, vm_id);
        if folder == waits.folder {
            assert_eq!(world.vmms(), before, "{backend}: CreateVm starts nothing");
            return waits;
        }
        // The process is there, and the daemon has not yet seen that it is.
        delete(world, vm_id);
        assert!(Instant::now() < deadline, "{backend}: no VM is ever given the spare VMM");
    }
}

fn listed(world: &World) -> Vec<String> {
    let list = world.call("ListVms", &json!({})).ok();
    let names = list["vms"].as_array().unwrap().iter().map(|vm| vm["vm_id"].as_str().unwrap().to_owned());
    names.collect()
}

/// What `doctor` says of spare VMMs: its verdict and the finding.
fn doctor(world: &World) -> (String, String) {
    let diagnosis: Value = serde_json::from_str(&run(world, &["doctor", "--json"]).out).unwrap();
    let checks = diagnosis["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "spare VMMs").unwrap();
    let text = |key: &str| check[key].as_str().unwrap().to_owned();
    (text("verdict"), text("finding"))
}

#[test]
fn no_spare_vmm_is_started_without_the_setting() {
    for backend in hypervisors("no_spare_vmm_is_started_without_the_setting") {
        let mut world = World::started(&[]);
        let pid = running(&world, backend, "vm");
        delete(&world, "vm");
        // A daemon that ends has carried out what it was about to do.
        running(&world, backend, "vm");
        let pids = (pid, vmm_pid(&world.info("vm")));
        world.stop(Signal::TERM);
        assert_eq!((world.vmms(), marked(&world)), (vec![pids.1], Vec::new()), "{backend}");
    }
}

#[test]
fn a_vm_runs_on_the_spare_vmm_and_leaves_nothing() {
    for backend in hypervisors("a_vm_runs_on_the_spare_vmm_and_leaves_nothing") {
        let mut world = World::started(ONE);
        create(&world, backend, "first");
        assert_eq!(world.vmms(), Vec::<u32>::new(), "{backend}: none before the backend has started a VM");
        world.boot("first");

        // The uid that waits is older than this VM, which finds no spare VMM of its own backend.
        spare(&world, &[]);
        let another = if backend == "qemu" { "cloudhypervisor" } else { "qemu" };
        create(&world, another, "between");
        let waited = create_with_spare(&world, backend, "late", &[]);
        assert_eq!(listed(&world), ["first", "between", "late"], "{backend}: oldest first");
        let info = world.info("late");
        assert_eq!(info["state"], "VM_STATE_CREATED", "{backend}: {info:#}");
        assert!(info["backend_info"]["pid"].is_null(), "{backend}: nothing runs for it yet: {info:#}");

        world.boot("late");
        assert_eq!(vmm_pid(&world.info("late")), waited.pid, "{backend}: the process that waited");
        world.wait_for_console("late", &TinyGuest::Idle.banner(), 1);
        // The process has had its input since its start.
        world.type_at_console("late", b"typed");
        assert!(!is_marked(&waited.folder), "{backend}: it is a spare one no longer");
        delete(&world, "late");
        assert!(!is_alive(waited.pid) && !waited.folder.exists(), "{backend}");

        // Given to a VM that is never booted.
        let waited = create_with_spare(&world, backend, "unbooted", &[]);
        world.call("DeleteVm", &json!({"vm_id": "unbooted"})).ok();
        assert!(!is_alive(waited.pid) && !waited.folder.exists(), "{backend}");

        leave(&mut world, &["first", "between"]);
    }
}

#[test]
fn a_terminated_daemon_ends_its_spare_vmms_and_no_vm() {
    for backend in hypervisors("a_terminated_daemon_ends_its_spare_vmms_and_no_vm") {
        let mut world = World::started(ONE);
        let vm = running(&world, backend, "vm");
        let given = create_with_spare(&world, backend, "given", &[]);
        let other = running(&world, backend, "other");
        let free = spare(&world, &[&given.folder]);
        let (code, ledger) = reconcile(&world, &["--dry-run"]);
        assert_eq!(code, 0, "{backend}: a host on which all is well: {ledger:#}");
        let (code, _) = world.stop(Signal::TERM);
        assert_eq!(code, Some(0), "{backend}");
        let mut left = world.vmms();
        left.sort_unstable();
        let mut expected = vec![vm, other];
        expected.sort_unstable();
        assert_eq!(left, expected, "{backend}: VMs live on, and nothing else");
        assert!(!free.folder.exists(), "{backend}");

        world.start();
        assert_eq!(vmm_pid(&world.info("vm")), vm, "{backend}");
        boots(&world, "given");
        leave(&mut world, &["vm", "other", "given"]);
    }
}

#[test]
fn spare_vmms_of_a_killed_daemon_are_reported_and_ended_by_the_next() {
    for backend in hypervisors("spare_vmms_of_a_killed_daemon_are_reported_and_ended_by_the_next") {
        let mut world = World::started(ONE);
        let vm = running(&world, backend, "vm");
        let waits = spare(&world, &[]);
        let name = waits.folder.display().to_string();

        let (code, ledger) = reconcile(&world, &["--dry-run"]);
        assert_eq!(code, 0, "{backend}: {ledger:#}");
        for item in [item(&ledger, "process", &waits.pid.to_string()), item(&ledger, "folder", &name)] {
            assert_eq!(item["decision"], "keep", "{backend}: {item}");
            let reason = item["reason"].as_str().unwrap();
            assert!(reason.contains(backend) && reason.contains("waits for a VM"), "{backend}: {item}");
        }
        let (verdict, finding) = doctor(&world);
        assert!(verdict == "ok" && finding.contains(&format!("{backend}: 1")), "{backend}: {finding}");

        killed(&mut world, backend, &waits);
        let (code, ledger) = reconcile(&world, &["--dry-run"]);
        assert_eq!(code, 3, "{backend}: {ledger:#}");
        assert_eq!(item(&ledger, "folder", &name)["decision"], "remove", "{backend}: {ledger:#}");
        assert!(waits.folder.exists(), "{backend}: it only looked");
        let (verdict, finding) = doctor(&world);
        assert!(verdict == "warn" && finding.contains(&format!("{backend}: 1")), "{backend}: {finding}");

        // Also one that keeps none itself.
        world.set_env("UNKEY_VMCP_SPARE_VMMS", Some("0"));
        world.start();
        eventually("the spare VMM that was left is ended", || !is_alive(waits.pid) && !waits.folder.exists());
        let info = world.info("vm");
        assert_eq!((vmm_pid(&info), &info["state"]), (vm, &json!("VM_STATE_RUNNING")), "{backend}");
        assert_eq!((world.vmms(), marked(&world)), (vec![vm], Vec::new()), "{backend}");
        leave(&mut world, &["vm"]);
    }
}

#[test]
fn spare_vmms_of_a_killed_daemon_are_ended_by_reconcile() {
    for backend in hypervisors("spare_vmms_of_a_killed_daemon_are_ended_by_reconcile") {
        let mut world = World::started(ONE);
        let vm = running(&world, backend, "vm");
        let given = create_with_spare(&world, backend, "given", &[]);
        let other = running(&world, backend, "other");
        let waits = spare(&world, &[&given.folder]);
        let lives = killed(&mut world, backend, &waits);

        let (_, ledger) = reconcile(&world, &[]);
        let processes = items(&ledger, "process", &waits.pid.to_string());
        assert_eq!(processes.len(), usize::from(lives), "{backend}: {ledger:#}");
        assert!(processes.iter().all(|item| item["outcome"] == "removed"), "{backend}: {ledger:#}");
        let folder = item(&ledger, "folder", waits.folder.to_str().unwrap());
        assert_eq!(folder["outcome"], "removed", "{backend}: {ledger:#}");
        assert!(!is_alive(waits.pid) && !waits.folder.exists(), "{backend}");
        assert!(is_alive(vm) && is_alive(other), "{backend}: VMs go on");
        let folder = item(&ledger, "folder", given.folder.to_str().unwrap());
        assert_eq!((&folder["vm_id"], &folder["decision"]), (&json!("given"), &json!("keep")), "{backend}");

        // A VM on record is the next daemon's to settle.
        world.start();
        eventually("what waited for a VM on record is ended", || !is_alive(given.pid));
        boots(&world, "given");
        leave(&mut world, &["vm", "other", "given"]);
    }
}

#[test]
fn a_restore_does_not_count_spare_vmms_as_running_vms() {
    for backend in hypervisors("a_restore_does_not_count_spare_vmms_as_running_vms") {
        let mut world = World::started(ONE);
        let vm = running(&world, backend, "vm");
        let given = create_with_spare(&world, backend, "given", &[]);
        let copy = world.dir.path().join("copy").display().to_string();
        assert_eq!(run(&world, &["backup", &copy]).code, 0, "{backend}");
        killed(&mut world, backend, &given);
        let restored = run(&world, &["restore", &copy]);
        assert_eq!(restored.code, 0, "{backend}: {}", restored.err);
        world.start();
        eventually("what waited is ended", || !is_alive(given.pid));
        assert_eq!(vmm_pid(&world.info("vm")), vm, "{backend}");
        assert_eq!(world.info("given")["state"], "VM_STATE_CREATED", "{backend}");
        leave(&mut world, &["vm", "given"]);
    }
}

/// Kills the daemon, and returns true if its spare VMM goes on. QEMU and Firecracker read their
/// configuration from a pipe of the daemon, and end with it.
fn killed(world: &mut World, backend: &str, waits: &Spare) -> bool {
    world.stop(Signal::KILL);
    let goes_on = backend == "cloudhypervisor";
    if goes_on {
        assert!(is_alive(waits.pid), "{backend}: nobody has ended it");
    } else {
        eventually("the spare VMM has ended by itself", || !is_alive(waits.pid));
    }
    goes_on
}

/// A VM whose spare VMM has gone is still to be booted, and boots.
#[track_caller]
fn boots(world: &World, vm_id: &str) {
    assert_eq!(world.info(vm_id)["state"], "VM_STATE_CREATED");
    world.boot(vm_id);
    world.wait_for_console(vm_id, &TinyGuest::Idle.banner(), 1);
}

/// Deletes these VMs and ends the daemon: nothing is left.
#[track_caller]
fn leave(world: &mut World, vms: &[&str]) {
    for vm_id in vms {
        delete(world, vm_id);
    }
    world.stop(Signal::TERM);
    world.assert_nothing_left();
}
