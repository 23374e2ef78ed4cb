//! The daemon's configuration: many sources in, one typed value out, or every error at once.
//!
//! ```text
//!   command line ──┐
//!   environment  ──┼─ sources ── text and origin ── load ──┬─ Config      typed, valid
//!   file         ──┘  (collect)  of each setting   (parse) ├─ warnings    for the log
//!                                                          ├─ effective   for check-config
//!                                                          └─ ConfigErrors
//! ```
//!
//! [`Setting`] is the table from which flags, variables, file keys and help texts are made. The loader is a pure
//! function of the command line, an environment map and a [`Host`]: it never looks at the process by itself.

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

pub use cli::{Cli, Command, Reconcile};
pub use error::{ConfigError, ConfigErrors, Origin};
pub use retired::migrate_env;
pub use settings::{Fallback, PREFIX, RETIRED_PREFIX, SHORT_PREFIX, Setting, Spec};
pub use sources::{Environment, Host, ThisHost};
pub use values::{BackendName, Endpoint, Kvm, Listen, UnsupportedBackend, is_loopback};

/// One hypervisor: how to reach it, and what to start where there is nothing to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hypervisor {
    /// Whether processes are started, or somebody else's are used.
    pub endpoint: Endpoint,
    /// The executable: a bare name to look up on PATH, or an absolute path.
    pub binary: PathBuf,
}

/// What a VM boots that names neither a kernel nor a firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootDefaults {
    /// The kernel's absolute path.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk's absolute path.
    pub initrd: Option<PathBuf>,
    /// The kernel's arguments.
    pub kernel_args: Option<String>,
}

/// OpenTelemetry, and the Prometheus page.
#[derive(Debug, Clone, PartialEq)]
pub struct Otel {
    /// Whether anything is sent.
    pub enabled: bool,
    /// The service's name in what is sent.
    pub service_name: String,
    /// The service's version in what is sent.
    pub service_version: String,
    /// The share of traces that is sent, from 0.0 to 1.0.
    pub sampling_rate: f64,
    /// The OTLP/HTTP collector: `HOST:PORT`, or a URL.
    pub endpoint: String,
    /// Whether the Prometheus page is served; independent of `enabled`.
    pub prometheus_enabled: bool,
    /// The TCP port of the Prometheus page; 0 lets the system choose.
    pub prometheus_port: u16,
}

/// The daemon's configuration, valid in itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where the API listens.
    pub listen: Listen,
    /// Names besides localhost and IP addresses that are served as Host; lower case.
    pub allowed_hosts: Vec<String>,
    /// Origins whose web pages may call the API; lower case.
    pub cors_origins: Vec<String>,
    /// The backend of a VM that names none.
    pub default_backend: BackendName,
    /// Cloud Hypervisor.
    pub ch: Hypervisor,
    /// Firecracker.
    pub fc: Hypervisor,
    /// QEMU.
    pub qemu: Hypervisor,
    /// Whether QEMU uses KVM.
    pub qemu_kvm: Kvm,
    /// Whether libvirt domains that are not ours are listed.
    pub qemu_import: bool,
    /// What a VM boots that does not say.
    pub defaults: BootDefaults,
    /// Time between two samples of a running VM.
    pub metrics_interval: Duration,
    /// How long events are kept.
    pub event_retention: Duration,
    /// How many spare VMMs are kept per backend that has started a VM.
    pub spare_vmms: usize,
    /// Durable state; an absolute path, which need not exist yet.
    pub state_dir: PathBuf,
    /// Sockets, process ids, consoles; an absolute path, short enough for socket names below it.
    pub runtime_dir: PathBuf,
    /// Telemetry.
    pub otel: Otel,
}

impl Config {
    /// Returns the hypervisor of this name.
    pub fn hypervisor(&self, backend: BackendName) -> &Hypervisor {
        match backend {
            BackendName::CloudHypervisor => &self.ch,
            BackendName::Firecracker => &self.fc,
            BackendName::Qemu => &self.qemu,
        }
    }
}

/// A setting in effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// The setting.
    pub setting: Setting,
    /// Its value as text; `None` where it is unset.
    pub value: Option<String>,
    /// Who gave the value.
    pub origin: Origin,
}

/// A configuration that loaded, and what is to be said about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Every setting, in the table's order.
    pub effective: Vec<Effective>,
    /// What does not stop the start but deserves a line in the log.
    pub warnings: Vec<String>,
}
