//! Helpers of the tests, which no release contains.
//!
//! ```text
//!   backend_suite ── drives any Backend through the service ──► column of docs/backend-support.md
//!   store_suite   ── holds any Store to its contract ──► memory_store, and SQLite in vmm-store
//!   fake          ── a hypervisor that follows a script, in the test or as a process
//!   guests        ── tiny kernels: deaf ones, ones that obey the power button, ones that crash
//!   logs          ── the room that a VMM's log takes
//!   libvirtd, libvirt_session ── a libvirt for one test
//!   qemu_copy     ── a QEMU from which a test takes parts
//!   by_hand       ── each VMM driven without the daemon, for tests and benchmarks
//! ```

pub mod backend_suite;
pub mod by_hand;
pub mod corpus;
pub mod fake;
pub mod guests;
pub mod libvirt_session;
pub mod libvirtd;
pub mod logs;
pub mod memory_store;
pub mod qemu_copy;
pub mod skip;
pub mod store_suite;
