//! One socket, and what is known of the VMM behind it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Notify;
use vmm_core::backend::BackendError;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::store::ProcessIdentity;
use vmm_host::endpoint::VisitError;

use super::Hypervisor;

/// One socket.
#[derive(Debug)]
pub(super) struct Seat {
    /// The socket.
    pub(super) socket: PathBuf,
    /// The socket's path as text: the place of the VM that lives there.
    pub(super) place: String,
    /// Whose turn it is to speak to the VMM: a look must not take a start that is under way for somebody else's.
    pub(super) turn: tokio::sync::Mutex<Memory>,
    holder: Mutex<Weak<()>>,
    view: Mutex<Option<View>>,
    /// Tells that the handle which held the seat has been dropped.
    left: Notify,
}

/// What one who had the turn leaves for the next.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// The VM that a start of ours has begun to make, and the VMM that it did it in.
    pub(super) started: Option<(VmUid, ProcessIdentity)>,
    /// The VMM whose VM at rest has been told of, or is to be told of no more.
    pub(super) told: Option<ProcessIdentity>,
}

/// What is known of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// A VMM of this version listens there.
    Serves(String),
    /// None can be used; the text says why and what to do.
    Fails(String),
}

/// Held by the handle of the VM that runs in a seat. While it is, nobody else looks there.
#[derive(Debug)]
pub(crate) struct Held {
    seat: Arc<Seat>,
    _kept: Arc<()>,
}

impl Held {
    /// Notes that the VMM's process has ended, before anybody has looked.
    pub(crate) fn ended(&self) {
        let text = format!("no VMM listens on {} any more: its process has ended", self.seat.endpoint());
        self.seat.note(View::Fails(text));
    }

    /// Notes whether the VMM answers: nobody else asks it meanwhile.
    pub(crate) fn answered<T>(&self, version: &str, answer: &Result<T, BackendError>) {
        self.seat.note(match answer {
            Ok(_) => View::Serves(version.to_owned()),
            Err(error) => View::Fails(format!("{} cannot be used: {error}", self.seat.endpoint())),
        });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.seat.left.notify_one();
    }
}

impl Seat {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self {
            place: socket.to_string_lossy().into_owned(),
            socket,
            turn: tokio::sync::Mutex::default(),
            holder: Mutex::default(),
            view: Mutex::default(),
            left: Notify::new(),
        }
    }

    /// The socket as an endpoint is written.
    pub(super) fn kind(&self) -> VmKind {
        VmKind::attached(&self.place)
    }

    pub(super) fn endpoint(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Takes the seat for a handle.
    pub(super) fn hold(self: &Arc<Self>) -> Held {
        let kept = Arc::new(());
        *self.holder.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&kept);
        Held { seat: Arc::clone(self), _kept: kept }
    }

    /// Says whether a handle holds the seat.
    pub(super) fn is_held(&self) -> bool {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner).strong_count() > 0
    }

    /// Waits until a handle has been dropped. May be cancelled.
    pub(super) async fn left(&self) {
        self.left.notified().await;
    }

    /// Remembers what was found, and says whether that is news.
    pub(super) fn note(&self, view: View) -> bool {
        let mut known = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = known.as_ref() != Some(&view);
        *known = Some(view);
        is_news
    }

    /// What was found last; `None` where nobody has looked yet.
    pub(super) fn view(&self) -> Option<View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why the seat cannot be used now, and what to do.
    pub(super) fn failure<H: Hypervisor>(&self, kind: &H, error: &VisitError) -> String {
        match error {
            VisitError::Nobody(_) => {
                let (title, start) = (kind.title(), kind.how_to_start(&self.socket));
                format!("no {title} listens on {}: start one there ({start})", self.endpoint())
            }
            VisitError::Refused(why) | VisitError::Failed(why) => {
                format!("{} cannot be used: {why}", self.endpoint())
            }
        }
    }
}

/// Finds the seat of a VM of `kind` among these.
pub(super) fn find<'a>(seats: &'a [Arc<Seat>], kind: &VmKind) -> Option<&'a Arc<Seat>> {
    seats.iter().find(|seat| kind.socket() == Some(&seat.place))
}
