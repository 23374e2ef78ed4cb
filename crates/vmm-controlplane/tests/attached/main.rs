//! The real daemon with VMMs that somebody else started: here the tests themselves, by hand.
//!
//! Every test has VMMs, sockets and a daemon of its own and takes them all down again. Where a program or /dev/kvm is missing a
//! test says `SKIPPED` and why.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the helpers of a test give up as loudly as the test itself"
)]

mod bench;
mod changes_by_others;
mod doctor;
mod force;
#[allow(dead_code, unused_imports, reason = "another program's harness, of which this one needs a part")]
#[path = "../e2e/harness.rs"]
mod harness;
mod hung;
#[path = "../e2e/hung_mount.rs"]
mod hung_mount;
mod import;
mod interfaces;
mod lifecycle;
mod qmp;
mod sockets;
