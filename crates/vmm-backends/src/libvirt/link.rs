//! The helper and its connection to libvirt. All VMs share one of each. Both are started again when
//! they end.
//!
//! ```text
//!   Starting ── ready ──► Up ── closed, or helper ended ──► Down ── a pause, `ready` ──► Starting
//!       └── unreachable, no helper ──────────────────────────►
//!
//!   call ──► stdin of the helper ──► … ──► its answer, by id
//!   events ──► the monitor of their domain ── or discovery, if there is no monitor
//! ```
//!
//! libvirt decides how long connecting takes: at its first use it examines QEMU, which takes half a
//! minute with KVM in software. A caller that needs the connection waits for its own time limit and
//! then gets an error with this explanation.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tracing::{Instrument as _, info, warn};
use uuid::Uuid;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_libvirt_wire::{
    Call, CallFailure, CallFailureKind, CallRequest, CallResult, Lifecycle, MAX_LINE, WaitsFor, to_line,
};

use super::domain::QUICK_CALL_TIMEOUT;
use super::helper_supervisor::supervise;
use crate::sanitize;

/// The most events that wait for one VM's monitor.
const EVENTS: usize = 256;

/// The state of the connection.
#[derive(Clone, Debug)]
pub(super) enum LinkState {
    /// A helper is connecting.
    Starting,
    /// libvirt answers.
    Up(LibvirtVersions),
    /// There is no connection. The number of the failed attempt counts from 1.
    Down(u64, LinkDown),
}

/// The versions that libvirt reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LibvirtVersions {
    pub(super) libvirt: String,
    pub(super) hypervisor: String,
}

/// The reason for the missing connection, and the advice.
#[derive(Clone, Debug)]
pub(super) struct LinkDown {
    pub(super) kind: BackendErrorKind,
    pub(super) message: String,
}

impl From<LinkDown> for BackendError {
    fn from(down: LinkDown) -> Self {
        Self::new(down.kind, Effect::NotApplied, down.message)
    }
}

/// An event for a VM's monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DomainEvent {
    /// An event of libvirt.
    Lifecycle(Lifecycle),
    /// An event of QEMU: its name and data.
    Monitor(String, String),
    /// A new connection. The events since the last one are lost.
    Connected,
}

/// An event for discovery, which receives the events of all domains without a monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum UnwatchedEvent {
    /// The state of a domain without a monitor has changed.
    Changed(Uuid),
    /// A domain was undefined.
    Undefined(Uuid),
    /// A new connection.
    Connected,
    /// The connection was lost.
    Lost,
}

/// The connection of one backend.
#[derive(Debug)]
pub(super) struct LibvirtLink {
    inner: Arc<LinkShared>,
    task: OnceLock<AbortHandle>,
}

/// The parts of the link that the task of the helper shares.
#[derive(Debug)]
pub(super) struct LinkShared {
    pub(super) uri: String,
    pub(super) program: PathBuf,
    pub(super) state: watch::Sender<LinkState>,
    /// Notified when a caller waits for a connection.
    pub(super) retry: Notify,
    next: AtomicU64,
    pending: Mutex<HashMap<u64, oneshot::Sender<Result<CallResult, CallFailure>>>>,
    outgoing: Mutex<Option<mpsc::Sender<Vec<u8>>>>,
    monitors: Mutex<HashMap<Uuid, mpsc::Sender<DomainEvent>>>,
    unwatched: Mutex<Option<mpsc::UnboundedSender<UnwatchedEvent>>>,
    /// Set when a call was not answered that needs neither QEMU nor the host. Then the helper or
    /// libvirtd hangs, and a new helper replaces the connection.
    pub(super) hangs: AtomicBool,
    hung: Notify,
    /// Set while a test call is in progress.
    suspected: AtomicBool,
}

impl Drop for LibvirtLink {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl LibvirtLink {
    pub(super) fn new(uri: String, program: PathBuf) -> Self {
        let inner = LinkShared {
            uri,
            program,
            state: watch::Sender::new(LinkState::Starting),
            retry: Notify::new(),
            next: AtomicU64::new(1),
            pending: Mutex::default(),
            outgoing: Mutex::default(),
            monitors: Mutex::default(),
            unwatched: Mutex::default(),
            hangs: AtomicBool::new(false),
            hung: Notify::new(),
            suspected: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner), task: OnceLock::new() }
    }

    /// Starts the task that keeps a helper. Every use of the link calls this, because only then
    /// there surely is a runtime.
    fn start(&self) {
        self.task.get_or_init(|| {
            let task = supervise(Arc::clone(&self.inner));
            tokio::spawn(task.instrument(tracing::info_span!(parent: None, "libvirt", uri = self.inner.uri)))
                .abort_handle()
        });
    }

