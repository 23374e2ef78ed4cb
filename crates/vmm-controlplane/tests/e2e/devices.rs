//! Disks, TAPs and consoles, seen from a Linux guest and from the metrics.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, hypervisors, linux, on_path, skipped};
use crate::needs_qemu;

fn raw_disk(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

fn linux_config(args: &str) -> Option<Value> {
    let (kernel, initrd) = linux()?;
    Some(json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": "268435456"},
        "boot": {"kernel_path": kernel, "initrd_path": initrd, "kernel_args": format!("console=ttyS0 cryptomgr.notests no_timer_check {args}")},
    }))
}

#[test]
fn disks_are_attached_in_order_and_counted() {
    needs_qemu!();
    let Some(mut config) = linux_config("vmcp.do=writedisk,idle") else {
        return skipped("disks_are_attached_in_order_and_counted", "no guest kernel; `make setup` makes it");
    };
    if !on_path("qemu-img") {
        return skipped(
            "disks_are_attached_in_order_and_counted",
            "qemu-img is not on PATH; `make setup` installs it",
        );
    }
    let world = World::started(&[]);
    let data = raw_disk(world.dir.path(), "data, with a comma.img", 8);
    let qcow2 = world.dir.path().join("disk.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&qcow2)
        .arg("24M")
        .status()
        .unwrap();
    assert!(made.success());
    let root = raw_disk(world.dir.path(), "root.img", 16);
    config["storage"] = json!([
        {"id": "data", "path": data, "read_only": true},
        {"id": "q", "path": qcow2, "options": {"format": "qcow2"}},
        {"id": "root", "path": root, "is_root_device": true},
    ]);
    world.create("vm", &config);
    world.boot("vm");
    let console = world.wait_for_console("vm", "vmcp-guest: wrote vda", 1);
    assert!(
        console.contains("vmcp-guest: disk vda 16777216 ro=0 root=1"),
        "the root device is first: {console}"
    );
    assert!(console.contains("vmcp-guest: disk vdb 8388608 ro=1 root=0"), "{console}");
    assert!(console.contains("vmcp-guest: disk vdc 25165824 ro=0 root=0"), "{console}");
    assert!(console.contains("root=/dev/vda rw"), "{console}");
    world.wait_for("vm", "seen writing", |info| {
        let stats = &info["metrics"]["storage_stats"];
        stats["bytes_written"].is_string()
            && stats["write_operations"].is_string()
            && stats["bytes_read"].is_string()
    });
    world.call("ShutdownVm", &json!({"vm_id": "vm"})).ok();
    let written = fs::read(&root).unwrap();
    assert!(written.windows(10).any(|bytes| bytes == b"vmcp-guest"), "what the guest wrote is on the disk");
    assert!(fs::read(&data).unwrap().iter().all(|byte| *byte == 0));
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    assert!(
        root.exists() && data.exists() && qcow2.exists(),
        "DeleteVm removes no file that the client named"
    );
    world.assert_nothing_left();
}

#[test]
fn data_on_a_raw_disk_does_not_prevent_a_boot() {
    let test = "data_on_a_raw_disk_does_not_prevent_a_boot";
    let world = World::started(&[]);
    for backend in hypervisors(test) {
        let disk = raw_disk(world.dir.path(), &format!("{backend}.img"), 1);
        let mut config = world.tiny(TinyGuest::Idle);
        config["storage"] = json!([{"path": disk}]);
        let request = json!({"vm_id": "vm", "backend": backend, "config": config});
        world.call("CreateVm", &request).ok();
        world.boot("vm");
        let file = fs::File::options().write(true).open(&disk).unwrap();
        file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
        if backend == "cloudhypervisor" {
            // Cloud Hypervisor opens no raw disk that begins as a qcow2, although the format is stated.
            world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
            let message = world.call("BootVm", &json!({"vm_id": "vm"})).error("failed_precondition");
            assert!(message.contains("the VMM refused"), "{message}");
            assert!(!message.contains("config.storage"), "this program does not look: {message}");
        } else {
            world.call("RebootVm", &json!({"vm_id": "vm", "force": true})).ok();
            world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
            world.boot("vm");
            world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
        }
        let another = json!({"vm_id": "another", "backend": backend, "config": config});
        let message = world.call("CreateVm", &another).error("invalid_argument");
        assert!(message.contains("begins as a qcow2 image"), "{message}");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    }
    world.assert_nothing_left();
}

#[test]
fn a_writable_disk_serves_one_running_vm() {
    needs_qemu!();
    let world = World::started(&[]);
    let disk = raw_disk(world.dir.path(), "disk.img", 1);
    let link = world.dir.path().join("hard-link.img");
    fs::hard_link(&disk, &link).unwrap();
    for (name, path) in [("holder", &disk), ("other", &link)] {
        let mut config = world.tiny(TinyGuest::Idle);
        config["storage"] = json!([{"path": path}]);
        world.create(name, &config);
    }
    world.boot("holder");
    let message = world.call("BootVm", &json!({"vm_id": "other"})).error("failed_precondition");
    assert!(message.contains("\"holder\""), "{message}");
    world.call("ShutdownVm", &json!({"vm_id": "holder", "force": true})).ok();
    world.boot("other");
}

#[test]
fn a_console_is_written_to_the_named_file_which_is_kept() {
    needs_qemu!();
    let world = World::started(&[]);
    let output = world.dir.path().join("my console.log");
    let mut config = world.tiny(TinyGuest::Idle);
    config["console"] = json!({"enabled": true, "output": output});
    world.create("vm", &config);
    let text = || fs::read_to_string(&output).unwrap_or_default();
    for boot in 1..=2 {
        world.boot("vm");
        crate::harness::eventually("the banner is in the file", || {
            text().matches(&TinyGuest::Idle.banner()).count() == boot
        });
        world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
    }
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    assert_eq!(
        text().matches(&TinyGuest::Idle.banner()).count(),
        2,
        "DeleteVm removes no file that the client named"
    );
    world.call("CreateVm", &json!({"vm_id": "vm", "config": config})).error("invalid_argument");
}

/// A TAP that a test made, in the test's own name, gone at its end.
struct Tap(String);

impl Tap {
    fn new() -> Option<Self> {
        let name = format!("vmct{:x}", std::process::id());
        let made =
            Command::new("ip").args(["tuntap", "add", &name, "mode", "tap"]).output().ok()?.status.success();
        let tap = made.then(|| Self(name))?;
        Command::new("ip").args(["link", "set", &tap.0, "up"]).status().ok()?;
        Command::new("ip").args(["addr", "add", "10.213.77.1/24", "dev", &tap.0]).status().ok()?;
        Some(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).status();
    }
}

#[test]
fn an_existing_tap_carries_the_guests_packets() {
    needs_qemu!();
    let args = "vmcp.ip=10.213.77.2/24 vmcp.peer=10.213.77.1 vmcp.do=ping,idle";
    let Some(mut config) = linux_config(args) else {
        return skipped(
            "an_existing_tap_carries_the_guests_packets",
            "no guest kernel; `make setup` makes it",
        );
    };
    let Some(tap) = Tap::new() else {
        return skipped(
            "an_existing_tap_carries_the_guests_packets",
            "no TAP can be made here; it takes root and ip",
        );
    };
    let world = World::started(&[]);
    config["network"] = json!([{"tap_device": tap.0, "mac_address": "02:00:00:00:00:77"}]);
    world.create("vm", &config);
    world.boot("vm");
    let console = world.wait_for_console("vm", "vmcp-guest: ping 10.213.77.1", 1);
    assert!(console.contains("net eth0 mac=02:00:00:00:00:77 ip=10.213.77.2/24"), "{console}");
    assert!(console.contains("ping 10.213.77.1 ok"), "{console}");
    world.wait_for("vm", "seen on the network", |info| {
        let stats = &info["metrics"]["network_stats"];
        ["bytes_received", "bytes_transmitted", "packets_received", "packets_transmitted"]
            .iter()
            .all(|counter| stats[*counter].is_string())
    });
    let mut rival = world.tiny(TinyGuest::Idle);
    rival["network"] = json!([{"tap_device": tap.0}]);
    world.create("rival", &rival);
    let message = world.call("BootVm", &json!({"vm_id": "rival"})).error("failed_precondition");
    assert!(message.contains("\"vm\""), "the holder is named: {message}");
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    assert!(Path::new("/sys/class/net").join(&tap.0).exists(), "an interface that was there stays");
}
