//! The notices about a configuration that parses: settings that this version does not serve yet,
//! and warnings.

use super::error::{ConfigError, ConfigErrors, Origin};
use super::settings::Setting;
use super::sources::{Environment, GivenTexts, LoaderHost, unknown_variables};
use super::values::{BackendChoice, Endpoint};
use super::{DaemonConfig, LoadedConfig, retired};
use std::path::Path;

/// The values that decide if this version can serve a configuration. A value that did not parse is
/// `None`.
pub(super) struct DemandedFeatures<'a> {
    pub(super) cors_origins: Option<&'a [String]>,
    pub(super) otel_enabled: Option<bool>,
}

/// A setting that asks for a feature which this version does not have.
pub(super) struct UnservedSetting {
    pub(super) setting: Setting,
    /// The feature; it ends the sentence "this version cannot yet …".
    what: &'static str,
    /// The consequence if the setting is unset.
    without: &'static str,
}

impl UnservedSetting {
    /// Returns the error about the setting, with the advice for doing without it.
    pub(super) fn error(&self, origin: Option<Origin>) -> ConfigError {
        let variable = self.setting.variable();
        let message = format!("{variable}: this version cannot yet {}", self.what);
        let advice = match &origin {
            Some(Origin::Flag(name)) => format!("leave {name} out"),
            Some(Origin::Variable(name)) => format!("unset {name}"),
            Some(Origin::File { .. }) => "remove that line".to_owned(),
            Some(Origin::Default) | None => format!("unset {variable}"),
        };
        ConfigError::new(message, origin, format!("{advice}: {}", self.without))
    }
}

impl DemandedFeatures<'_> {
    /// Returns the settings that ask for a feature which this version does not have. A feature that
    /// is added leaves this list.
    pub(super) fn unserved(&self) -> Vec<UnservedSetting> {
        let cors = self.cors_origins.is_some_and(|origins| !origins.is_empty());
        let asked = [
            (cors, Setting::CorsOrigins, "serve web pages of other origins", "only browsers are affected"),
            (
                self.otel_enabled == Some(true),
                Setting::OtelEnabled,
                "send telemetry over OTLP",
                "nothing is then sent",
            ),
        ];
        let asked = asked.into_iter().filter(|(asked, ..)| *asked);
        asked.map(|(_, setting, what, without)| UnservedSetting { setting, what, without }).collect()
    }
}

impl DaemonConfig {
    /// Returns the settings that ask for a feature which this version does not have. The daemon
    /// must not start while there are any. [`LoadedConfig::require_served`] gives them as errors
    /// for a person.
    pub fn unserved(&self) -> Vec<Setting> {
        self.demands().into_iter().map(|unserved| unserved.setting).collect()
    }

    fn demands(&self) -> Vec<UnservedSetting> {
        DemandedFeatures { cors_origins: Some(&self.cors_origins), otel_enabled: Some(self.otel.enabled) }
            .unserved()
    }
}

impl LoadedConfig {
    /// Refuses a configuration that asks for a feature which this version does not have.
    ///
    /// # Errors
    ///
    /// One error for each setting of [`DaemonConfig::unserved`], with its origin and the advice for
    /// doing without it.
    pub fn require_served(&self) -> Result<(), ConfigErrors> {
        let origin = |setting| {
            self.effective.iter().find(|entry| entry.setting == setting).map(|entry| entry.origin.clone())
        };
        let unserved = self.config.demands();
        let errors: Vec<_> = unserved.iter().map(|it| it.error(origin(it.setting))).collect();
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors(errors)) }
    }
}

/// Collects the warnings, which do not stop the start and are logged.
pub(super) fn warnings(
    config: &DaemonConfig,
    given: &GivenTexts,
    env: &Environment,
    host: &dyn LoaderHost,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let exposed = config.listen.as_ref().filter(|listen| !listen.is_loopback());
    if let Some(listen) = exposed.filter(|_| !config.demands_certificates()) {
        warnings.push(format!(
            "listening on {listen} with no authentication configured: every program that reaches this address controls every VM; set {} to \
             127.0.0.1, or let only trusted machines through the firewall",
            Setting::Address.variable(),
        ));
    }
    warnings.extend(listeners(config, given));
    warnings.extend(old_socket(config, host));
    if config.qemu_import && !matches!(config.qemu.endpoint, Endpoint::Libvirt(_)) {
        warnings.push(format!(
            "{} has no effect where {} does not name libvirt, such as qemu:///system",
            Setting::QemuImport.variable(),
            Setting::QemuEndpoint.variable(),
        ));
    }
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
    warnings.extend(retired::warnings(env));
    warnings.extend(unknown_variables(env));
    warnings
}

/// Returns the warnings about settings of listeners that are off or open to everybody.
fn listeners(config: &DaemonConfig, given: &GivenTexts) -> Vec<String> {
    let mut warnings = Vec::new();
    match &config.socket {
        None => {
            let settings = [Setting::SocketMode, Setting::SocketGroup];
            warnings.extend(without_effect(given, "no unix socket is named", &settings));
        }
        Some(socket) if socket.mode & 0o002 != 0 => warnings.push(format!(
            "every local user may connect to {}, because its mode is {:04o}; set {} to 0660",
            socket.path.display(),
            socket.mode,
            Setting::SocketMode.variable(),
        )),
        Some(_) => {}
    }
    if config.listen.is_none() {
        let settings = [Setting::Port, Setting::TlsCert, Setting::TlsKey, Setting::TlsClientCa];
        warnings.extend(without_effect(given, "the daemon does not listen on TCP", &settings));
    }
    warnings
}

/// Returns one warning about those of `settings` that were given, if any.
fn without_effect(given: &GivenTexts, why: &str, settings: &[Setting]) -> Option<String> {
    let set: Vec<_> =
        settings.iter().filter(|setting| given.contains_key(setting)).map(|s| s.variable()).collect();
    (!set.is_empty()).then(|| format!("no effect: {} ({why})", set.join(", ")))
}

/// Returns a warning if the socket that the predecessor attached to by default exists and the
/// endpoint of the default backend is unset.
///
/// This program does not attach to it by itself, because anybody may put a socket into /tmp.
fn old_socket(config: &DaemonConfig, host: &dyn LoaderHost) -> Option<String> {
    let backend = config.default_backend;
    let (paths, setting, value): (&[&str], _, _) = match backend {
        BackendChoice::CloudHypervisor => (&["/tmp/ch.sock"], Setting::ChEndpoint, "unix:///tmp/ch.sock"),
        BackendChoice::Firecracker => {
            (&["/tmp/firecracker.sock"], Setting::FcEndpoint, "unix:///tmp/firecracker.sock")
        }
        // The first socket is that of libvirt as one daemon, the second that of libvirt with a
        // daemon for each hypervisor.
        BackendChoice::Qemu => (
            &["/var/run/libvirt/libvirt-sock", "/var/run/libvirt/virtqemud-sock"],
            Setting::QemuEndpoint,
            "qemu:///system",
        ),
    };
    let unset = config.hypervisor(backend).endpoint == Endpoint::Managed;
    let found = paths.iter().find(|path| host.exists(Path::new(path)));
    found.filter(|_| unset).map(|path| {
        format!(
            "{path} exists and is not used: {} is unset, so {backend} processes are started, one per VM; \
             {}={value} attaches to it",
            setting.variable(),
            setting.variable(),
        )
    })
}
