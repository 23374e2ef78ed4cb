//! The real daemon with real hypervisors and real guests, driven over HTTP as a user would.
//!
//! Every test has a daemon, folders and guests of its own, on loopback, and takes them all down again, whether it passes or
//! fails. Where something is missing on the machine a test says `SKIPPED` and why.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the helpers of a test give up as loudly as the test itself"
)]

mod adoption;
mod bad_input;
mod busy;
mod cli;
mod clock;
mod console;
mod console_trouble;
mod damage;
mod devices;
mod events;
mod full_disk;
mod guest_ends;
mod harness;
mod hung_files;
#[allow(dead_code, reason = "another program uses the rest")]
mod hung_mount;
mod hypervisor_failures;
mod keys;
mod libvirt;
mod libvirt_session;
mod lifecycle;
mod listeners;
mod log;
mod log_lines;
mod metrics;
mod operator;
mod recovery;
mod run_folders;
mod scarcity;
mod service_manager;
mod settings;
mod shutdown;
mod signals;
mod spares;
mod startable;
mod stream;
mod taps;
mod unprivileged;
mod update;
mod valid;
