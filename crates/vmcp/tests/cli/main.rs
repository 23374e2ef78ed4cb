//! `vmcp` against real daemons, and through them against real hypervisors.
//!
//! The daemon is this very program, started once more, so that no other one has to be built and
//! found. A test that needs a terminal has one of its own.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test, though one with a main of its own: a helper that fails fails as loudly as the test itself"
)]

mod completion;
mod console;
mod create;
mod edit;
mod hostile;
mod lifecycle;
mod live;
mod pty;
mod queries;
mod raw;
mod run;
mod server;
mod terminal;
mod update;
mod wait;
mod watch;
mod world;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// Trials wait for processes more than they compute.
const THREADS: usize = 4;

/// Lists functions of a module as trials, by their names.
#[macro_export]
macro_rules! trials {
    ($($name:ident),* $(,)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            let module = module_path!().trim_start_matches("cli::");
            vec![$(libtest_mimic::Trial::test(format!("{module}::{}", stringify!($name)), || {
                $name();
                Ok(())
            })),*]
        }
    };
}

fn main() -> ExitCode {
    if std::env::var_os(world::BE_THE_DAEMON).is_some() {
        return world::daemon();
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(THREADS));
    let modules: [fn() -> Vec<Trial>; 15] = [
        completion::trials,
        console::trials,
        create::trials,
        edit::trials,
        hostile::trials,
        lifecycle::trials,
        live::trials,
        queries::trials,
        raw::trials,
        run::trials,
        server::trials,
        terminal::trials,
        update::trials,
        wait::trials,
        watch::trials,
    ];
    let trials = modules.iter().flat_map(|module| module()).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
