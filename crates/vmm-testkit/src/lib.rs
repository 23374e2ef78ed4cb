//! vmm-testkit
