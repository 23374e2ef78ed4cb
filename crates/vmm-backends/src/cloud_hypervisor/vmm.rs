//! One running Cloud Hypervisor: its handle, and the task that reports its events.
//!
//! ```text
//!   CloudHypervisorVmm ─ client ─► API socket  one connection, closed after each sample
//!      │
//!      ├───── expected ──────────────┐         events of this daemon's own orders are not reported
//!      │                             ▼
//!      │        events file ──► CloudHypervisorMonitor ─► GuestReset, Paused, Resumed
//!      └───── process ─► pidfd ──►  │  └──► Gone(cause), the end
//!                          ▲        │
//!                          └─ kill ─┘          after a reset of the guest whose restart policy is
//!                                              NEVER, and after a panic of the guest
//! ```
//!
//! Cloud Hypervisor always resets a guest in place and cannot be configured to end. Therefore the
//! monitor kills the VMM when it reads a reset that must end the run. The guest may run for some
//! milliseconds of its next boot. A guest's power-off ends the process with exit status 0, as
//! SIGTERM does, so the status does not show the cause. A guest that has panicked does not end its
//! VMM, so the monitor kills the VMM then, too.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument;
use vmm_core::backend::{
    AdoptRequest, BackendError, BackendErrorKind, ConsoleInput, Effect, Exit, ExitCause, GuestState,
    LadderOptions, LaunchedVmm, NetworkCounters, ResetOutcome, Sample, StorageCounters, Vmm, VmmEvent,
};
use vmm_core::state::EndedBy;
use vmm_core::store::{ProcessIdentity, RunRecord};
use vmm_host::clock::now_ms;
use vmm_host::file_watch::{FileWatch, FileWatcher};
use vmm_host::process::{ExitStatus, Process, ProcessExit, Signal};

use super::client::{CloudHypervisorClient, DeviceCounters};
use super::events::{CloudHypervisorEvent, EVENTS, EventFile};
use super::reset_ends;
use crate::console_input::TerminalInput;
use crate::counters;
use crate::ladder::{self, LadderRungs, UnsentCall};
use crate::launch::kill;
use crate::rest::adopt::{LOG, exit_message, or_gone};
use crate::rest::backend::RestVmmParts;
use crate::throttle::{Throttle, wait_until};

/// The most events that wait for the VM's owner.
const QUEUE: usize = 64;
/// The most events that are read at once.
const BATCH: usize = 64;

/// The orders of this daemon whose events were not read yet.
#[derive(Debug, Default)]
struct ExpectedEvents {
    ending: AtomicBool,
    resets: AtomicU32,
    pauses: AtomicU32,
    resumes: AtomicU32,
}

/// Decrements `count` and returns true, or returns false if it is 0.
fn decrement(count: &AtomicU32) -> bool {
    count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1)).is_ok()
}

/// The handle of one Cloud Hypervisor.
#[derive(Debug)]
struct CloudHypervisorVmm {
    run: RunRecord,
    process: Process,
    client: CloudHypervisorClient,
    input: TerminalInput,
    expected: Arc<ExpectedEvents>,
    totals: Mutex<CounterTotals>,
}

/// Sums the counters of a run, because the VMM's counters restart at 0 when the guest is reset in
/// place.
#[derive(Debug, Default)]
struct CounterTotals {
    before: [u64; 8],
    last: [u64; 8],
}

impl CounterTotals {
    /// Records the present counters and returns those of the whole run.
    fn update(&mut self, now: [u64; 8]) -> [u64; 8] {
        if now.iter().zip(self.last).any(|(now, last)| *now < last) {
            for (before, last) in self.before.iter_mut().zip(self.last) {
                *before = before.saturating_add(last);
            }
        }
        self.last = now;
        let mut sums = now;
        for (sum, before) in sums.iter_mut().zip(self.before) {
            *sum = sum.saturating_add(before);
        }
        sums
    }
}

