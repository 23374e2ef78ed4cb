//! The documented fields of disks, network interfaces and the console.

use std::path::Path;
use std::process::Command;

use vmm_core::config::{ConsoleConfig, NetworkInterface, StorageDevice, VmConfig};
use vmm_service::ServiceError;

use super::fields::{assert_evidence, field_of};
use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM, file_shows};
use super::tap::TestTap;
use crate::guests::TinyGuest;

fn disk(vms: &DaemonLife, name: &str) -> StorageDevice {
    let path = vms.rig.dir().join(name);
    std::fs::write(&path, vec![0; 1 << 20]).expect("the disk can be written");
    StorageDevice { id: name.replace('.', "-"), path: path.display().to_string(), ..StorageDevice::default() }
}

fn with_options(mut disk: StorageDevice, options: &[(&str, &str)]) -> StorageDevice {
    disk.options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    disk
}

async fn storage(vms: &DaemonLife, path: &str, storage: Vec<StorageDevice>) -> CaseVerdict {
    let config = VmConfig { storage, ..vms.config(TinyGuest::Idle) };
    field_of(vms, path, config).await.without(vms.rig.dir())
}

pub(super) async fn several_disks(vms: DaemonLife) -> CaseVerdict {
    let disks = vec![disk(&vms, "a.raw"), disk(&vms, "b.raw"), disk(&vms, "c.raw")];
    storage(&vms, "config.storage", disks).await
}

/// The root device is the first disk, and the kernel's arguments name it.
pub(super) async fn root_device(vms: DaemonLife) -> CaseVerdict {
    let root = StorageDevice { is_root_device: true, ..disk(&vms, "root.raw") };
    storage(&vms, "config.storage", vec![disk(&vms, "data.raw"), root]).await
}

pub(super) async fn qcow2_disk(vms: DaemonLife) -> CaseVerdict {
    let path = vms.rig.dir().join("a.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
    if !made.is_ok_and(|status| status.success()) {
        return CaseVerdict::NotRun("qemu-img is not there to make an image".to_owned());
    }
    let plain =
        StorageDevice { id: "a".to_owned(), path: path.display().to_string(), ..StorageDevice::default() };
    // Formats are never probed: every backend refuses a qcow2 image without the format option.
    let unsaid = VmConfig { storage: vec![plain.clone()], ..vms.config(TinyGuest::Idle) };
    let refused = vms.try_create(VM, unsaid).await.expect_err("raw would hand the guest the header");
    assert!(matches!(refused, ServiceError::Invalid(_)), "{refused:?}");
    storage(&vms, "config.storage", vec![with_options(plain, &[("format", "qcow2")])]).await
}

pub(super) async fn read_only_disk(vms: DaemonLife) -> CaseVerdict {
    let disks = vec![StorageDevice { read_only: true, ..disk(&vms, "a.raw") }, disk(&vms, "b.raw")];
    storage(&vms, "config.storage[0]", disks).await
}

pub(super) async fn disk_rate_limits(vms: DaemonLife) -> CaseVerdict {
    let limits = [("rate_limit.bytes_per_second", "1000000"), ("rate_limit.operations_per_second", "200")];
    storage(&vms, "config.storage[0].options", vec![with_options(disk(&vms, "a.raw"), &limits)]).await
}

pub(super) async fn cache_unsafe(vms: DaemonLife) -> CaseVerdict {
    let disks = vec![with_options(disk(&vms, "a.raw"), &[("cache", "unsafe")])];
    storage(&vms, "config.storage[0].options", disks).await
}

pub(super) async fn direct_io(vms: DaemonLife) -> CaseVerdict {
    let disks = vec![with_options(disk(&vms, "a.raw"), &[("direct_io", "true")])];
    storage(&vms, "config.storage[0].options", disks).await
}

fn nic(id: &str, tap: &str, mac: &str) -> NetworkInterface {
    NetworkInterface {
        id: id.to_owned(),
        tap_device: tap.to_owned(),
        mac_address: mac.to_owned(),
        ..NetworkInterface::default()
    }
}

/// Existing TAPs are used, and are not deleted.
pub(super) async fn nics_on_taps(vms: DaemonLife) -> CaseVerdict {
    let (first, second) = match (TestTap::new(), TestTap::new()) {
        (Ok(first), Ok(second)) => (first, second),
        (Err(why), _) | (_, Err(why)) => return CaseVerdict::NotRun(why),
    };
    let network =
        vec![nic("a", first.name(), "02:00:00:00:05:01"), nic("b", second.name(), "02:00:00:00:05:02")];
    let verdict = field_of(&vms, "config.network", VmConfig { network, ..vms.config(TinyGuest::Idle) }).await;
    vms.delete(VM, true).await.expect("DeleteVm succeeds");
    assert!(TestTap::exists(first.name()) && TestTap::exists(second.name()), "what was there before stays");
    verdict
}

pub(super) async fn nic_rate_limits(vms: DaemonLife) -> CaseVerdict {
    let tap = match TestTap::new() {
        Ok(tap) => tap,
        Err(why) => return CaseVerdict::NotRun(why),
    };
    let mut limited = nic("a", tap.name(), "02:00:00:00:05:03");
    for (key, value) in [("rate_limit.bytes_per_second", "1000000"), ("rate_limit.packets_per_second", "200")]
    {
        limited.options.insert(key.to_owned(), value.to_owned());
    }
    let config = VmConfig { network: vec![limited], ..vms.config(TinyGuest::Idle) };
    field_of(&vms, "config.network[0].options", config).await
}

/// A named TAP that does not exist is made, and is deleted with the VM.
pub(super) async fn tap_made_by_name(vms: DaemonLife) -> CaseVerdict {
    made_tap(&vms, &TestTap::free_name()).await
}

/// A TAP without a name gets one from the program, is made, and is deleted with the VM.
pub(super) async fn tap_named_by_the_program(vms: DaemonLife) -> CaseVerdict {
    made_tap(&vms, "").await
}

async fn made_tap(vms: &DaemonLife, asked: &str) -> CaseVerdict {
    // The TAP is dropped at once. It only shows whether this host can make TAPs.
    if let Err(why) = TestTap::new() {
        return CaseVerdict::NotRun(why);
    }
    let network = vec![nic("a", asked, "02:00:00:00:05:04")];
    let verdict = field_of(vms, "config.network", VmConfig { network, ..vms.config(TinyGuest::Idle) }).await;
    let chosen = vms.record(VM).uid.tap_name(0);
    let name = if asked.is_empty() { chosen.as_str() } else { asked };
    if !vms.column().is_real() {
        // The fake has no network.
        return verdict;
    }
    assert!(TestTap::exists(name), "{name} is there while the VM runs");
    assert!(vms.view(VM).await.contains(name));
    vms.delete(VM, true).await.expect("DeleteVm succeeds");
    assert!(!TestTap::exists(name), "{name} goes with the VM");
    verdict
}

/// A TAP serves one running VM. The refusal of a second VM names the holder.
pub(super) async fn one_tap_one_vm(vms: DaemonLife) -> CaseVerdict {
    let tap = match TestTap::new() {
        Ok(tap) => tap,
        Err(why) => return CaseVerdict::NotRun(why),
    };
    let on = |mac| VmConfig { network: vec![nic("a", tap.name(), mac)], ..vms.config(TinyGuest::Idle) };
    refused_while_held(&vms, on("02:00:00:00:05:05"), on("02:00:00:00:05:06")).await
}

/// A writable disk serves one running VM, also under a second path.
pub(super) async fn one_disk_one_vm(vms: DaemonLife) -> CaseVerdict {
    let held = disk(&vms, "held.raw");
    let link = vms.rig.dir().join("link.raw");
    // A hard link, because a disk is identified by its device and inode and not by its path.
    std::fs::hard_link(&held.path, &link).expect("the disk can be linked");
    let other = StorageDevice { path: link.display().to_string(), ..held.clone() };
    let with = |disk| VmConfig { storage: vec![disk], ..vms.config(TinyGuest::Idle) };
    refused_while_held(&vms, with(held), with(other)).await
}

async fn refused_while_held(vms: &DaemonLife, first: VmConfig, second: VmConfig) -> CaseVerdict {
    vms.run("holder", first).await;
    vms.create("rival", second).await;
    let error = vms.boot("rival").await.expect_err("it is held");
    assert!(matches!(error, ServiceError::Precondition(_)), "{error:?}");
    assert!(error.to_string().contains("\"holder\""), "it names the holder: {error}");
    vms.force_shutdown("holder").await.expect("ShutdownVm succeeds");
    vms.boot("rival").await.expect("it is free now");
    CaseVerdict::Served
}

/// The console is kept from the first message on, over boots and reboots.
pub(super) async fn console_kept(vms: DaemonLife) -> CaseVerdict {
    vms.run_tiny(TinyGuest::Idle).await;
    vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
    vms.boot_again(VM).await.expect("BootVm succeeds");
    vms.console_shows(VM, &TinyGuest::Idle.banner(), 2).await;
    if vms.facts.reboots {
        vms.reboot(VM, false).await.expect("RebootVm succeeds");
    } else {
        vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
        vms.boot_again(VM).await.expect("BootVm succeeds");
    }
    let console = vms.console_shows(VM, &TinyGuest::Idle.banner(), 3).await;
    let lines: Vec<&str> = console.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines, vec![TinyGuest::Idle.banner(); 3], "the guest's words and no others");
    CaseVerdict::Served
}

