//! vmm-host
