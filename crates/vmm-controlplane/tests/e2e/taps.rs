//! TAPs that the program makes, on every hypervisor that is here: attached while the VM runs, gone
//! when it is deleted, and never anybody else's.

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_core::id::VmUid;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, eventually, on_path, skipped};

/// The hypervisors that can run here; what is missing is told.
fn backends(test: &str) -> Vec<&'static str> {
    let all = [
        ("qemu", "qemu-system-x86_64", true),
        ("cloudhypervisor", "cloud-hypervisor", Path::new("/dev/kvm").exists()),
        ("firecracker", "firecracker", Path::new("/dev/kvm").exists()),
    ];
    let mut here = Vec::new();
    for (backend, program, can_run) in all {
        if on_path(program) && can_run {
            here.push(backend);
        } else {
            skipped(&format!("{test} on {backend}"), &format!("{program} or /dev/kvm is missing"));
        }
    }
    here
}

/// Interfaces that a test may leave behind, gone at its end. Declared before the world, so that
/// VMMs have ended by then.
#[derive(Default)]
struct Interfaces(RefCell<Vec<String>>);

impl Interfaces {
    /// `None`, and a word about it, where no TAP can be made.
    fn new(test: &str) -> Option<Self> {
        let interfaces = Self::default();
        let probe = interfaces.unused("p");
        if ip(&["tuntap", "add", &probe, "mode", "tap"]) {
            return Some(interfaces);
        }
        skipped(test, "no TAP can be made here; it takes root, /dev/net/tun and ip");
        None
    }

    /// A name that nobody else uses.
    fn unused(&self, suffix: &str) -> String {
        let uid = VmUid::new(uuid::Uuid::now_v7());
        self.watch(uid.tap_name(0).replacen("vmt", "vmx", 1)[..13].to_owned() + suffix)
    }

    fn watch(&self, name: String) -> String {
        self.0.borrow_mut().push(name.clone());
        name
    }

    /// The TAP that the program makes for a VM's first interface.
    fn of(&self, created: &Value) -> String {
        let uid: VmUid = created["uid"].as_str().unwrap().parse().unwrap();
        self.watch(uid.tap_name(0))
    }
}

