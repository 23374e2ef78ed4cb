//! The operator's subcommands, beside a daemon and without one.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_core::id::VmUid;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, eventually, is_alive, on_path, signal, skipped, vmm_pid};
use crate::needs_qemu;

/// What a subcommand did.
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs a subcommand with the settings of the world's daemon.
pub(crate) fn run(world: &World, args: &[&str]) -> Done {
    let output = world.command().args(args).output().unwrap();
    Done {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs `reconcile --json` with `args` and answers its exit code and ledger.
pub(crate) fn reconcile(world: &World, args: &[&str]) -> (i32, Value) {
    let done = run(world, &[&["reconcile", "--json"], args].concat());
    (done.code, serde_json::from_str(&done.out).unwrap_or_else(|_| panic!("{}{}", done.out, done.err)))
}

/// The items of a kind in a ledger whose name has `part` in it.
pub(crate) fn items<'a>(ledger: &'a Value, kind: &str, part: &str) -> Vec<&'a Value> {
    let all = ledger["items"].as_array().unwrap().iter();
    all.filter(|item| item["kind"] == kind && item["name"].as_str().unwrap().contains(part)).collect()
}

/// The only such item.
#[track_caller]
pub(crate) fn item<'a>(ledger: &'a Value, kind: &str, part: &str) -> &'a Value {
    match items(ledger, kind, part)[..] {
        [only] => only,
        ref found => panic!("{} of {kind} {part} in {ledger:#}", found.len()),
    }
}

fn folder(world: &World, created: &Value) -> PathBuf {
    world.dir.path().join("run/vms").join(created["uid"].as_str().unwrap().replace('-', ""))
}

/// A VM with a tiny guest that runs: its folder, and its VMM's process id.
fn running(world: &World, name: &str) -> (PathBuf, u32) {
    let created = world.create(name, &world.tiny(TinyGuest::Idle));
    world.boot(name);
    (folder(world, &created), vmm_pid(&world.info(name)))
}

/// A process that ends with the test.
struct Stranger(Child);

