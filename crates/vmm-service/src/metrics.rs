//! The contact with running VMMs and their metrics. Both are updated beside the actor, so that a
//! VMM that hangs delays no operation.
//!
//! ```text
//!   each interval ──► trim logs ──► probe ──┬─ answered ──► Contact::Made ──► sample ──► metrics
//!                                           ├─ silent ────► Contact::Lost
//!                                           └─ not asked ─► nothing: a limit of the host, or the
//!                                                           VMM has ended
//! ```
//!
//! The probe alone determines whether a VMM is there. Counters are optional: a TAP that was
//! renamed, or a folder without room, proves nothing about the VMM.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::Instrument as _;
use vmm_core::backend::{ContactProof, NetworkCounters, Sample, StorageCounters, Vmm};
use vmm_core::id::VmId;

use crate::clock::now_ms;
use crate::panics::report_panic;
use crate::sockets::Sockets;

/// The time from a start to the first sample. It is short, so that a new VM has numbers before a
/// whole interval has passed.
const FIRST_SAMPLE_DELAY: Duration = Duration::from_secs(1);
/// The time within which a VMM must answer a probe. After that, contact is lost.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// The time that a VMM may take for the counters of one sample.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(10);

/// The last sample of a running VM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// The share of all the VM's vCPUs since the sample before, 0 to 100. It is 0 if it could not
    /// be read.
    pub cpu_usage_percent: f64,
    /// The CPU time since the run began, or `None` if it could not be read.
    pub cpu_time: Option<Duration>,
    /// The resident memory of the VMM in bytes, or `None` if it could not be read.
    pub memory_bytes: Option<u64>,
    /// The network counters since the run began, or `None` if none could be read.
    pub network: Option<NetworkCounters>,
    /// The disk counters since the run began, or `None` if none could be read.
    pub storage: Option<StorageCounters>,
    /// The time of the sample, in Unix milliseconds.
    pub observed_ms: i64,
}

/// The place where a sampler stores its last sample.
#[derive(Clone, Default)]
pub(crate) struct LatestMetrics(Arc<Mutex<Option<Metrics>>>);

impl LatestMetrics {
    /// Returns the last sample, or `None` while nothing runs.
    pub(crate) fn get(&self) -> Option<Metrics> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the last sample.
    pub(crate) fn set(&self, metrics: Option<Metrics>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = metrics;
    }
}

/// A message about the contact with a VMM. The actor may read it late, so each message carries the
/// instant of its probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContactReport {
    /// The instant at which the VMM was asked.
    pub(crate) asked: Instant,
    /// The answer.
    pub(crate) contact: Contact,
    /// The message about a control socket that is gone.
    pub(crate) sockets_gone: Option<String>,
}

/// Contact with a VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contact {
    /// The VMM did not answer. The text is the error.
    Lost(String),
    /// The VMM answers.
    Made,
}

/// Probes and samples one run until it is dropped.
pub(crate) struct Sampler {
    task: AbortHandle,
    latest: LatestMetrics,
    news: watch::Receiver<Option<ContactReport>>,
}

impl Sampler {
    /// Starts to probe and sample `vmm`, which runs `vm_id` with `vcpus` CPUs, at each `interval`.
    /// `sockets` is given for a VMM that this program started.
    pub(crate) fn start(
        vmm: Arc<dyn Vmm>,
        sockets: Option<Sockets>,
        (vm_id, vcpus): (VmId, u32),
        interval: Duration,
        latest: LatestMetrics,
    ) -> Self {
        // Only the newest message counts, so a busy actor neither delays the sampler nor reads old
        // messages.
        let (tell, news) = watch::channel(None);
        let pid = vmm.run().process.pid;
        let sampling = SamplerTask {
            vmm,
            sockets,
            vm_id,
            vcpus,
            latest: latest.clone(),
            before: None,
            missing: Vec::new(),
            tell,
        };
        let task = sampling.run(interval, sample_offset(pid));
        let task =
            tokio::spawn(task.instrument(tracing::debug_span!(parent: None, "sampler", pid))).abort_handle();
        Self { task, latest, news }
    }

    /// Waits for the next news of the contact.
    pub(crate) async fn news(&mut self) -> ContactReport {
        loop {
            if self.news.changed().await.is_err() {
                return std::future::pending().await;
            }
            if let Some(news) = self.news.borrow_and_update().clone() {
                return news;
            }
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.task.abort();
        self.latest.set(None);
    }
}

/// Returns a number from 0 up to 1 for each process. The numbers of processes that were started one
/// after the other are far apart, so that VMs that a daemon adopts together are not all sampled at
/// the same moment.
fn sample_offset(pid: u32) -> f64 {
    // Multiples of the golden ratio fill the range evenly.
    const GOLDEN: u32 = 0x9E37_79B9;
    f64::from(pid.wrapping_mul(GOLDEN)) / (f64::from(u32::MAX) + 1.0)
}

struct SamplerTask {
    vmm: Arc<dyn Vmm>,
    sockets: Option<Sockets>,
    /// The VM, for the log.
    vm_id: VmId,
    vcpus: u32,
    latest: LatestMetrics,
    /// The time and the CPU time of the sample before.
    before: Option<(Instant, Duration)>,
    /// The counters that the sample before could not read, so that a lasting fault is logged once.
    missing: Vec<String>,
    tell: watch::Sender<Option<ContactReport>>,
}

impl SamplerTask {
    /// Probes and samples at each `interval`. `sample_offset` (0 to 1) moves the moments of this
    /// run away from those of other runs.
    async fn run(mut self, interval: Duration, spread: f64) {
        let mut wait = FIRST_SAMPLE_DELAY.min(interval);
        // The second sample comes after a part of the interval, and all later ones are a whole
        // interval apart.
        let mut next = interval.mul_f64(0.5 + spread / 2.0);
        loop {
            tokio::time::sleep(wait).await;
            (wait, next) = (next, interval);
            let task = format!("the sampler of VM \"{}\"", self.vm_id);
            report_panic(task, self.step()).await;
        }
    }

