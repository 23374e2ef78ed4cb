//! The API's generated code: messages, the service trait that the daemon implements, and a client.
//!
//! Nothing here is written by hand. The contract is `proto/vmm/v1/vm.proto`, whose comments are
//! this crate's documentation; `build.rs` turns it into Rust and says what is special about its
//! JSON.
//!
//! - [`v1`]: the messages, [`v1::VmService`] (the trait), [`v1::VmServiceClient`].
//! - [`rpc`]: the standard error detail `google.rpc.BadRequest`.
//! - [`FILE_DESCRIPTOR_SET`]: the description of the API that server reflection serves.

// Lint groups are silenced for generated code only, because the generator chooses its shape.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::panic,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "generated code"
)]
mod generated {
    connectrpc::include_generated!();
}

pub use generated::google::rpc;
pub use generated::vmm::v1;

/// The compiled `.proto` files, comments included: a `google.protobuf.FileDescriptorSet` in wire
/// format.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reflection.binpb"));
