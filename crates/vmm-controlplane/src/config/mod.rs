//! The daemon's configuration: several sources are merged into one typed value, or every error is
//! returned at once.
//!
//! ```text
//!   command line ──┐
//!   environment  ──┼─ sources ── text and origin ── load ──┬─ DaemonConfig typed, valid
//!   file         ──┘  (collect)  of each setting   (parse) ├─ warnings    for the log
//!                                                          ├─ effective   for check-config
//!                                                          └─ ConfigErrors
//! ```
//!
//! [`Setting`] is the table from which flags, variables, file keys and help texts are made. The
//! loader is a pure function of the command line, an environment map and a [`LoaderHost`], and
//! never reads the process by itself.

mod cli;
mod error;
mod file;
mod load;
mod notices;
mod report;
mod retired;
mod settings;
mod sockets;
mod sources;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use crate::rpc::{TlsFiles, UnixSocketOptions};

pub use cli::{Cli, ReconcileFlags, Subcommand};
pub use error::{ConfigError, ConfigErrors, Origin};
pub use retired::migrate_env;
pub use settings::{PREFIX, RETIRED_PREFIX, SHORT_PREFIX, Setting, SettingDefault, SettingSpec};
pub use sources::{Environment, LoaderHost, ThisHost};
pub use values::{BackendChoice, Endpoint, KvmSetting, ListenAddress, UnsupportedBackend, is_loopback};

/// The configuration of one hypervisor: its endpoint, and the program to start if there is no
/// endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HypervisorConfig {
    /// The choice between VMMs that the daemon starts and VMMs of another program.
    pub endpoint: Endpoint,
    /// The executable: a bare name to look up on PATH, or an absolute path.
    pub binary: PathBuf,
}

/// The boot files of a VM that names neither a kernel nor a firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootDefaults {
    /// The kernel's absolute path.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk's absolute path.
    pub initrd: Option<PathBuf>,
    /// The kernel's arguments.
    pub kernel_args: Option<String>,
}

/// The settings of OpenTelemetry and of the Prometheus page.
#[derive(Debug, Clone, PartialEq)]
pub struct OtelConfig {
    /// True if telemetry is sent.
    pub enabled: bool,
    /// The service's name in the telemetry.
    pub service_name: String,
    /// The service's version in the telemetry.
    pub service_version: String,
    /// The share of traces that is sent, from 0.0 to 1.0.
    pub sampling_rate: f64,
    /// The OTLP/HTTP collector: `HOST:PORT`, or a URL.
    pub endpoint: String,
    /// True if the Prometheus page is served; independent of `enabled`.
    pub prometheus_enabled: bool,
    /// The TCP port of the Prometheus page; 0 lets the system choose.
    pub prometheus_port: u16,
    /// True if the page has samples of each VM.
    pub prometheus_vms: bool,
}

/// The daemon's configuration, valid in itself.
#[derive(Debug, Clone, PartialEq)]
pub struct DaemonConfig {
    /// The address on which the API listens; `None` leaves the unix socket alone.
    pub listen: Option<ListenAddress>,
    /// The unix socket on which the API listens.
    pub socket: Option<UnixSocketOptions>,
    /// The certificates of the TCP port, which then serves TLS alone.
    pub tls: Option<TlsFiles>,
    /// The names besides localhost and IP addresses that are served as Host, in lower case.
    pub allowed_hosts: Vec<String>,
    /// The origins whose web pages may call the API, in lower case.
    pub cors_origins: Vec<String>,
    /// The backend of a VM that names none.
    pub default_backend: BackendChoice,
    /// Cloud Hypervisor.
    pub ch: HypervisorConfig,
    /// Firecracker.
    pub fc: HypervisorConfig,
    /// QEMU.
    pub qemu: HypervisorConfig,
    /// The use of KVM by QEMU.
    pub qemu_kvm: KvmSetting,
    /// True if libvirt domains that another program made are listed.
    pub qemu_import: bool,
    /// The boot files of a VM that names none.
    pub defaults: BootDefaults,
    /// The time between two samples of a running VM.
    pub metrics_interval: Duration,
    /// The time for which events are kept.
    pub event_retention: Duration,
    /// The bytes that are kept of each console.
    pub console_history: u64,
    /// The number of spare VMMs that are kept per backend that has started a VM.
    pub spare_vmms: usize,
    /// The directory of durable state: an absolute path, which need not exist yet.
    pub state_dir: PathBuf,
    /// The directory of sockets, process ids and consoles: an absolute path, short enough for
    /// socket names below it.
    pub runtime_dir: PathBuf,
    /// Telemetry.
    pub otel: OtelConfig,
}

impl DaemonConfig {
    /// Returns true if callers of the TCP port prove who they are, by a client certificate.
    pub fn demands_certificates(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some())
    }

    /// Returns the hypervisor of this name.
    pub fn hypervisor(&self, backend: BackendChoice) -> &HypervisorConfig {
        match backend {
            BackendChoice::CloudHypervisor => &self.ch,
            BackendChoice::Firecracker => &self.fc,
            BackendChoice::Qemu => &self.qemu,
        }
    }
}

/// A setting in effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EffectiveSetting {
    /// The setting.
    pub setting: Setting,
    /// The value as text; `None` if the setting is unset.
    pub value: Option<String>,
    /// The origin of the value.
    pub origin: Origin,
}

/// A configuration that loaded, with its warnings.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedConfig {
    /// The configuration.
    pub config: DaemonConfig,
    /// Every setting, in the table's order.
    pub effective: Vec<EffectiveSetting>,
    /// The warnings, which do not stop the start and are logged.
    pub warnings: Vec<String>,
}

impl LoadedConfig {
    /// Returns true if a source gave the setting a value, so that its default is not in effect.
    pub fn is_given(&self, setting: Setting) -> bool {
        self.effective.iter().any(|entry| entry.setting == setting && entry.origin != Origin::Default)
    }
}
