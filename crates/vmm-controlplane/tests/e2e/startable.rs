//! A backend that is available starts VMs: trial starts of QEMU, and the accelerator of each boot.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::qemu_copy::QemuCopy;

use crate::harness::{World, eventually, is_alive, skipped, vmm_pid};
use crate::needs_qemu;
use crate::operator::run;

fn qemu_of(world: &World) -> Value {
    let backends = world.call("ListBackends", &json!({})).ok();
    let all = backends["backends"].as_array().unwrap();
    all.iter().find(|entry| entry["name"] == "qemu").unwrap().clone()
}

/// Returns the reason why QEMU cannot start VMs on the KVM of this host, if it cannot.
fn fault_of_kvm() -> Option<String> {
    let world = World::started(&[("UNKEY_VMCP_QEMU_KVM", "true")]);
    let qemu = qemu_of(&world);
    (qemu["available"] != true).then(|| qemu["reason"].as_str().unwrap_or_default().to_owned())
}

/// Returns the messages of the warnings about the field `backend`.
fn about_backend(answer: &Value) -> Vec<String> {
    let warnings = answer["warnings"].as_array().cloned().unwrap_or_default();
    let about = warnings.iter().filter(|warning| warning["field"] == "backend");
    about.map(|warning| warning["message"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_qemu_without_its_firmware_is_unavailable_and_the_package_is_named() {
    const TEST: &str = "a_qemu_without_its_firmware_is_unavailable_and_the_package_is_named";
    let folder = tempfile::tempdir().unwrap();
    let Some(copy) = QemuCopy::in_folder(folder.path()).unwrap() else {
        return skipped(TEST, "qemu-system-x86_64 is not on PATH; `make setup` installs it");
    };
    let world = World::new(&[("UNKEY_VMCP_QEMU_BINARY", copy.program().to_str().unwrap())]);
    let whole = run(&world, &["doctor"]);
    if whole.code != 0 {
        return skipped(TEST, &format!("a copy of this QEMU does not find its parts: {}", whole.out));
    }
    let taken = copy.take("qboot.rom").unwrap();
    let mut world = world;
    world.start();
    let qemu = qemu_of(&world);
    assert!(qemu["available"].is_null(), "false is the default and left out: {qemu}");
    let reason = qemu["reason"].as_str().unwrap();
    assert!(reason.contains("'qboot.rom'") && reason.contains("the package qemu-system-data"), "{reason}");
    assert_eq!(world.get("/_/health").status, 503);
    let reported = run(&world, &["doctor"]);
    assert!(reported.code == 1 && reported.out.contains("the package qemu-system-data"), "{}", reported.out);

    let config = world.tiny(TinyGuest::Idle);
    let validated = world.call("ValidateVm", &json!({"config": config})).ok();
    let created = world.create("vm", &config);
    for answer in [validated, created] {
        assert!(about_backend(&answer)[0].contains("BootVm will fail"), "{answer}");
    }
    let message = world.call("BootVm", &json!({"vm_id": "vm"})).error("failed_precondition");
    assert!(message.contains("qboot.rom"), "{message}");

    copy.put_back(taken).unwrap();
    world.boot("vm");
    eventually("available", || qemu_of(&world)["available"] == true);
    let validated = world.call("ValidateVm", &json!({"config": config})).ok();
    assert_eq!((&validated["ok"], about_backend(&validated)), (&json!(true), Vec::new()));
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    world.assert_nothing_left();
}

#[test]
fn a_hanging_trial_ends_with_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let wrapper = folder.path().join("qemu");
    for hang in ["sleep 900", "kill -STOP $$"] {
        let script = format!(
            "#!/bin/sh\ncase \"$1\" in --version) echo 'QEMU emulator version 7.2.0'; exit 0;; esac\n\
             echo $$ >> '{}'\n{hang}\n",
            folder.path().join("pids").display()
        );
        fs::write(&wrapper, script).unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        let world = World::new(&[("UNKEY_VMCP_QEMU_BINARY", wrapper.to_str().unwrap())]);
        let mut daemon = world.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let pids = || -> Vec<u32> {
            let text = fs::read_to_string(folder.path().join("pids")).unwrap_or_default();
            text.lines().filter_map(|line| line.parse().ok()).collect()
        };
        eventually("tried", || pids().len() == 2);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        eventually("ended", || pids().into_iter().all(|pid| !is_alive(pid)));
        fs::remove_file(folder.path().join("pids")).unwrap();
    }
}

/// A mount namespace in which the CPUs show vmx, and `/dev/kvm` can be hidden. It ends with the
/// test.
struct Host {
    holder: Child,
    files: TempDir,
}

impl Host {
    /// Has the daemons of `world` run on such a host. Returns `None` after saying that `test` is
    /// skipped.
    fn of(world: &mut World, test: &str) -> Option<Self> {
        if !Path::new("/dev/kvm").exists() {
            skipped(test, "there is no /dev/kvm");
            return None;
        }
        let files = tempfile::tempdir().unwrap();
        let cpuinfo = files.path().join("cpuinfo");
        fs::write(&cpuinfo, "processor\t: 0\nflags\t\t: fpu vmx\n\n").unwrap();
        // A socket cannot be opened, not even by root.
        drop(UnixListener::bind(files.path().join("no-kvm")).unwrap());
        let script = "mount --bind \"$1\" /proc/cpuinfo && echo mounted && exec sleep 900";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(&cpuinfo);
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(holder) = started else {
            skipped(test, "there is no program `unshare`");
            return None;
        };
        let mut host = Self { holder, files };
        let mut line = String::new();
        let _ = BufReader::new(host.holder.stdout.take().unwrap()).read_line(&mut line);
        if line.trim() != "mounted" {
            skipped(test, "a file can only be mounted by root");
            return None;
        }
        let pid = host.holder.id().to_string();
        world.wrapper = ["nsenter", "--mount", "--target", &pid].map(str::to_owned).into();
        Some(host)
    }

    fn inside(&self, arguments: &[&str]) {
        let pid = self.holder.id().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &pid]).args(arguments);
        assert!(command.status().unwrap().success(), "{arguments:?}");
    }

    fn hide_kvm(&self) {
        let socket = self.files.path().join("no-kvm");
        self.inside(&["mount", "--bind", socket.to_str().unwrap(), "/dev/kvm"]);
    }

    fn show_kvm(&self) {
        self.inside(&["umount", "/dev/kvm"]);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn each_boot_chooses_the_accelerator_and_unasked_emulation_is_a_warning() {
    const TEST: &str = "each_boot_chooses_the_accelerator_and_unasked_emulation_is_a_warning";
    needs_qemu!();
    if let Some(why) = fault_of_kvm() {
        return skipped(TEST, &why);
    }
    let mut world = World::new(&[("UNKEY_VMCP_QEMU_KVM", "auto")]);
    let Some(host) = Host::of(&mut world, TEST) else { return };
    host.hide_kvm();
    world.start();
    assert_eq!(qemu_of(&world)["capabilities"]["accelerator"], "tcg");
    let config = world.tiny(TinyGuest::Idle);
    let validate = || about_backend(&world.call("ValidateVm", &json!({"config": config})).ok());
    let boot = || {
        world.boot("vm");
        let info = world.info("vm");
        assert!(is_alive(vmm_pid(&info)));
        world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        info["backend_info"]["accelerator"].as_str().unwrap().to_owned()
    };
    for warnings in [validate(), about_backend(&world.create("vm", &config))] {
        let [message] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(message.contains("emulated in software") && message.contains("/dev/kvm"), "{message}");
    }
    assert_eq!(boot(), "tcg");
    host.show_kvm();
    assert_eq!(validate(), [""; 0]);
    assert_eq!(boot(), "kvm");
    eventually("listed", || qemu_of(&world)["capabilities"]["accelerator"] == "kvm");
    host.hide_kvm();
    assert_eq!(validate().len(), 1);
    assert_eq!(boot(), "tcg");
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.assert_nothing_left();
    let (code, log) = world.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    let lines = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let said =
        lines.filter(|line| line["message"] == "the CPUs of a VM that starts are emulated in software");
    let of: Vec<_> = said.map(|line| (line["level"].clone(), line["vm_id"].clone())).collect();
    assert_eq!(of, vec![(json!("WARN"), json!("vm")); 2], "{log:#?}");
}

#[test]
fn requested_emulation_is_no_warning() {
    needs_qemu!();
    let world = World::started(&[("UNKEY_VMCP_QEMU_KVM", "false")]);
    let created = world.create("vm", &world.tiny(TinyGuest::Idle));
    assert_eq!(about_backend(&created), [""; 0]);
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
}
