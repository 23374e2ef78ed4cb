//! The hypervisors, one folder each. A file of the same name has the same task in every folder: `mod.rs` implements the
//! backend's trait, `check.rs` says what is refused, `convert.rs` turns a [`vmm_core::spec::VmSpec`] into the hypervisor's own
//! configuration and `describe.rs` turns that back, `client.rs` speaks the hypervisor's own API, `vmm.rs` is the handle of one run,
//! `attached.rs` serves VMMs that another program started.
//!
//! What the hypervisors share is beside them: the frame of all [`attached`] VMMs, the [`rest`] of a managed VMM with a REST API,
//! the [`ladder`] that ends a VM, the search for a hypervisor's [`program`], and the [`launch`] of its process.

pub mod attached;
pub mod cloud_hypervisor;
mod connecting;
mod counters;
pub mod firecracker;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod kernel_args;
pub mod ladder;
pub mod launch;
pub mod libvirt;
mod ordered;
mod patience;
pub mod program;
pub mod qemu;
mod resets;
pub mod rest;
mod search;
mod spares;
mod throttle;
mod words;
