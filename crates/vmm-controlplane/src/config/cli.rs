//! The command line, which is built from the table of settings.
//!
//! A flag has no default here, so a flag that was not typed is absent and cannot override a
//! variable or the file. The environment is not read here either. Each flag's help names its
//! variable and its default.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches};

use super::settings::{CONFIG_KEY, PREFIX, Setting, SettingDefault, variable};

const CHECK_CONFIG: &str = "check-config";
const MIGRATE_ENV: &str = "migrate-env";
const MAN: &str = "man";
const SERVE: &str = "serve";
const DOCTOR: &str = "doctor";
const RECONCILE: &str = "reconcile";
const BACKUP: &str = "backup";
const RESTORE: &str = "restore";
/// The names of the subcommands' own arguments; no setting has them.
const DRY_RUN: &str = "dry-run";
const JSON: &str = "json";
const KILL_ORPHANS: &str = "kill-orphans";
const FILE: &str = "FILE";

const AFTER_HELP: &str = "\
Each setting is taken from the command line, else from its UNKEY_VMCP_ variable, else from the same variable \
without UNKEY_, else from the configuration file, else from its default. An empty variable counts as unset.

Examples:
  vmm-controlplane --port 9000
  vmm-controlplane check-config --config /etc/vmm-controlplane/config.toml
  vmm-controlplane doctor
  vmm-controlplane reconcile --dry-run
  eval \"$(vmm-controlplane migrate-env)\"";

/// The subcommand that was typed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Subcommand {
    /// Serves the API; also chosen without a subcommand.
    #[default]
    Serve,
    /// Checks the configuration, prints it, and ends.
    CheckConfig,
    /// Prints the exports that replace the retired variables, and ends.
    MigrateEnv,
    /// Prints the manual page, and ends.
    Man,
    /// Checks the abilities of this host.
    Doctor {
        /// Prints JSON.
        json: bool,
    },
    /// Lists the things that bear our mark, and removes those without an owner.
    Reconcile(ReconcileFlags),
    /// Copies the database.
    Backup {
        /// The new file.
        file: PathBuf,
    },
    /// Replaces the database by a copy.
    Restore {
        /// The copy.
        file: PathBuf,
    },
}

/// The flags of `reconcile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReconcileFlags {
    /// Lists everything and changes nothing.
    pub dry_run: bool,
    /// Prints JSON.
    pub json: bool,
    /// Ends VMMs that are proven ours, are alive, and have no owner.
    pub kill_orphans: bool,
}

/// The parsed command line; use [`clap::Parser::parse`] or [`clap::Parser::try_parse_from`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cli {
    /// The subcommand.
    pub command: Subcommand,
    /// The configuration file that `--config` names.
    pub config: Option<OsString>,
    /// The settings that were typed, as they were typed.
    pub settings: BTreeMap<Setting, OsString>,
}

impl clap::Parser for Cli {}

/// Returns the version, with the commit of the build if the build had one.
fn long_version() -> String {
    if crate::COMMIT.is_empty() {
        return crate::VERSION.to_owned();
    }
    format!("{} (commit {})", crate::VERSION, crate::COMMIT)
}

impl Cli {
    /// Returns the manual page in the roff format.
    pub fn manual() -> String {
        let mut page = Vec::new();
        let manual = clap_mangen::Man::new(Self::command()).section("8");
        // Writing to memory does not fail.
        let _written = manual.render(&mut page);
        String::from_utf8_lossy(&page).into_owned()
    }

    /// Returns the hint for an error of the command line: an unknown command may be one for VMs,
    /// which are those of the program `vmcp`.
    pub fn hint(error: &clap::Error) -> Option<&'static str> {
        (error.kind() == ErrorKind::InvalidSubcommand)
            .then_some("commands for VMs are those of the program vmcp, as `vmcp list`; see `vmcp --help`")
    }
}

