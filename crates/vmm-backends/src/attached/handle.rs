//! The handle of a VM that runs in a VMM with a REST API that another program started.
//!
//! ```text
//!   AttachedVmm ─ AttachedVmmApi ─► the VMM's socket   asked for the guest's state at each sample
//!      │                             │
//!      │                             └─ differs from the order: Paused, Resumed, Gone (requested)
//!      └───── process ─► pidfd ──► AttachedVmmMonitor ──► Gone (unknown)
//! ```
//!
//! Neither hypervisor sends events on this socket, so a change by another client is seen at the
//! next sample. The pidfd reports the end of the process at once. The cause of that end is unknown,
//! because the process is not a child of this daemon and its log belongs to the other program.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tokio::sync::{Mutex, mpsc};
use tracing::Instrument;
use vmm_core::backend::{
    BackendError, Exit, ExitCause, GuestState, LadderOptions, LaunchedVmm, NetworkCounters, ResetOutcome,
    Sample, StorageCounters, Vmm, VmmEvent,
};
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;
use vmm_host::process::Process;

use super::console::ConsoleCopy;
use super::force::{self, EndMethod};
use super::socket::SocketLease;
use super::{AttachedVmmParts, GuestPhase};
use crate::counters;
use crate::ladder::{self, LadderRungs, UnsentCall};
use crate::rest::adopt::or_gone;

/// The most events that wait for the VM's owner.
const QUEUE: usize = 16;

/// The calls of a handle to a VMM.
#[async_trait]
pub(crate) trait AttachedVmmApi: std::fmt::Debug + Send + Sync + 'static {
    /// Returns the state of the guest.
    async fn state(&self) -> Result<GuestState, BackendError>;
    /// Stops the guest's CPUs. Succeeds if they are stopped already.
    async fn pause(&self) -> Result<(), BackendError>;
    /// Starts the guest's CPUs. Succeeds if they run already.
    async fn resume(&self) -> Result<(), BackendError>;
    /// Returns a request to the guest to shut down with the name of its rung, or `None` if the
    /// guest cannot be asked.
    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)>;
    /// Returns the order to power the VM off, or `None` if the VMM has none.
    fn power_off(&self) -> Option<UnsentCall<'_>>;
    /// Starts the guest again in the same VMM.
    async fn reset(&self, socket: &Path) -> Result<(), BackendError>;
    /// Returns the cause of the process's end, if the files in the run folder `dir` show it.
    async fn explain(&self, _dir: &Path) -> Option<ExitCause> {
        None
    }
    /// Returns the counters of the guest's devices, as far as the VMM reports them. `dir` is the
    /// run folder of a VM that this program started.
    async fn counters(&self, dir: Option<&Path>) -> Result<(NetworkCounters, StorageCounters), BackendError>;
}

/// The handle of one VM.
#[derive(Debug)]
struct AttachedVmm<A> {
    run: RunRecord,
    process: Process,
    api: Arc<A>,
    program: &'static str,
    dir: Option<PathBuf>,
    /// The state that was ordered last or was seen last. Locked during a call to the VMM, so that
    /// an order and a sample do not overlap.
    known: Mutex<GuestPhase>,
    events: mpsc::Sender<VmmEvent>,
    ending: Arc<AtomicBool>,
    console: Option<Arc<ConsoleCopy>>,
    held: Arc<SocketLease>,
}

/// Returns the handle of a VM that runs in `process`, and starts a task that watches the process.
pub(crate) fn attend<A: AttachedVmmApi>(
    api: Arc<A>,
    process: Process,
    program: &'static str,
    parts: AttachedVmmParts,
) -> LaunchedVmm {
    let (sender, events) = mpsc::channel(QUEUE);
    let ending = Arc::new(AtomicBool::new(false));
    let span = tracing::info_span!(parent: None, "attached", pid = process.pid());
    let console = parts.console.map(Arc::new);
    let held = Arc::new(parts.held);
    let monitor = AttachedVmmMonitor {
        process: process.clone(),
        api: Arc::clone(&api),
        dir: parts.dir.clone(),
        console: console.clone(),
        held: Arc::clone(&held),
        ending: Arc::clone(&ending),
        sender: sender.clone(),
    };
    tokio::spawn(monitor.run().instrument(span));
    let handle = AttachedVmm {
        run: parts.run,
        process,
        api,
        program,
        dir: parts.dir,
        known: Mutex::new(parts.guest),
        events: sender,
        ending,
        console,
        held,
    };
    LaunchedVmm { vmm: Arc::new(handle), events }
}

struct AttachedVmmMonitor<A> {
    process: Process,
    api: Arc<A>,
    dir: Option<PathBuf>,
    console: Option<Arc<ConsoleCopy>>,
    held: Arc<SocketLease>,
    ending: Arc<AtomicBool>,
    sender: mpsc::Sender<VmmEvent>,
}

