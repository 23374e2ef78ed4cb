//! The parts of the hypervisors with a REST API on a unix socket that are alike: the [`backend`], which starts and adopts
//! their VMMs, and below that the [`client`], the [`start`] of their programs, the spare VMMs, the questions about their
//! [`options`], and the way back to a VMM that an earlier daemon started ([`adopt`]).
//!
//! Firecracker and Cloud Hypervisor use the same small HTTP server: ten connections, requests of 51,200 bytes at most. So
//! every VM has at most one connection. The connection is kept from call to call, and closed after each sample.

pub mod adopt;
pub mod backend;
pub mod client;
pub mod options;
pub(crate) mod spare;
pub mod start;
