//! One socket of an attached VMM, and the knowledge about the VMM behind it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Notify;
use vmm_core::backend::BackendError;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::store::ProcessIdentity;
use vmm_host::endpoint::EndpointError;

use super::AttachedHypervisor;

/// One socket of an attached VMM.
#[derive(Debug)]
pub(super) struct AttachedSocket {
    /// The socket's path.
    pub(super) path: PathBuf,
    /// The socket's path as text, which is the place of the VM behind it.
    pub(super) place: String,
    /// The right to speak to the VMM. A scan must not take a start that is in progress for a VM of
    /// another client.
    pub(super) turn: tokio::sync::Mutex<ScanMemory>,
    holder: Mutex<Weak<()>>,
    view: Mutex<Option<SocketHealth>>,
    /// Notified when the handle that held the socket has been dropped.
    left: Notify,
}

/// The knowledge that one owner of the turn leaves for the next.
#[derive(Debug, Default)]
pub(super) struct ScanMemory {
    /// The VM that an unfinished start of this program has begun to create, and the VMM of that
    /// start.
    pub(super) started: Option<(VmUid, ProcessIdentity)>,
    /// The VMM whose stopped VM was already reported. The scanner does not report it again.
    pub(super) reported: Option<ProcessIdentity>,
}

/// The knowledge about a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SocketHealth {
    /// A VMM of this version listens there.
    Serves(String),
    /// No VMM can be used. The text gives the reason and the remedy.
    Fails(String),
}

/// Held by the handle of a running VM. While it exists, the scanner does not examine the socket.
#[derive(Debug)]
pub(crate) struct SocketLease {
    socket: Arc<AttachedSocket>,
    _kept: Arc<()>,
}

impl SocketLease {
    /// Records that the VMM's process has ended, so that the health is right before the next scan.
    pub(crate) fn ended(&self) {
        let text = format!("no VMM listens on {} any more: its process has ended", self.socket.endpoint());
        self.socket.set_health(SocketHealth::Fails(text));
    }

    /// Records the answer of the VMM to the handle, because the scanner does not ask meanwhile.
    pub(crate) fn answered<T>(&self, version: &str, answer: &Result<T, BackendError>) {
        self.socket.set_health(match answer {
            Ok(_) => SocketHealth::Serves(version.to_owned()),
            Err(error) => SocketHealth::Fails(format!("{} cannot be used: {error}", self.socket.endpoint())),
        });
    }
}

impl Drop for SocketLease {
    fn drop(&mut self) {
        self.socket.left.notify_one();
    }
}

impl AttachedSocket {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            place: path.to_string_lossy().into_owned(),
            path,
            turn: tokio::sync::Mutex::default(),
            holder: Mutex::default(),
            view: Mutex::default(),
            left: Notify::new(),
        }
    }

    /// Returns the socket as a [`VmKind`].
    pub(super) fn kind(&self) -> VmKind {
        VmKind::attached(&self.place)
    }

    pub(super) fn endpoint(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Reserves the socket for a handle, until the returned value is dropped.
    pub(super) fn lease(self: &Arc<Self>) -> SocketLease {
        let kept = Arc::new(());
        *self.holder.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&kept);
        SocketLease { socket: Arc::clone(self), _kept: kept }
    }

    /// Returns true if a handle holds the socket.
    pub(super) fn is_held(&self) -> bool {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner).strong_count() > 0
    }

    /// Waits until a handle has been dropped. Cancel-safe.
    pub(super) async fn wait_for_release(&self) {
        self.left.notified().await;
    }

    /// Records the result of a scan, and returns true if it differs from the last one.
    pub(super) fn set_health(&self, view: SocketHealth) -> bool {
        let mut known = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = known.as_ref() != Some(&view);
        *known = Some(view);
        is_news
    }

    /// Returns the last result, or `None` before the first scan.
    pub(super) fn health(&self) -> Option<SocketHealth> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the reason why the socket cannot be used, and the remedy.
    pub(super) fn failure<H: AttachedHypervisor>(&self, kind: &H, error: &EndpointError) -> String {
        match error {
            EndpointError::Nobody(_) => {
                let (title, start) = (kind.title(), kind.how_to_start(&self.path));
                format!("no {title} listens on {}: start one there ({start})", self.endpoint())
            }
            EndpointError::Refused(why) | EndpointError::Failed(why) => {
                format!("{} cannot be used: {why}", self.endpoint())
            }
        }
    }
}

/// Returns the socket of a VM of `kind`.
pub(super) fn find<'a>(sockets: &'a [Arc<AttachedSocket>], kind: &VmKind) -> Option<&'a Arc<AttachedSocket>> {
    sockets.iter().find(|socket| kind.socket() == Some(&socket.place))
}
