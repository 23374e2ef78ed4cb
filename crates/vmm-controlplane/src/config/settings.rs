//! The table of settings: the single source of every name under which a setting can be given.
//!
//! One key names a setting everywhere, and the other spellings are computed from it:
//!
//! ```text
//!   key (file)        ch_endpoint   or   [ch] endpoint
//!   flag              --ch-endpoint
//!   variable          UNKEY_VMCP_CH_ENDPOINT, then VMCP_CH_ENDPOINT
//!   retired variable  CHCP_CH_ENDPOINT
//! ```
//!
//! The command line, the file reader, the error messages, `check-config`, and the test over
//! `docs/configuration.md` all read this table, so a setting that is added here exists everywhere
//! at once.

/// The prefix of the variables that the program reads first.
pub const PREFIX: &str = "UNKEY_VMCP_";
/// The prefix of the variables that the program reads if the first one is not set.
pub const SHORT_PREFIX: &str = "VMCP_";
/// The prefix of the variables of the program's predecessor, which are no longer read.
pub const RETIRED_PREFIX: &str = "CHCP_";
/// The key of the configuration file's own name, which cannot stand in the file itself.
pub(super) const CONFIG_KEY: &str = "config";

/// The value of a setting that nobody gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingDefault {
    /// The setting stays unset.
    Unset,
    /// This text, which is read by the same parser as a given one.
    Text(&'static str),
    /// A directory that depends on the user; the text is root's.
    Directory(&'static str),
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct SettingSpec {
    /// The key in the configuration file, in snake case.
    pub key: &'static str,
    /// The heading in the help text under which the flag stands.
    pub heading: &'static str,
    /// The name of the value in the help text.
    pub value_name: &'static str,
    /// The value if none is given.
    pub default: SettingDefault,
    /// The purpose of the setting, in one or two sentences.
    pub help: &'static str,
}

macro_rules! settings {
    ($(
        $heading:literal {
            $( $(#[doc = $doc:literal])+ $name:ident = $key:literal <$value:literal> $default:expr; )+
        }
    )+) => {
        /// A setting of the daemon, in the order of the help text and of the documentation.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Setting {
            $($( $(#[doc = $doc])+ $name, )+)+
        }

        impl Setting {
            /// Every setting, in order.
            pub const ALL: &'static [Setting] = &[$($(Setting::$name,)+)+];

            /// Returns the setting's row of the table.
            pub const fn spec(self) -> &'static SettingSpec {
                match self {
                    $($(Setting::$name => &SettingSpec {
                        key: $key,
                        heading: $heading,
                        value_name: $value,
                        default: $default,
                        help: concat!($($doc),+),
                    },)+)+
                }
            }
        }
    };
}

use SettingDefault::{Directory, Text, Unset};

settings! {
    "Listening" {
        /// IP address or host name to listen on; none leaves the unix socket alone.
        Address = "address" <"ADDRESS"> Text("127.0.0.1");
        /// TCP port to listen on; 0 lets the system choose a free one.
        Port = "port" <"PORT"> Text("8080");
        /// Unix socket that serves the API too, an absolute path.
        Socket = "socket" <"PATH"> Unset;
        /// Permission bits of the unix socket, in octal digits.
        SocketMode = "socket_mode" <"MODE"> Text("0660");
        /// Group of the unix socket, a name or an id; if unset, the group of the daemon.
        SocketGroup = "socket_group" <"GROUP"> Unset;
        /// Certificate chain of the TCP port in PEM form, an absolute path; with it the port serves TLS alone.
        TlsCert = "tls_cert" <"PATH"> Unset;
        /// Private key of the certificate in PEM form, an absolute path.
        TlsKey = "tls_key" <"PATH"> Unset;
        /// Authorities of client certificates in PEM form, an absolute path; with them every client of the TCP port needs a certificate.
        TlsClientCa = "tls_client_ca" <"PATH"> Unset;
        /// Names besides localhost and IP addresses that clients may use in the Host header, comma-separated.
        AllowedHosts = "allowed_hosts" <"NAME,..."> Text("");
        /// Origins whose web pages may call the API, comma-separated, such as `https://vms.example.com`.
        CorsOrigins = "cors_origins" <"ORIGIN,..."> Text("");
    }
    "Backends" {
        /// Backend of a VM that names none: cloudhypervisor, firecracker or qemu.
        Backend = "backend" <"BACKEND"> Text("cloudhypervisor");
        /// Cloud Hypervisor sockets to attach to, comma-separated unix:///path; if unset, the daemon starts one process per VM.
        ChEndpoint = "ch_endpoint" <"ENDPOINT"> Unset;
        /// Firecracker sockets to attach to, comma-separated unix:///path; if unset, the daemon starts one process per VM.
        FcEndpoint = "fc_endpoint" <"ENDPOINT"> Unset;
        /// QMP socket of a running QEMU (unix:///path), or libvirt (qemu:///system, qemu:///session, qemu+unix://...); if unset, the daemon starts one process per VM.
        QemuEndpoint = "qemu_endpoint" <"ENDPOINT"> Unset;
        /// Cloud Hypervisor executable: a name looked up on PATH, or an absolute path.
        ChBinary = "ch_binary" <"PROGRAM"> Text("cloud-hypervisor");
        /// Firecracker executable: a name looked up on PATH, or an absolute path.
        FcBinary = "fc_binary" <"PROGRAM"> Text("firecracker");
        /// QEMU executable: a name looked up on PATH, or an absolute path.
        QemuBinary = "qemu_binary" <"PROGRAM"> Text("qemu-system-x86_64");
        /// Use of KVM by QEMU: true, false, or auto, which uses KVM if /dev/kvm opens and the CPU has vmx or svm.
        QemuKvm = "qemu_kvm" <"auto|true|false"> Text("auto");
        /// Import of the libvirt domains that another program made.
        QemuImport = "qemu_import" <"true|false"> Text("false");
    }
    "Defaults for VMs" {
        /// Kernel of a VM that names neither a kernel nor a firmware; an absolute path.
        DefaultKernel = "default_kernel" <"PATH"> Unset;
        /// Initial RAM disk that goes with the default kernel; an absolute path.
        DefaultInitrd = "default_initrd" <"PATH"> Unset;
        /// Kernel arguments that go with the default kernel.
        DefaultKernelArgs = "default_kernel_args" <"ARGS"> Unset;
    }
    "Running" {
        /// Time between two samples of a running VM's metrics; a bare number is seconds.
        MetricsInterval = "metrics_interval" <"DURATION"> Text("10");
        /// Time for which events are kept, such as 7d, 12h or 30m; a bare number is seconds.
        EventRetention = "event_retention" <"DURATION"> Text("7d");
        /// Bytes that are kept of each console, such as 256K, 1M or 1G; a bare number is bytes.
        ConsoleHistory = "console_history" <"SIZE"> Text("1M");
        /// Number of spare VMMs for each backend that has started a VM; 0 keeps none.
        SpareVmms = "spare_vmms" <"COUNT"> Text("0");
        /// Directory of the database, which must survive a reboot of the host; for a user other than root $XDG_STATE_HOME/vmm-controlplane.
        StateDir = "state_dir" <"DIR"> Directory("/var/lib/vmm-controlplane");
        /// Directory of sockets, logs and consoles; for a user other than root $XDG_RUNTIME_DIR/vmm-controlplane.
        RuntimeDir = "runtime_dir" <"DIR"> Directory("/run/vmm-controlplane");
    }
    "Telemetry" {
        /// Sending of traces and metrics over OTLP.
        OtelEnabled = "otel_enabled" <"true|false"> Text("false");
        /// Service name in the telemetry.
        OtelServiceName = "otel_service_name" <"NAME"> Text("vmm-controlplane");
        /// Service version in the telemetry; the program's own by default.
        OtelServiceVersion = "otel_service_version" <"VERSION"> Text(env!("CARGO_PKG_VERSION"));
        /// Share of the traces that are sent, from 0.0 to 1.0.
        OtelSamplingRate = "otel_sampling_rate" <"RATE"> Text("1.0");
        /// OTLP/HTTP collector: HOST:PORT, or an http:// or https:// URL.
        OtelEndpoint = "otel_endpoint" <"ENDPOINT"> Text("localhost:4318");
        /// Serving of a Prometheus page at /metrics, independent of otel_enabled.
        OtelPrometheusEnabled = "otel_prometheus_enabled" <"true|false"> Text("true");
        /// TCP port of the Prometheus page; 0 lets the system choose a free one.
        OtelPrometheusPort = "otel_prometheus_port" <"PORT"> Text("9464");
        /// Samples of each running VM on the Prometheus page; false keeps a large fleet's page small.
        OtelPrometheusVms = "otel_prometheus_vms" <"true|false"> Text("true");
    }
}

impl Setting {
    /// Returns the key in the configuration file, such as `ch_endpoint`.
    pub const fn key(self) -> &'static str {
        self.spec().key
    }

    /// Returns the variable that messages name, such as `UNKEY_VMCP_CH_ENDPOINT`.
    pub fn variable(self) -> String {
        variable(PREFIX, self.key())
    }

    /// Returns the variable of the same name with a prefix of its own, such as `VMCP_CH_ENDPOINT`.
    pub fn variable_with(self, prefix: &str) -> String {
        variable(prefix, self.key())
    }

    /// Returns the flag on the command line, such as `--ch-endpoint`.
    pub fn flag(self) -> String {
        format!("--{}", self.long_flag())
    }

    /// Returns the flag without its dashes, such as `ch-endpoint`.
    pub(super) fn long_flag(self) -> String {
        self.key().replace('_', "-")
    }

    /// Returns true if the setting takes several values: an array in the file, a comma-separated
    /// text elsewhere.
    pub const fn is_list(self) -> bool {
        matches!(
            self,
            Self::AllowedHosts | Self::CorsOrigins | Self::ChEndpoint | Self::FcEndpoint | Self::QemuEndpoint
        )
    }

    /// Returns the setting with this key in the configuration file.
    pub fn from_key(key: &str) -> Option<Setting> {
        Setting::ALL.iter().copied().find(|setting| setting.key() == key)
    }

    /// Returns the setting that a variable's name stands for once its prefix is taken off.
    pub(super) fn from_suffix(suffix: &str) -> Option<Setting> {
        Setting::ALL.iter().copied().find(|setting| setting.key().to_ascii_uppercase() == suffix)
    }
}

/// Spells a key as a variable.
pub(super) fn variable(prefix: &str, key: &str) -> String {
    format!("{prefix}{}", key.to_ascii_uppercase())
}

/// Returns the candidate that is most similar to `typed`, if one is similar enough to be a typing
/// error.
pub(super) fn nearest<'a>(typed: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Below this similarity a suggestion misleads more often than it helps.
    const ALIKE: f64 = 0.8;
    candidates
        .map(|candidate| (strsim::jaro_winkler(typed, candidate), candidate))
        .filter(|(similarity, _)| *similarity >= ALIKE)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn variable_and_flag_are_derived_from_the_key() {
        assert_eq!(Setting::ChEndpoint.flag(), "--ch-endpoint");
        assert_eq!(Setting::ChEndpoint.variable(), "UNKEY_VMCP_CH_ENDPOINT");
        assert_eq!(Setting::QemuKvm.variable_with(SHORT_PREFIX), "VMCP_QEMU_KVM");
        assert_eq!(Setting::from_key("otel_sampling_rate"), Some(Setting::OtelSamplingRate));
        assert_eq!(Setting::from_suffix("PORT"), Some(Setting::Port));
    }

    #[test]
    fn every_key_is_unique_and_documented() {
        let keys: BTreeSet<_> = Setting::ALL.iter().map(|setting| setting.key()).collect();
        assert_eq!(keys.len(), Setting::ALL.len());
        assert!(!keys.contains(CONFIG_KEY));
        for setting in Setting::ALL {
            assert!(setting.spec().help.trim().ends_with('.'), "{setting:?}");
        }
    }

    #[test]
    fn a_misspelled_key_finds_its_setting_and_an_unrelated_word_finds_none() {
        let keys = || Setting::ALL.iter().map(|setting| setting.key());
        assert_eq!(nearest("prot", keys()), Some("port"));
        assert_eq!(nearest("ch_endpiont", keys()), Some("ch_endpoint"));
        assert_eq!(nearest("zzz", keys()), None);
    }
}
