//! vmm-testkit

pub mod guests;
pub mod store_suite;
