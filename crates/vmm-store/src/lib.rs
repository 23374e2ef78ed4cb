//! vmm-store
