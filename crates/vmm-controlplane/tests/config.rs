//! The configuration's companions outside the library: its documentation, the example file, the migration script.

#![allow(clippy::unwrap_used, reason = "the helpers are tests too; clippy.toml only sees #[test] functions")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vmm_controlplane::config::{
    Cli, DaemonConfig, Environment, LoadedConfig, LoaderHost, Setting, SettingDefault, migrate_env,
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap()
}

/// Root on a machine with one file.
struct OneFile(String);

impl LoaderHost for OneFile {
    fn uid(&self) -> u32 {
        0
    }

    fn read_file(&self, _: &Path) -> std::io::Result<Vec<u8>> {
        Ok(self.0.clone().into_bytes())
    }

    fn exists(&self, _: &Path) -> bool {
        false
    }

    fn group(&self, name: &str) -> Option<u32> {
        (name == "root").then_some(0)
    }
}

fn load_file(text: String) -> LoadedConfig {
    let cli = Cli { config: Some("f.toml".into()), ..Cli::default() };
    DaemonConfig::load(&cli, &Environment::new(), &OneFile(text)).unwrap()
}

#[test]
fn the_documentation_lists_every_setting_with_its_default() {
    let text = read("docs/configuration.md");
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| `--"))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), Setting::ALL.len());
    for (setting, row) in Setting::ALL.iter().zip(rows) {
        let default = match setting.spec().default {
            SettingDefault::Unset => "unset".to_owned(),
            SettingDefault::Text("") => "none".to_owned(),
            SettingDefault::Text(_) if *setting == Setting::OtelServiceVersion => {
                "the program's version".to_owned()
            }
            SettingDefault::Text(text) | SettingDefault::Directory(text) => format!("`{text}`"),
        };
        let names =
            [setting.flag(), setting.variable(), setting.key().to_owned()].map(|name| format!("`{name}`"));
        assert_eq!(row[..3], names, "{setting:?}");
        assert_eq!(row[3], default, "{setting:?}");
        assert!(!row[4].is_empty(), "{setting:?}");
    }
}

#[test]
fn the_example_file_shows_every_setting_and_sets_none() {
    let text = read("packaging/vmm-controlplane.toml");
    let defaults = load_file(String::new());
    assert_eq!(load_file(text.clone()).config, defaults.config);

    // A setting stands directly behind its #, a remark behind "# ".
    let is_setting =
        |line: &str| line.starts_with('#') && line.as_bytes().get(1).is_some_and(u8::is_ascii_lowercase);
    let uncommented: Vec<_> =
        text.lines().map(|line| if is_setting(line) { &line[1..] } else { line }).collect();
    let loaded = load_file(uncommented.join("\n"));
    for (entry, default) in loaded.effective.iter().zip(&defaults.effective) {
        assert_ne!(entry.origin, default.origin, "{:?} is missing", entry.setting);
        let is_default = default.value.is_none()
            || entry.value == default.value
            // The example shows a version, which is not to be changed with each release.
            || entry.setting == Setting::OtelServiceVersion;
        assert!(is_default, "{:?} is not at its default", entry.setting);
    }
}

/// Runs bash in an empty directory with these variables alone, and returns what it said and what it left there.
fn bash(code: &str, variables: &[(&str, &str)]) -> (Output, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let script = repository().join("scripts/migrate-env.sh");
    let output = Command::new("bash")
        .args(["-c", code, "bash"])
        .arg(script)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .envs(variables.iter().copied())
        .current_dir(directory.path())
        .output()
        .unwrap();
    (output, directory)
}

fn stdout(output: &Output) -> &str {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    std::str::from_utf8(&output.stdout).unwrap()
}

const OLD: [(&str, &str); 3] =
    [("CHCP_PORT", "9000"), ("CHCP_ADDRESS", "0.0.0.0"), ("CHCP_CH_ENDPOINT", "unix:///tmp/a 'b'.sock")];

#[test]
fn the_migration_script_agrees_with_the_guide() {
    let (output, directory) = bash("\"$1\"", &OLD);
    let text = stdout(&output);
    let expected = [
        "Migrating VMM Control Plane environment variables...",
        "Migrated CHCP_PORT -> UNKEY_VMCP_PORT",
        "Migrated CHCP_ADDRESS -> UNKEY_VMCP_ADDRESS",
        "Migrated CHCP_CH_ENDPOINT -> UNKEY_VMCP_CH_ENDPOINT",
        "Set UNKEY_VMCP_BACKEND=cloudhypervisor for compatibility",
        "Migration complete. New variables:",
    ];
    assert_eq!(text.lines().take(expected.len()).collect::<Vec<_>>(), expected);
    let listed = text.split_once("New variables:\n").unwrap().1;
    for line in ["UNKEY_VMCP_PORT=9000", "UNKEY_VMCP_ADDRESS=0.0.0.0", "UNKEY_VMCP_BACKEND=cloudhypervisor"] {
        assert!(listed.lines().any(|listed| listed == line), "{text}");
    }
    assert!(text.contains("source scripts/migrate-env.sh"), "{text}");
    let backup = std::fs::read_to_string(directory.path().join("chcp-backup.env")).unwrap();
    for (name, value) in OLD {
        assert!(backup.lines().any(|line| line == format!("{name}={value}")), "{backup}");
    }
}

#[test]
fn the_sourced_migration_script_leaves_only_the_exports() {
    for shell in ["", "set -eu; "] {
        let code = format!("{shell}. \"$1\" >log; . \"$1\" >log2; set | grep '_vmcp[_]' || :; env");
        let (output, directory) = bash(&code, &OLD);
        let text = stdout(&output);
        let exports: BTreeMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
        for (name, value) in OLD {
            assert_eq!(exports[name.replace("CHCP_", "UNKEY_VMCP_").as_str()], value);
        }
        assert_eq!(exports["UNKEY_VMCP_BACKEND"], "cloudhypervisor");
        assert!(!text.contains("_vmcp_"), "{text}");
        let log = std::fs::read_to_string(directory.path().join("log")).unwrap();
        assert!(!log.contains("source scripts"), "{log}");
        // The second run found its own backup and kept it.
        assert!(!directory.path().join("chcp-backup.env.1").exists());
    }
}

#[test]
fn the_migration_script_keeps_variables_that_are_set() {
    let variables =
        [OLD[0], OLD[1], ("UNKEY_VMCP_PORT", "1"), ("VMCP_ADDRESS", "::1"), ("VMCP_BACKEND", "qemu")];
    let (output, directory) = bash("echo precious >chcp-backup.env; . \"$1\"", &variables);
    let text = stdout(&output);
    assert!(text.contains("Kept UNKEY_VMCP_PORT, which is already set"), "{text}");
    assert!(text.contains("Kept VMCP_ADDRESS, which is already set"), "{text}");
    assert!(!text.contains("Migrated ") && !text.contains("UNKEY_VMCP_BACKEND"), "{text}");
    assert!(text.contains("backed up to chcp-backup.env.1"), "{text}");
    let kept = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
    assert_eq!(kept("chcp-backup.env"), "precious\n");
    assert!(kept("chcp-backup.env.1").contains("CHCP_PORT=9000\n"));

    let (output, directory) = bash("set -e; . \"$1\"", &[]);
    assert!(stdout(&output).contains("nothing to back up"));
    assert!(!directory.path().join("chcp-backup.env").exists());
}

#[test]
fn the_migration_script_and_the_program_have_the_same_variables() {
    let names: Vec<_> = Setting::ALL.iter().map(|setting| setting.variable_with("CHCP_")).collect();
    let variables: Vec<_> = names.iter().map(|name| (name.as_str(), "it's $HOME")).collect();
    let (output, _directory) = bash(". \"$1\" >log; env | grep '^UNKEY_VMCP_' | LC_ALL=C sort", &variables);

    let environment: Environment =
        variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
    let exports = migrate_env(&environment);
    let (evaluated, _directory) =
        bash("eval \"$EXPORTS\"; env | grep '^UNKEY_VMCP_' | LC_ALL=C sort", &[("EXPORTS", &exports)]);
    assert_eq!(stdout(&output), stdout(&evaluated));
    assert_eq!(stdout(&output).lines().count(), Setting::ALL.len());
}
