//! vmm-testkit

pub mod fake;
pub mod guests;
pub mod memory_store;
pub mod store_suite;