    /// Returns the state of the connection.
    pub(super) fn state(&self) -> LinkState {
        self.start();
        self.inner.state.borrow().clone()
    }

    /// Waits until there is a connection, for at most `timeout`. A lost connection is tried again
    /// at once.
    pub(super) async fn ready(&self, timeout: Duration) -> Result<LibvirtVersions, LinkDown> {
        self.start();
        let mut states = self.inner.state.subscribe();
        // The attempt counter distinguishes a failure before this call from a later one. Without it
        // the old `LinkDown` state would end the wait at once, although the notification below
        // starts a new attempt whose result counts. `Starting` counts as attempt 0, so its failure
        // ends the wait, too. A permit of `notify_one` is kept if the task does not wait at this
        // moment, so the notification cannot be lost.
        let known = match &*states.borrow_and_update() {
            LinkState::Up(up) => return Ok(up.clone()),
            LinkState::Down(attempt, _) => *attempt,
            LinkState::Starting => 0,
        };
        self.inner.retry.notify_one();
        let settled = states.wait_for(|state| match state {
            LinkState::Up(_) => true,
            LinkState::Down(attempt, _) => *attempt > known,
            LinkState::Starting => false,
        });
        match tokio::time::timeout(timeout, settled).await {
            Ok(Ok(state)) => match &*state {
                LinkState::Up(up) => Ok(up.clone()),
                LinkState::Down(_, down) => Err(down.clone()),
                LinkState::Starting => Err(self.inner.still_connecting()),
            },
            Ok(Err(_)) | Err(_) => Err(self.inner.still_connecting()),
        }
    }

    /// Makes one call over the present connection.
    pub(super) async fn call(&self, call: Call, timeout: Duration) -> Result<CallResult, CallError> {
        self.start();
        self.inner.call(call, timeout).await
    }

    /// Sends the events of one domain to the returned receiver, until it is dropped.
    pub(super) fn subscribe(&self, domain: Uuid) -> DomainEvents {
        let (sender, events) = mpsc::channel(EVENTS);
        lock(&self.inner.monitors).insert(domain, sender);
        DomainEvents { inner: Arc::clone(&self.inner), domain, events }
    }

    /// Returns true if a domain has a monitor.
    pub(super) fn has_monitor(&self, domain: Uuid) -> bool {
        lock(&self.inner.monitors).get(&domain).is_some_and(|monitor| !monitor.is_closed())
    }

    /// Sends the events of all domains without a monitor to the returned receiver. A second
    /// receiver replaces the first.
    pub(super) fn unwatched_events(&self) -> mpsc::UnboundedReceiver<UnwatchedEvent> {
        self.start();
        let (sender, unwatched) = mpsc::unbounded_channel();
        *lock(&self.inner.unwatched) = Some(sender);
        unwatched
    }
}

#[cfg(test)]
impl LibvirtLink {
    /// Returns a connection to a libvirt that answers each call with `answer`.
    pub(super) fn scripted(answer: impl Fn(Call) -> CallResult + Send + 'static) -> Self {
        let link = Self::new("test:///scripted".to_owned(), PathBuf::new());
        let (sender, mut asked) = mpsc::channel::<Vec<u8>>(EVENTS);
        link.inner.connected("libvirt".to_owned(), "QEMU".to_owned(), sender);
        let inner = Arc::downgrade(&link.inner);
        let task = async move {
            while let (Some(line), Some(inner)) = (asked.recv().await, inner.upgrade()) {
                let Ok(CallRequest { id, call, .. }) = serde_json::from_slice(&line) else { return };
                inner.answered(id, Some(answer(call)), None);
            }
        };
        let _ = link.task.set(tokio::spawn(task).abort_handle());
        link
    }
}

