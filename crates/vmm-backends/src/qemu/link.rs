//! The connection of one VM's handle to its QEMU, which is restored when it is lost.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::debug;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};

use super::qmp::{Qmp, QmpError, QmpEvent};

/// The longest time of a connection, including the greeting.
pub(crate) const QMP_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The first pause between two attempts to connect again.
const FIRST_RECONNECT_DELAY: Duration = Duration::from_millis(100);
/// The longest pause between two attempts to connect again.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(5);

/// The connection to one QEMU, if there is one now.
#[derive(Debug)]
pub(crate) struct QemuLink {
    socket: PathBuf,
    /// The process that must listen on the socket.
    pid: u32,
    events: mpsc::Sender<QmpEvent>,
    current: Mutex<Option<Arc<Qmp>>>,
}

impl QemuLink {
    pub(crate) fn new(socket: PathBuf, pid: u32, events: mpsc::Sender<QmpEvent>) -> Self {
        Self { socket, pid, events, current: Mutex::new(None) }
    }

    /// Stores a connection, if the process of this QEMU listens on its other end.
    pub(crate) fn set(&self, qmp: Qmp) -> Result<Arc<Qmp>, BackendError> {
        // Pid 0 stands for a process of another namespace, which proves nothing.
        let listener = qmp.peer_pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        if let Some(listener) = listener
            && listener != self.pid
        {
            return Err(BackendError::new(
                BackendErrorKind::Unreachable,
                Effect::NotApplied,
                format!(
                    "process {listener} listens on {}, not the VM's QEMU ({}); nothing was sent to it",
                    self.socket.display(),
                    self.pid
                ),
            ));
        }
        let qmp = Arc::new(qmp);
        *self.slot() = Some(Arc::clone(&qmp));
        Ok(qmp)
    }

    /// Returns the connection.
    ///
    /// # Errors
    ///
    /// [`BackendErrorKind::Unreachable`] while there is none.
    pub(crate) fn get(&self) -> Result<Arc<Qmp>, BackendError> {
        self.slot().clone().ok_or_else(|| {
            BackendError::new(
                BackendErrorKind::Unreachable,
                Effect::NotApplied,
                format!(
                    "QEMU's socket {} is not connected; it is tried again every few seconds",
                    self.socket.display()
                ),
            )
        })
    }

    /// Connects once, within [`QMP_CONNECT_TIMEOUT`].
    pub(crate) async fn connect(&self) -> Result<Arc<Qmp>, BackendError> {
        let qmp = Qmp::connect(&self.socket, QMP_CONNECT_TIMEOUT, self.events.clone()).await;
        self.set(qmp.map_err(|error: QmpError| BackendError::from(error))?)
    }

    /// Waits until the connection is lost, and then until a new one exists. Cancel-safe.
    pub(crate) async fn restored(&self) -> Arc<Qmp> {
        let current = self.slot().clone();
        if let Some(qmp) = current {
            qmp.closed().await;
            *self.slot() = None;
        }
        let mut pause = FIRST_RECONNECT_DELAY;
        loop {
            tokio::time::sleep(pause).await;
            match self.connect().await {
                Ok(qmp) => {
                    debug!(pid = self.pid, "the daemon is connected to QEMU again");
                    return qmp;
                }
                Err(error) => debug!(pid = self.pid, %error, "QEMU cannot be connected to"),
            }
            pause = (pause * 2).min(MAX_RECONNECT_DELAY);
        }
    }

    /// Waits until the present connection, if there is one, has ended and all its events were
    /// delivered.
    pub(crate) async fn wait_until_drained(&self) {
        let current = self.slot().clone();
        if let Some(qmp) = current {
            qmp.closed().await;
        }
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Arc<Qmp>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