/// Returns the handle of a running Cloud Hypervisor, and starts the task that watches it.
/// `reset_ends` is true if a reset of the guest ends the run.
pub(super) fn attend(
    run: RestVmmParts<'_, CloudHypervisorClient>,
    reset_ends: bool,
    watcher: &FileWatcher,
) -> LaunchedVmm {
    let RestVmmParts { record, process, client, dir, spec, is_new, changed_ms } = run;
    let file = if is_new {
        EventFile::from_start(dir)
    } else {
        EventFile::continue_run(dir).known_until(known_until(&record.process, changed_ms, now_ms()))
    };
    let (sender, events) = mpsc::channel(QUEUE);
    let expected = Arc::new(ExpectedEvents::default());
    let span = tracing::info_span!(parent: None, "cloud-hypervisor", pid = process.pid());
    let monitor = CloudHypervisorMonitor {
        process: process.clone(),
        file,
        watched: watcher.watch(&dir.join(EVENTS)),
        expected: Arc::clone(&expected),
        log: dir.join(LOG),
        reset_ends,
        seen: EndEvents::default(),
        throttle: Throttle::new(),
        moved: None,
        sender,
    };
    tokio::spawn(monitor.run().instrument(span));
    let input = TerminalInput::new(process.clone(), &spec.console, dir);
    let handle =
        CloudHypervisorVmm { run: record, process, client, input, expected, totals: Mutex::default() };
    LaunchedVmm { vmm: Arc::new(handle), events }
}

/// The events of a run that show how it ended.
#[derive(Clone, Copy, Debug, Default)]
struct EndEvents {
    shutdown: bool,
    ending_reset: bool,
    panic: bool,
}

impl EndEvents {
    /// Adds a panic as the reason to the message about an end.
    fn explain(self, message: String) -> String {
        if self.panic { format!("the guest panicked, and its VMM was ended: {message}") } else { message }
    }
}

struct CloudHypervisorMonitor {
    process: Process,
    file: EventFile,
    watched: FileWatch,
    expected: Arc<ExpectedEvents>,
    log: PathBuf,
    reset_ends: bool,
    seen: EndEvents,
    /// Limits the reports of a VMM that pauses and resumes its guest without end, because each
    /// report is stored.
    throttle: Throttle,
    /// The last change that the throttle has delayed, and the time of its report.
    moved: Option<(VmmEvent, Instant)>,
    sender: mpsc::Sender<VmmEvent>,
}

impl CloudHypervisorMonitor {
    async fn run(mut self) {
        let exit = loop {
            // The file is read before each wait, because events that were written before the watch
            // began cause no wake-up.
            self.read_events().await;
            let held_up = self.moved.as_ref().map(|(_, at)| *at);
            // The order matters. The end of the handle comes first, because the VMM may have
            // another owner from then on, whose orders this task does not know. A delayed change is
            // due at a fixed time and must not be starved by a file that grows without end. Growth
            // comes before the end of the process, so that the events which explain the end are
            // read first; the read after the loop takes those that were written in between.
            tokio::select! {
                biased;
                () = self.sender.closed() => return,
                () = wait_until(held_up) => {
                    if let Some((event, _)) = self.moved.take() {
                        self.report_change(event).await;
                    }
                }
                () = self.watched.grown() => {}
                exit = self.process.wait() => break exit,
            }
        };
        self.read_events().await;
        let asked = self.expected.ending.load(Ordering::Acquire);
        let cause = cause(exit, asked, self.seen);
        let message = self.seen.explain(exit_message(exit, &[&self.log]).await);
        self.report(VmmEvent::Gone(Exit { cause, message })).await;
    }

    async fn read_events(&mut self) {
        loop {
            let (events, file) = read(self.file.clone()).await;
            self.file = file;
            let all = events.len() < BATCH;
            for event in events {
                // The next owner of the VMM reads on from the position on record, and decides what
                // the event means.
                if self.sender.is_closed() {
                    return;
                }
                self.on_event(event).await;
            }
            if all {
                return;
            }
        }
    }

    async fn on_event(&mut self, event: CloudHypervisorEvent) {
        match event {
            // Each event is compared with the orders of this daemon first. An order increments its
            // count before the call, so its event finds the count even if the event is read before
            // the answer.
            CloudHypervisorEvent::Rebooting if decrement(&self.expected.resets) => {}
            CloudHypervisorEvent::Rebooting if self.reset_ends => {
                self.seen.ending_reset = true;
                if let Err(error) = self.process.signal(Signal::KILL) {
                    tracing::error!(%error, "the guest reset itself, and its VMM could not be killed");
                    self.report(VmmEvent::GuestReset).await;
                }
            }
            CloudHypervisorEvent::Panicked => {
                self.seen.panic = true;
                if let Err(error) = self.process.signal(Signal::KILL) {
                    tracing::error!(%error, "the guest has panicked, and its VMM could not be killed");
                    self.report(VmmEvent::GuestFailed("the guest panicked".to_owned())).await;
                }
            }
            CloudHypervisorEvent::Rebooting => self.report(VmmEvent::GuestReset).await,
            CloudHypervisorEvent::Paused => {
                if !decrement(&self.expected.pauses) {
                    self.report_change(VmmEvent::Paused).await;
                }
            }
            CloudHypervisorEvent::Resumed => {
                if !decrement(&self.expected.resumes) {
                    self.report_change(VmmEvent::Resumed).await;
                }
            }
            CloudHypervisorEvent::Shutdown => self.seen.shutdown = true,
            CloudHypervisorEvent::Other => {}
        }
    }