/// The failure of a call.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// There is no connection.
    #[error("{}", .0.message)]
    Down(LinkDown),
    /// The connection was lost before the answer came.
    #[error("the connection to libvirt was lost during {name}; the daemon connects again")]
    Lost { name: &'static str, only_reads: bool },
    /// The answer did not come in time.
    #[error("libvirt has not answered {name} within {timeout:?}")]
    Silent { name: &'static str, only_reads: bool, timeout: Duration },
    /// The helper did not read the call in time, because too many calls wait.
    #[error("the libvirt helper has not taken {name} within {timeout:?}: too many calls wait for it")]
    Full { name: &'static str, timeout: Duration },
    /// libvirt refused the call.
    #[error("libvirt says: {}", sanitize::sentence(&.0.message))]
    Failed(CallFailure),
    /// The helper's answer, or the daemon's request, is malformed.
    #[error("the libvirt helper and the daemon do not understand each other: {0}")]
    Malformed(String),
}

impl CallError {
    /// Returns the kind of libvirt's refusal, if libvirt refused the call.
    pub(super) fn refusal(&self) -> Option<CallFailureKind> {
        match self {
            Self::Failed(failure) => Some(failure.kind),
            Self::Down(_)
            | Self::Lost { .. }
            | Self::Silent { .. }
            | Self::Full { .. }
            | Self::Malformed(_) => None,
        }
    }
}

impl From<CallError> for BackendError {
    fn from(error: CallError) -> Self {
        let sent = |only_reads: &bool| if *only_reads { Effect::NotApplied } else { Effect::Unknown };
        let (kind, effect) = match &error {
            CallError::Down(down) => (down.kind, Effect::NotApplied),
            CallError::Lost { only_reads, .. } => (BackendErrorKind::Unreachable, sent(only_reads)),
            CallError::Silent { only_reads, .. } => (BackendErrorKind::Timeout, sent(only_reads)),
            CallError::Full { .. } => (BackendErrorKind::Host, Effect::NotApplied),
            CallError::Failed(failure) => match failure.kind {
                CallFailureKind::NoDomain => (BackendErrorKind::Gone, Effect::NotApplied),
                CallFailureKind::WrongState | CallFailureKind::Other => {
                    return Self::refused(Effect::NotApplied, error.to_string()).caused_by(error);
                }
                // The helper did not pass the call on to libvirt, so the call says nothing about
                // the VM.
                CallFailureKind::Busy => (BackendErrorKind::Host, Effect::NotApplied),
                CallFailureKind::Timeout => (BackendErrorKind::Timeout, Effect::NotApplied),
                CallFailureKind::NoConnection => (BackendErrorKind::Unreachable, Effect::Unknown),
                CallFailureKind::Denied => (BackendErrorKind::Host, Effect::NotApplied),
                CallFailureKind::Unsupported => (BackendErrorKind::Rejected, Effect::NotApplied),
            },
            CallError::Malformed(_) => (BackendErrorKind::Protocol, Effect::Unknown),
        };
        Self::new(kind, effect, error.to_string()).caused_by(error)
    }
}

/// The entry of a call that waits for its answer. Removed when dropped.
struct PendingCall<'a> {
    inner: &'a LinkShared,
    id: u64,
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        lock(&self.inner.pending).remove(&self.id);
    }
}

/// The events of one domain.
#[derive(Debug)]
pub(super) struct DomainEvents {
    inner: Arc<LinkShared>,
    domain: Uuid,
    pub(super) events: mpsc::Receiver<DomainEvent>,
}

impl DomainEvents {
    /// Returns the domain.
    pub(super) fn domain(&self) -> Uuid {
        self.domain
    }
}

impl Drop for DomainEvents {
    fn drop(&mut self) {
        {
            let mut monitors = lock(&self.inner.monitors);
            self.events.close();
            // Another run of the same domain may have begun to receive events.
            if monitors.get(&self.domain).is_some_and(mpsc::Sender::is_closed) {
                monitors.remove(&self.domain);
            }
        }
        // An unread start event may belong to the next run, so discovery receives it.
        while let Ok(event) = self.events.try_recv() {
            if event == DomainEvent::Lifecycle(Lifecycle::Started) {
                self.inner.send_unwatched(UnwatchedEvent::Changed(self.domain));
            }
        }
    }
}

