//! vmm-testkit

pub mod backend_suite;
pub mod by_hand;
pub mod corpus;
pub mod fake;
pub mod guests;
pub mod libvirt_session;
pub mod libvirtd;
pub mod memory_store;
pub mod skip;
pub mod store_suite;
