//! One running Firecracker: its handle, and the task that reports its end.
//!
//! ```text
//!   FirecrackerVmm ─ client ─► API socket    one connection, closed after each sample
//!      │
//!      └───── process ─► pidfd ◄── monitor ──► VmmEvent::Gone(cause)
//!                                     └─ exit status, or the last line of the counters
//! ```
//!
//! Firecracker sends no events, so the end is the only event here. The exit status shows the cause:
//! 0 after a reset of the guest, 1 after a triple fault, other numbers and signals after a failure
//! of Firecracker itself. A guest's power-off is not seen at all on x86.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tracing::Instrument;
use vmm_core::backend::{
    BackendError, ConsoleInput, Exit, ExitCause, GuestState, LadderOptions, LaunchedVmm, ResetOutcome,
    Sample, Vmm, VmmEvent,
};
use vmm_core::state::EndedBy;
use vmm_core::store::RunRecord;
use vmm_host::process::{ExitStatus, Process, ProcessExit};

use super::OWN_LOG;
use super::client::FirecrackerClient;
use super::metrics::{FirecrackerMetrics, MetricsSums};
use crate::console_input::FifoInput;
use crate::counters;
use crate::ladder::{self, LadderRungs, UnsentCall};
use crate::launch::kill;
use crate::rest::adopt::{LOG, exit_message, or_gone};
use crate::rest::backend::RestVmmParts;
use crate::rest::client::RestApi as _;

/// The most events that wait. A run has one event.
const EVENTS: usize = 4;

/// The handle of one Firecracker.
#[derive(Debug)]
struct FirecrackerVmm {
    run: RunRecord,
    process: Process,
    client: FirecrackerClient,
    metrics: FirecrackerMetrics,
    input: FifoInput,
    /// True if this daemon has ordered the end.
    ending: Arc<AtomicBool>,
}

/// Returns the handle of a running Firecracker, and starts the task that watches it.
pub(super) fn attend(run: RestVmmParts<'_, FirecrackerClient>) -> LaunchedVmm {
    let RestVmmParts { record: run, process, client, dir, spec: _, is_new: _, changed_ms: _ } = run;
    let (sender, events) = mpsc::channel(EVENTS);
    let ending = Arc::new(AtomicBool::new(false));
    let metrics = FirecrackerMetrics::new(dir);
    let span = tracing::info_span!(parent: None, "firecracker", pid = process.pid());
    let monitor = FirecrackerMonitor {
        process: process.clone(),
        metrics: metrics.clone(),
        ending: Arc::clone(&ending),
        dir: dir.to_path_buf(),
    };
    tokio::spawn(monitor.watch(sender).instrument(span));
    let input = FifoInput::new(dir);
    LaunchedVmm { vmm: Arc::new(FirecrackerVmm { run, process, client, metrics, input, ending }), events }
}

struct FirecrackerMonitor {
    process: Process,
    metrics: FirecrackerMetrics,
    ending: Arc<AtomicBool>,
    dir: PathBuf,
}

impl FirecrackerMonitor {
    async fn watch(self, events: mpsc::Sender<VmmEvent>) {
        let exit = tokio::select! {
            biased;
            exit = self.process.wait() => exit,
            // The receiver has been dropped. The daemon that adopts the VMM next sees the end.
            () = events.closed() => return,
        };
        let asked = self.ending.load(Ordering::Acquire);
        let exit = explain(exit, asked, &self.metrics, &self.dir).await;
        let _ = events.send(VmmEvent::Gone(exit)).await;
    }
}

/// Returns the cause of a run's end, from its exit status and the files in its folder.
pub(super) async fn explain(
    exit: ProcessExit,
    asked: bool,
    metrics: &FirecrackerMetrics,
    dir: &Path,
) -> Exit {
    let sums = if asked {
        // The cause is known, and a read of the counters would write to a folder that may be about
        // to be deleted.
        None
    } else {
        metrics.sums().await.inspect_err(|error| tracing::debug!(%error, "the last counters are lost")).ok()
    };
    let logs = [dir.join(OWN_LOG), dir.join(LOG)];
    let message = exit_message(exit, &[&logs[0], &logs[1]]).await;
    Exit { cause: cause(exit, asked, sums), message }
}

fn cause(exit: ProcessExit, asked: bool, sums: Option<MetricsSums>) -> ExitCause {
    let reset = sums.is_some_and(|sums| sums.guest_reset());
    let crashed = sums.is_some_and(|sums| sums.cpu_failed());
    if asked {
        return ExitCause::Requested;
    }
    // The exit status comes first. The counters decide only where the status is missing, because
    // the process was not a child of this daemon, or ambiguous: status 1 is a triple fault only if
    // a virtual CPU has failed.
    match exit.status {
        Some(ExitStatus::Code(0)) => ExitCause::GuestReset,
        Some(ExitStatus::Code(1)) if crashed => ExitCause::GuestCrash,
        Some(ExitStatus::Code(_) | ExitStatus::Signal(_)) => ExitCause::VmmFailed,
        None if crashed => ExitCause::GuestCrash,
        None if reset => ExitCause::GuestReset,
        None => ExitCause::Unknown,
    }
}

