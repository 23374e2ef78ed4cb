//! vmm-controlplane

pub mod config;
