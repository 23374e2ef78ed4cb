//! Console input, an ability of some VMMs.

use std::time::Duration;

use async_trait::async_trait;

use crate::backend::BackendError;

/// Takes input for the serial console of one run.
///
/// A write needs no answer of the VMM's control interface, so that it may run beside any operation
/// on the VM.
#[async_trait]
pub trait ConsoleInput: Send + Sync {
    /// Writes `data`, for at most `within`. The bytes of one call stay together. Success means that
    /// the console has taken the bytes, and not that the guest has read them.
    ///
    /// # Errors
    /// Returns [`ConsoleInputError`] with the number of bytes that were taken.
    async fn write_console(&self, data: &[u8], within: Duration) -> Result<(), ConsoleInputError>;
}

/// A write that did not take all bytes.
#[derive(Clone, Debug)]
pub struct ConsoleInputError {
    /// The number of bytes that were taken.
    pub taken: usize,
    /// The cause.
    pub cause: ConsoleInputFailure,
}

/// The cause of a write that did not take all bytes.
#[derive(Clone, Debug)]
pub enum ConsoleInputFailure {
    /// The guest did not read its console in time.
    Unread,
    /// The console could not be written to.
    Failed(BackendError),
}
