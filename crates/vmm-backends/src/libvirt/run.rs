//! Taking a QEMU that libvirt has started into hand.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;
use uuid::Uuid;
use vmm_core::backend::Launched;
use vmm_core::store::RunRecord;
use vmm_host::process::Process;

use super::guest::Guest;
use super::link::{Link, Watched};
use super::vmm::LibvirtVmm;
use super::watch::Watch;

/// Events that wait for the VM's owner.
const EVENTS: usize = 256;

/// What is known of a run, besides its process.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) domain: Uuid,
    pub(super) socket: PathBuf,
    pub(super) version: String,
    pub(super) accelerator: String,
    pub(super) machine: String,
    /// Whether a guest that resets itself starts again.
    pub(super) restarts: bool,
    /// Whether somebody else made the domain.
    pub(super) imported: bool,
    pub(super) taps: Vec<String>,
}

impl Facts {
    /// The run's record, of a run that begins now.
    pub(super) fn record(&self, process: &Process) -> RunRecord {
        RunRecord {
            process: process.identity().clone(),
            socket: self.socket.clone(),
            version: self.version.clone(),
            accelerator: self.accelerator.clone(),
            machine: self.machine.clone(),
            started_ms: now_ms(),
            claims: Vec::new(),
        }
    }
}

/// Makes the handle and begins to watch. `runs` says whether the guest's CPUs are thought to run.
pub(super) fn assemble(
    link: &Arc<Link>,
    watched: Watched,
    process: Process,
    facts: Facts,
    run: RunRecord,
    runs: bool,
) -> (Arc<LibvirtVmm>, Launched) {
    let (sender, events) = mpsc::channel(EVENTS);
    let guest = Arc::new(Guest::new(runs));
    let (wanted, handle) = oneshot::channel();
    let watch = Watch {
        watched,
        process: process.clone(),
        link: Arc::clone(link),
        guest: Arc::clone(&guest),
        events: sender,
        reason: None,
        ended: None,
        handle,
    };
    let span = tracing::info_span!("domain", uuid = %facts.domain, pid = process.pid());
    tokio::spawn(watch.run().instrument(span));
    let vmm = Arc::new(LibvirtVmm {
        domain: facts.domain,
        run,
        process,
        link: Arc::clone(link),
        guest,
        restarts: facts.restarts,
        imported: facts.imported,
        taps: facts.taps,
        _wanted: wanted,
    });
    (Arc::clone(&vmm), Launched { vmm, events })
}

/// Now, in Unix milliseconds.
fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
