//! The server, the connection and the output of one command.

use crate::config::Server;
use crate::connect::Client;
use crate::output::Output;

/// The things that a command works with.
pub(crate) struct Session {
    pub(crate) server: Server,
    pub(crate) client: Client,
    pub(crate) output: Output,
}