impl LinkShared {
    async fn call(self: &Arc<Self>, call: Call, timeout: Duration) -> Result<CallResult, CallError> {
        let (name, only_reads) = (call.name(), call.only_reads());
        let waits_for = call.waits_for();
        let outgoing = lock(&self.outgoing).clone();
        let Some(outgoing) = outgoing else { return Err(CallError::Down(self.why_down())) };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let within_ms = u64::try_from(timeout.as_millis()).ok();
        let line = to_line(&CallRequest { id, within_ms, call })
            .map_err(|error| CallError::Malformed(error.to_string()))?;
        if line.len() > MAX_LINE {
            return Err(CallError::Malformed("the request is too long".to_owned()));
        }
        let (reply, answer) = oneshot::channel();
        // The entry exists before the request is written, because the answer may come before `send`
        // returns. `_pending` removes the entry on every path, so a late answer finds none and is
        // dropped.
        lock(&self.pending).insert(id, reply);
        let _pending = PendingCall { inner: self, id };
        let deadline = tokio::time::Instant::now() + timeout;
        match tokio::time::timeout_at(deadline, outgoing.send(line)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(CallError::Down(self.why_down())),
            Err(_) => return Err(CallError::Full { name, timeout }),
        }
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(Ok(got))) => Ok(got),
            Ok(Ok(Err(failure))) => Err(CallError::Failed(failure)),
            Ok(Err(_)) => Err(CallError::Lost { name, only_reads }),
            Err(_) => {
                // A call that needs neither QEMU nor the host must be answered at once, so its
                // silence means that the helper or libvirtd hangs. Silence of any other call may be
                // the fault of one QEMU, so a test call decides.
                match waits_for {
                    WaitsFor::Nothing => {
                        self.hangs.store(true, Ordering::Relaxed);
                        self.hung.notify_one();
                    }
                    WaitsFor::Host | WaitsFor::Qemu(_) => self.test_for_hang(),
                }
                Err(CallError::Silent { name, only_reads, timeout })
            }
        }
    }

    /// Starts a test call that finds out whether one QEMU hangs, or the helper or libvirtd. At most
    /// one runs at a time.
    fn test_for_hang(self: &Arc<Self>) {
        if self.suspected.swap(true, Ordering::Relaxed) {
            return;
        }
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            // No domain has this UUID. Any answer proves that libvirtd answers. Silence sets
            // `hangs` in `call`.
            let _ = Box::pin(inner.call(Call::LookUp { uuid: Uuid::nil() }, QUICK_CALL_TIMEOUT)).await;
            inner.suspected.store(false, Ordering::Relaxed);
        });
    }

    fn why_down(&self) -> LinkDown {
        match &*self.state.borrow() {
            LinkState::Down(_, down) => down.clone(),
            LinkState::Starting | LinkState::Up(_) => self.still_connecting(),
        }
    }

    fn still_connecting(&self) -> LinkDown {
        LinkDown {
            kind: BackendErrorKind::Unreachable,
            message: format!(
                "libvirt at {} has not answered yet; at its first use it looks at QEMU, which may take half a minute: try again",
                self.uri
            ),
        }
    }

    /// Ends every call that is in progress, because the helper has ended.
    pub(super) fn disconnected(&self) {
        *lock(&self.outgoing) = None;
        lock(&self.pending).clear();
    }

    /// Records a new connection, whose calls go to `sender`.
    pub(super) fn connected(&self, libvirt: String, hypervisor: String, sender: mpsc::Sender<Vec<u8>>) {
        info!(libvirt, hypervisor, "the daemon is connected to libvirt");
        *lock(&self.outgoing) = Some(sender);
        self.state.send_replace(LinkState::Up(LibvirtVersions { libvirt, hypervisor }));
        for monitor in lock(&self.monitors).values() {
            // A monitor whose queue is full compares the state anyway.
            let _ = monitor.try_send(DomainEvent::Connected);
        }
        self.send_unwatched(UnwatchedEvent::Connected);
    }

    /// Passes an answer to the call that waits for it.
    pub(super) fn answered(&self, id: u64, ok: Option<CallResult>, failed: Option<CallFailure>) {
        let waiting = lock(&self.pending).remove(&id);
        // The call has given up before its answer came.
        let Some(waiting) = waiting else { return };
        let answer = match (ok, failed) {
            (Some(got), None) => Ok(got),
            (_, Some(failure)) => Err(failure),
            (None, None) => Err(CallFailure {
                kind: CallFailureKind::Other,
                message: "the helper's answer says neither yes nor no".to_owned(),
            }),
        };
        let _ = waiting.send(answer);
    }

    /// Passes an event to the monitor of its domain, or to discovery.
    pub(super) fn pass_on(&self, domain: Uuid, event: DomainEvent) {
        if event == DomainEvent::Lifecycle(Lifecycle::Undefined) {
            self.send_unwatched(UnwatchedEvent::Undefined(domain));
        }
        let monitor = lock(&self.monitors).get(&domain).cloned();
        match monitor.map(|monitor| monitor.try_send(event)) {
            Some(Ok(())) => {}
            Some(Err(mpsc::error::TrySendError::Full(event))) => {
                warn!(%domain, ?event, "an event of libvirt was dropped, because too many events wait");
            }
            Some(Err(mpsc::error::TrySendError::Closed(_))) | None => {
                self.send_unwatched(UnwatchedEvent::Changed(domain))
            }
        }
    }

    /// Sends an event to discovery.
    pub(super) fn send_unwatched(&self, event: UnwatchedEvent) {
        if let Some(unwatched) = &*lock(&self.unwatched) {
            let _ = unwatched.send(event);
        }
    }

    /// Waits until libvirt was found to hang.
    pub(super) async fn wait_for_hang(&self) {
        while !self.hangs.load(Ordering::Relaxed) {
            self.hung.notified().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
