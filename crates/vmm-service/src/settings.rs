//! The settings of the service, which the configuration of the daemon gives.

use std::path::PathBuf;
use std::time::Duration;

/// The settings of the service.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The folder of sockets, logs and consoles.
    pub runtime_dir: PathBuf,
    /// The kernel of VMs that name none.
    pub default_boot: DefaultBoot,
    /// The time between two samples of a running VM.
    pub metrics_interval: Duration,
    /// The time for which events are kept.
    pub event_retention: Duration,
    /// The bytes that are kept of each console, at least. At most twice as many take up space.
    pub console_history: u64,
    /// The number of spare VMMs of each backend that has started a VM. Zero means none.
    pub spare_vmms: usize,
}

/// The kernel of VMs that name none. An empty `kernel` means that there is no default.
#[derive(Clone, Debug, Default)]
pub struct DefaultBoot {
    /// The path of the kernel image on the host.
    pub kernel: String,
    /// The path of the initial RAM disk on the host, or empty.
    pub initrd: String,
    /// The kernel command line, or empty.
    pub kernel_args: String,
}
