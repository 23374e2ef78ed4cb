//! The service on a scripted hypervisor and a scripted store, on a clock that jumps wherever nothing else is left to do.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, which clippy does not take for tests"
)]

mod causes;
mod claims;
mod common;
mod concurrency;
mod console;
mod creation;
mod disks;
mod event_log;
mod events;
mod fake_taps;
mod force;
mod interrupted;
mod keys;
mod kinds;
mod landlord;
mod lifecycle;
mod listing;
mod log;
mod many_vms;
mod observe;
mod places;
mod quarantine;
mod recover;
mod restart;
mod spares;
mod storage;
mod taps;
mod update;
mod wait;
