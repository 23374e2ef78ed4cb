//! What is said about a configuration that parses: settings that this version does not serve yet, and warnings.

use super::error::{ConfigError, ConfigErrors, Origin};
use super::settings::Setting;
use super::sources::{Environment, Given, Host, unknown_variables};
use super::values::{BackendName, Endpoint};
use super::{Config, Loaded, retired};
use std::path::Path;

/// The values on which it depends whether this version can serve a configuration; `None` did not parse.
pub(super) struct Demands<'a> {
    pub(super) endpoints: [Option<&'a Endpoint>; 3],
    pub(super) cors_origins: Option<&'a [String]>,
    pub(super) qemu_import: Option<bool>,
    pub(super) otel_enabled: Option<bool>,
}

impl Demands<'_> {
    /// Returns the settings that ask for what this version does not do. A feature that arrives leaves this list.
    pub(super) fn unserved(&self) -> Vec<Setting> {
        let attached =
            |endpoint: Option<&Endpoint>| endpoint.is_some_and(|endpoint| *endpoint != Endpoint::Managed);
        let [ch, fc, qemu] = self.endpoints;
        let asked = [
            (Setting::CorsOrigins, self.cors_origins.is_some_and(|origins| !origins.is_empty())),
            (Setting::ChEndpoint, attached(ch)),
            (Setting::FcEndpoint, attached(fc)),
            (Setting::QemuEndpoint, attached(qemu)),
            (Setting::QemuImport, self.qemu_import == Some(true)),
            (Setting::OtelEnabled, self.otel_enabled == Some(true)),
        ];
        asked.into_iter().filter(|(_, asked)| *asked).map(|(setting, _)| setting).collect()
    }
}

/// Says that this version does not serve a setting, and how to do without.
pub(super) fn not_served(setting: Setting, origin: Option<Origin>) -> ConfigError {
    let (what, without) = match setting {
        Setting::ChEndpoint | Setting::FcEndpoint => {
            ("attach to a VMM that somebody else started", "one process is then started per VM")
        }
        Setting::QemuEndpoint => {
            ("attach to a running QEMU or to libvirt", "one process is then started per VM")
        }
        Setting::QemuImport => ("import libvirt domains", "only its own VMs are then listed"),
        Setting::OtelEnabled => ("send telemetry over OTLP", "the log on standard error stays"),
        Setting::CorsOrigins => {
            ("serve web pages of other origins", "clients other than browsers are not affected")
        }
        // The list above has no other; a setting added there without a text of its own still reads well.
        _ => ("serve this setting", "the default then applies"),
    };
    let message = format!("{}: this version cannot {what} yet", setting.key());
    ConfigError::new(message, origin, format!("unset {}: {without}", setting.variable()))
}

impl Config {
    /// Returns the settings that ask for what this version does not do; the daemon must not start while there are any.
    pub fn unserved(&self) -> Vec<Setting> {
        let endpoints = BackendName::ALL.map(|backend| Some(&self.hypervisor(backend).endpoint));
        Demands {
            endpoints,
            cors_origins: Some(&self.cors_origins),
            qemu_import: Some(self.qemu_import),
            otel_enabled: Some(self.otel.enabled),
        }
        .unserved()
    }
}

impl Loaded {
    /// Refuses a configuration that asks for what this version does not do.
    ///
    /// # Errors
    ///
    /// One for each setting of [`Config::unserved`], with its origin and what to do without it.
    pub fn require_served(&self) -> Result<(), ConfigErrors> {
        let origin = |setting| {
            self.effective.iter().find(|entry| entry.setting == setting).map(|entry| entry.origin.clone())
        };
        let unserved = self.config.unserved();
        let errors: Vec<_> =
            unserved.into_iter().map(|setting| not_served(setting, origin(setting))).collect();
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors(errors)) }
    }
}

/// Collects what does not stop the start but deserves a line in the log.
pub(super) fn warnings(config: &Config, given: &Given, env: &Environment, host: &dyn Host) -> Vec<String> {
    let mut warnings = Vec::new();
    if !config.listen.is_loopback() {
        warnings.push(format!(
            "listening on {} with no authentication configured: whoever reaches it controls every VM; set {} to \
             127.0.0.1, or let only trusted machines through the firewall",
            config.listen,
            Setting::Address.variable(),
        ));
    }
    warnings.extend(old_socket(config, host));
    if config.defaults.kernel.is_none() {
        for setting in [Setting::DefaultInitrd, Setting::DefaultKernelArgs] {
            if given.get(&setting).is_some_and(|(text, _)| !text.is_empty()) {
                let kernel = Setting::DefaultKernel.variable();
                warnings.push(format!(
                    "{} has no effect without a default kernel; set {kernel}",
                    setting.variable()
                ));
            }
        }
    }
    let prometheus_off = !config.otel.prometheus_enabled;
    warnings.extend(without_effect(
        given,
        "telemetry is not sent by this version yet",
        &[
            Setting::OtelServiceName,
            Setting::OtelServiceVersion,
            Setting::OtelSamplingRate,
            Setting::OtelEndpoint,
        ],
    ));
    if !prometheus_off {
        let settings = [Setting::OtelPrometheusEnabled, Setting::OtelPrometheusPort];
        warnings.extend(without_effect(
            given,
            "the Prometheus page is not served by this version yet",
            &settings,
        ));
    }
    warnings.extend(retired::warnings(env));
    warnings.extend(unknown_variables(env));
    warnings
}

/// Warns, in one line, of the given ones among these settings.
fn without_effect(given: &Given, why: &str, settings: &[Setting]) -> Option<String> {
    let set: Vec<_> =
        settings.iter().filter(|setting| given.contains_key(setting)).map(|s| s.variable()).collect();
    (!set.is_empty()).then(|| format!("no effect: {} ({why})", set.join(", ")))
}

/// Warns if the default backend's socket of old is there while nothing says whether to use it.
///
/// The predecessor attached to these by default. This program does not: anybody may put a socket into /tmp.
fn old_socket(config: &Config, host: &dyn Host) -> Option<String> {
    let backend = config.default_backend;
    let (path, setting, value) = match backend {
        BackendName::CloudHypervisor => ("/tmp/ch.sock", Setting::ChEndpoint, "unix:///tmp/ch.sock"),
        BackendName::Firecracker => {
            ("/tmp/firecracker.sock", Setting::FcEndpoint, "unix:///tmp/firecracker.sock")
        }
        BackendName::Qemu => ("/var/run/libvirt/libvirt-sock", Setting::QemuEndpoint, "qemu:///system"),
    };
    let unset = config.hypervisor(backend).endpoint == Endpoint::Managed;
    (unset && host.exists(Path::new(path))).then(|| {
        format!(
            "{path} exists and is not used: {} is unset, so {backend} processes are started, one per VM; \
             {}={value} is what attaches to it",
            setting.variable(),
            setting.variable(),
        )
    })
}