    async fn step(&mut self) {
        // A VMM that does not answer can still write to its log.
        self.vmm.trim_logs().await;
        if self.probe().await {
            self.sample().await;
        }
    }

    /// Probes the VMM and publishes the result. Returns true if the VMM may be asked for its
    /// counters.
    async fn probe(&self) -> bool {
        let asked = Instant::now();
        let contact = match tokio::time::timeout(PROBE_TIMEOUT, self.vmm.probe()).await {
            Ok(Ok(_)) => Contact::Made,
            Ok(Err(error)) => match error.kind.contact() {
                ContactProof::Made => Contact::Made,
                ContactProof::Lost => Contact::Lost(error.to_string()),
                ContactProof::None => {
                    tracing::debug!(vm_id = %self.vm_id, %error, "the VMM could not be asked for an answer");
                    return true;
                }
            },
            Err(_) => Contact::Lost(format!("the VMM did not answer within {} s", PROBE_TIMEOUT.as_secs())),
        };
        let made = contact == Contact::Made;
        let sockets_gone = match self.sockets.clone() {
            Some(sockets) if made => sockets.gone_beside_a_connection().await,
            Some(sockets) => sockets.gone().await,
            None => None,
        };
        self.tell.send_replace(Some(ContactReport { asked, contact, sockets_gone }));
        made
    }

    async fn sample(&mut self) {
        let sampled = tokio::time::timeout(SAMPLE_TIMEOUT, self.vmm.sample()).await;
        let sample = sampled.unwrap_or_else(|_| Sample {
            missing: vec![format!("the VMM's counters were not read within {} s", SAMPLE_TIMEOUT.as_secs())],
            ..Sample::default()
        });
        let now = Instant::now();
        self.latest.set(metrics_of(&sample, self.before, now, self.vcpus));
        self.before = sample.cpu_time.map(|cpu| (now, cpu));
        if sample.missing != self.missing {
            if sample.missing.is_empty() {
                tracing::info!(vm_id = %self.vm_id, "all counters of the VM can be read again");
            } else {
                tracing::warn!(vm_id = %self.vm_id, missing = ?sample.missing, "counters of the VM cannot be read");
            }
            self.missing = sample.missing;
        }
    }
}

/// Returns the metrics of a sample, or `None` if no counter could be read.
fn metrics_of(
    sample: &Sample,
    before: Option<(Instant, Duration)>,
    now: Instant,
    vcpus: u32,
) -> Option<Metrics> {
    let Sample { cpu_time, memory_bytes, network, storage, missing: _ } = sample;
    if cpu_time.is_none() && memory_bytes.is_none() && network.is_none() && storage.is_none() {
        return None;
    }
    let share = |((then, cpu_then), cpu): ((Instant, Duration), Duration)| {
        let passed = now.saturating_duration_since(then).as_secs_f64() * f64::from(vcpus.max(1));
        let used = cpu.saturating_sub(cpu_then).as_secs_f64();
        if passed > 0.0 { (100.0 * used / passed).clamp(0.0, 100.0) } else { 0.0 }
    };
    Some(Metrics {
        cpu_usage_percent: before.zip(*cpu_time).map_or(0.0, share),
        cpu_time: *cpu_time,
        memory_bytes: *memory_bytes,
        network: *network,
        storage: *storage,
        observed_ms: now_ms(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_usage_is_a_share_of_all_vcpus() {
        let start = Instant::now();
        let later = start + Duration::from_secs(10);
        let of = |cpu: u64| Sample { cpu_time: Some(Duration::from_secs(cpu)), ..Sample::default() };
        let before = Some((start, Duration::from_secs(5)));
        let usage = |sample: &Sample, before, vcpus| {
            metrics_of(sample, before, later, vcpus).unwrap().cpu_usage_percent
        };
        assert_eq!(usage(&of(15), before, 2), 50.0);
        assert_eq!(usage(&of(15), before, 1), 100.0);
        assert_eq!(usage(&of(500), before, 1), 100.0, "never above 100");
        assert_eq!(usage(&of(500), None, 1), 0.0);
    }

    #[test]
    fn unreadable_metrics_are_absent() {
        let now = Instant::now();
        assert_eq!(metrics_of(&Sample::default(), None, now, 1), None);
        let storage = Some(StorageCounters { bytes_read: 1, ..StorageCounters::default() });
        let metrics = metrics_of(&Sample { storage, ..Sample::default() }, None, now, 1).unwrap();
        assert_eq!((metrics.storage, metrics.network, metrics.memory_bytes), (storage, None, None));
    }

    #[test]
    fn samples_of_processes_started_together_are_spread() {
        let mut moments: Vec<f64> = (1000..1100).map(sample_offset).collect();
        moments.sort_by(f64::total_cmp);
        assert!(moments.iter().all(|moment| (0.0..1.0).contains(moment)), "{moments:?}");
        let gaps = moments.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(gaps.fold(0.0, f64::max) < 0.03, "{moments:?}");
    }
}
