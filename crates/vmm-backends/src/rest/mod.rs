//! The parts that hypervisors with a REST API on a unix socket share: the [`backend`], which starts
//! and adopts their VMMs, the [`client`], the [`start`] of their programs, the spare VMMs, the
//! checks of their [`options`], and the adoption of a VMM that an earlier daemon started
//! ([`adopt`]).
//!
//! Firecracker and Cloud Hypervisor use the same HTTP server, which accepts ten connections and
//! requests of at most 51,200 bytes. Therefore every VM has at most one connection. The connection
//! is kept between calls and closed after each sample.

pub mod adopt;
pub mod backend;
pub mod client;
pub(crate) mod config_pipe;
pub mod options;
pub(crate) mod spare;
pub mod start;
