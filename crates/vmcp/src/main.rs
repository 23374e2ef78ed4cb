//! `vmcp`: the command line of the VM control plane.
//!
//! ```text
//!   arguments ──► cli ──► commands ──► connect ──► the daemon
//!                 input ──┘   │
//!                 config      └──► output ──► terminal, or a program that reads messages
//! ```
//!
//! - [`cli`]: the commands and their arguments, which are also the help and the man pages.
//! - [`commands`]: a file for each command.
//! - [`config`]: the choice of the server. [`input`]: a VM's configuration from flags or a file.
//! - [`connect`]: the generated client, names and prefixes, retries.
//! - [`output`]: tables, messages, errors, the spinner.
//! - [`failure`]: exit codes.

mod cli;
mod commands;
mod config;
mod connect;
mod failure;
mod input;
mod output;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use clap_complete::CompleteEnv;

use crate::cli::{Cli, Command, Global};
use crate::commands::Session;
use crate::config::Environment;
use crate::failure::Failure;
use crate::output::{Output, problem, remark};

fn main() -> ExitCode {
    // A shell that completes calls this program with this variable set and reads its output, so
    // nothing else may be printed.
    CompleteEnv::with_factory(Cli::command).var(commands::completion::VARIABLE).complete();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let format = cli.global.output;
    let mut server = String::new();
    match run(cli, &mut server) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = problem::text(&failure, format, &server) {
                remark(&text);
            }
            failure.exit_code()
        }
    }
}

/// Prints help, the version or an error of the command line. An error gets a hint where the command
/// is one of another tool.
fn refuse(error: &clap::Error) -> ExitCode {
    // A closed stream is no failure of its own, and the exit code says what happened.
    let _ = error.print();
    if let Some(hint) = cli::hint(error) {
        remark(&format!("hint: {hint}"));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Carries out the command. `server` is set to the server's name as soon as it is known, so that an
/// error can name it.
fn run(cli: Cli, server: &mut String) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    match command {
        // These commands need no server, and must work without a configured one.
        Command::Completion { shell } => commands::completion::registration(shell),
        Command::Man(arguments) => commands::man::run(&arguments),
        command => {
            let session = session(&global)?;
            *server = session.server.to_string();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| Failure::Local(format!("the system refuses: {error}")))?;
            runtime.block_on(commands::run(session, command))
        }
    }
}

fn session(global: &Global) -> Result<Session, Failure> {
    let environment = Environment::of_this_process();
    let server =
        config::choose(global.server.as_deref(), global.context.as_deref(), global.tls(), &environment)?;
    Ok(Session { client: connect::client(&server)?, server, output: Output::new(global.output) })
}
