//! A VM's configuration as a client writes it: unchecked data with the shape and names of the wire.
//!
//! Two configurations are stored per VM. The one that CreateVm was sent is packed, and serves to
//! recognise a repeated creation. The one in force has generated ids and defaults filled in, and
//! clients get it back. [`crate::spec::VmSpec`] is the checked form.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A free map of a configuration, in a stable order.
pub type Options = BTreeMap<String, String>;

/// The configuration of a VM, with everything that a client can state.
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
    /// The policy for the end of a run.
    pub restart_policy: Option<RestartPolicyConfig>,
    /// True if DeleteVm is refused, also with force, until UpdateVm clears the protection.
    pub delete_protection: bool,
}

/// Virtual CPUs as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuConfig {
    /// CPUs at boot.
    pub vcpu_count: i32,
    /// Ceiling for hot-plug; 0 means `vcpu_count`.
    pub max_vcpu_count: i32,
    /// The arrangement of `max_vcpu_count` CPUs.
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
    /// True if memory may grow while the VM runs.
    pub hotplug_enabled: bool,
    /// Ceiling for growth in bytes; 0 means none.
    pub max_size_bytes: i64,
    /// The host's backing of the memory, by documented key.
    pub backing: Options,
}

/// Kernel and arguments as sent.
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
    /// True if the guest may only read.
    pub read_only: bool,
    /// True if the disk holds the guest's root file system.
    pub is_root_device: bool,
    /// The kind of device that the guest sees; empty means virtio.
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
    /// TAP on the host; empty means that the program makes one and names it.
    pub tap_device: String,
    /// The kind of device that the guest sees; empty means virtio.
    pub interface_type: String,
    /// Interface settings, by documented key.
    pub options: Options,
}

/// The console as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConsoleConfig {
    /// True if there is a console.
    pub enabled: bool,
    /// File that receives the output; empty means that the program keeps it.
    pub output: String,
    /// Source of input; only empty is served.
    pub input: String,
    /// Kind of device; empty and `serial` mean the serial port.
    pub console_type: String,
}

/// The policy for the end of a run, as sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestartPolicyConfig {
    /// Number of the wire's `RestartMode`.
    pub mode: i32,
    /// The most restarts without a quiet minute in between; 0 means 5.
    pub max_restarts: i32,
}
