//! The sources of settings. For each setting the first source that has it counts.
//!
//! ```text
//!   flag  >  UNKEY_VMCP_X  >  VMCP_X  >  file  >  default
//! ```
//!
//! This module does not read the process: the environment is a map, and a [`LoaderHost`] answers
//! for files, the user and the existence of old sockets.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use super::cli::Cli;
use super::error::{ConfigError, Origin, printable};
use super::file;
use super::settings::{CONFIG_KEY, PREFIX, SHORT_PREFIX, Setting, nearest, variable};
use super::sockets;

/// The environment variables, by name.
pub type Environment = BTreeMap<OsString, OsString>;

/// The facts of the host that the loader reads. Tests pass facts of their own.
pub trait LoaderHost {
    /// Returns the effective user id.
    fn uid(&self) -> u32;
    /// Reads a whole file.
    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Returns true if a path exists.
    fn exists(&self, path: &Path) -> bool;
    /// Returns the id of the group with this name.
    fn group(&self, name: &str) -> Option<u32> {
        let _ = name;
        None
    }
    /// Returns the identity of the file that a path leads to. Two paths with the same identity are
    /// one file.
    fn identity(&self, path: &Path) -> String {
        path.to_string_lossy().into_owned()
    }
}

/// The machine on which the program runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThisHost;

impl LoaderHost for ThisHost {
    fn uid(&self) -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        std::fs::read(path)
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn group(&self, name: &str) -> Option<u32> {
        nix::unistd::Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
    }

    fn identity(&self, path: &Path) -> String {
        sockets::identity(path)
    }
}

/// The file that is read if it exists and no other is named, so that a subcommand which a person
/// types has the configuration of the service.
const DEFAULT_FILE: &str = "/etc/vmm-controlplane/config.toml";

/// The text that was given for each setting, with its origin. A setting that nobody gave is absent.
pub(super) type GivenTexts = BTreeMap<Setting, (String, Origin)>;

/// Collects the given texts. Values that cannot be read are added to `errors`.
pub(super) fn collect(
    cli: &Cli,
    env: &Environment,
    host: &dyn LoaderHost,
    errors: &mut Vec<ConfigError>,
) -> GivenTexts {
    let mut given = read_file(cli, env, host, errors);
    for setting in Setting::ALL.iter().copied() {
        // The sources are read from the weakest to the strongest, and each replaces the value of
        // the one before.
        for prefix in [SHORT_PREFIX, PREFIX] {
            let name = setting.variable_with(prefix);
            if let Some(value) = variable_value(env, &name) {
                insert_text(&mut given, setting, value, Origin::Variable(name), errors);
            }
        }
        if let Some(value) = cli.settings.get(&setting) {
            insert_text(&mut given, setting, value, Origin::Flag(setting.flag()), errors);
        }
    }
    given
}

/// Returns a variable's value. An empty variable counts as unset.
pub(super) fn variable_value<'a>(env: &'a Environment, name: &str) -> Option<&'a OsStr> {
    env.get(OsStr::new(name)).map(OsString::as_os_str).filter(|value| !value.is_empty())
}

fn insert_text(
    given: &mut GivenTexts,
    setting: Setting,
    value: &OsStr,
    origin: Origin,
    errors: &mut Vec<ConfigError>,
) {
    match value.to_str() {
        Some(text) => {
            given.insert(setting, (text.to_owned(), origin));
        }
        None => {
            let advice = format!("set {} to a text in UTF-8", setting.variable());
            errors.push(ConfigError::new(format!("the value of {origin} is not UTF-8"), origin, advice));
        }
    }
}

fn read_file(
    cli: &Cli,
    env: &Environment,
    host: &dyn LoaderHost,
    errors: &mut Vec<ConfigError>,
) -> GivenTexts {
    let by_variable = || {
        let names = [PREFIX, SHORT_PREFIX].map(|prefix| variable(prefix, CONFIG_KEY));
        names
            .into_iter()
            .find_map(|name| variable_value(env, &name).map(|path| (path, Origin::Variable(name))))
    };
    let by_place = || {
        let is_there = host.exists(Path::new(DEFAULT_FILE));
        is_there.then(|| (OsStr::new(DEFAULT_FILE), Origin::Default))
    };
    let by_flag = || cli.config.as_deref().map(|path| (path, Origin::Flag(format!("--{CONFIG_KEY}"))));
    let Some((path, origin)) = by_flag().or_else(by_variable).or_else(by_place) else {
        return GivenTexts::new();
    };
    let path = PathBuf::from(path);
    let fault = match host.read_file(&path).map(String::from_utf8) {
        Ok(Ok(text)) => return file::read(&path, &text, errors),
        Ok(Err(_)) => "it is not UTF-8".to_owned(),
        Err(error) => error.to_string(),
    };
    let message =
        format!("cannot read the configuration file {}: {fault}", printable(&path.to_string_lossy()));
    let advice = format!("set {} to a TOML file that this user can read", variable(PREFIX, CONFIG_KEY));
    errors.push(ConfigError::new(message, origin, advice));
    GivenTexts::new()
}

/// The beginnings of the variables of this repository's scripts, tests and client, which have the
/// short prefix and are no settings.
const NO_SETTINGS: [&str; 18] = [
    "VMCP_BACKEND_MATRIX",
    "VMCP_BENCH_",
    "VMCP_CA",
    "VMCP_CERT",
    "VMCP_CHAOS_",
    "VMCP_COMPLETE",
    "VMCP_CONTEXT",
    "VMCP_DAEMON",
    "VMCP_DEMO_",
    "VMCP_GUEST_",
    "VMCP_KEY",
    "VMCP_MIGRATION_",
    "VMCP_SERVER",
    "VMCP_SKIP_",
    "VMCP_TEST_",
    "VMCP_TINY_",
    "VMCP_TOKEN",
    "VMCP_URL",
];

/// Returns a warning for each variable that looks like a setting and is none, with the setting that
/// was probably meant.
pub(super) fn unknown_variables(env: &Environment) -> Vec<String> {
    let known = |suffix: &str| suffix == variable("", CONFIG_KEY) || Setting::from_suffix(suffix).is_some();
    let names = env.keys().filter_map(|name| name.to_str());
    let unknown = names.filter(|name| !NO_SETTINGS.iter().any(|start| name.starts_with(start)));
    let unknown = unknown.filter_map(|name| {
        // The two prefixes differ in their first letters, so a name has at most one of them.
        let prefix = [PREFIX, SHORT_PREFIX].into_iter().find(|prefix| name.starts_with(prefix))?;
        let suffix = &name[prefix.len()..];
        (!known(suffix)).then_some((name, prefix, suffix))
    });
    unknown
        .map(|(name, prefix, suffix)| {
            let suffix = suffix.to_ascii_lowercase();
            let meant = nearest(&suffix, Setting::ALL.iter().map(|setting| setting.key()));
            let hint = meant.map(|key| format!("; did you mean {}?", variable(prefix, key)));
            format!("{} is not a setting and has no effect{}", printable(name), hint.unwrap_or_default())
        })
        .collect()
}
