//! Implements the port of `vmm_core::backend` for each hypervisor: [`cloud_hypervisor`],
//! [`firecracker`] and [`qemu`] start VMMs themselves, [`libvirt`] runs QEMU through libvirt, and
//! [`attached`] serves VMMs that another program started.
//!
//! A file of the same name has the same task in every folder:
//!
//! - `mod.rs` implements the backend's trait.
//! - `check.rs` returns the violations and warnings about a specification.
//! - `convert.rs` turns a [`vmm_core::spec::VmSpec`] into the hypervisor's own configuration.
//! - `describe.rs` turns the hypervisor's own configuration back into one of ours.
//! - `client.rs` speaks the hypervisor's own API.
//! - `vmm.rs` is the handle of one run.
//! - `attached.rs` serves VMMs of this hypervisor that another program started.
//!
//! The files beside the folders are shared. A launch uses [`program`] (finds the executable and its
//! version, which `output` reads), [`launch`] (starts the process and waits for its socket),
//! `spares` and, for a VMM with a REST API, [`rest`]. A shutdown uses the [`ladder`], with the
//! deadlines of `timeouts`. A restarted daemon uses `search` to find the VMM of a launch that was
//! interrupted. The monitor of a running VM uses `ordered`, `resets` and `throttle`. Text that
//! comes from a VMM passes `sanitize` before it is shown or stored. `console_input` has the ways to write
//! into a console.

pub mod attached;
pub mod cloud_hypervisor;
mod connect_errors;
pub(crate) mod console_input;
mod counters;
pub mod firecracker;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod guest_orders;
mod kernel_args;
pub mod ladder;
pub mod launch;
pub mod libvirt;
mod output;
pub mod program;
pub mod qemu;
mod resets;
pub mod rest;
mod sanitize;
mod search;
mod spares;
mod throttle;
mod timeouts;