    /// Reports that another client has stopped or started the guest's CPUs. Of a flood only the
    /// last change is reported.
    async fn report_change(&mut self, event: VmmEvent) {
        if let Some((held_up, _)) = &mut self.moved {
            *held_up = event;
            return;
        }
        match self.throttle.admit() {
            Ok(()) => self.report(event).await,
            Err(at) => self.moved = Some((event, at)),
        }
    }

    /// Sends an event. A dropped receiver is no error, because the next daemon reads the same state
    /// from the VMM.
    async fn report(&self, event: VmmEvent) {
        let _ = self.sender.send(event).await;
    }
}

async fn read(mut file: EventFile) -> (Vec<CloudHypervisorEvent>, EventFile) {
    let spare = file.clone();
    let read = tokio::task::spawn_blocking(move || {
        let events = file.read(BATCH).unwrap_or_else(|error| {
            tracing::warn!(%error, "the VMM's events cannot be read");
            Vec::new()
        });
        (events, file)
    });
    read.await.unwrap_or((Vec::new(), spare))
}

/// Returns the age that the VMM `process` had at `changed_ms`, the last change of its VM's record,
/// because the record includes every event before. Both times are Unix milliseconds. Returns zero
/// if the clock was set back since, because then the order of the events is unknown.
fn known_until(process: &ProcessIdentity, changed_ms: i64, now_ms: i64) -> Duration {
    let since = u64::try_from(now_ms.saturating_sub(changed_ms)).map(Duration::from_millis);
    match (vmm_host::process::age(process), since) {
        (Some(age), Ok(since)) => age.saturating_sub(since),
        (None, _) | (_, Err(_)) => Duration::ZERO,
    }
}

/// Returns the cause of a run's end that no daemon watched, read from the files in its folder.
pub(super) async fn explain_past(request: &AdoptRequest) -> Exit {
    let (dir, reset_ends) = (request.dir.as_path(), reset_ends(&request.spec));
    let run = request.run.as_ref();
    let known_until =
        run.map_or(Duration::ZERO, |run| known_until(&run.process, request.changed_ms, now_ms()));
    let owned = dir.to_path_buf();
    let read = tokio::task::spawn_blocking(move || {
        EventFile::continue_run(&owned).known_until(known_until).read(usize::MAX)
    })
    .await;
    let events = read.unwrap_or_else(|_| Ok(Vec::new())).unwrap_or_default();
    let seen = EndEvents {
        shutdown: events.contains(&CloudHypervisorEvent::Shutdown),
        ending_reset: reset_ends && events.contains(&CloudHypervisorEvent::Rebooting),
        panic: events.contains(&CloudHypervisorEvent::Panicked),
    };
    let message = seen.explain(exit_message(ProcessExit::UNKNOWN, &[&dir.join(LOG)]).await);
    Exit { cause: cause(ProcessExit::UNKNOWN, false, seen), message }
}

fn cause(exit: ProcessExit, asked: bool, seen: EndEvents) -> ExitCause {
    // The events come first, because they are more precise than the exit status: a run that the
    // monitor killed after a reset or a panic ended by SIGKILL of this daemon. An order of this
    // daemon comes next. The exit status decides only an end that nobody announced.
    if seen.ending_reset {
        return ExitCause::GuestReset;
    }
    if seen.panic {
        return ExitCause::GuestCrash;
    }
    if asked {
        return ExitCause::Requested;
    }
    match exit.status {
        // Exit status 0 is a power-off even without its event, because a separate thread of the VMM
        // writes the event and may not get to it before the process ends.
        Some(ExitStatus::Code(0)) => ExitCause::GuestPowerOff,
        None if seen.shutdown => ExitCause::GuestPowerOff,
        Some(ExitStatus::Code(_) | ExitStatus::Signal(_)) => ExitCause::VmmFailed,
        None => ExitCause::Unknown,
    }
}

