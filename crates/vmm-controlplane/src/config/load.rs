//! Parses the given texts into a [`DaemonConfig`]. Every setting is parsed, even after an error in
//! another one, so that all errors are reported at once.

mod listening;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::error::{ConfigError, ConfigErrors, Origin};
use super::notices::DemandedFeatures;
use super::settings::{Setting, SettingDefault};
use super::sources::{self, Environment, GivenTexts, LoaderHost, variable_value};
use super::values::{self, BackendChoice, Endpoint, ValueError};
use super::{
    BootDefaults, Cli, DaemonConfig, EffectiveSetting, HypervisorConfig, LoadedConfig, OtelConfig, notices,
    retired, sockets,
};
use listening::Listening;
use std::time::Duration;

/// The name of the program's folder in shared directories.
const FOLDER: &str = "vmm-controlplane";
/// The longest time between two samples: a day.
const METRICS_INTERVAL_LIMIT: Duration = Duration::from_secs(86_400);
/// The most spare VMMs of one backend, because each is a process that waits.
const SPARE_VMMS_MAX: usize = 16;
/// The bytes that can be kept of a console: 4 KiB, one block of a file, to 1 GiB.
const CONSOLE_HISTORY_RANGE: RangeInclusive<u64> = 4 << 10..=1 << 30;
/// The longest time for which events are kept: ten years.
const EVENT_RETENTION_LIMIT: Duration = Duration::from_secs(3_650 * 86_400);

impl DaemonConfig {
    /// Loads the configuration from the command line, the environment, the file that they name, and
    /// the defaults.
    ///
    /// A configuration that asks for a feature which this version does not have is loaded, so that
    /// it can be shown. Call [`LoadedConfig::require_served`] before serving.
    ///
    /// # Errors
    ///
    /// All errors at once. If there is any, the features that this version does not have are listed
    /// too.
    pub fn load(cli: &Cli, env: &Environment, host: &dyn LoaderHost) -> Result<LoadedConfig, ConfigErrors> {
        let mut errors = Vec::new();
        let given = sources::collect(cli, env, host, &mut errors);
        errors.splice(0..0, retired::check(env, &given));
        let mut loader =
            Loader { given: &given, env, host, effective: Vec::new(), warnings: Vec::new(), errors };
        match loader.config() {
            Some(config) if loader.errors.is_empty() => {
                let mut warnings = notices::warnings(&config, &given, env, host);
                warnings.append(&mut loader.warnings);
                Ok(LoadedConfig { config, effective: loader.effective, warnings })
            }
            _ => Err(ConfigErrors(loader.errors)),
        }
    }
}

struct Loader<'a> {
    given: &'a GivenTexts,
    env: &'a Environment,
    host: &'a dyn LoaderHost,
    effective: Vec<EffectiveSetting>,
    warnings: Vec<String>,
    errors: Vec<ConfigError>,
}