impl CommandFactory for Cli {
    fn command() -> clap::Command {
        let file = Arg::new(CONFIG_KEY)
            .long(CONFIG_KEY)
            .value_name("FILE")
            .help(format!("Configuration file (TOML). [env: {}]", variable(PREFIX, CONFIG_KEY)))
            .value_parser(clap::value_parser!(OsString))
            .action(ArgAction::Set)
            .global(true);
        clap::Command::new("vmm-controlplane")
            .version(crate::VERSION)
            .long_version(long_version())
            .about("One API over Cloud Hypervisor, Firecracker and QEMU virtual machines")
            .after_help(AFTER_HELP)
            .arg(file)
            .args(Setting::ALL.iter().map(|setting| flag(*setting)))
            .subcommands([
                clap::Command::new(SERVE).about("Serves the API (the default)"),
                clap::Command::new(CHECK_CONFIG).about(
                    "Checks the configuration and prints each setting with its origin; prints every error and exits with code 1 if the configuration is not usable",
                ),
                clap::Command::new(MIGRATE_ENV)
                    .about("Prints shell exports that replace the CHCP_ variables, which are no longer read"),
                clap::Command::new(MAN).about("Prints the manual page of this program"),
            ])
            .subcommands(operator())
    }

    fn command_for_update() -> clap::Command {
        Self::command()
    }
}

impl FromArgMatches for Cli {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        // Global flags typed after the subcommand reach both matches. The inner ones were typed
        // last, so they count.
        let (name, matches) = matches.subcommand().unwrap_or((SERVE, matches));
        let command = match name {
            CHECK_CONFIG => Subcommand::CheckConfig,
            MIGRATE_ENV => Subcommand::MigrateEnv,
            MAN => Subcommand::Man,
            DOCTOR => Subcommand::Doctor { json: matches.get_flag(JSON) },
            RECONCILE => Subcommand::Reconcile(ReconcileFlags {
                dry_run: matches.get_flag(DRY_RUN),
                json: matches.get_flag(JSON),
                kill_orphans: matches.get_flag(KILL_ORPHANS),
            }),
            BACKUP => Subcommand::Backup { file: file_of(matches) },
            RESTORE => Subcommand::Restore { file: file_of(matches) },
            _ => Subcommand::Serve,
        };
        let typed = |name: &str| matches.get_one::<OsString>(name).cloned();
        let settings = Setting::ALL
            .iter()
            .filter_map(|setting| typed(setting.key()).map(|value| (*setting, value)))
            .collect();
        Ok(Self { command, config: typed(CONFIG_KEY), settings })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let newer = Self::from_arg_matches(matches)?;
        self.command = newer.command;
        self.config = newer.config.or_else(|| self.config.take());
        self.settings.extend(newer.settings);
        Ok(())
    }
}

/// Builds the subcommands of the operator, who works beside the daemon.
fn operator() -> [clap::Command; 4] {
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).help(help).action(ArgAction::SetTrue)
    };
    let json = || flag(JSON, "Print JSON");
    let file = |help: &'static str| {
        Arg::new(FILE).help(help).required(true).value_parser(clap::value_parser!(PathBuf))
    };
    [
        clap::Command::new(DOCTOR)
            .about(
                "Checks this host and prints a remedy for each problem; exits with code 1 if the default backend cannot serve",
            )
            .arg(json()),
        clap::Command::new(RECONCILE)
            .about(
                "Lists every process, TAP, socket and folder that bears the program's mark, with its owner, decision and reason, and removes each that is proven to be this program's, unused and without an owner; exits with code 3 if something is left that a person should look at",
            )
            .args([
                flag(DRY_RUN, "Only list, and remove nothing; allowed while the daemon runs"),
                flag(KILL_ORPHANS, "Also end VMMs that are proven to be this program's and that belong to no VM on record"),
                json(),
            ]),
        clap::Command::new(BACKUP)
            .about("Copies the database to a new file; allowed while the daemon runs")
            .arg(file("The new file; an existing file is refused")),
        clap::Command::new(RESTORE)
            .about("Replaces the database by a backup, and keeps the old database beside it; the daemon must be stopped")
            .arg(file("The backup")),
    ]
}

fn file_of(matches: &ArgMatches) -> PathBuf {
    // The argument is required, so clap has refused a command line without it.
    matches.get_one::<PathBuf>(FILE).cloned().unwrap_or_default()
}

