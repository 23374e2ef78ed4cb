//! The API's handlers, which convert protobuf to the core's types and back, and decide nothing.
//!
//! [`vm`] has one function per method, [`call`] the idempotency keys of those that change something, and [`events`] has the functions of the methods about
//! events, and [`console`] that of StreamConsole. [`convert`] turns configurations and records into messages and back. [`capabilities`]
//! describes the abilities of backends in words. [`error`] turns failures into codes. [`size`]
//! keeps answers within the limit of default clients, and [`alive`] keeps streams from falling
//! silent.

mod call;
mod capabilities;
mod console;
pub(crate) mod convert;
mod error;
mod events;
mod keepalive;
mod size;
mod vm;

pub use vm::VmHandlers;