impl Loader<'_> {
    /// Parses every setting in the table's order. Returns `None` if one is invalid, and then an
    /// error about it was added.
    fn config(&mut self) -> Option<DaemonConfig> {
        use Setting as S;
        let listening = self.listening();
        let cors_origins = self.text(S::CorsOrigins, values::cors_origins);
        let default_backend = self.text(S::Backend, values::backend);
        let ch_endpoint = self.endpoint(S::ChEndpoint, BackendChoice::CloudHypervisor);
        let fc_endpoint = self.endpoint(S::FcEndpoint, BackendChoice::Firecracker);
        let qemu_endpoint = self.endpoint(S::QemuEndpoint, BackendChoice::Qemu);
        let named = [
            (S::ChEndpoint, ch_endpoint.as_ref()),
            (S::FcEndpoint, fc_endpoint.as_ref()),
            (S::QemuEndpoint, qemu_endpoint.as_ref()),
        ]
        .map(|(setting, endpoint)| (setting, endpoint, self.given(setting).map(|(_, origin)| origin)));
        self.errors.extend(sockets::named_twice(&named, self.host));
        let ch_binary = self.text(S::ChBinary, values::binary);
        let fc_binary = self.text(S::FcBinary, values::binary);
        let qemu_binary = self.text(S::QemuBinary, values::binary);
        let qemu_kvm = self.text(S::QemuKvm, values::kvm);
        let qemu_import = self.text(S::QemuImport, values::boolean);
        let defaults = self.boot_defaults();
        let metrics_interval =
            self.text(S::MetricsInterval, |text| values::duration(text, METRICS_INTERVAL_LIMIT));
        let event_retention =
            self.text(S::EventRetention, |text| values::duration(text, EVENT_RETENTION_LIMIT));
        let console_history = self.text(S::ConsoleHistory, |text| values::size(text, &CONSOLE_HISTORY_RANGE));
        let spare_vmms = self.text(S::SpareVmms, |text| values::count(text, SPARE_VMMS_MAX));
        let state_dir = self.state_dir();
        let runtime_dir = self.runtime_dir(state_dir.as_ref());
        let otel_enabled = self.text(S::OtelEnabled, values::boolean);
        let demands = DemandedFeatures { cors_origins: cors_origins.as_deref(), otel_enabled };
        let unserved = demands.unserved();
        let otel = self.otel(otel_enabled);
        if !self.errors.is_empty() {
            let origin = |setting| self.given(setting).map(|(_, origin)| origin);
            let unserved: Vec<_> = unserved.into_iter().map(|it| it.error(origin(it.setting))).collect();
            self.errors.extend(unserved);
        }
        // The `?` below come after all settings have been parsed, because an early return would
        // hide the errors of later settings. Features that this version does not have are errors
        // here only beside another error. Without one the configuration loads, so that it can be
        // shown, and `require_served` reports them.
        let Listening { listen, socket, tls, allowed_hosts } = listening?;
        Some(DaemonConfig {
            listen,
            socket,
            tls,
            allowed_hosts,
            cors_origins: cors_origins?,
            default_backend: default_backend?,
            ch: HypervisorConfig { endpoint: ch_endpoint?, binary: ch_binary? },
            fc: HypervisorConfig { endpoint: fc_endpoint?, binary: fc_binary? },
            qemu: HypervisorConfig { endpoint: qemu_endpoint?, binary: qemu_binary? },
            qemu_kvm: qemu_kvm?,
            qemu_import: qemu_import?,
            defaults: defaults?,
            metrics_interval: metrics_interval?,
            event_retention: event_retention?,
            console_history: console_history?,
            spare_vmms: spare_vmms?,
            state_dir: state_dir?,
            runtime_dir: runtime_dir?,
            otel: otel?,
        })
    }

    fn boot_defaults(&mut self) -> Option<BootDefaults> {
        let kernel = self.optional(Setting::DefaultKernel, values::absolute_path);
        let initrd = self.optional(Setting::DefaultInitrd, values::absolute_path);
        let kernel_args = self.optional(Setting::DefaultKernelArgs, values::single_line);
        Some(BootDefaults { kernel: kernel?, initrd: initrd?, kernel_args: kernel_args? })
    }

    fn otel(&mut self, enabled: Option<bool>) -> Option<OtelConfig> {
        use Setting as S;
        let service_name = self.text(S::OtelServiceName, values::single_line);
        let service_version = self.text(S::OtelServiceVersion, values::single_line);
        let sampling_rate = self.text(S::OtelSamplingRate, values::sampling_rate);
        let endpoint = self.text(S::OtelEndpoint, values::otel_endpoint);
        let prometheus_enabled = self.text(S::OtelPrometheusEnabled, values::boolean);
        let prometheus_port = self.text(S::OtelPrometheusPort, values::port);
        let prometheus_vms = self.text(S::OtelPrometheusVms, values::boolean);
        Some(OtelConfig {
            enabled: enabled?,
            service_name: service_name?,
            service_version: service_version?,
            sampling_rate: sampling_rate?,
            endpoint: endpoint?,
            prometheus_enabled: prometheus_enabled?,
            prometheus_port: prometheus_port?,
            prometheus_vms: prometheus_vms?,
        })
    }

    /// Parses a setting that always has a value.
    fn text<T>(&mut self, setting: Setting, parse: impl Fn(&str) -> Result<T, ValueError>) -> Option<T> {
        let default = match setting.spec().default {
            SettingDefault::Text(text) | SettingDefault::Directory(text) => text,
            SettingDefault::Unset => "",
        };
        let (text, origin) = self.given(setting).unwrap_or((default.to_owned(), Origin::Default));
        self.parse(setting, text, origin, parse)
    }

    /// Parses a setting that may be unset. An empty flag or key unsets the value of a weaker
    /// source.
    fn optional<T>(
        &mut self,
        setting: Setting,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<Option<T>> {
        match self.given(setting) {
            Some((text, origin)) if !text.is_empty() => self.parse(setting, text, origin, parse).map(Some),
            other => {
                self.record(setting, None, other.map_or(Origin::Default, |(_, origin)| origin));
                Some(None)
            }
        }
    }

    fn endpoint(&mut self, setting: Setting, backend: BackendChoice) -> Option<Endpoint> {
        let Some((text, origin)) = self.given(setting) else {
            self.record(setting, None, Origin::Default);
            return Some(Endpoint::Managed);
        };
        self.parse(setting, text, origin, |text| values::endpoint(backend, text))
    }

    fn state_dir(&mut self) -> Option<PathBuf> {
        let setting = Setting::StateDir;
        if self.host.uid() == 0 || self.given.contains_key(&setting) {
            return self.text(setting, values::absolute_path);
        }
        let home = || self.folder("HOME").map(|home| home.join(".local/state"));
        let Some(base) = self.folder("XDG_STATE_HOME").or_else(home) else {
            let advice = format!("set {} to an absolute path, or set HOME", setting.variable());
            self.errors.push(ConfigError::new("state_dir: this user has no home directory", None, advice));
            return None;
        };
        self.default_dir(setting, base.join(FOLDER), values::absolute_path)
    }

    fn runtime_dir(&mut self, state_dir: Option<&PathBuf>) -> Option<PathBuf> {
        let setting = Setting::RuntimeDir;
        if self.host.uid() == 0 || self.given.contains_key(&setting) {
            return self.text(setting, values::runtime_dir);
        }
        let session = PathBuf::from(format!("/run/user/{}", self.host.uid()));
        let session = || self.host.exists(&session).then_some(session);
        if let Some(base) = self.folder("XDG_RUNTIME_DIR").or_else(session) {
            return self.default_dir(setting, base.join(FOLDER), values::runtime_dir);
        }
        // The state directory is used, because in a shared directory such as /tmp another user
        // could make the folder first.
        let fallback = state_dir?.join("run");
        self.warnings.push(format!(
            "XDG_RUNTIME_DIR is not set: sockets go below {}; set {} to choose another place",
            fallback.display(),
            setting.variable(),
        ));
        self.default_dir(setting, fallback, values::runtime_dir)
    }

    fn default_dir(
        &mut self,
        setting: Setting,
        path: PathBuf,
        parse: fn(&str) -> Result<PathBuf, ValueError>,
    ) -> Option<PathBuf> {
        match path.into_os_string().into_string() {
            Ok(text) => self.parse(setting, text, Origin::Default, parse),
            Err(_) => {
                let message = format!("{}: this user's default directory is not UTF-8", setting.key());
                let advice = format!("set {} to an absolute path", setting.variable());
                self.errors.push(ConfigError::new(message, None, advice));
                None
            }
        }
    }

    /// Returns the directory that a variable of the user's session names. A relative path is
    /// ignored, as the XDG specification demands.
    fn folder(&self, variable: &str) -> Option<PathBuf> {
        variable_value(self.env, variable).map(PathBuf::from).filter(|path| path.is_absolute())
    }

    fn given(&self, setting: Setting) -> Option<(String, Origin)> {
        self.given.get(&setting).cloned()
    }

    fn parse<T>(
        &mut self,
        setting: Setting,
        text: String,
        origin: Origin,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Option<T> {
        match parse(&text) {
            Ok(value) => {
                self.record(setting, Some(text), origin);
                Some(value)
            }
            Err(fault) => {
                let message = if fault.verbatim {
                    fault.message
                } else {
                    format!("{}: {}", setting.key(), fault.message)
                };
                let variable = setting.variable();
                let advice = match origin {
                    // A flag overrides the variable, so setting only the variable would have no
                    // effect.
                    Origin::Flag(_) => format!("set it, or {variable} in its stead, to {}", fault.want),
                    // The key is shown with its section, and is written there without it.
                    Origin::File { ref key, .. } => {
                        let key = key.rsplit('.').next().unwrap_or(key);
                        format!("write `{key} = …` there, with {}", fault.want)
                    }
                    Origin::Variable(_) | Origin::Default => format!("set {variable} to {}", fault.want),
                };
                self.errors.push(ConfigError::new(message, origin, advice));
                None
            }
        }
    }

    fn record(&mut self, setting: Setting, value: Option<String>, origin: Origin) {
        self.effective.push(EffectiveSetting { setting, value, origin });
    }
}
