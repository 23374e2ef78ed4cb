//! A VM's configuration as a client writes it: plain data with the shape and the names of the wire, checked by nothing.
//!
//! Two of these are stored per VM: the one that was sent, packed, to recognise a repeated creation, and the one that is in force, with
//! generated ids and defaults filled in, which is what clients get back. [`crate::spec::VmSpec`] is the checked form.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A free map of a configuration, in a stable order.
pub type Options = BTreeMap<String, String>;

/// Everything a client may say about a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// Virtual CPUs; required.
    pub cpu: Option<CpuConfig>,
    /// Memory; required.
    pub memory: Option<MemoryConfig>,
    /// Kernel and arguments; required unless the host has a default kernel.
    pub boot: Option<BootConfig>,
    /// Disks, in the order the guest sees them.
    pub storage: Vec<StorageDevice>,
    /// Network interfaces, in the order the guest sees them.
    pub network: Vec<NetworkInterface>,
    /// The serial console.
    pub console: Option<ConsoleConfig>,
    /// The client's own labels.
    pub metadata: Options,
    /// What follows the end of a run.
    pub restart_policy: Option<RestartPolicyConfig>,
}

/// Virtual CPUs as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuConfig {
    /// CPUs at boot.
    pub vcpu_count: i32,
    /// Ceiling for hot-plug; 0 means `vcpu_count`.
    pub max_vcpu_count: i32,
    /// How the ceiling's CPUs are arranged.
    pub topology: Option<CpuTopology>,
    /// CPU features, by documented key.
    pub features: Options,
}

/// Arrangement of CPUs as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuTopology {
    /// Sockets.
    pub sockets: i32,
    /// Cores in each socket.
    pub cores_per_socket: i32,
    /// Threads on each core.
    pub threads_per_core: i32,
}

/// Memory as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryConfig {
    /// Bytes at boot.
    pub size_bytes: i64,
    /// Whether memory may grow while the VM runs.
    pub hotplug_enabled: bool,
    /// Ceiling for growth in bytes; 0 means none.
    pub max_size_bytes: i64,
    /// How the host backs the memory, by documented key.
    pub backing: Options,
}

/// Boot as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BootConfig {
    /// Kernel image on the host.
    pub kernel_path: String,
    /// Initial RAM disk on the host; empty means none.
    pub initrd_path: String,
    /// Kernel command line.
    pub kernel_args: String,
    /// Boot settings, by documented key.
    pub boot_options: Options,
}

/// One disk as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StorageDevice {
    /// Name among this VM's disks; empty means generated.
    pub id: String,
    /// Image or block device on the host.
    pub path: String,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether the guest's root file system is on it.
    pub is_root_device: bool,
    /// How the guest sees it; empty means virtio.
    pub interface_type: String,
    /// Disk settings, by documented key.
    pub options: Options,
}

/// One network interface as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkInterface {
    /// Name among this VM's interfaces; empty means generated.
    pub id: String,
    /// Hardware address; empty means generated.
    pub mac_address: String,
    /// TAP on the host; empty means named by the program.
    pub tap_device: String,
    /// How the guest sees it; empty means virtio.
    pub interface_type: String,
    /// Interface settings, by documented key.
    pub options: Options,
}

/// The console as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConsoleConfig {
    /// Whether there is one.
    pub enabled: bool,
    /// File that receives the output; empty means kept by the program.
    pub output: String,
    /// Source of input; only empty is served.
    pub input: String,
    /// Kind of device; empty and `serial` mean the serial port.
    pub console_type: String,
}

/// What follows the end of a run, as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestartPolicyConfig {
    /// Number of the wire's `RestartMode`.
    pub mode: i32,
    /// Restarts without a quiet minute between; 0 means 5.
    pub max_restarts: i32,
}
