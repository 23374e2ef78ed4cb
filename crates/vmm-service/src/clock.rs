//! The wall clock that records and events use.

pub(crate) use vmm_host::clock::now_ms;