impl Stranger {
    /// Somebody who looks at a file.
    fn looking_at(file: &Path) -> Self {
        let mut tail = Command::new("tail");
        Self(tail.arg("-f").arg(file).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn doctor_names_the_remedy_for_an_unavailable_default_backend() {
    let world = World::new(&[("UNKEY_VMCP_QEMU_BINARY", "/nowhere/qemu")]);
    let done = run(&world, &["doctor"]);
    assert_eq!(done.code, 1, "{}{}", done.out, done.err);
    assert!(
        done.out.contains("remedy: install it") && done.out.contains("UNKEY_VMCP_QEMU_BINARY"),
        "{}",
        done.out
    );
    assert!(done.out.contains("qemu, CANNOT serve"), "{}", done.out);
    let diagnosis: Value = serde_json::from_str(&run(&world, &["doctor", "--json"]).out).unwrap();
    assert_eq!(diagnosis["can_serve"], false);
    for check in diagnosis["checks"].as_array().unwrap() {
        assert_eq!(check["verdict"] == "ok", check["remedy"].is_null(), "{check}");
    }
    assert!(
        !world.dir.path().join("state").exists() && !world.dir.path().join("run").exists(),
        "it only looks"
    );
}

#[test]
fn doctor_works_without_the_daemon_and_beside_it() {
    needs_qemu!();
    let mut world = World::new(&[]);
    let finding = |world: &World, name: &str| {
        let done = run(world, &["doctor", "--json"]);
        assert_eq!(done.code, 0, "{}{}", done.out, done.err);
        let diagnosis: Value = serde_json::from_str(&done.out).unwrap();
        let checks = diagnosis["checks"].as_array().unwrap().clone();
        let check = checks.into_iter().find(|check| check["name"] == name).unwrap();
        check["finding"].as_str().unwrap().to_owned()
    };
    assert!(finding(&world, "daemon").contains("does not run"));
    assert!(finding(&world, "database").contains("none yet"));
    world.start();
    world.create("vm", &world.tiny(TinyGuest::Idle));
    assert!(finding(&world, "daemon").contains(&world.pid().to_string()));
    assert!(finding(&world, "database").contains("1 VMs"));
}

#[test]
fn reconcile_beside_a_daemon_lists_every_trace_and_changes_nothing() {
    needs_qemu!();
    let world = World::started(&[]);
    let (dir, pid) = running(&world, "vm");
    let (code, ledger) = reconcile(&world, &["--dry-run"]);
    assert_eq!((code, &ledger["daemon_pid"]), (0, &json!(world.pid())), "{ledger:#}");
    for (kind, part) in [("process", pid.to_string().as_str()), ("folder", dir.to_str().unwrap())] {
        let item = item(&ledger, kind, part);
        assert_eq!((&item["vm_id"], &item["decision"]), (&json!("vm"), &json!("keep")), "{item}");
    }
    assert!(!items(&ledger, "socket", "qmp.sock").is_empty(), "{ledger:#}");

    let done = run(&world, &["reconcile", "--kill-orphans"]);
    assert_eq!(done.code, 1, "{}", done.out);
    assert!(done.err.contains(&world.pid().to_string()) && done.err.contains("--dry-run"), "{}", done.err);
    assert_eq!(world.info("vm")["state"], "VM_STATE_RUNNING");
    let table = run(&world, &["reconcile", "--dry-run"]);
    let heading = table.out.lines().nth(1).unwrap_or_default();
    assert!(heading.starts_with("DECISION") && table.out.contains("the VMM of VM vm"), "{}", table.out);
}

#[test]
fn a_restore_into_a_directory_writable_by_others_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut world = World::started(&[]);
    let copy = world.dir.path().join("copy");
    let copy = copy.to_str().unwrap();
    assert_eq!(run(&world, &["backup", copy]).code, 0);
    world.stop(Signal::TERM);
    let state = world.dir.path().join("state");
    let names = || {
        let entries = std::fs::read_dir(&state).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect::<std::collections::BTreeSet<_>>()
    };
    let before = names();
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused = run(&world, &["restore", copy]);
    assert!(refused.code == 1 && refused.err.contains("may be written by other users"), "{}", refused.err);
    assert_eq!(names(), before, "nothing was changed");
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(run(&world, &["restore", copy]).code, 0);
    // A directory that is missing is made, and for its owner alone.
    std::fs::remove_dir_all(&state).unwrap();
    assert_eq!(run(&world, &["restore", copy]).code, 0);
    assert_eq!(std::fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn orphans_of_an_older_backup_are_ended_only_on_request() {
    needs_qemu!();
    let mut world = World::started(&[]);
    let (kept_dir, kept) = running(&world, "kept");
    let copy = world.dir.path().join("copy");
    let copy_text = copy.to_str().unwrap();
    assert_eq!(run(&world, &["backup", copy_text]).code, 0, "beside the daemon");
    let again = run(&world, &["backup", copy_text]);
    assert!(again.code == 1 && again.err.contains("is there already"), "{}", again.err);
    let (orphan_dir, orphan) = running(&world, "orphan");
    let (dead_dir, dead) = running(&world, "dead");
    let refused = run(&world, &["restore", copy_text]);
    assert!(refused.code == 1 && refused.err.contains(&world.pid().to_string()), "{}", refused.err);
    world.stop(Signal::KILL);

    let restored = run(&world, &["restore", copy_text]);
    assert_eq!(restored.code, 0, "{}", restored.err);
    assert!(restored.out.contains("replaced") && restored.out.contains("have no owner"), "{}", restored.out);
    signal(dead, Signal::KILL);
    eventually("the VMM is gone", || !is_alive(dead));
    let stranger = Stranger::looking_at(&orphan_dir.join("console.log"));

    // Looked at: everything is named, nothing is touched.
    let (code, ledger) = reconcile(&world, &["--dry-run"]);
    assert_eq!(code, 3);
    assert_eq!(item(&ledger, "process", &orphan.to_string())["decision"], "report", "{ledger:#}");
    assert_eq!(item(&ledger, "process", &stranger.0.id().to_string())["decision"], "keep");
    assert_eq!(item(&ledger, "folder", orphan_dir.to_str().unwrap())["decision"], "report");
    assert_eq!(item(&ledger, "folder", dead_dir.to_str().unwrap())["decision"], "remove");
    assert_eq!(item(&ledger, "folder", kept_dir.to_str().unwrap())["vm_id"], "kept");
    assert!(dead_dir.exists());

    // Done: what is dead goes, what lives stays.
    let (code, ledger) = reconcile(&world, &[]);
    assert_eq!(code, 3, "the orphan is still there");
    assert_eq!(item(&ledger, "folder", dead_dir.to_str().unwrap())["outcome"], "removed");
    assert!(!dead_dir.exists() && orphan_dir.exists() && is_alive(orphan));

    // The daemon says so too, and leaves it alone.
    world.start();
    assert_eq!(vmm_pid(&world.info("kept")), kept);
    let (code, ledger) = reconcile(&world, &["--dry-run"]);
    assert_eq!((code, &item(&ledger, "process", &orphan.to_string())["decision"]), (3, &json!("report")));
    let (_, log) = world.stop(Signal::TERM);
    let reported = log.iter().any(|line| line.contains("have no owner") && line.contains("WARN"));
    assert!(reported, "{}", log.join("\n"));
    assert!(is_alive(orphan));

    // Asked for: the orphan ends, and its folder stays for as long as somebody else uses it.
    let (code, ledger) = reconcile(&world, &["--kill-orphans"]);
    assert_eq!((code, &item(&ledger, "process", &orphan.to_string())["outcome"]), (3, &json!("removed")));
    assert!(!is_alive(orphan) && orphan_dir.exists() && is_alive(stranger.0.id()));
    drop(stranger);
    let (code, ledger) = reconcile(&world, &[]);
    assert_eq!(code, 0, "{ledger:#}");
    assert!(!orphan_dir.exists() && is_alive(kept) && kept_dir.exists());
}

#[test]
fn a_vm_started_again_after_the_backup_is_found() {
    needs_qemu!();
    let mut world = World::started(&[]);
    let (_, before) = running(&world, "vm");
    let copy = world.dir.path().join("copy");
    let copy = copy.to_str().unwrap();
    assert_eq!(run(&world, &["backup", copy]).code, 0);
    world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
    world.boot("vm");
    let now = vmm_pid(&world.info("vm"));
    assert_ne!(now, before);
    world.stop(Signal::TERM);
    let restored = run(&world, &["restore", copy]);
    assert_eq!(restored.code, 0, "{}", restored.err);
    assert!(restored.out.contains("started again"), "{}", restored.out);
    world.start();
    let info = world.info("vm");
    assert_eq!((&info["state"], vmm_pid(&info)), (&json!("VM_STATE_RUNNING"), now));
}

#[test]
fn a_restore_that_would_orphan_a_running_vm_is_refused() {
    needs_qemu!();
    let mut world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let copy = world.dir.path().join("copy");
    let copy = copy.to_str().unwrap();
    assert_eq!(run(&world, &["backup", copy]).code, 0);
    world.boot("vm");
    let pid = vmm_pid(&world.info("vm"));
    world.stop(Signal::TERM);
    let refused = run(&world, &["restore", copy]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains(&pid.to_string()) && refused.err.contains("VM vm"), "{}", refused.err);
    world.start();
    assert_eq!(vmm_pid(&world.info("vm")), pid, "nothing was changed");
}

#[test]
fn reconcile_keeps_two_instances_apart() {
    needs_qemu!();
    let mut one = World::started(&[]);
    let (dir, pid) = running(&one, "vm");
    let mut apart = World::started(&[]);
    apart.stop(Signal::TERM);
    let (code, ledger) = reconcile(&apart, &["--kill-orphans"]);
    assert_eq!((code, &ledger["items"]), (0, &json!([])), "{ledger:#}");

    // By mistake both have been given one runtime directory.
    let runtime_dir = one.dir.path().join("run").display().to_string();
    let mut shared = World::started(&[("UNKEY_VMCP_RUNTIME_DIR", &runtime_dir)]);
    shared.stop(Signal::TERM);
    let (code, ledger) = reconcile(&shared, &["--kill-orphans"]);
    assert_eq!(code, 3);
    assert!(
        ledger["items"].as_array().unwrap().iter().all(|item| item["decision"] == "report"),
        "{ledger:#}"
    );
    assert!(is_alive(pid) && dir.exists());
    one.stop(Signal::TERM);
    let (code, ledger) = reconcile(&one, &["--kill-orphans"]);
    assert_eq!(code, 0, "what has an owner stays: {ledger:#}");
    assert!(is_alive(pid));
}

/// An interface that goes with the test. Declared before the world, so that its VMM has ended by
/// then.
#[derive(Default)]
struct Tap(std::cell::RefCell<String>);

impl Tap {
    fn exists(&self) -> bool {
        let name = self.0.borrow();
        !name.is_empty() && Path::new("/sys/class/net").join(&*name).exists()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.exists() {
            let _ = Command::new("ip").args(["link", "delete", &self.0.borrow()]).status();
        }
    }
}

#[test]
fn an_orphan_of_each_hypervisor_is_ended_with_its_traces() {
    const TEST: &str = "an_orphan_of_each_hypervisor_is_ended_with_its_traces";
    let kvm = Path::new("/dev/kvm").exists();
    let all = [
        ("qemu", "qemu-system-x86_64", true),
        ("cloudhypervisor", "cloud-hypervisor", kvm),
        ("firecracker", "firecracker", kvm),
    ];
    for (backend, program, can_run) in all {
        if !on_path(program) || !can_run {
            skipped(&format!("{TEST} on {backend}"), &format!("{program} or /dev/kvm is missing"));
            continue;
        }
        let tap = Tap::default();
        let mut world = World::started(&[]);
        let copy = world.dir.path().join("copy").display().to_string();
        assert_eq!(run(&world, &["backup", &copy]).code, 0);
        let mut config = world.tiny(TinyGuest::Idle);
        config["network"] = json!([{}]);
        let created =
            world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config})).ok();
        let uid: VmUid = created["uid"].as_str().unwrap().parse().unwrap();
        tap.0.replace(uid.tap_name(0));
        if world.call("BootVm", &json!({"vm_id": "vm"})).status != 200 {
            // Without the right to make TAPs, all but the TAP can still be proven.
            skipped(&format!("{TEST}: the TAP on {backend}"), "no TAP can be made here");
            world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
            config["network"] = json!([]);
            world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config})).ok();
            world.boot("vm");
        }
        let pid = vmm_pid(&world.info("vm"));
        let with_tap = tap.exists();
        world.stop(Signal::TERM);
        assert_eq!(run(&world, &["restore", &copy]).code, 0);

        let (code, ledger) = reconcile(&world, &[]);
        assert_eq!(code, 3, "{backend}: {ledger:#}");
        assert!(is_alive(pid) && tap.exists() == with_tap, "{backend}: what lives is left alone");
        assert_eq!(items(&ledger, "tap", "").len(), usize::from(with_tap), "{backend}: {ledger:#}");
        let (code, ledger) = reconcile(&world, &["--kill-orphans"]);
        assert_eq!(code, 0, "{backend}: {ledger:#}");
        assert!(!is_alive(pid) && !tap.exists(), "{backend}: {ledger:#}");
        world.assert_nothing_left();
        assert_eq!(reconcile(&world, &[]).1["items"], json!([]), "{backend}");
    }
}
