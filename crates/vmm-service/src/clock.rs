//! The wall clock, as records and events use it.

pub(crate) use vmm_host::clock::now_ms;
