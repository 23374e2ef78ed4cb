//! Converts the answer of `vm.info` into a [`VmConfig`].

use serde_json::{Value, json};
use vmm_core::config::{
    BootConfig, ConsoleConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface, Options,
    StorageDevice, VmConfig,
};
use vmm_core::id::is_name;

use crate::attached::native_config::{count, flag, list, list_unrepresented, number, text};

/// Returns the configuration that `vm.info` reports, and the settings that a [`VmConfig`] cannot
/// express.
pub(crate) fn configuration(native: &Value) -> (VmConfig, Vec<String>) {
    let mut unrepresented = Vec::new();
    let nothing = Value::Null;
    let part = |name: &str| native.get(name).unwrap_or(&nothing);
    let config = VmConfig {
        cpu: Some(cpus(part("cpus"), &mut unrepresented)),
        memory: Some(memory(part("memory"), &mut unrepresented)),
        boot: Some(boot(part("payload"), &mut unrepresented)),
        storage: list(native, "disks")
            .enumerate()
            .map(|(at, disk)| storage(at, disk, &mut unrepresented))
            .collect(),
        network: list(native, "net")
            .enumerate()
            .map(|(at, net)| interface(at, net, &mut unrepresented))
            .collect(),
        console: Some(console(part("serial"))),
        ..VmConfig::default()
    };
    // Every other field that differs from its default is listed, so that the shown configuration is
    // not taken for the whole one.
    let known = ["cpus", "memory", "payload", "disks", "net", "serial", "console", "debug_console"];
    let defaults =
        [("rng", json!({"pci_segment": 0, "src": "/dev/urandom"})), ("rng", json!({"src": "/dev/urandom"}))];
    list_unrepresented(native, &known, &defaults, &mut unrepresented, "");
    (config, unrepresented)
}

fn cpus(reported: &Value, unrepresented: &mut Vec<String>) -> CpuConfig {
    let vcpu_count = count(reported, "boot_vcpus");
    let max = count(reported, "max_vcpus");
    let topology =
        reported.get("topology").filter(|topology| !topology.is_null()).map(|topology| CpuTopology {
            sockets: count(topology, "packages").saturating_mul(count(topology, "dies_per_package").max(1)),
            cores_per_socket: count(topology, "cores_per_die"),
            threads_per_core: count(topology, "threads_per_core"),
        });
    let known = ["boot_vcpus", "max_vcpus", "topology", "max_phys_bits", "nested", "core_scheduling"];
    let defaults = [("profile", json!("Host"))];
    list_unrepresented(reported, &known, &defaults, unrepresented, "cpus");
    CpuConfig {
        vcpu_count,
        max_vcpu_count: if max == vcpu_count { 0 } else { max },
        topology,
        features: Options::new(),
    }
}

fn memory(reported: &Value, unrepresented: &mut Vec<String>) -> MemoryConfig {
    let zones: i64 = list(reported, "zones").map(|zone| number(zone, "size")).fold(0, i64::saturating_add);
    let size_bytes = number(reported, "size").saturating_add(zones);
    let room = number(reported, "hotplug_size");
    let mut backing = Options::new();
    for key in ["shared", "hugepages"] {
        if flag(reported, key) {
            backing.insert(key.to_owned(), "true".to_owned());
        }
    }
    let known = ["size", "hotplug_size", "shared", "hugepages"];
    let defaults = [("hotplug_method", json!("Acpi")), ("thp", json!(true))];
    list_unrepresented(reported, &known, &defaults, unrepresented, "memory");
    MemoryConfig {
        size_bytes,
        hotplug_enabled: room > 0,
        max_size_bytes: if room > 0 { size_bytes.saturating_add(room) } else { 0 },
        backing,
    }
}

fn boot(reported: &Value, unrepresented: &mut Vec<String>) -> BootConfig {
    list_unrepresented(reported, &["kernel", "initramfs", "cmdline"], &[], unrepresented, "payload");
    BootConfig {
        kernel_path: text(reported, "kernel"),
        initrd_path: text(reported, "initramfs"),
        kernel_args: text(reported, "cmdline"),
        boot_options: Options::new(),
    }
}

/// Returns the first of `fields` that is a legal name, or a name from the device's position.
fn device_id(reported: &Value, fields: &[&str], kind: &str, at: usize) -> String {
    let ids = fields.iter().map(|field| text(reported, field));
    ids.into_iter().find(|id| is_name(id)).unwrap_or_else(|| format!("{kind}{at}"))
}

fn storage(at: usize, reported: &Value, unrepresented: &mut Vec<String>) -> StorageDevice {
    let mut options = Options::new();
    match text(reported, "image_type").as_str() {
        "Qcow2" => {
            options.insert("format".to_owned(), "qcow2".to_owned());
        }
        "Raw" | "" | "Unknown" => {}
        other => unrepresented.push(format!("a disk in the format {other}")),
    }
    for (key, field) in [("direct_io", "direct"), ("backing_files", "backing_files")] {
        if flag(reported, field) {
            options.insert(key.to_owned(), "true".to_owned());
        }
    }
    let known = ["id", "serial", "path", "readonly", "direct", "image_type", "backing_files", "pci_segment"];
    let defaults = [
        ("num_queues", json!(1)),
        ("queue_size", json!(128)),
        ("sparse", json!(true)),
        ("lock_granularity", json!("ByteRange")),
    ];
    list_unrepresented(reported, &known, &defaults, unrepresented, "disk");
    StorageDevice {
        id: device_id(reported, &["serial", "id"], "disk", at),
        path: text(reported, "path"),
        read_only: flag(reported, "readonly"),
        is_root_device: false,
        interface_type: String::new(),
        options,
    }
}

