//! Converts the answer of `/vm/config` into a [`VmConfig`].

use serde_json::{Value, json};
use vmm_core::config::{
    BootConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface, Options, StorageDevice, VmConfig,
};
use vmm_core::id::is_name;
use vmm_core::spec::MIB;

use crate::attached::native_config::{count, flag, list, list_unrepresented, number, text};

/// Returns the configuration that `/vm/config` reports, and the settings that a [`VmConfig`] cannot
/// express.
pub(crate) fn configuration(native: &Value) -> (VmConfig, Vec<String>) {
    let mut unrepresented = Vec::new();
    let nothing = Value::Null;
    let part = |name: &str| native.get(name).unwrap_or(&nothing);
    let (cpu, memory) = machine(part("machine-config"), &mut unrepresented);
    let boot = part("boot-source");
    let config = VmConfig {
        cpu: Some(cpu),
        memory: Some(memory),
        boot: Some(BootConfig {
            kernel_path: text(boot, "kernel_image_path"),
            initrd_path: text(boot, "initrd_path"),
            kernel_args: text(boot, "boot_args"),
            boot_options: Options::new(),
        }),
        storage: list(native, "drives")
            .enumerate()
            .map(|(at, drive)| storage(at, drive, &mut unrepresented))
            .collect(),
        network: list(native, "network-interfaces")
            .enumerate()
            .map(|(at, net)| interface(at, net, &mut unrepresented))
            .collect(),
        ..VmConfig::default()
    };
    // The log and the counters belong to the VMM, not to the VM.
    let known = ["machine-config", "boot-source", "drives", "network-interfaces", "logger", "metrics"];
    list_unrepresented(native, &known, &[], &mut unrepresented, "");
    (config, unrepresented)
}

fn machine(reported: &Value, unrepresented: &mut Vec<String>) -> (CpuConfig, MemoryConfig) {
    let vcpu_count = count(reported, "vcpu_count");
    let pairs = flag(reported, "smt") && vcpu_count > 1;
    let topology =
        pairs.then_some(CpuTopology { sockets: 1, cores_per_socket: vcpu_count / 2, threads_per_core: 2 });
    let mut backing = Options::new();
    if text(reported, "huge_pages") == "2M" {
        backing.insert("hugepages".to_owned(), "true".to_owned());
    }
    let known = ["vcpu_count", "mem_size_mib", "smt", "huge_pages"];
    list_unrepresented(reported, &known, &[("cpu_template", json!("None"))], unrepresented, "machine");
    let cpu = CpuConfig { vcpu_count, topology, ..CpuConfig::default() };
    let size_bytes = number(reported, "mem_size_mib").saturating_mul(i64::try_from(MIB).unwrap_or(i64::MAX));
    (cpu, MemoryConfig { size_bytes, backing, ..MemoryConfig::default() })
}

fn storage(at: usize, reported: &Value, unrepresented: &mut Vec<String>) -> StorageDevice {
    let mut options = Options::new();
    if text(reported, "cache_type") == "Unsafe" {
        options.insert("cache".to_owned(), "unsafe".to_owned());
    }
    let known = ["drive_id", "path_on_host", "is_root_device", "is_read_only", "cache_type", "rate_limiter"];
    list_unrepresented(reported, &known, &[("io_engine", json!("Sync"))], unrepresented, "drive");
    limits(reported, "rate_limiter", "rate_limit.operations_per_second", &mut options, unrepresented);
    let id = text(reported, "drive_id");
    StorageDevice {
        id: if is_name(&id) { id } else { format!("disk{at}") },
        path: text(reported, "path_on_host"),
        read_only: flag(reported, "is_read_only"),
        is_root_device: flag(reported, "is_root_device"),
        interface_type: String::new(),
        options,
    }
}

fn interface(at: usize, reported: &Value, unrepresented: &mut Vec<String>) -> NetworkInterface {
    let mut options = Options::new();
    let known = ["iface_id", "host_dev_name", "guest_mac", "rx_rate_limiter", "tx_rate_limiter"];
    list_unrepresented(reported, &known, &[], unrepresented, "network interface");
    limits(reported, "rx_rate_limiter", "rate_limit.packets_per_second", &mut options, unrepresented);
    if reported.get("rx_rate_limiter") != reported.get("tx_rate_limiter") {
        unrepresented.push("different limits for what is sent and received".to_owned());
    }
    let id = text(reported, "iface_id");
    NetworkInterface {
        id: if is_name(&id) { id } else { format!("net{at}") },
        mac_address: text(reported, "guest_mac"),
        tap_device: text(reported, "host_dev_name"),
        interface_type: String::new(),
        options,
    }
}

/// Converts a limiter into options if it fills once a second and allows no burst.
fn limits(
    reported: &Value,
    field: &str,
    per_second: &str,
    options: &mut Options,
    unrepresented: &mut Vec<String>,
) {
    let Some(limiter) = reported.get(field).filter(|limiter| !limiter.is_null()) else { return };
    for (bucket, key) in [("bandwidth", "rate_limit.bytes_per_second"), ("ops", per_second)] {
        let Some(bucket) = limiter.get(bucket).filter(|bucket| !bucket.is_null()) else { continue };
        if number(bucket, "refill_time") == 1000 && number(bucket, "one_time_burst") == 0 {
            options.insert(key.to_owned(), number(bucket, "size").to_string());
        } else {
            unrepresented.push(format!("a {field} of another kind"));
        }
    }
}

#[cfg(test)]
pub(super) mod unit_tests {
    use vmm_core::spec::VmSpec;

    use super::super::convert::FirecrackerConfig;
    use super::*;

    pub(in super::super) fn spec() -> VmSpec {
        let config = serde_json::from_str(
            r#"{"cpu": {"vcpu_count": 2, "topology": {"sockets": 1, "cores_per_socket": 1, "threads_per_core": 2}},
                "memory": {"size_bytes": 134217728},
                "boot": {"kernel_path": "/k", "kernel_args": "quiet reboot=k"},
                "storage": [{"id": "a", "path": "/a"}, {"id": "b", "path": "/b", "read_only": true}],
                "network": [{"id": "n", "mac_address": "02:00:00:00:00:01", "tap_device": "tap0",
                             "options": {"rate_limit.bytes_per_second": "1000000"}}]}"#,
        );
        VmSpec::parse(&config.unwrap()).unwrap()
    }

    /// Returns the answer of `/vm/config` to the configuration of `spec`.
    pub(in super::super) fn native(spec: &VmSpec) -> Value {
        let config = FirecrackerConfig::of(spec, &["tap0".to_owned()]);
        json!({
            "machine-config": config.machine, "boot-source": config.boot, "drives": config.drives,
            "network-interfaces": config.interfaces, "vsock": null, "balloon": null, "pmem": [],
            "logger": {"level": "Error"}, "metrics": null,
        })
    }

    #[test]
    fn a_converted_specification_is_described_unchanged() {
        let (spec, (reported, unrepresented)) = (spec(), configuration(&native(&spec())));
        assert_eq!(unrepresented, [""; 0]);
        let back = VmSpec::parse(&reported).unwrap();
        assert_eq!((&back.cpu, &back.memory, &back.boot), (&spec.cpu, &spec.memory, &spec.boot));
        let disks = |spec: &VmSpec| -> Vec<_> {
            spec.disks.iter().map(|disk| (disk.path.clone(), disk.read_only)).collect()
        };
        assert_eq!(disks(&back), disks(&spec));
        assert_eq!((back.nics[0].mac, back.nics[0].limits), (spec.nics[0].mac, spec.nics[0].limits));
    }
}
