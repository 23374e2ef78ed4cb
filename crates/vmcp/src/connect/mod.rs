//! The connection to the daemon.
//!
//! - [`client`]: the generated client, which speaks Connect with binary messages. Binary messages
//!   of a later release can have fields that this program does not know; JSON could not.
//! - [`names`]: the VM that a name or a prefix means.
//! - [`raw`]: a call with JSON as it is typed, and the pages beside the API.
//! - [`retry`]: the pauses before a connection is tried again.
//! - [`transport`]: TCP, TLS and unix sockets, and [`tls`] the files of TLS.
//! - [`wait`]: one call of WaitVm.

pub(crate) mod names;
pub(crate) mod raw;
pub(crate) mod retry;
mod tls;
mod transport;
pub(crate) mod wait;

use std::error::Error;
use std::time::Duration;

use connectrpc::ConnectError;
use connectrpc::client::{CallOptions, ClientConfig};
use vmm_proto::v1::VmServiceClient;

use crate::config::Server;
use crate::failure::Failure;
use transport::Transport;

/// The longest time for an answer that comes from the daemon's memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest silence of a stream that lives: the server sends a sign of life every 30 s.
pub(crate) const SILENCE_LIMIT: Duration = Duration::from_secs(75);
/// The longest time for an operation and for a stream: the daemon takes no later deadline.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(3600);

/// The client of the daemon.
pub(crate) type Client = VmServiceClient<Transport>;

/// Returns a client of a server. Nothing is sent yet.
///
/// # Errors
///
/// A file of TLS cannot be used.
pub(crate) fn client(server: &Server) -> Result<Client, Failure> {
    let config = ClientConfig::new(server.uri()).with_default_timeout(ANSWER_TIMEOUT);
    Ok(VmServiceClient::new(Transport::to(server)?, config))
}

/// Returns the options of a call that waits for a guest, for other operations or for events.
pub(crate) fn long_call() -> CallOptions {
    CallOptions::default().with_timeout(LONGEST_TIMEOUT)
}

/// Returns the reason of an error: the deepest cause where the server was not reached, as
/// "Connection refused", and else the server's own words.
pub(crate) fn reason(error: &ConnectError) -> String {
    let mut cause = error.source();
    while let Some(deeper) = cause.and_then(Error::source) {
        cause = Some(deeper);
    }
    match cause {
        Some(cause) => format!("the server cannot be reached: {cause}"),
        None => error.message.clone().unwrap_or_else(|| "the server gives no reason".to_owned()),
    }
}
