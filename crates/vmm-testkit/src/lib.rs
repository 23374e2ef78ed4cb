//! vmm-testkit

pub mod backend_suite;
pub mod fake;
pub mod guests;
pub mod memory_store;
pub mod store_suite;
