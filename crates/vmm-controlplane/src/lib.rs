//! The daemon: what of the program is about this process and this wire, and not about VMs.
//!
//! `main.rs` reads the command line, [`config`] settles what it means, `backends` is the registry of hypervisors, [`daemon`] puts
//! the parts together, [`rpc`] is the
//! HTTP server, [`api`] the handlers, [`health`] the health pages, [`operator`] the subcommands of a person on the host and
//! [`telemetry`] the log.

pub mod api;
mod backends;
pub mod config;
pub mod daemon;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod health;
mod notify;
pub mod operator;
pub mod rpc;
pub mod telemetry;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
