//! The spinner of a long operation, which shows the phase of the VM.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinHandle;
use vmm_proto::v1 as pb;

use super::{escape, is_interactive, remark};
use crate::connect::{Client, long_call};
use crate::failure::Failure;

/// The time between two turns of the spinner.
const TURN_INTERVAL: Duration = Duration::from_millis(100);

/// The exit code after Ctrl-C, by the convention of shells.
const INTERRUPTED: u8 = 130;

/// A spinner that is shown until this value is dropped. Nothing is shown unless stdout and stderr
/// are terminals.
pub(crate) struct Progress {
    shown: Option<(ProgressBar, JoinHandle<()>)>,
}

impl Progress {
    /// Shows the phase of one VM while an operation on the VM runs.
    pub(crate) fn of_vm(client: &Client, vm_id: &str) -> Self {
        if !is_interactive() {
            return Self { shown: None };
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.set_message(escape::line(vm_id).into_owned());
        bar.enable_steady_tick(TURN_INTERVAL);
        let follower = tokio::spawn(follow(client.clone(), vm_id.to_owned(), bar.clone()));
        Self { shown: Some((bar, follower)) }
    }

    /// Waits for `work`. If a spinner is shown, Ctrl-C ends the wait, so that the spinner is
    /// removed from the line of the prompt. Otherwise Ctrl-C ends the process in the usual way.
    ///
    /// # Errors
    ///
    /// The user pressed Ctrl-C.
    pub(crate) async fn during<T>(&self, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            outcome = work => Ok(outcome),
            _ = tokio::signal::ctrl_c(), if self.shown.is_some() => Err(Failure::Reported(INTERRUPTED)),
        }
    }

    /// Prints a remark beside the spinner, not into its line.
    pub(crate) fn remark(&self, text: &str) {
        match &self.shown {
            Some((bar, _)) => bar.suspend(|| remark(text)),
            None => remark(text),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((bar, follower)) = &self.shown {
            follower.abort();
            bar.finish_and_clear();
        }
    }
}

/// Shows the phase from each event of the VM. An error ends it, because the operation itself
/// reports a lost server.
async fn follow(client: Client, vm_id: String, bar: ProgressBar) {
    let request = pb::WatchVmsRequest { vm_id: vm_id.clone(), ..Default::default() };
    let Ok(mut events) = client.watch_vms_with_options(request, long_call()).await else { return };
    while let Ok(Some(event)) = events.message().await {
        let event: pb::VmEvent = event.to_owned_message();
        if !event.status.phase.is_empty() {
            bar.set_message(format!("{}: {}", escape::line(&vm_id), escape::line(&event.status.phase)));
        }
    }
}
