//! vmm-service