#[async_trait]
impl LadderRungs for FirecrackerVmm {
    fn process(&self) -> &Process {
        &self.process
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        let call = || -> UnsentCall<'_> {
            Box::pin(async {
                // A paused guest does not react, so it is resumed first.
                self.client.resume().await?;
                self.client.ctrl_alt_del().await
            })
        };
        // Only Firecracker on x86-64 has a keyboard controller.
        cfg!(target_arch = "x86_64").then(|| (EndedBy::CtrlAltDel, call()))
    }

    fn power_off(&self, _forced: bool) -> Option<UnsentCall<'_>> {
        None
    }
}

impl FirecrackerVmm {
    fn will_end(&self) {
        if self.process.exit().is_none() {
            self.ending.store(true, Ordering::Release);
        }
    }

    async fn device_counters(&self) -> Result<MetricsSums, BackendError> {
        self.client.flush_metrics().await.map_err(|error| or_gone(&self.process, error))?;
        self.metrics.sums().await
    }
}

#[async_trait]
impl Vmm for FirecrackerVmm {
    fn run(&self) -> &RunRecord {
        &self.run
    }

    async fn pause(&self) -> Result<(), BackendError> {
        self.client.pause().await.map_err(|error| or_gone(&self.process, error))
    }

    async fn resume(&self) -> Result<(), BackendError> {
        self.client.resume().await.map_err(|error| or_gone(&self.process, error))
    }

    async fn shutdown(&self, ladder: LadderOptions) -> Result<EndedBy, BackendError> {
        self.will_end();
        let ended = ladder::climb(self, ladder).await;
        if ended.is_err() {
            self.ending.store(false, Ordering::Release);
        }
        ended
    }

    async fn reset(&self) -> Result<ResetOutcome, BackendError> {
        Ok(ResetOutcome::NeedsRelaunch)
    }

    async fn trim_logs(&self) {
        counters::trim_logs([LOG, OWN_LOG].map(|log| self.run.socket.with_file_name(log)).to_vec()).await;
    }

    async fn sample(&self) -> Sample {
        let mut sample = counters::of_host(&self.process, None).await;
        let sums = counters::or_missing(&mut sample, "devices", self.device_counters().await);
        sample.network = sums.map(|sums| sums.network());
        sample.storage = sums.map(|sums| sums.storage());
        self.client.hang_up();
        sample
    }

    async fn probe(&self) -> Result<GuestState, BackendError> {
        match self.client.instance().await {
            Ok((state, _)) => Ok(state),
            Err(error) => Err(or_gone(&self.process, error)),
        }
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
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_overrides_the_counters() {
        let code = |code| ProcessExit { status: Some(ExitStatus::Code(code)) };
        let sums = |resets: u64, failures: u64| {
            let text = format!(
                r#"{{"offset":0,"read_bytes":0,"write_bytes":0,"read_operations":0,"write_operations":0,"rx_bytes":0,"tx_bytes":0,"rx_packets":0,"tx_packets":0,"resets":{resets},"failures":{failures}}}"#
            );
            Some(serde_json::from_str(&text).unwrap())
        };
        let killed = ProcessExit { status: Some(ExitStatus::Signal(9)) };
        assert_eq!(cause(code(0), false, None), ExitCause::GuestReset);
        assert_eq!(cause(code(0), true, sums(1, 0)), ExitCause::Requested);
        assert_eq!(cause(code(1), false, sums(0, 1)), ExitCause::GuestCrash);
        assert_eq!(cause(code(1), false, sums(0, 0)), ExitCause::VmmFailed);
        assert_eq!(cause(code(148), false, sums(0, 0)), ExitCause::VmmFailed);
        assert_eq!(cause(killed, false, sums(0, 0)), ExitCause::VmmFailed);
        assert_eq!(cause(ProcessExit::UNKNOWN, false, sums(1, 0)), ExitCause::GuestReset);
        assert_eq!(cause(ProcessExit::UNKNOWN, false, sums(0, 1)), ExitCause::GuestCrash);
        assert_eq!(cause(ProcessExit::UNKNOWN, false, sums(0, 0)), ExitCause::Unknown);
        assert_eq!(cause(ProcessExit::UNKNOWN, false, None), ExitCause::Unknown);
    }
}