/// The console is written to the named file, which is not deleted.
pub(super) async fn console_to_a_file(vms: DaemonLife) -> CaseVerdict {
    // The comma and the spaces must survive the option syntax of the hypervisor.
    let output = vms.rig.dir().join("my console, with a comma.log");
    let console = Some(ConsoleConfig {
        enabled: true,
        output: output.display().to_string(),
        ..ConsoleConfig::default()
    });
    vms.run(VM, VmConfig { console, ..vms.config(TinyGuest::Idle) }).await;
    file_shows(&output, &TinyGuest::Idle.banner(), 1).await;
    vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
    vms.boot_again(VM).await.expect("BootVm succeeds");
    file_shows(&output, &TinyGuest::Idle.banner(), 2).await;
    assert!(!vms.console_file(VM).exists(), "nothing is kept beside it");
    vms.delete(VM, true).await.expect("DeleteVm succeeds");
    assert!(output.exists(), "DeleteVm removes no file that the client named");
    CaseVerdict::Served
}

pub(super) async fn console_off(vms: DaemonLife) -> CaseVerdict {
    let console = Some(ConsoleConfig::default());
    let record = vms.run(VM, VmConfig { console, ..vms.config(TinyGuest::Idle) }).await;
    assert_evidence(&vms).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    let dir = record.uid.run_dir(&vms.rig.runtime_dir());
    assert!(!holds(&dir, &TinyGuest::Idle.banner()), "what the guest prints is not kept");
    CaseVerdict::Served
}

/// Returns true if a file in `dir` contains `text`.
fn holds(dir: &Path, text: &str) -> bool {
    let files = std::fs::read_dir(dir).expect("the run folder is there").flatten();
    files.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())).any(|entry| {
        std::fs::read(entry.path()).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
    })
}
