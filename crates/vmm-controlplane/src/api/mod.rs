//! The API's handlers: from protobuf to the domain and back, and nothing else.
//!
//! [`vm`] has one function per method, and [`events`] those of the methods about events. [`convert`] turns configurations and
//! records into messages and back. [`capabilities`] puts the abilities of backends into words. [`error`] turns failures into
//! codes. [`size`] keeps answers within what default clients take, and [`alive`] streams from falling silent.

mod alive;
mod capabilities;
pub(crate) mod convert;
mod error;
mod events;
mod size;
mod vm;

pub use vm::Api;
