//! `vmm-controlplane`: the command line of the daemon.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use vmm_controlplane::config::{
    Cli, ConfigErrors, DaemonConfig, Environment, LoadedConfig, Subcommand, ThisHost, migrate_env,
};
use vmm_controlplane::{daemon, operator, telemetry};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let environment: Environment = std::env::vars_os().collect();
    let outcome = match &cli.command {
        Subcommand::MigrateEnv => Ok(print_answer(&migrate_env(&environment))),
        Subcommand::Man => Ok(print_answer(&Cli::manual())),
        Subcommand::CheckConfig => {
            load(&cli, &environment).map(|loaded| print_answer(&loaded.report())).map_err(Into::into)
        }
        Subcommand::Serve => load(&cli, &environment).map_err(Into::into).map(serve),
        command @ (Subcommand::Doctor { .. }
        | Subcommand::Reconcile(_)
        | Subcommand::Backup { .. }
        | Subcommand::Restore { .. }) => {
            load(&cli, &environment).map_err(Into::into).and_then(|loaded| operate(command, &loaded))
        }
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            print_start_error(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints help, the version or an error of the command line.
fn refuse(error: &clap::Error) -> ExitCode {
    // A closed stream is no failure of its own, and the exit code says what happened.
    let _ = error.print();
    if let Some(hint) = Cli::hint(error) {
        let _ = writeln!(std::io::stderr(), "hint: {hint}");
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn load(cli: &Cli, environment: &Environment) -> Result<LoadedConfig, ConfigErrors> {
    let loaded = DaemonConfig::load(cli, environment, &ThisHost)?;
    loaded.require_served()?;
    Ok(loaded)
}

fn operate(command: &Subcommand, loaded: &LoadedConfig) -> anyhow::Result<ExitCode> {
    let answer = operator::run(command, loaded)?;
    print_text(&answer.text);
    Ok(ExitCode::from(answer.code))
}

/// Serves until a signal. An error is written through the log, so that it stands behind the last
/// log line and cannot block on stderr.
fn serve(loaded: LoadedConfig) -> ExitCode {
    let log = match telemetry::start() {
        Ok(log) => log,
        Err(error) => {
            print_start_error(&error.into());
            return ExitCode::FAILURE;
        }
    };
    match run(loaded) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.print_line(&format!("vmm-controlplane: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(loaded: LoadedConfig) -> anyhow::Result<()> {
    // VMMs inherit the working directory, which must not keep a file system from being unmounted.
    std::env::set_current_dir("/")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(daemon::run(loaded));
    // The tasks that still run hold nothing that a restart needs, so nobody waits for them.
    runtime.shutdown_background();
    result
}

fn print_answer(text: &str) -> ExitCode {
    print_text(text);
    ExitCode::SUCCESS
}

/// Prints the answer of a subcommand. An error is ignored, because a reader that has gone, as in `|
/// head`, needs no more text.
fn print_text(text: &str) {
    let _gone = writeln!(std::io::stdout(), "{}", text.trim_end());
}

/// Prints the reason of a start that failed before the log existed. An error is ignored, because
/// the exit code shows the failure too.
fn print_start_error(error: &anyhow::Error) {
    let _gone = writeln!(std::io::stderr(), "vmm-controlplane: {error:#}");
}
