//! Tests of the whole loader: precedence, errors and warnings.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;

use clap::Parser as _;
use proptest::prelude::*;

use super::*;

mod listening;

/// A machine with given answers.
#[derive(Default)]
struct FakeHost {
    uid: u32,
    file: Option<Vec<u8>>,
    existing: BTreeSet<&'static str>,
}

impl LoaderHost for FakeHost {
    fn uid(&self) -> u32 {
        self.uid
    }

    fn read_file(&self, _: &Path) -> io::Result<Vec<u8>> {
        self.file.clone().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn exists(&self, path: &Path) -> bool {
        path.to_str().is_some_and(|path| self.existing.contains(path))
    }
}

fn env(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
}

fn cli(args: &[&str]) -> Cli {
    Cli::try_parse_from([&["vmm-controlplane"], args].concat()).unwrap()
}

fn load(args: &[&str], variables: &[(&str, &str)], host: &FakeHost) -> Result<LoadedConfig, ConfigErrors> {
    DaemonConfig::load(&cli(args), &env(variables), host)
}

fn good(args: &[&str], variables: &[(&str, &str)]) -> LoadedConfig {
    load(args, variables, &FakeHost::default()).unwrap()
}

fn bad(args: &[&str], variables: &[(&str, &str)]) -> String {
    load(args, variables, &FakeHost::default()).unwrap_err().to_string()
}

fn with_file(text: &str) -> FakeHost {
    FakeHost { file: Some(text.into()), ..FakeHost::default() }
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let LoadedConfig { config, effective, warnings } = good(&[], &[]);
    let managed = |binary: &str| HypervisorConfig { endpoint: Endpoint::Managed, binary: binary.into() };
    let want = DaemonConfig {
        listen: Some(ListenAddress { host: "127.0.0.1".into(), port: 8080 }),
        socket: None,
        tls: None,
        allowed_hosts: vec![],
        cors_origins: vec![],
        default_backend: BackendChoice::CloudHypervisor,
        ch: managed("cloud-hypervisor"),
        fc: managed("firecracker"),
        qemu: managed("qemu-system-x86_64"),
        qemu_kvm: KvmSetting::Auto,
        qemu_import: false,
        defaults: BootDefaults { kernel: None, initrd: None, kernel_args: None },
        metrics_interval: Duration::from_secs(10),
        event_retention: Duration::from_secs(7 * 86_400),
        console_history: 1 << 20,
        spare_vmms: 0,
        state_dir: "/var/lib/vmm-controlplane".into(),
        runtime_dir: "/run/vmm-controlplane".into(),
        otel: OtelConfig {
            enabled: false,
            service_name: "vmm-controlplane".into(),
            service_version: env!("CARGO_PKG_VERSION").into(),
            sampling_rate: 1.0,
            endpoint: "localhost:4318".into(),
            prometheus_enabled: true,
            prometheus_port: 9464,
            prometheus_vms: true,
        },
    };
    assert_eq!(config, want);
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(effective.iter().map(|entry| entry.setting).collect::<Vec<_>>(), Setting::ALL);
    assert!(effective.iter().all(|entry| entry.origin == Origin::Default));
}

#[test]
fn flags_override_variables_which_override_the_file() {
    let file = with_file("port = 4");
    let sources = [
        (
            &["--port=1"][..],
            &[("UNKEY_VMCP_PORT", "2"), ("VMCP_PORT", "3"), ("UNKEY_VMCP_CONFIG", "f.toml")][..],
        ),
        (&[], &[("UNKEY_VMCP_PORT", "2"), ("VMCP_PORT", "3"), ("UNKEY_VMCP_CONFIG", "f.toml")]),
        (&[], &[("UNKEY_VMCP_PORT", ""), ("VMCP_PORT", "3"), ("UNKEY_VMCP_CONFIG", "f.toml")]),
        (&["--config", "f.toml"], &[("UNKEY_VMCP_PORT", ""), ("VMCP_PORT", "")]),
        (&[], &[("PORT", "5")]),
    ];
    let origins = ["--port", "UNKEY_VMCP_PORT", "VMCP_PORT", "f.toml:1 (port)", "default"];
    for ((args, variables), (port, origin)) in
        sources.into_iter().zip([1, 2, 3, 4, 8080].into_iter().zip(origins))
    {
        let loaded = load(args, variables, &file).unwrap();
        assert_eq!(loaded.config.listen.as_ref().unwrap().port, port);
        let entry = loaded.effective.iter().find(|entry| entry.setting == Setting::Port).unwrap();
        assert_eq!(entry.origin.to_string(), origin);
    }
}

#[test]
fn absent_flags_never_override_variables() {
    // The predecessor's documented endpoint variable lost against the default of its flag.
    let values = [
        (Setting::Address, "localhost"),
        (Setting::Port, "9"),
        (Setting::Socket, "/s"),
        (Setting::SocketMode, "0600"),
        (Setting::SocketGroup, "7"),
        (Setting::TlsCert, "/cert"),
        (Setting::TlsKey, "/key"),
        (Setting::TlsClientCa, "/ca"),
        (Setting::AllowedHosts, "a.example"),
        (Setting::CorsOrigins, "https://a.example"),
        (Setting::Backend, "qemu"),
        (Setting::ChEndpoint, "unix:///c"),
        (Setting::FcEndpoint, "unix:///f"),
        (Setting::QemuEndpoint, "qemu:///system"),
        (Setting::ChBinary, "c"),
        (Setting::FcBinary, "f"),
        (Setting::QemuBinary, "q"),
        (Setting::QemuKvm, "true"),
        (Setting::QemuImport, "true"),
        (Setting::DefaultKernel, "/k"),
        (Setting::DefaultInitrd, "/i"),
        (Setting::DefaultKernelArgs, "-quiet"),
        (Setting::MetricsInterval, "1m"),
        (Setting::EventRetention, "12h"),
        (Setting::ConsoleHistory, "64K"),
        (Setting::SpareVmms, "2"),
        (Setting::StateDir, "/s"),
        (Setting::RuntimeDir, "/r"),
        (Setting::OtelEnabled, "true"),
        (Setting::OtelServiceName, "n"),
        (Setting::OtelServiceVersion, "v"),
        (Setting::OtelSamplingRate, "0.5"),
        (Setting::OtelEndpoint, "c:1"),
        (Setting::OtelPrometheusEnabled, "false"),
        (Setting::OtelPrometheusPort, "0"),
        (Setting::OtelPrometheusVms, "false"),
    ];
    assert_eq!(values.map(|(setting, _)| setting), *Setting::ALL);
    let by_source = |origin: &dyn Fn(Setting) -> String, loaded: &LoadedConfig| {
        for ((setting, value), entry) in values.iter().zip(&loaded.effective) {
            assert_eq!((entry.setting, entry.value.as_deref()), (*setting, Some(*value)));
            assert_eq!(entry.origin.to_string(), origin(*setting));
        }
    };
    let mut configs = Vec::new();
    for prefix in [PREFIX, SHORT_PREFIX] {
        let names = values.map(|(setting, value)| (setting.variable_with(prefix), value));
        let pairs: Vec<_> = names.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        let loaded = good(&[], &pairs);
        by_source(&|setting| setting.variable_with(prefix), &loaded);
        configs.push(loaded.config);
    }
    let flags = values.map(|(setting, value)| [setting.flag(), value.to_owned()]).concat();
    let loaded = good(&flags.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    by_source(&Setting::flag, &loaded);
    configs.push(loaded.config);
    let lines = values.map(|(setting, value)| format!("{} = \"{value}\"\n", setting.key())).concat();
    configs.push(load(&["--config=f"], &[], &with_file(&lines)).unwrap().config);
    assert!(configs.iter().all(|config| *config == configs[0]), "{configs:#?}");
}

#[test]
fn all_bad_settings_are_reported_at_once_with_their_variables() {
    let bad_value = "\u{1}bad,";
    let names: Vec<_> = Setting::ALL.iter().map(|setting| setting.variable()).collect();
    let pairs: Vec<_> = names.iter().map(|name| (name.as_str(), bad_value)).collect();
    let errors = load(&[], &pairs, &FakeHost::default()).unwrap_err();
    assert_eq!(errors.errors().len(), Setting::ALL.len(), "{errors}");
    for (error, name) in errors.errors().iter().zip(&names) {
        assert!(error.advice.contains(name), "{error:?}");
        assert_eq!(error.origin, Some(Origin::Variable(name.clone())));
    }
    assert!(!errors.to_string().contains('\u{1}'));
}

#[test]
fn an_error_names_the_variable_and_the_source_of_the_value() {
    let file = with_file("\n[otel]\nsampling_rate = 2.0");
    let shown =
        load(&["--port=x", "--config=f.toml"], &[("VMCP_BACKEND", "xen")], &file).unwrap_err().to_string();
    let want = "failed to load config: 3 errors\n  \
        port: \"x\" is not a port\n    \
          from --port; set it, or UNKEY_VMCP_PORT in its stead, to a number from 0 to 65535\n  \
        unsupported backend type: xen\n    \
          from VMCP_BACKEND; set UNKEY_VMCP_BACKEND to cloudhypervisor, firecracker or qemu\n  \
        otel_sampling_rate: \"2.0\" is not a share\n    \
          from f.toml:3 (otel.sampling_rate); write `sampling_rate = …` there, with a number from 0.0 to 1.0";
    assert_eq!(shown, want);
}

#[test]
fn documented_error_texts_are_stable() {
    for (name, value, text) in [
        ("UNKEY_VMCP_BACKEND", "your-backend", "unsupported backend type: your-backend\n"),
        ("UNKEY_VMCP_CH_ENDPOINT", "unix://", "cloud hypervisor endpoint is required"),
        ("VMCP_FC_ENDPOINT", "unix:///a,,unix:///b", "firecracker endpoint is required"),
        ("VMCP_QEMU_ENDPOINT", "qemu://", "qemu endpoint is required"),
    ] {
        let shown = bad(&[], &[(name, value)]);
        assert!(shown.starts_with(&format!("failed to load config: {text}")), "{shown}");
        assert!(shown.contains(&format!("from {name}; set UNKEY_VMCP_")), "{shown}");
    }
    assert!(bad(&["--ch-endpoint="], &[]).contains("cloud hypervisor endpoint is required"));
}

#[test]
fn a_value_that_is_not_utf8_is_an_error() {
    for name in ["UNKEY_VMCP_PORT", "VMCP_PORT"] {
        let variables = Environment::from([(name.into(), std::ffi::OsString::from_vec(vec![0xff]))]);
        let shown = DaemonConfig::load(&cli(&[]), &variables, &FakeHost::default()).unwrap_err().to_string();
        assert!(shown.contains(&format!("the value of {name} is not UTF-8")), "{shown}");
        assert!(shown.contains("set UNKEY_VMCP_PORT"), "{shown}");
    }
}

#[test]
fn an_unreadable_file_is_named_with_the_source_of_its_path() {
    let missing = FakeHost::default();
    let binary = FakeHost { file: Some(vec![0xff]), ..FakeHost::default() };
    for (args, variables, host, want) in [
        (&["--config=/a"][..], &[][..], &missing, "cannot read the configuration file /a: "),
        (&[], &[("UNKEY_VMCP_CONFIG", "/b")], &missing, "from UNKEY_VMCP_CONFIG; set UNKEY_VMCP_CONFIG"),
        (&[], &[("VMCP_CONFIG", "/b")], &missing, "from VMCP_CONFIG; set UNKEY_VMCP_CONFIG"),
        (&["--config=/a"], &[("UNKEY_VMCP_CONFIG", "/b")], &binary, "/a: it is not UTF-8"),
    ] {
        let shown = load(args, variables, host).unwrap_err().to_string();
        assert!(shown.contains(want), "{shown}");
    }
    assert!(load(&[], &[("UNKEY_VMCP_CONFIG", "")], &missing).is_ok());
    let shown = load(&["--config=f", "--port=x"], &[], &with_file("prot = 1")).unwrap_err().to_string();
    assert!(
        shown.contains("unknown key prot") && shown.contains("did you mean port") && shown.contains("--port")
    );
}

#[test]
fn the_default_file_is_read_if_no_other_is_named() {
    let file = Some(b"port = 81".to_vec());
    let host = |existing: &[&'static str]| FakeHost {
        file: file.clone(),
        existing: existing.iter().copied().collect(),
        ..FakeHost::default()
    };
    let in_etc = host(&["/etc/vmm-controlplane/config.toml"]);
    let loaded = load(&[], &[], &in_etc).unwrap();
    assert_eq!(loaded.config.listen.as_ref().unwrap().port, 81);
    assert!(loaded.report().contains("/etc/vmm-controlplane/config.toml:1 (port)"), "{}", loaded.report());
    assert_eq!(load(&[], &[], &host(&[])).unwrap().config.listen.as_ref().unwrap().port, 8080);
    let unreadable = FakeHost { file: None, ..host(&["/etc/vmm-controlplane/config.toml"]) };
    let shown = load(&[], &[], &unreadable).unwrap_err().to_string();
    assert!(
        shown.contains("cannot read the configuration file /etc/vmm-controlplane/config.toml"),
        "{shown}"
    );
    // Another file replaces the default one.
    let other = load(&["--config=/a"], &[], &in_etc).unwrap();
    assert!(other.report().contains("/a:1 (port)"), "{}", other.report());
}

#[test]
fn a_retired_variable_stops_the_start_unless_its_successor_is_set() {
    let retired = [("CHCP_PORT", "1"), ("CHCP_ADDRESS", "::1"), ("CHCP_CH_ENDPOINT", "unix:///a")];
    let shown = bad(&["--metrics-interval=0"], &retired);
    assert!(shown.starts_with("failed to load config: missing required environment variables\n"), "{shown}");
    for (old, _) in retired {
        let new = old.replace("CHCP_", "UNKEY_VMCP_");
        assert!(shown.contains(&format!("{new}: not set, while {old}")), "{shown}");
        assert!(shown.contains(&format!("from {old}; set {new} instead")), "{shown}");
    }
    assert!(shown.contains("metrics_interval"), "{shown}");

    let file = with_file("port = 2");
    assert!(load(&["--config=f"], &retired[..1], &file).is_ok());
    assert!(load(&["--port=2"], &retired[..1], &file).is_ok());
    for (name, value) in [("UNKEY_VMCP_PORT", "2"), ("VMCP_PORT", "2")] {
        assert!(load(&[], &[retired[0], (name, value)], &file).is_ok());
    }
    assert!(good(&[], &[("CHCP_PORT", "")]).warnings.is_empty());
    assert!(good(&[], &[("CHCP_COLOR", "1")]).warnings[0].contains("CHCP_COLOR is no longer read"));
}

#[test]
fn an_unserved_setting_stops_the_start() {
    for (setting, value) in [(Setting::OtelEnabled, "true"), (Setting::CorsOrigins, "https://a.example")] {
        let name = setting.variable();
        let loaded = good(&[], &[(&name, value)]);
        assert_eq!(loaded.config.unserved(), [setting]);
        let shown = loaded.require_served().unwrap_err().to_string();
        assert!(
            shown.contains("this version cannot yet ") && shown.contains(&format!("unset {name}")),
            "{shown}"
        );
        assert!(shown.contains(&format!("from {name};")), "{shown}");
        // Together with another error this one is reported too.
        assert!(bad(&["--port=x"], &[(&name, value)]).contains("this version cannot yet "));
    }
    for (name, value) in [
        ("UNKEY_VMCP_QEMU_IMPORT", "false"),
        ("UNKEY_VMCP_OTEL_ENABLED", "false"),
        ("UNKEY_VMCP_CH_ENDPOINT", ""),
    ] {
        let loaded = good(&[], &[(name, value)]);
        assert_eq!((loaded.require_served(), loaded.warnings), (Ok(()), vec![]), "{name}");
    }
}

#[test]
fn ineffective_and_dangerous_settings_cause_warnings() {
    for (args, want) in [
        (&["--address=0.0.0.0"][..], "listening on 0.0.0.0:8080 with no authentication"),
        (&["--address=::"], "listening on [::]:8080"),
        (&["--address=vms.example.com"], "UNKEY_VMCP_ADDRESS"),
        (
            &["--otel-endpoint=c:1", "--otel-sampling-rate=0.5"],
            "no effect: UNKEY_VMCP_OTEL_SAMPLING_RATE, UNKEY_VMCP_OTEL_ENDPOINT (",
        ),
        (&["--default-initrd=/i"], "UNKEY_VMCP_DEFAULT_INITRD has no effect without a default kernel"),
    ] {
        let warnings = good(args, &[]).warnings;
        assert!(warnings.len() == 1 && warnings[0].contains(want), "{args:?}: {warnings:?}");
    }
    for args in [
        &["--address=127.0.0.2"][..],
        &["--address=localhost"],
        &["--otel-prometheus-enabled=true", "--otel-prometheus-port=1"],
        &["--default-kernel=/k", "--default-initrd=/i"],
        &["--default-initrd="],
    ] {
        assert_eq!(good(args, &[]).warnings, Vec::<String>::new(), "{args:?}");
    }
    let misspelt = good(&[], &[("UNKEY_VMCP_PROT", "1"), ("VMCP_TOKEN", "1")]).warnings;
    assert_eq!(
        misspelt,
        ["UNKEY_VMCP_PROT is not a setting and has no effect; did you mean UNKEY_VMCP_PORT?"]
    );
    let misspelt = good(&[], &[("VMCP_PROT", "1"), ("VMCP_SKIP_LOG", "x"), ("VMCP_PORT", "1")]).warnings;
    assert_eq!(misspelt, ["VMCP_PROT is not a setting and has no effect; did you mean VMCP_PORT?"]);
}

#[test]
fn variables_of_vmcp_cause_no_warning() {
    let of_vmcp = ["SERVER", "CONTEXT", "CONTEXTS_FILE", "COMPLETE", "CA", "CERT", "KEY"];
    let of_vmcp = of_vmcp.map(|name| format!("VMCP_{name}"));
    // The file of the command line does not exist here, so reading the file would fail.
    let loaded = good(&[], &of_vmcp.each_ref().map(|name| (name.as_str(), "/home/me/vmcp.toml")));
    assert_eq!(loaded.warnings, Vec::<String>::new());
    let with_the_other_prefix = good(&[], &[("UNKEY_VMCP_SERVER", "http://127.0.0.1:1")]).warnings;
    assert_eq!(with_the_other_prefix.len(), 1, "{with_the_other_prefix:?}");
}

#[test]
fn a_socket_at_the_old_default_path_causes_a_warning() {
    let sockets = [
        "/tmp/ch.sock",
        "/tmp/firecracker.sock",
        "/var/run/libvirt/libvirt-sock",
        "/var/run/libvirt/virtqemud-sock",
    ];
    for (backend, socket, variable) in [
        ("cloudhypervisor", sockets[0], "UNKEY_VMCP_CH_ENDPOINT=unix:///tmp/ch.sock"),
        ("firecracker", sockets[1], "UNKEY_VMCP_FC_ENDPOINT=unix:///tmp/firecracker.sock"),
        ("qemu", sockets[2], "UNKEY_VMCP_QEMU_ENDPOINT=qemu:///system"),
        ("qemu", sockets[3], "UNKEY_VMCP_QEMU_ENDPOINT=qemu:///system"),
    ] {
        let host = FakeHost { existing: [socket].into(), ..FakeHost::default() };
        let warnings = load(&["--backend", backend], &[], &host).unwrap().warnings;
        assert!(warnings.len() == 1 && warnings[0].starts_with(socket), "{warnings:?}");
        assert!(warnings[0].contains(variable), "{warnings:?}");
        let flag = format!(
            "--{}-endpoint=unix:///x",
            ["ch", "fc", "qemu", "qemu"][sockets.iter().position(|s| *s == socket).unwrap()]
        );
        assert_eq!(load(&["--backend", backend, &flag], &[], &host).unwrap().warnings, Vec::<String>::new());
    }
}

#[test]
fn a_user_without_root_has_directories_of_their_own() {
    let user = |existing: &[&'static str]| FakeHost {
        uid: 1000,
        existing: existing.iter().copied().collect(),
        ..FakeHost::default()
    };
    for (variables, existing, state, runtime) in [
        (
            &[("XDG_STATE_HOME", "/s"), ("XDG_RUNTIME_DIR", "/r"), ("HOME", "/h")][..],
            &[][..],
            "/s/vmm-controlplane",
            "/r/vmm-controlplane",
        ),
        (
            &[("HOME", "/h")],
            &["/run/user/1000"],
            "/h/.local/state/vmm-controlplane",
            "/run/user/1000/vmm-controlplane",
        ),
        (
            &[("HOME", "/h"), ("XDG_STATE_HOME", "relative"), ("XDG_RUNTIME_DIR", "")],
            &[],
            "/h/.local/state/vmm-controlplane",
            "/h/.local/state/vmm-controlplane/run",
        ),
        (&[("VMCP_STATE_DIR", "/a"), ("VMCP_RUNTIME_DIR", "/b")], &[], "/a", "/b"),
    ] {
        let LoadedConfig { config, warnings, .. } = load(&[], variables, &user(existing)).unwrap();
        assert_eq!((config.state_dir, config.runtime_dir), (state.into(), runtime.into()));
        assert_eq!(warnings.len(), usize::from(runtime.ends_with("/run")), "{warnings:?}");
    }
    let shown = load(&[], &[], &user(&[])).unwrap_err().to_string();
    assert!(shown.contains("no home directory") && shown.contains("set UNKEY_VMCP_STATE_DIR"), "{shown}");
    let long = format!("/{}", "x".repeat(60));
    let shown = load(&[], &[("HOME", "/h"), ("XDG_RUNTIME_DIR", &long)], &user(&[])).unwrap_err().to_string();
    assert!(shown.contains("set UNKEY_VMCP_RUNTIME_DIR to a path of 59 bytes at most"), "{shown}");
}

#[test]
fn an_empty_flag_unsets_an_optional_setting() {
    let kernel = [("UNKEY_VMCP_DEFAULT_KERNEL", "/k")];
    assert_eq!(good(&[], &kernel).config.defaults.kernel, Some("/k".into()));
    assert_eq!(good(&["--default-kernel="], &kernel).config.defaults.kernel, None);
}

#[test]
fn the_report_shows_each_setting_with_its_origin() {
    let report =
        good(&["--port=9000"], &[("VMCP_BACKEND", "qemu"), ("UNKEY_VMCP_ADDRESS", "0.0.0.0")]).report();
    assert!(report.starts_with("OK\n"), "{report}");
    let row = |name: &str| {
        let line = report.lines().find(|line| line.split_whitespace().next() == Some(name)).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(row("UNKEY_VMCP_PORT"), ["9000", "--port"]);
    assert_eq!(row("UNKEY_VMCP_BACKEND"), ["qemu", "VMCP_BACKEND"]);
    assert_eq!(row("UNKEY_VMCP_CH_ENDPOINT"), ["-", "default"]);
    assert!(Setting::ALL.iter().all(|setting| row(&setting.variable()).len() == 2));
    assert!(report.contains("\nwarning: listening on 0.0.0.0:9000"), "{report}");
}

proptest! {
    #[test]
    fn loading_never_panics_and_never_fails_without_a_reason(
        values in proptest::collection::btree_map(
            (0..Setting::ALL.len(), 0..3_usize),
            proptest::collection::vec(any::<u8>(), 0..40),
            0..8,
        ),
        file in proptest::option::of("[a-z_.=\\[\\]\"{}# \n0-9]{0,80}"),
    ) {
        let mut variables: Environment = values
            .into_iter()
            .map(|((setting, prefix), value)| {
                let prefix = [PREFIX, SHORT_PREFIX, RETIRED_PREFIX][prefix];
                (Setting::ALL[setting].variable_with(prefix).into(), std::ffi::OsString::from_vec(value))
            })
            .collect();
        if file.is_some() {
            variables.insert("UNKEY_VMCP_CONFIG".into(), "f.toml".into());
        }
        let host = FakeHost { uid: 1000, file: file.map(String::into_bytes), ..FakeHost::default() };
        match DaemonConfig::load(&Cli::default(), &variables, &host) {
            Ok(loaded) => prop_assert!(loaded.report().starts_with("OK\n")),
            Err(errors) => prop_assert!(!errors.errors().is_empty()),
        }
        let _ = migrate_env(&variables);
    }
}
