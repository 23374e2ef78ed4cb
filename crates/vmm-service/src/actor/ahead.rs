//! A head start: the VMM of a VM that was just created is started before anybody asks for it.
//!
//! ```text
//!   CreateVm ── record ──┬── answer          BootVm ── intent ── the gate opens ──► the guest runs
//!                        └── VMM's process ───────────────────────────┘
//!                              │ nobody boots it in time, it is deleted, the daemon stops
//!                              └──► ended
//! ```
//!
//! Who creates a VM mostly boots it at once, and to start a VMM takes as long as all that the program does beside it. The
//! process waits behind the [`Gate`], as in every start: no guest runs, and nothing is touched but the VM's run folder, in which
//! a daemon that starts after a crash finds it. Few wait at once, and none for long. If a file that it may have read is another
//! one by the time that somebody boots the VM, it is ended and the start begins anew.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use vmm_core::backend::{Backend, BackendError, BackendErrorKind, Effect, Launched, Sweep};
use vmm_core::gate::{Gate, GateKeeper};
use vmm_core::spec::VmSpec;
use vmm_core::store::VmRecord;
use vmm_host::files::{FileFacts, FileKind};

use super::boot::{self, Launching};
use super::{Actor, Broken};
use crate::service::{Shared, UnderWay};

/// What the daemon allows of them.
#[derive(Debug)]
pub(crate) struct HeadStarts {
    /// How long one waits for BootVm; zero means that there are none.
    wait: Duration,
    places: Arc<Semaphore>,
    stopping: watch::Sender<bool>,
}

impl HeadStarts {
    /// Each waits for `wait`. More than the host has CPUs would only hinder one another.
    pub(crate) fn new(wait: Duration) -> Self {
        let places = std::thread::available_parallelism().map_or(1, usize::from);
        Self { wait, places: Arc::new(Semaphore::new(places)), stopping: watch::Sender::new(false) }
    }

    /// Gives up those that wait, and begins no more: the daemon stops.
    pub(crate) fn stop(&self) {
        self.places.close();
        self.stopping.send_replace(true);
    }
}

/// A start that no client has asked for yet.
pub(crate) struct HeadStart {
    keeper: GateKeeper,
    launch: AbortOnDropHandle<Result<Launched, BackendError>>,
    /// The kernel and the initial RAM disk as they were when it began: a VMM may have read them.
    boot_files: Vec<FileFacts>,
    /// When it is given up.
    until: Instant,
    stopping: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
    /// The daemon waits for its end.
    _under_way: UnderWay,
}

impl HeadStart {
    /// Begins one, if there is a place for it and the VM can have one.
    pub(crate) fn begin(
        shared: &Arc<Shared>,
        backend: &Arc<dyn Backend>,
        record: &VmRecord,
        spec: &VmSpec,
        boot_files: Vec<FileFacts>,
    ) -> Option<Self> {
        let allowed = &shared.head_starts;
        if allowed.wait.is_zero() || !backend.starts_ahead(spec) {
            return None;
        }
        let place = Arc::clone(&allowed.places).try_acquire_owned().ok()?;
        let (keeper, gate) = Gate::shut();
        let launch = boot::launch(shared, Arc::clone(backend), record, spec.clone(), None, gate);
        let launch = AbortOnDropHandle::new(tokio::spawn(launch));
        Some(Self {
            keeper,
            launch,
            boot_files,
            until: Instant::now() + allowed.wait,
            stopping: allowed.stopping.subscribe(),
            _place: place,
            _under_way: UnderWay::new(shared),
        })
    }

    /// Says whether the VM would boot these files.
    pub(super) fn has_read(&self, boot_files: &[FileFacts]) -> bool {
        self.boot_files == boot_files && boot_files.iter().all(|file| file.kind == FileKind::Regular)
    }

    /// What is left to do of the start. `None` where it has failed: whoever boots the VM then is told why it fails now.
    pub(super) fn go_on(self) -> Option<(GateKeeper, Launching)> {
        if self.launch.is_finished() {
            return None;
        }
        let launch = self.launch;
        let rest = async move {
            launch.await.unwrap_or_else(|error| {
                let message = format!("the start of the VMM was broken off: {error}");
                Err(BackendError::new(BackendErrorKind::Host, Effect::Unknown, message))
            })
        };
        Some((self.keeper, Box::pin(rest)))
    }
}

/// Waits until a head start has waited long enough.
pub(super) async fn over(ahead: Option<&HeadStart>) {
    let Some(ahead) = ahead else { return std::future::pending().await };
    let mut stopping = ahead.stopping.clone();
    tokio::select! {
        () = tokio::time::sleep_until(ahead.until) => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

impl Actor {
    /// Ends the VMM that waits to be asked for, if one does.
    pub(super) async fn give_up_head_start(&mut self) {
        if self.ahead.take().is_none() {
            return;
        }
        // It is killed where its task holds it; a process that is just being made is found by its run folder.
        if let Err(Broken::Backend(error)) = self.sweep(Sweep::Clear).await {
            tracing::error!(%error, "a VMM that nobody asked for could not be ended; the next operation tries again");
        }
    }
}