impl CloudHypervisorVmm {
    /// Makes `call`, whose event will be counted in `count`. Returns success if the VMM refuses the
    /// call because the guest is already in the state `wanted`.
    async fn order(
        &self,
        count: &AtomicU32,
        call: UnsentCall<'_>,
        wanted: GuestState,
    ) -> Result<(), BackendError> {
        // The count is incremented before the call, because the monitor may read the event before
        // the answer arrives. It is decremented again if no event can follow. A call with an
        // unknown effect keeps its count: a later event of this kind is then taken for the order's
        // own.
        count.fetch_add(1, Ordering::AcqRel);
        let Err(error) = call.await else { return Ok(()) };
        if error.kind != BackendErrorKind::Rejected {
            if error.effect == Effect::NotApplied {
                decrement(count);
            }
            return Err(or_gone(&self.process, error));
        }
        decrement(count);
        // Cloud Hypervisor refuses to pause a paused guest. Such a refusal is a success here.
        match self.client.state().await {
            Ok(state) if state == wanted => Ok(()),
            Ok(_) | Err(_) => Err(or_gone(&self.process, error)),
        }
    }

    async fn wake(&self) -> Result<(), BackendError> {
        self.order(&self.expected.resumes, Box::pin(self.client.resume()), GuestState::Running).await
    }

    /// Returns the counters of the whole run, across resets in place.
    fn totals(&self, now: &DeviceCounters) -> (NetworkCounters, StorageCounters) {
        let (net, disk) = (now.network(), now.storage());
        let now = [
            net.bytes_received,
            net.bytes_transmitted,
            net.packets_received,
            net.packets_transmitted,
            disk.bytes_read,
            disk.bytes_written,
            disk.read_operations,
            disk.write_operations,
        ];
        let [rx, tx, rx_packets, tx_packets, read, written, reads, writes] =
            self.totals.lock().unwrap_or_else(PoisonError::into_inner).update(now);
        let network = NetworkCounters {
            bytes_received: rx,
            bytes_transmitted: tx,
            packets_received: rx_packets,
            packets_transmitted: tx_packets,
        };
        let storage = StorageCounters {
            bytes_read: read,
            bytes_written: written,
            read_operations: reads,
            write_operations: writes,
        };
        (network, storage)
    }

    fn will_end(&self) {
        if self.process.exit().is_none() {
            self.expected.ending.store(true, Ordering::Release);
        }
    }
}

#[async_trait]
impl LadderRungs for CloudHypervisorVmm {
    fn process(&self) -> &Process {
        &self.process
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        let call: UnsentCall<'_> = Box::pin(async {
            // A paused guest does not react to its power button, so it is resumed first.
            if self.client.state().await? == GuestState::Paused {
                self.wake().await?;
            }
            self.client.power_button().await
        });
        Some((EndedBy::Acpi, call))
    }

    fn power_off(&self, _forced: bool) -> Option<UnsentCall<'_>> {
        Some(Box::pin(self.client.end()))
    }
}

#[async_trait]
impl Vmm for CloudHypervisorVmm {
    fn run(&self) -> &RunRecord {
        &self.run
    }

    async fn pause(&self) -> Result<(), BackendError> {
        self.order(&self.expected.pauses, Box::pin(self.client.pause()), GuestState::Paused).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        self.wake().await
    }

    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        self.will_end();
        let ended = ladder::climb(self, ladder).await;
        if ended.is_err() {
            self.expected.ending.store(false, Ordering::Release);
        }
        ended
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        self.expected.resets.fetch_add(1, Ordering::AcqRel);
        match self.client.reboot().await {
            Ok(()) => Ok(ResetOutcome::InPlace),
            Err(error) => {
                if error.effect == Effect::NotApplied {
                    decrement(&self.expected.resets);
                }
                Err(or_gone(&self.process, error))
            }
        }
    }

    async fn trim_logs(&self) {
        counters::trim_logs(vec![self.run.socket.with_file_name(LOG)]).await;
    }

    async fn sample(&self) -> Sample {
        let mut sample = counters::of_host(&self.process, None).await;
        let counted = self.client.counters().await.map_err(|error| or_gone(&self.process, error));
        let now = counters::or_missing(&mut sample, "devices", counted);
        let devices = now.map(|now| self.totals(&now));
        sample.network = devices.map(|(network, _)| network);
        sample.storage = devices.map(|(_, storage)| storage);
        self.client.hang_up();
        sample
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        self.client.state().await.map_err(|error| or_gone(&self.process, error))
    }

    async fn kill(&self) -> Result<(), BackendError> {
        self.will_end();
        kill(&self.process).await
    }

    fn console_input(&self) -> Option<&dyn ConsoleInput> {
        Some(&self.input)
    }
}

#[cfg(test)]
mod tests;
