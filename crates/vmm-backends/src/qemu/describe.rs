//! Reads the configuration of a running QEMU's VM. A question that fails leaves its value empty.

use serde_json::{Value, json};
use vmm_core::config::{
    BootConfig, CpuConfig, MemoryConfig, NetworkInterface, Options, StorageDevice, VmConfig,
};
use vmm_core::id::is_name;

use super::qmp::Qmp;
use crate::attached::native_config::{MAX_DEVICES, flag, number, text};
use crate::sanitize;

/// The configuration that QEMU reports.
pub(super) struct QemuDescription {
    pub(super) config: VmConfig,
    pub(super) accelerator: String,
    pub(super) machine: String,
}

/// Asks QEMU for the values of a [`VmConfig`].
pub(super) async fn describe(qmp: &Qmp) -> QemuDescription {
    let cpus = ask(qmp, "query-cpus-fast").await;
    let memory = ask(qmp, "query-memory-size-summary").await;
    let disks = ask(qmp, "query-block").await;
    let filters = ask(qmp, "query-rx-filter").await;
    let kvm = ask(qmp, "query-kvm").await;
    let machine = property(qmp, "type").await;
    let boot = BootConfig {
        kernel_path: property(qmp, "kernel").await,
        initrd_path: property(qmp, "initrd").await,
        kernel_args: property(qmp, "append").await,
        boot_options: Options::new(),
    };
    let devices = |answer: &Value| answer.as_array().cloned().unwrap_or_default();
    let config = VmConfig {
        cpu: Some(CpuConfig {
            vcpu_count: i32::try_from(devices(&cpus).len()).unwrap_or(i32::MAX),
            ..CpuConfig::default()
        }),
        memory: Some(MemoryConfig {
            size_bytes: number(&memory, "base-memory").saturating_add(number(&memory, "plugged-memory")),
            ..MemoryConfig::default()
        }),
        boot: Some(boot),
        storage: devices(&disks).iter().take(MAX_DEVICES).enumerate().filter_map(storage).collect(),
        network: devices(&filters).iter().take(MAX_DEVICES).enumerate().map(interface).collect(),
        ..VmConfig::default()
    };
    QemuDescription {
        config,
        accelerator: if flag(&kvm, "enabled") { "kvm" } else { "tcg" }.to_owned(),
        machine: machine.trim_end_matches("-machine").trim_start_matches("pc-").to_owned(),
    }
}

async fn ask(qmp: &Qmp, command: &'static str) -> Value {
    qmp.execute(command, Value::Null).await.unwrap_or(Value::Null)
}

async fn property(qmp: &Qmp, name: &str) -> String {
    let answer: Result<String, _> =
        qmp.execute("qom-get", json!({ "path": "/machine", "property": name })).await;
    answer.map(|value| sanitize::value(&value)).unwrap_or_default()
}

/// Returns a disk, or `None` for an empty drive.
fn storage((at, reported): (usize, &Value)) -> Option<StorageDevice> {
    let inserted = reported.get("inserted").filter(|inserted| !inserted.is_null())?;
    let mut options = Options::new();
    if text(inserted, "drv") == "qcow2" {
        options.insert("format".to_owned(), "qcow2".to_owned());
    }
    let id = text(reported, "device");
    Some(StorageDevice {
        id: if is_name(&id) { id } else { format!("disk{at}") },
        path: text(inserted.get("image").unwrap_or(inserted), "filename"),
        read_only: flag(inserted, "ro"),
        options,
        ..StorageDevice::default()
    })
}

fn interface((at, reported): (usize, &Value)) -> NetworkInterface {
    let id = text(reported, "name");
    NetworkInterface {
        id: if is_name(&id) { id } else { format!("net{at}") },
        mac_address: text(reported, "main-mac"),
        ..NetworkInterface::default()
    }
}
