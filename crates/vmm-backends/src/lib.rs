//! The hypervisors, one folder each: `mod.rs` holds the trait's implementation and nothing else, `convert.rs` turns a
//! [`vmm_core::spec::VmSpec`] into the hypervisor's own configuration, `client.rs` speaks the hypervisor's own API.
//!
//! What they share is beside them: the [`ladder`] that ends a VM, and the [`launch`] of a VMM's process.

pub mod cloud_hypervisor;
pub mod firecracker;
pub mod ladder;
pub mod launch;
pub mod qemu;
pub mod rest;
