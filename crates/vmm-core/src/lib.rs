//! The domain of the control plane.
//!
//! What a VM is ([`config`], [`spec`]), which states it has and what may be done in each ([`state`]), what a hypervisor must
//! offer ([`backend`]), what must survive ([`store`], [`event`]) and how things are called ([`id`]). Nothing here does I/O,
//! speaks protobuf or knows a hypervisor by name, so all of it can be tested by calling it.

pub mod backend;
pub mod caller;
mod capabilities;
pub mod config;
pub mod event;
pub mod gate;
pub mod id;
pub mod intent;
pub mod kind;
pub mod place;
pub mod report;
mod spare;
pub mod spec;
pub mod state;
pub mod store;
mod sweep;
