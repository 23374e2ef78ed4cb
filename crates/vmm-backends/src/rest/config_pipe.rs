//! The pipe from which a VMM reads its whole configuration.
//!
//! ```text
//!   start ──► the VMM loads its program, and waits at its first read
//!     probe ─► a line break, which the VMM skips
//!     send ──► the configuration and the end of the file: the VMM starts its guest
//!     the daemon ends at any moment: an end of file without a configuration, and the VMM exits
//! ```
//!
//! The pipe has no name that must be made and removed, and only the daemon has its other end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe::Sender;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_host::process::KEPT_DESCRIPTOR;

use crate::launch::sleep_for;

/// The longest time that a VMM may take to read its configuration. The pipe holds 64 KiB, so that a
/// smaller configuration is written at once.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between two looks whether a VMM has read a probe.
const PROBE_DELAY: Duration = Duration::from_micros(50);

/// The daemon's end of the pipe.
#[derive(Debug)]
pub(crate) struct ConfigPipe(OwnedFd);

impl ConfigPipe {
    /// Returns a new pipe, and the VMM's end of it.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (output, input) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok((Self(input), output))
    }

    /// Returns the file that a VMM opens to read the pipe, which it holds as [`KEPT_DESCRIPTOR`].
    pub(crate) fn file() -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{KEPT_DESCRIPTOR}"))
    }

    /// Waits until the VMM has read a probe, which shows that the VMM waits for its configuration.
    /// Never returns if the VMM does not read. Returns false if nobody can read the pipe any more.
    pub(crate) async fn probe(&self) -> bool {
        if rustix::io::write(&self.0, b"\n").is_err() {
            return false;
        }
        loop {
            match rustix::io::ioctl_fionread(&self.0) {
                Ok(0) => return true,
                Ok(_) => sleep_for(PROBE_DELAY).await,
                Err(_) => return false,
            }
        }
    }

    /// Writes `config` and closes the pipe.
    ///
    /// # Errors
    /// [`BackendErrorKind::Gone`] if nobody can read the pipe any more; [`BackendErrorKind::Timeout`]
    /// if the VMM does not read. The VMM has not seen the end of its configuration after an error.
    pub(crate) async fn send(self, config: &str) -> Result<(), BackendError> {
        let sending = async { Sender::from_owned_fd(self.0)?.write_all(config.as_bytes()).await };
        match tokio::time::timeout(SEND_TIMEOUT, sending).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let message = format!("the VMM did not read its configuration: {error}");
                Err(BackendError::new(BackendErrorKind::Gone, Effect::NotApplied, message).caused_by(error))
            }
            Err(_) => {
                let message = format!("the VMM did not read its configuration within {SEND_TIMEOUT:?}");
                Err(BackendError::new(BackendErrorKind::Timeout, Effect::NotApplied, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[tokio::test]
    async fn a_probe_returns_when_it_was_read_and_the_end_follows_the_configuration() {
        let (pipe, output) = ConfigPipe::new().unwrap();
        let mut reader = std::fs::File::from(output);
        let early = tokio::time::timeout(Duration::from_millis(20), pipe.probe()).await;
        assert!(early.is_err(), "nobody has read it");
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text)
        });
        assert!(pipe.probe().await);
        pipe.send("{}").await.unwrap();
        assert_eq!(read.await.unwrap().unwrap(), "\n\n{}");
    }

    #[tokio::test]
    async fn a_pipe_without_a_reader_is_noticed() {
        let (pipe, output) = ConfigPipe::new().unwrap();
        drop(output);
        assert!(!pipe.probe().await);
        assert_eq!(pipe.send("{}").await.unwrap_err().kind, BackendErrorKind::Gone);
    }
}
