//! The hypervisors, one folder each: `mod.rs` holds the trait's implementation and nothing else, `convert.rs` turns a
//! [`vmm_core::spec::VmSpec`] into the hypervisor's own configuration, `client.rs` speaks the hypervisor's own API.
//!
//! [`attached`] is the same for VMMs that somebody else started. What they share is beside them: the [`ladder`] that ends a VM,
//! the search for a hypervisor's [`program`], and the [`launch`] of its process.

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
pub mod program;
pub mod qemu;
mod resets;
pub mod rest;
mod search;
mod spares;
mod throttle;
mod words;