impl Drop for Interfaces {
    fn drop(&mut self) {
        for name in self.0.borrow().iter().filter(|name| exists(name)) {
            ip(&["link", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|done| done.status.success())
}

fn class(name: &str) -> PathBuf {
    Path::new("/sys/class/net").join(name)
}

fn exists(name: &str) -> bool {
    class(name).exists()
}

fn alias(name: &str) -> String {
    fs::read_to_string(class(name).join("ifalias")).unwrap_or_default().trim().to_owned()
}

/// Whether a VMM holds the other end.
fn attached(name: &str) -> bool {
    fs::read_to_string(class(name).join("carrier")).is_ok_and(|carrier| carrier.trim() == "1")
}

/// Creates a VM with one interface; an empty `tap` is named by the program.
fn create(world: &World, backend: &str, vm_id: &str, tap: &str) -> Value {
    let mut config = world.tiny(TinyGuest::Idle);
    config["network"] = json!([{"tap_device": tap}]);
    world.call("CreateVm", &json!({"vm_id": vm_id, "backend": backend, "config": config})).ok()
}

fn is_up(name: &str) -> bool {
    let flags = fs::read_to_string(class(name).join("flags")).unwrap();
    u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap() & 1 == 1
}

/// The warning of CreateVm about a field.
fn warning<'a>(created: &'a Value, field: &str) -> Option<&'a str> {
    let warnings = created["warnings"].as_array()?;
    warnings.iter().find(|warning| warning["field"] == field)?["message"].as_str()
}

fn delete(world: &World, vm_id: &str) {
    let answer = world.call("DeleteVm", &json!({"vm_id": vm_id, "force": true})).ok();
    assert!(answer["left_behind"].as_array().is_none_or(Vec::is_empty), "{answer}");
}

#[test]
fn a_generated_tap_is_removed_with_the_vm() {
    const TEST: &str = "a_generated_tap_is_removed_with_the_vm";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let world = World::started(&[]);
    for backend in backends(TEST) {
        let created = create(&world, backend, backend, "");
        let name = interfaces.of(&created);
        assert!(!exists(&name), "CreateVm makes nothing");
        for boot in 1..=2 {
            world.boot(backend);
            assert!(exists(&name), "{backend}, boot {boot}");
            eventually("the VMM holds the TAP", || attached(&name));
            assert!(alias(&name).contains(created["uid"].as_str().unwrap()), "{}", alias(&name));
            world.wait_for_console(backend, &TinyGuest::Idle.banner(), boot);
            world.call("ShutdownVm", &json!({"vm_id": backend, "force": true})).ok();
            assert!(exists(&name) && !attached(&name), "{backend}: kept for the next boot");
        }
        delete(&world, backend);
        assert!(!exists(&name), "{backend}");
    }
    world.assert_nothing_left();
}

#[test]
fn a_named_tap_is_created_and_held_by_one_running_vm() {
    const TEST: &str = "a_named_tap_is_created_and_held_by_one_running_vm";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let world = World::started(&[]);
    let backends = backends(TEST);
    let name = interfaces.unused("n");
    for backend in &backends {
        create(&world, backend, backend, &name);
    }
    for backend in &backends {
        world.boot(backend);
        eventually("the VMM holds the TAP", || attached(&name));
        for other in backends.iter().filter(|other| *other != backend) {
            let message = world.call("BootVm", &json!({"vm_id": other})).error("failed_precondition");
            assert!(message.contains(&format!("\"{backend}\"")) && message.contains(&name), "{message}");
        }
        world.call("ShutdownVm", &json!({"vm_id": backend, "force": true})).ok();
    }
    // It goes with the VM that ran on it last.
    for backend in &backends {
        assert!(exists(&name), "{backend}");
        delete(&world, backend);
    }
    assert!(!exists(&name));
    world.assert_nothing_left();
}

#[test]
fn an_existing_tap_is_used_and_not_removed() {
    const TEST: &str = "an_existing_tap_is_used_and_not_removed";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let world = World::started(&[]);
    let name = interfaces.unused("e");
    assert!(ip(&["tuntap", "add", &name, "mode", "tap"]));
    for backend in backends(TEST) {
        let created = create(&world, backend, backend, &name);
        assert_eq!(warning(&created, "config.network[0].tap_device"), None, "{backend}");
        // Cloud Hypervisor brings up a TAP that is down, and the others do not.
        assert!(ip(&["link", "set", &name, "down"]));
        world.boot(backend);
        assert!(is_up(&name), "{backend}: a TAP that is down connects nobody");
        eventually("the VMM holds the TAP", || attached(&name));
        delete(&world, backend);
        assert!(exists(&name), "{backend}");
        assert_eq!(alias(&name), "", "{backend}: it is labelled as nobody's");
    }
    world.assert_nothing_left();
}

#[test]
fn an_interface_that_is_no_tap_is_refused_before_the_launch() {
    const TEST: &str = "an_interface_that_is_no_tap_is_refused_before_the_launch";
    let world = World::started(&[]);
    for backend in backends(TEST) {
        create(&world, backend, backend, "lo");
        let message = world.call("BootVm", &json!({"vm_id": backend})).error("failed_precondition");
        assert!(message.contains("config.network[0].tap_device"), "{message}");
        assert!(message.contains("lo exists and is not a TAP"), "{message}");
        assert_eq!(world.info(backend)["state"], "VM_STATE_CREATED");
        assert_eq!(world.vmms(), Vec::<u32>::new());
    }
}

#[test]
fn a_start_that_fails_leaves_no_tap() {
    const TEST: &str = "a_start_that_fails_leaves_no_tap";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let world = World::started(&[]);
    // Held by somebody who is no VM of ours, and not to be shared: the VMM cannot open it.
    let held = interfaces.unused("h");
    let holder = tappers::linux::Tap::create_named(tappers::Interface::new(&held).unwrap()).unwrap();
    for backend in backends(TEST) {
        let mut config = world.tiny(TinyGuest::Idle);
        config["network"] = json!([{}, {"tap_device": held}]);
        let created =
            world.call("CreateVm", &json!({"vm_id": backend, "backend": backend, "config": config})).ok();
        let name = interfaces.of(&created);
        let answer = world.call("BootVm", &json!({"vm_id": backend}));
        assert_ne!(answer.status, 200, "{backend}: {}", answer.body);
        assert!(!exists(&name), "{backend}: what this start made is taken back");
        assert_eq!(world.vmms(), Vec::<u32>::new(), "{backend}");
        delete(&world, backend);
    }
    assert!(exists(&held));
    drop(holder);
}

#[test]
fn taps_of_a_killed_daemon_are_found_and_removed() {
    const TEST: &str = "taps_of_a_killed_daemon_are_found_and_removed";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let mut world = World::started(&[]);
    let backends = backends(TEST);
    let mut names = Vec::new();
    for backend in &backends {
        names.push(interfaces.of(&create(&world, backend, backend, "")));
        let named = interfaces.unused("k");
        let other = format!("{backend}-named");
        create(&world, backend, &other, &named);
        names.push(named);
        world.boot(backend);
        world.boot(&other);
    }
    assert!(names.iter().all(|name| exists(name)), "{names:?}");
    world.stop(Signal::KILL);
    world.start();
    assert!(names.iter().all(|name| attached(name)), "the VMs go on: {names:?}");
    for backend in &backends {
        delete(&world, backend);
        delete(&world, &format!("{backend}-named"));
    }
    let left: Vec<_> = names.iter().filter(|name| exists(name)).collect();
    assert_eq!(left, Vec::<&String>::new());
    world.assert_nothing_left();
}

#[test]
fn a_daemon_killed_during_a_boot_leaves_no_tap() {
    const TEST: &str = "a_daemon_killed_during_a_boot_leaves_no_tap";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let mut world = World::started(&[]);
    for backend in backends(TEST) {
        for round in 0..3 {
            let name = interfaces.of(&create(&world, backend, backend, ""));
            let url = format!("{}/vmm.v1.VmService/BootVm", world.url());
            let body = json!({"vm_id": backend}).to_string();
            // Nobody answers: the daemon dies as soon as the TAP is there.
            let boot = std::thread::spawn(move || {
                ureq::post(&url).header("content-type", "application/json").send(body).is_ok()
            });
            let patience = std::time::Instant::now() + crate::harness::WAIT_TIMEOUT;
            while !exists(&name) && std::time::Instant::now() < patience {
                std::thread::yield_now();
            }
            world.stop(Signal::KILL);
            let _ = boot.join();
            world.start();
            let info = world.info(backend);
            let state = &info["state"];
            assert_eq!(state == "VM_STATE_RUNNING", attached(&name), "{backend}, round {round}: {info:#}");
            assert_eq!(state == "VM_STATE_RUNNING", exists(&name), "{backend}, round {round}: {info:#}");
            delete(&world, backend);
            assert!(!exists(&name), "{backend}, round {round}, left {state}");
        }
    }
    world.assert_nothing_left();
}

/// A network namespace that ends with the test.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo ready && exec sleep 900"]);
        let mut holder = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(holder)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_tap_removed_by_hand_does_not_make_the_vm_unreachable() {
    const TEST: &str = "a_tap_removed_by_hand_does_not_make_the_vm_unreachable";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let namespace = Namespace::new();
    let mut world = World::started(&[]);
    for backend in backends(TEST) {
        let elsewhere = interfaces.unused("r");
        let holder = namespace.0.id().to_string();
        let ways: [(&str, Vec<&str>); 3] =
            [("renamed", vec!["name", &elsewhere]), ("moved", vec!["netns", &holder]), ("deleted", vec![])];
        for (what, change) in ways {
            let vm_id = format!("{backend}-{what}");
            let name = interfaces.of(&create(&world, backend, &vm_id, ""));
            world.boot(&vm_id);
            world.wait_for(&vm_id, "sampled", |info| info["metrics"]["network_stats"].is_object());
            let mut arguments = vec!["link", if change.is_empty() { "delete" } else { "set" }, &name];
            arguments.extend(change);
            ip(&["link", "set", &name, "down"]);
            assert!(ip(&arguments), "{arguments:?}");
            // Three more samples, and no word of a silence.
            let seen = world.info(&vm_id)["metrics_observed_at"].as_str().unwrap().parse::<i64>().unwrap();
            let info = world.wait_for(&vm_id, "sampled again", |info| {
                assert_eq!(info["status"]["phase"], "running", "{info:#}");
                let observed = info["metrics_observed_at"].as_str().and_then(|at| at.parse::<i64>().ok());
                observed.is_some_and(|observed| observed >= seen + 3)
            });
            if backend == "qemu" {
                // Cloud Hypervisor and Firecracker count by themselves.
                assert!(info["metrics"]["network_stats"].is_null(), "{info:#}");
            }
            world.call("PauseVm", &json!({"vm_id": vm_id})).ok();
            world.call("ResumeVm", &json!({"vm_id": vm_id})).ok();
            world.call("ShutdownVm", &json!({"vm_id": vm_id, "timeout_seconds": 1})).ok();
            delete(&world, &vm_id);
            ip(&["link", "delete", &elsewhere]);
        }
    }
    world.assert_nothing_left();
    let (_, log) = world.stop(Signal::TERM);
    let reported =
        |line: &String| line.contains("counters of the VM cannot be read") && line.contains("qemu-renamed");
    assert!(!on_path("qemu-system-x86_64") || log.iter().any(reported), "the log says of which VM: {log:#?}");
}

/// Puts programs in front of the hypervisors' own that write the host's interfaces to `seen` before
/// they become the hypervisor.
fn with_witness(folder: &Path, seen: &Path) -> Vec<(&'static str, String)> {
    let programs = [
        ("UNKEY_VMCP_QEMU_BINARY", "qemu-system-x86_64"),
        ("UNKEY_VMCP_CH_BINARY", "cloud-hypervisor"),
        ("UNKEY_VMCP_FC_BINARY", "firecracker"),
    ];
    let mut env = Vec::new();
    for (variable, program) in programs.into_iter().filter(|(_, program)| on_path(program)) {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let real = std::env::split_paths(&paths).map(|dir| dir.join(program)).find(|path| path.is_file());
        let witness = folder.join(program);
        let script = format!(
            "#!/bin/sh\nls /sys/class/net > '{}'\nexec '{}' \"$@\"\n",
            seen.display(),
            real.unwrap().display()
        );
        fs::write(&witness, script).unwrap();
        fs::set_permissions(&witness, fs::Permissions::from_mode(0o755)).unwrap();
        env.push((variable, witness.display().to_string()));
    }
    env
}

#[test]
fn a_tap_is_named_at_creation_and_exists_before_its_vmm_starts() {
    const TEST: &str = "a_tap_is_named_at_creation_and_exists_before_its_vmm_starts";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let folder = tempfile::tempdir().unwrap();
    let seen = folder.path().join("seen");
    let env = with_witness(folder.path(), &seen);
    let env: Vec<_> = env.iter().map(|(variable, path)| (*variable, path.as_str())).collect();
    let world = World::started(&env);
    for backend in backends(TEST) {
        let created = create(&world, backend, backend, "");
        let name = interfaces.of(&created);
        assert_eq!(world.info(backend)["config"]["network"][0]["tap_device"], name, "{backend}");
        assert!(!fs::read_to_string(&seen).unwrap_or_default().contains(&name), "{backend}: not started yet");
        world.boot(backend);
        let there = fs::read_to_string(&seen).unwrap();
        assert!(there.lines().any(|line| line == name), "{backend}: {name} is not in {there}");
        delete(&world, backend);
    }
    world.assert_nothing_left();
}

#[test]
fn a_bridged_tap_stays_in_its_bridge() {
    const TEST: &str = "a_bridged_tap_stays_in_its_bridge";
    let Some(interfaces) = Interfaces::new(TEST) else { return };
    let (bridge, name) = (interfaces.unused("b"), interfaces.unused("t"));
    if !ip(&["link", "add", &bridge, "type", "bridge"]) {
        return skipped(TEST, "no bridge can be made here");
    }
    assert!(ip(&["tuntap", "add", &name, "mode", "tap"]));
    assert!(ip(&["link", "set", &name, "up", "master", &bridge]));
    let connected = || fs::read_link(class(&name).join("master")).is_ok_and(|to| to.ends_with(&bridge));
    let world = World::started(&[]);
    for backend in backends(TEST) {
        create(&world, backend, backend, &name);
        assert!(connected(), "{backend}");
        world.boot(backend);
        eventually("the VMM holds the TAP", || attached(&name));
        assert!(connected(), "{backend}");
        delete(&world, backend);
        assert!(connected(), "{backend}");
    }
    world.assert_nothing_left();
}