impl<A: AttachedVmmApi> AttachedVmmMonitor<A> {
    async fn run(self) {
        tokio::select! {
            biased;
            _ = self.process.wait() => {}
            // The receiver has been dropped. The next daemon or the next scan of the socket sees
            // the end.
            () = self.sender.closed() => return,
        }
        self.held.ended();
        if let Some(console) = &self.console {
            console.catch_up().await;
        }
        let reported = match &self.dir {
            Some(dir) => self.api.explain(dir).await,
            None => None,
        };
        // An end that this daemon ordered is its own work, whatever the files say.
        let asked = self.ending.load(Ordering::Acquire);
        let cause = if asked { ExitCause::Requested } else { reported.unwrap_or(ExitCause::Unknown) };
        let message = format!(
            "the VMM, process {}, has ended; the exit status is not known, because another program started the process",
            self.process.pid()
        );
        let _ = self.sender.send(VmmEvent::Gone(Exit { cause, message })).await;
    }
}

impl<A: AttachedVmmApi> AttachedVmm<A> {
    /// Reads the state of the guest, and reports an event if the state differs from the order.
    async fn compare_state(&self) -> Result<GuestState, BackendError> {
        let mut known = self.known.lock().await;
        let state = self.api.state().await.map_err(|error| or_gone(&self.process, error))?;
        let seen = GuestPhase::from(state);
        // A change during an ordered end is part of that end and is reported by it.
        if seen == *known || self.ending.load(Ordering::Acquire) {
            return Ok(state);
        }
        *known = seen;
        let event = match seen {
            GuestPhase::Running => VmmEvent::Resumed,
            GuestPhase::Paused => VmmEvent::Paused,
            GuestPhase::AtRest => VmmEvent::Gone(Exit {
                cause: ExitCause::Requested,
                message: "another client of the VMM ended the VM, and the VMM runs on".to_owned(),
            }),
        };
        // A receiver that is that far behind reads the state at its next sample.
        if let Err(error) = self.events.try_send(event) {
            tracing::warn!(%error, "a change of the VM could not be reported");
        }
        Ok(state)
    }

    async fn order(&self, wanted: GuestPhase) -> Result<(), BackendError> {
        let mut known = self.known.lock().await;
        let done = match wanted {
            GuestPhase::Paused => self.api.pause().await,
            GuestPhase::Running | GuestPhase::AtRest => self.api.resume().await,
        };
        done.map_err(|error| or_gone(&self.process, error))?;
        *known = wanted;
        Ok(())
    }

    async fn end(&self, how: EndMethod) -> Result<EndedBy, BackendError> {
        self.ending.store(true, Ordering::Release);
        let ended = match how {
            EndMethod::Ladder(ladder) => ladder::climb(self, ladder).await,
            EndMethod::OrderOff => ladder::power_off(self).await,
        };
        if ended.is_err() {
            self.ending.store(false, Ordering::Release);
        }
        if self.process.has_ended() {
            self.held.ended();
        }
        self.save_console().await;
        ended
    }

    /// Copies the console output that the VMM may be about to overwrite.
    async fn save_console(&self) {
        if let Some(console) = &self.console {
            console.catch_up().await;
        }
    }
}

#[async_trait]
impl<A: AttachedVmmApi> LadderRungs for AttachedVmm<A> {
    fn process(&self) -> &Process {
        &self.process
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        let (rung, ask) = self.api.ask()?;
        let call: UnsentCall<'_> = Box::pin(async {
            // A paused guest does not react, so it is resumed first.
            if self.api.state().await? == GuestState::Paused {
                self.api.resume().await?;
            }
            ask.await
        });
        Some((rung, call))
    }

    fn power_off(&self, _forced: bool) -> Option<UnsentCall<'_>> {
        self.api.power_off()
    }

    async fn has_ended(&self) -> bool {
        matches!(self.api.state().await, Ok(GuestState::Ended))
    }

    async fn end_process(&self, forced: bool, _reached: EndedBy) -> Result<EndedBy, BackendError> {
        force::end_process(&self.process, &self.run.socket, self.program, forced).await
    }
}

#[async_trait]
impl<A: AttachedVmmApi> Vmm for AttachedVmm<A> {
    fn run(&self) -> &RunRecord {
        &self.run
    }

    async fn pause(&self) -> Result<(), BackendError> {
        self.order(GuestPhase::Paused).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        self.order(GuestPhase::Running).await
    }

    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        self.end(EndMethod::Ladder(ladder)).await
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        self.save_console().await;
        self.api.reset(&self.run.socket).await.map_err(|error| or_gone(&self.process, error))?;
        Ok(ResetOutcome::InPlace)
    }

    async fn reboot(&self, _ladder: LadderOptions) -> Result<ResetOutcome, BackendError> {
        // A guest that obeys its power button ends its VMM as well, and this program may not start
        // another one.
        self.reset().await
    }

    async fn sample(&self) -> Sample {
        let mut sample = counters::of_host(&self.process, None).await;
        let counted = self.api.counters(self.dir.as_deref()).await;
        let devices = counters::or_missing(&mut sample, "devices", counted);
        sample.network = devices.map(|(network, _)| network);
        sample.storage = devices.map(|(_, storage)| storage);
        sample
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        let looked = self.compare_state().await;
        self.held.answered(&self.run.version, &looked);
        looked
    }

    async fn kill(&self) -> Result<(), BackendError> {
        self.end(EndMethod::OrderOff).await.map(drop)
    }
}
