//! Metrics of running VMs, sampled beside the actor so that a VMM that hangs delays nobody.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::Instrument as _;
use vmm_core::backend::{NetworkCounters, Sample, StorageCounters, Vmm};

use crate::clock::now_ms;

/// The first sample is taken so soon after a start, so that a new VM does not stay without numbers for a whole interval.
const FIRST_SAMPLE: Duration = Duration::from_secs(1);
/// No VMM may take longer over one sample.
const SAMPLE_DEADLINE: Duration = Duration::from_secs(10);

/// The last sample of a running VM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Share of all the VM's vCPUs since the sample before, 0 to 100.
    pub cpu_usage_percent: f64,
    /// Resident memory of the VMM, in bytes.
    pub memory_bytes: u64,
    /// Network counters since the run began.
    pub network: NetworkCounters,
    /// Disk counters since the run began.
    pub storage: StorageCounters,
    /// When the sample was taken, in Unix milliseconds.
    pub observed_ms: i64,
}

/// The place where a sampler leaves its last sample.
#[derive(Clone, Default)]
pub(crate) struct MetricsCell(Arc<Mutex<Option<Metrics>>>);

impl MetricsCell {
    /// The last sample; `None` while nothing runs.
    pub(crate) fn get(&self) -> Option<Metrics> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the last sample.
    pub(crate) fn set(&self, metrics: Option<Metrics>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = metrics;
    }
}

/// What a sampler tells the actor.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Contact {
    /// The VMM did not answer; the text says how.
    Lost(String),
    /// The VMM answers.
    Made,
}

/// Samples one run until it is dropped.
pub(crate) struct Sampler {
    task: AbortHandle,
    cell: MetricsCell,
    contact: mpsc::Receiver<Contact>,
}

impl Sampler {
    /// Starts to sample `vmm`, which has `vcpus` CPUs, at each `interval`.
    pub(crate) fn start(vmm: Arc<dyn Vmm>, vcpus: u32, interval: Duration, cell: MetricsCell) -> Self {
        let (tell, contact) = mpsc::channel(1);
        let pid = vmm.run().process.pid;
        let task = sample_forever(vmm, vcpus, interval, cell.clone(), tell);
        let task = tokio::spawn(task.instrument(tracing::debug_span!("sampler", pid))).abort_handle();
        Self { task, cell, contact }
    }

    /// Waits for the next change of contact.
    pub(crate) async fn contact(&mut self) -> Contact {
        match self.contact.recv().await {
            Some(contact) => contact,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.task.abort();
        self.cell.set(None);
    }
}

async fn sample_forever(
    vmm: Arc<dyn Vmm>,
    vcpus: u32,
    interval: Duration,
    cell: MetricsCell,
    tell: mpsc::Sender<Contact>,
) {
    let mut before: Option<(Instant, Duration)> = None;
    let mut wait = FIRST_SAMPLE.min(interval);
    loop {
        tokio::time::sleep(wait).await;
        wait = interval;
        let contact = match tokio::time::timeout(SAMPLE_DEADLINE, vmm.sample()).await {
            Ok(Ok(sample)) => {
                let now = Instant::now();
                cell.set(Some(metrics_of(&sample, before, now, vcpus)));
                before = Some((now, sample.cpu_time));
                Contact::Made
            }
            Ok(Err(error)) => Contact::Lost(error.to_string()),
            Err(_) => Contact::Lost(format!("it did not answer within {} s", SAMPLE_DEADLINE.as_secs())),
        };
        if tell.send(contact).await.is_err() {
            return;
        }
    }
}

fn metrics_of(sample: &Sample, before: Option<(Instant, Duration)>, now: Instant, vcpus: u32) -> Metrics {
    let cpu_usage_percent = before.map_or(0.0, |(then, cpu_then)| {
        let passed = now.saturating_duration_since(then).as_secs_f64() * f64::from(vcpus.max(1));
        let used = sample.cpu_time.saturating_sub(cpu_then).as_secs_f64();
        if passed > 0.0 { (100.0 * used / passed).clamp(0.0, 100.0) } else { 0.0 }
    });
    Metrics {
        cpu_usage_percent,
        memory_bytes: sample.memory_bytes,
        network: sample.network,
        storage: sample.storage,
        observed_ms: now_ms(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_usage_is_a_share_of_all_vcpus() {
        let start = Instant::now();
        let later = start + Duration::from_secs(10);
        let sample = Sample { cpu_time: Duration::from_secs(15), ..Sample::default() };
        let before = Some((start, Duration::from_secs(5)));
        assert_eq!(metrics_of(&sample, before, later, 2).cpu_usage_percent, 50.0);
        assert_eq!(metrics_of(&sample, before, later, 1).cpu_usage_percent, 100.0);
        let busy = Sample { cpu_time: Duration::from_secs(500), ..Sample::default() };
        assert_eq!(metrics_of(&busy, before, later, 1).cpu_usage_percent, 100.0, "never above 100");
        assert_eq!(metrics_of(&busy, None, later, 1).cpu_usage_percent, 0.0);
    }
}
