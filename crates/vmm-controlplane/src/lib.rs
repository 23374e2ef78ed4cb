//! vmm-controlplane

pub mod config;
pub mod rpc;
