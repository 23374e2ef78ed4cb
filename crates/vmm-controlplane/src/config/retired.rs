//! The variables of the program's predecessor, `CHCP_*`. They are no longer read, and the user is
//! always informed of them.
//!
//! A retired variable has the same name as its successor except for the prefix. If one is set and
//! its successor is not, the daemon does not start. `migrate-env` prints the exports to set
//! instead.

use std::ffi::OsStr;
use std::fmt::Write as _;

use vmm_host::path::shell_word;

use super::error::{ConfigError, Origin, printable};
use super::settings::{PREFIX, RETIRED_PREFIX, SHORT_PREFIX, Setting};
use super::sources::{Environment, GivenTexts, variable_value};

/// Returns the retired variables that are set, with their successors where they have one.
fn retired(env: &Environment) -> impl Iterator<Item = (&str, &OsStr, Option<Setting>)> {
    env.iter().filter(|(_, value)| !value.is_empty()).filter_map(|(name, value)| {
        let name = name.to_str()?;
        let suffix = name.strip_prefix(RETIRED_PREFIX)?;
        Some((name, value.as_os_str(), Setting::from_suffix(suffix)))
    })
}

/// Returns an error for each retired variable whose successor nobody gave.
pub(super) fn check(env: &Environment, given: &GivenTexts) -> Vec<ConfigError> {
    let orphans = retired(env).filter_map(|(name, _, successor)| Some((name, successor?)));
    orphans
        .filter(|(_, successor)| !given.contains_key(successor))
        .map(|(name, successor)| {
            let successor = successor.variable();
            let advice = format!(
                "set {successor} instead; `vmm-controlplane migrate-env` prints the exports for all of them"
            );
            let message = format!("{successor}: not set, while {name}, which is no longer read, is");
            ConfigError {
                retired: true,
                ..ConfigError::new(message, Origin::Variable(name.to_owned()), advice)
            }
        })
        .collect()
}

/// Returns a warning for each retired variable that never had a successor.
pub(super) fn warnings(env: &Environment) -> Vec<String> {
    let strangers = retired(env).filter(|(_, _, successor)| successor.is_none());
    strangers
        .map(|(name, ..)| format!("{} is no longer read and has no successor; unset it", printable(name)))
        .collect()
}

/// Returns the shell text that `migrate-env` prints: exports to be evaluated, and explanations as
/// comments.
///
/// A successor that is already set is left alone. The backend is set to Cloud Hypervisor, the only
/// one that the predecessor knew, unless one is chosen.
pub fn migrate_env(env: &Environment) -> String {
    let mut exports = String::new();
    let mut notes = String::new();
    let taken = |setting: Setting| {
        [PREFIX, SHORT_PREFIX]
            .map(|prefix| setting.variable_with(prefix))
            .into_iter()
            .find(|name| variable_value(env, name).is_some())
    };
    for (name, value, successor) in retired(env) {
        // Writing to a String cannot fail.
        let _ = match (successor, value.to_str()) {
            // The name comes from outside, and a shell evaluates this comment, so nothing may break
            // out of the line.
            (None, _) => writeln!(notes, "# {} has no successor: it is ignored.", printable(name)),
            (Some(setting), _) if let Some(by) = taken(setting) => {
                writeln!(notes, "# {name}: nothing to do, {by} is already set.")
            }
            (Some(setting), None) => {
                writeln!(notes, "# {name} is not UTF-8: set {} by hand.", setting.variable())
            }
            (Some(setting), Some(text)) => {
                writeln!(exports, "export {}={}", setting.variable(), shell_word(text))
            }
        };
    }
    if exports.is_empty() {
        if notes.is_empty() {
            return format!(
                "# Nothing to migrate: no {RETIRED_PREFIX} variable is set in this environment.\n\
                 # Run this where they are set, for instance after sourcing the old environment file.\n"
            );
        }
        return notes;
    }
    let backend = Setting::Backend;
    if taken(backend).is_none() && !exports.contains(&format!("export {}=", backend.variable())) {
        let _ = writeln!(exports, "export {}=cloudhypervisor", backend.variable());
    }
    notes + &exports
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt as _;

    fn env(pairs: &[(&str, &str)]) -> Environment {
        pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    #[test]
    fn migrated_exports_are_quoted_and_select_cloud_hypervisor() {
        let text = migrate_env(&env(&[("CHCP_PORT", "9000"), ("CHCP_ADDRESS", "it's $(here)")]));
        assert_eq!(
            text,
            "export UNKEY_VMCP_ADDRESS='it'\\''s $(here)'\nexport UNKEY_VMCP_PORT=9000\n\
             export UNKEY_VMCP_BACKEND=cloudhypervisor\n"
        );
    }

    #[test]
    fn a_variable_that_is_set_is_not_migrated() {
        let backends = [("UNKEY_VMCP_BACKEND", "qemu"), ("VMCP_BACKEND", "qemu"), ("CHCP_BACKEND", "qemu")];
        for (name, value) in backends {
            let text = migrate_env(&env(&[("CHCP_PORT", "1"), (name, value)]));
            assert!(!text.contains("=cloudhypervisor"), "{text}");
        }
        let text = migrate_env(&env(&[("CHCP_PORT", "1"), ("VMCP_PORT", "2")]));
        assert_eq!(text, "# CHCP_PORT: nothing to do, VMCP_PORT is already set.\n");
    }

    #[test]
    fn a_migration_without_old_variables_prints_comments_only() {
        for variables in [env(&[]), env(&[("CHCP_PORT", "")]), env(&[("UNKEY_VMCP_PORT", "1")])] {
            let text = migrate_env(&variables);
            assert!(text.starts_with("# Nothing to migrate"), "{text}");
            assert!(text.lines().all(|line| line.starts_with("# ")), "{text}");
        }
    }

    #[test]
    fn untrusted_names_and_bytes_never_become_shell_commands() {
        let mut variables = env(&[("CHCP_X\nrm -rf", "1")]);
        variables.insert("CHCP_PORT".into(), std::ffi::OsString::from_vec(vec![0xff]));
        let text = migrate_env(&variables);
        assert!(text.lines().all(|line| line.starts_with("# ")), "{text}");
        assert!(text.contains("set UNKEY_VMCP_PORT by hand"), "{text}");
    }
}
