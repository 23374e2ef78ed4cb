//! The signals that ask this process to end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// The exit code of a process that a signal ended, before the signal's number is added.
const SIGNALLED: u8 = 128;

/// Receives SIGHUP, SIGINT and SIGTERM, which do not end this process any more.
pub(super) struct EndSignals {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl EndSignals {
    /// Begins to receive the signals.
    ///
    /// # Errors
    ///
    /// The system refuses.
    pub(super) fn new() -> Result<Self, Failure> {
        let receive = |kind| {
            signal(kind)
                .map_err(|error: io::Error| Failure::Local(format!("signals cannot be received: {error}")))
        };
        Ok(Self {
            hangup: receive(SignalKind::hangup())?,
            interrupt: receive(SignalKind::interrupt())?,
            terminate: receive(SignalKind::terminate())?,
        })
    }

    /// Waits for a signal. Returns the exit code of a process that this signal ends.
    pub(super) async fn next(&mut self) -> u8 {
        let kind = tokio::select! {
            _ = self.hangup.recv() => SignalKind::hangup(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
        };
        SIGNALLED.saturating_add(u8::try_from(kind.as_raw_value()).unwrap_or_default())
    }
}
