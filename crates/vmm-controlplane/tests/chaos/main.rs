//! Nothing lost, nothing leaked: the real daemon under load is killed again and again, and the world is held against what its
//! clients were told.
//!
//! ```text
//!   clients ── calls over HTTP ──► daemon ── VMMs, TAPs, sockets, folders
//!      │                             ▲ │
//!      │                 kill -9, again and again
//!      ▼                               ▼
//!   history ──► checker ◄─ final reads, events, host ──► audit
//! ```
//!
//! `cargo test` runs both tests shortened; `make chaos` runs them in full. `VMCP_CHAOS_SEED`, `VMCP_CHAOS_KILLS` and
//! `VMCP_CHAOS_CYCLES` set the seed of the choices and the size. The same seed makes the same choices, not the same run: when
//! things happen is up to the machine.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the helpers of a test give up as loudly as the test itself"
)]

mod audit;
mod checker;
mod client;
mod consoles;
mod cycles;
#[path = "../e2e/harness.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the end-to-end tests, which use the rest")]
mod harness;
mod history;
mod host;
mod load;
mod model;
mod plan;
mod randomised;
mod report;
mod stall;
mod verdict;
