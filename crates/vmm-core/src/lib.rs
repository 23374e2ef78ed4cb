//! The core of the control plane: VMs, their states, and the ports to hypervisors and to durable
//! state.
//!
//! - A VM is described by [`config`] as sent and by [`spec`] as checked. [`id`] has the names.
//! - [`state`] has the states of a VM and the requests that each state admits. [`intent`] has the
//!   operations that a crash may interrupt, and [`idempotency`] the answers that are kept for
//!   repeated calls.
//! - [`backend`] is the port to a hypervisor, and [`store`] the port to durable state. [`event`]
//!   has the entries of the log of VMs.
//!
//! No module does I/O, speaks protobuf or knows a hypervisor by name. Therefore all of it can be
//! tested by plain calls.

pub mod backend;
mod backend_error;
pub mod caller;
pub mod capabilities;
pub mod cause;
pub mod config;
pub mod config_part;
pub mod console;
pub mod discovery;
pub mod event;
mod health;
pub mod id;
pub mod idempotency;
pub mod intent;
pub mod kind;
pub mod limit;
pub mod pending;
pub mod reason;
pub mod report;
pub mod run_permit;
mod spare;
pub mod spec;
pub mod state;
pub mod store;
mod sweep;
mod words;
