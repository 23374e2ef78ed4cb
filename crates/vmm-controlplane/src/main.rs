//! `vmm-controlplane`: the command line of the daemon.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use vmm_controlplane::config::{
    Cli, Command, Config, ConfigErrors, Environment, Loaded, ThisHost, migrate_env,
};
use vmm_controlplane::{daemon, operator, telemetry};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let environment: Environment = std::env::vars_os().collect();
    let outcome = match &cli.command {
        Command::MigrateEnv => Ok(answer(&migrate_env(&environment))),
        Command::CheckConfig => {
            load(&cli, &environment).map(|loaded| answer(&loaded.report())).map_err(Into::into)
        }
        Command::Serve => load(&cli, &environment).map_err(Into::into).map(serve),
        command @ (Command::Doctor { .. }
        | Command::Reconcile(_)
        | Command::Backup { .. }
        | Command::Restore { .. }) => {
            load(&cli, &environment).map_err(Into::into).and_then(|loaded| operate(command, &loaded))
        }
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn load(cli: &Cli, environment: &Environment) -> Result<Loaded, ConfigErrors> {
    let loaded = Config::load(cli, environment, &ThisHost)?;
    loaded.require_served()?;
    Ok(loaded)
}

fn operate(command: &Command, loaded: &Loaded) -> anyhow::Result<ExitCode> {
    let answer = operator::run(command, loaded)?;
    say(&answer.text);
    Ok(ExitCode::from(answer.code))
}

/// Serves until a signal. An error is written through the log, so that it stands behind the last
/// log line and cannot block on stderr.
fn serve(loaded: Loaded) -> ExitCode {
    let log = match telemetry::start() {
        Ok(log) => log,
        Err(error) => {
            complain(&error.into());
            return ExitCode::FAILURE;
        }
    };
    match run(loaded) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.say(&format!("vmm-controlplane: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(loaded: Loaded) -> anyhow::Result<()> {
    // VMMs inherit the working directory, which must not keep a file system from being unmounted.
    std::env::set_current_dir("/")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(daemon::run(loaded));
    // The tasks that still run hold nothing that a restart needs, so nobody waits for them.
    runtime.shutdown_background();
    result
}

fn answer(text: &str) -> ExitCode {
    say(text);
    ExitCode::SUCCESS
}

/// Prints the answer of a subcommand. An error is ignored, because a reader that has gone, as in `|
/// head`, needs no more text.
fn say(text: &str) {
    let _gone = writeln!(std::io::stdout(), "{}", text.trim_end());
}

/// Prints the reason of a start that failed before the log existed. An error is ignored, because
/// the exit code shows the failure too.
fn complain(error: &anyhow::Error) {
    let _gone = writeln!(std::io::stderr(), "vmm-controlplane: {error:#}");
}