/// Builds a setting's flag. The flag accepts the raw text, because the loader reads all sources
/// with one parser.
fn flag(setting: Setting) -> Arg {
    let spec = setting.spec();
    let default = match spec.default {
        SettingDefault::Unset | SettingDefault::Text("") => String::new(),
        SettingDefault::Text(text) | SettingDefault::Directory(text) => format!(" [default: {text}]"),
    };
    Arg::new(spec.key)
        .long(setting.long_flag())
        .value_name(spec.value_name)
        .help(format!("{} [env: {}]{default}", spec.help.trim(), setting.variable()))
        .help_heading(spec.heading)
        .value_parser(clap::value_parser!(OsString))
        // Kernel arguments and the like may begin with a dash.
        .allow_hyphen_values(setting == Setting::DefaultKernelArgs)
        .action(ArgAction::Set)
        .global(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn parse(args: &[&str]) -> Cli {
        Cli::try_parse_from([&["vmm-controlplane"], args].concat()).unwrap()
    }

    #[test]
    fn clap_accepts_the_definition_of_the_command_line() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_empty_command_line_serves_without_settings() {
        assert_eq!(parse(&[]), Cli::default());
        assert_eq!(parse(&["serve"]), Cli::default());
    }

    #[test]
    fn flags_are_accepted_before_and_after_the_subcommand() {
        for args in
            [&["--port", "1", "check-config", "--config=f"], &["check-config", "--config", "f", "--port=1"]]
        {
            let cli = parse(args);
            assert_eq!(cli.command, Subcommand::CheckConfig);
            assert_eq!(cli.config, Some("f".into()));
            assert_eq!(cli.settings, BTreeMap::from([(Setting::Port, "1".into())]));
        }
        assert_eq!(parse(&["migrate-env"]).command, Subcommand::MigrateEnv);
        assert_eq!(parse(&["--port", "1", "serve", "--port", "2"]).settings[&Setting::Port], "2");
    }

    #[test]
    fn operator_subcommands_have_their_own_arguments() {
        assert_eq!(parse(&["doctor", "--json"]).command, Subcommand::Doctor { json: true });
        let dry = ReconcileFlags { dry_run: true, ..ReconcileFlags::default() };
        let cli = parse(&["reconcile", "--dry-run", "--state-dir", "/s"]);
        assert_eq!(cli.command, Subcommand::Reconcile(dry));
        assert_eq!(cli.settings[&Setting::StateDir], "/s");
        assert_eq!(parse(&["backup", "f"]).command, Subcommand::Backup { file: "f".into() });
        assert_eq!(parse(&["restore", "f"]).command, Subcommand::Restore { file: "f".into() });
        for args in [
            ["vmm-controlplane", "backup"],
            ["vmm-controlplane", "restore"],
            ["vmm-controlplane", "--dry-run"],
        ] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
    }

    #[test]
    fn every_setting_has_a_flag_whose_help_names_its_variable() {
        let help = Cli::command().term_width(0).render_long_help().to_string();
        for setting in Setting::ALL {
            let cli = parse(&[&setting.flag(), "x"]);
            assert_eq!(cli.settings, BTreeMap::from([(*setting, "x".into())]));
            assert!(help.contains(&format!("[env: {}]", setting.variable())), "{setting:?}");
        }
        assert!(help.contains("[env: UNKEY_VMCP_CONFIG]"));
    }

    #[test]
    fn unknown_flags_and_subcommands_are_refused() {
        for args in [["vmm-controlplane", "--prot=1"], ["vmm-controlplane", "server"]] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
    }

    #[test]
    fn an_unknown_command_leads_to_the_program_for_vms() {
        let hint = |arg| Cli::hint(&Cli::try_parse_from(["vmm-controlplane", arg]).unwrap_err());
        assert!(hint("list").unwrap().contains("`vmcp list`"));
        assert_eq!(hint("--prot=1"), None);
    }

    #[test]
    fn the_version_flag_prints_the_version_of_the_program() {
        let version = Cli::try_parse_from(["vmm-controlplane", "--version"]).unwrap_err().to_string();
        assert_eq!(version, format!("vmm-controlplane {}\n", long_version()));
        assert!(version.contains(env!("CARGO_PKG_VERSION")) && version.contains(crate::COMMIT));
    }
}
