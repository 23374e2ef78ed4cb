//! The daemon: the parts of the program that concern this process and its wire protocol, and not
//! VMs.
//!
//! `main.rs` reads the command line, [`config`] loads the settings, and `backends` is the registry
//! of hypervisors. [`daemon`] puts the parts together. [`rpc`] is the HTTP server, [`api`] has the
//! handlers, [`health`] the health pages, and `metrics` the page for Prometheus. [`operator`] has the subcommands for a person on the
//! host, `runtime_dir` and `service_unit` have
//! the warnings about that directory and about systemd, and [`telemetry`] the log.

pub mod api;
mod backends;
pub mod config;
pub mod daemon;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod health;
mod metrics;
mod notify;
pub mod operator;
pub mod rpc;
mod runtime_dir;
mod service_unit;
pub mod telemetry;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit of this build, from the variable `VMM_BUILD_COMMIT` at build time. Empty if the build
/// had none.
pub const COMMIT: &str = match option_env!("VMM_BUILD_COMMIT") {
    Some(commit) => commit,
    None => "",
};