fn interface(at: usize, reported: &Value, unrepresented: &mut Vec<String>) -> NetworkInterface {
    let known = ["id", "tap", "mac", "pci_segment", "host_mac"];
    let defaults = [
        ("ip", json!("192.168.249.1")),
        ("mask", json!("255.255.255.0")),
        ("num_queues", json!(2)),
        ("queue_size", json!(256)),
        ("vhost_mode", json!("Client")),
        ("offload_tso", json!(true)),
        ("offload_ufo", json!(true)),
        ("offload_csum", json!(true)),
    ];
    list_unrepresented(reported, &known, &defaults, unrepresented, "net");
    if text(reported, "tap").is_empty() && !flag(reported, "vhost_user") {
        // The VMM creates a TAP itself when it boots the VM, and does not report its name.
        unrepresented.push("net with a TAP that the VMM makes".to_owned());
    }
    NetworkInterface {
        id: device_id(reported, &["id"], "net", at),
        mac_address: text(reported, "mac"),
        tap_device: text(reported, "tap"),
        interface_type: String::new(),
        options: Options::new(),
    }
}

fn console(reported: &Value) -> ConsoleConfig {
    let enabled = !matches!(text(reported, "mode").as_str(), "" | "Off" | "Null");
    ConsoleConfig {
        enabled,
        output: if enabled { text(reported, "file") } else { String::new() },
        ..ConsoleConfig::default()
    }
}

#[cfg(test)]
pub(super) mod unit_tests {
    use vmm_core::spec::VmSpec;

    use super::super::convert::CloudHypervisorConfig;
    use super::*;

    fn spec(text: &str) -> VmSpec {
        VmSpec::parse(&serde_json::from_str(text).unwrap()).unwrap()
    }

    pub(in super::super) fn large() -> VmSpec {
        spec(
            r#"{"cpu": {"vcpu_count": 2, "max_vcpu_count": 4, "topology": {"sockets": 2, "cores_per_socket": 1, "threads_per_core": 2}},
                "memory": {"size_bytes": 134217728, "hotplug_enabled": true, "max_size_bytes": 268435456, "backing": {"shared": "true"}},
                "boot": {"kernel_path": "/k", "initrd_path": "/i", "kernel_args": "quiet"},
                "storage": [{"id": "data", "path": "/d", "read_only": true, "options": {"format": "qcow2", "direct_io": "true"}}],
                "network": [{"id": "n", "mac_address": "02:00:00:00:00:01", "tap_device": "tap0"}]}"#,
        )
    }

    #[test]
    fn a_converted_specification_is_described_unchanged() {
        let spec = large();
        let native = serde_json::to_value(CloudHypervisorConfig::of(&spec, &["tap0".to_owned()])).unwrap();
        let (reported, unrepresented) = configuration(&native);
        assert_eq!(unrepresented, [""; 0]);
        let back = VmSpec::parse(&reported).unwrap();
        assert_eq!((&back.cpu, &back.memory, &back.boot), (&spec.cpu, &spec.memory, &spec.boot));
        assert_eq!(
            (&back.disks, back.nics[0].mac, &back.nics[0].tap),
            (&spec.disks, spec.nics[0].mac, &spec.nics[0].tap)
        );
    }

    #[test]
    fn unrepresented_settings_are_named() {
        let native = json!({
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": true},
            "memory": {"size": 0, "zones": [{"id": "a", "size": 67108864}, {"id": "b", "size": 67108864}]},
            "payload": {"firmware": "/fw"},
            "disks": [{"path": null, "vhost_user": true, "vhost_socket": "/s"}],
            "net": [{"tap": null, "mac": "02:00:00:00:00:01"}, {"vhost_user": true, "vhost_socket": "/s"}],
            "rng": {"src": "/dev/random"},
            "vsock": {"cid": 3, "socket": "/v"},
            "watchdog": true,
        });
        let (reported, unrepresented) = configuration(&native);
        assert_eq!(reported.memory.unwrap().size_bytes, 128 << 20);
        for named in [
            "cpus kvm_hyperv",
            "memory zones",
            "payload firmware",
            "disk vhost_user",
            "net with a TAP that the VMM makes",
            "net vhost_user",
            "rng",
            "vsock",
            "watchdog",
        ] {
            assert!(unrepresented.iter().any(|text| text == named), "{named} is not in {unrepresented:?}");
        }
    }

    #[test]
    fn every_reported_configuration_is_described_without_a_panic() {
        for odd in
            [json!(null), json!([]), json!({"disks": 5, "cpus": [], "memory": {"size": -1}}), json!("x")]
        {
            let (reported, _) = configuration(&odd);
            let _ = VmSpec::imported(&reported);
        }
    }
}
