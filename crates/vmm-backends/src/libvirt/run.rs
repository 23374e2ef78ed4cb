//! Assembles the handle and the monitor of a QEMU that libvirt has started.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;
use uuid::Uuid;
use vmm_core::backend::{GuestState, LaunchedVmm};
use vmm_core::store::RunRecord;
use vmm_host::clock::now_ms;
use vmm_host::process::Process;
use vmm_libvirt_wire::{Call, CallResult, DomainState};

use super::describe::describe;
use super::domain::{QUICK_CALL_TIMEOUT, guest_state, unexpected_answer};
use super::link::{DomainEvents, LibvirtLink};
use super::monitor::DomainMonitor;
use super::vmm::LibvirtVmm;
use crate::console_input::SocketInput;
use crate::guest_orders::GuestOrders;
use crate::qemu::exit_schedule::ExitTimeouts;
use crate::throttle::Throttle;

/// The most events that wait for the VM's owner.
const EVENTS: usize = 256;

/// The facts about a run other than its process.
#[derive(Clone, Debug)]
pub(super) struct DomainRunFacts {
    pub(super) domain: Uuid,
    pub(super) socket: PathBuf,
    pub(super) version: String,
    pub(super) accelerator: String,
    pub(super) machine: String,
    /// True if a guest that resets itself starts again.
    pub(super) restarts: bool,
    /// True if another client created the domain.
    pub(super) imported: bool,
    pub(super) taps: Vec<String>,
    /// The console's socket. `None` for an imported domain, whose console is where its creator has
    /// put it.
    pub(super) console: Option<PathBuf>,
}

impl DomainRunFacts {
    /// Returns the facts with the TAPs that libvirt has given to an imported domain for this run.
    pub(super) async fn with_live_taps(mut self, link: &LibvirtLink) -> Self {
        if self.imported {
            self.taps = live_taps(link, self.domain, QUICK_CALL_TIMEOUT).await.unwrap_or_default();
        }
        self
    }

    /// Returns the record of a run that begins now.
    pub(super) fn record(&self, process: &Process) -> RunRecord {
        RunRecord {
            process: process.identity().clone(),
            socket: self.socket.clone(),
            version: self.version.clone(),
            accelerator: self.accelerator.clone(),
            machine: self.machine.clone(),
            started_ms: now_ms(),
            claims: Vec::new(),
            taps: if self.imported { self.taps.clone() } else { Vec::new() },
        }
    }
}

/// Returns the TAPs that a running domain has now, or `None` if libvirt does not report them.
pub(super) async fn live_taps(link: &LibvirtLink, domain: Uuid, timeout: Duration) -> Option<Vec<String>> {
    let reported = match link.call(Call::Xml { uuid: domain }, timeout).await {
        Ok(CallResult::Xml { xml }) => describe(&xml),
        Ok(other) => Err(unexpected_answer(&other).to_string()),
        Err(error) => Err(error.to_string()),
    };
    reported.map(|reported| reported.taps)
        .inspect_err(|why| tracing::warn!(%domain, detail = why, "the TAPs of the domain are not known; its network counters are missing"))
        .ok()
}

/// Returns the handle, and starts the task that watches the domain. `state` is the last known state
/// of the domain.
pub(super) fn assemble(
    link: &Arc<LibvirtLink>,
    watched: DomainEvents,
    process: Process,
    facts: DomainRunFacts,
    run: RunRecord,
    state: DomainState,
) -> (Arc<LibvirtVmm>, LaunchedVmm) {
    let (sender, events) = mpsc::channel(EVENTS);
    let guest = Arc::new(GuestOrders::new(guest_state(state) == GuestState::Running));
    let (wanted, handle) = oneshot::channel();
    // The handle and the monitor share `guest`, so that the events of an order are not reported as
    // another client's.
    let mut monitor = DomainMonitor {
        watched,
        process: process.clone(),
        link: Arc::clone(link),
        guest: Arc::clone(&guest),
        events: sender,
        reason: None,
        ended: None,
        // An imported domain is ended by force only, so a hanging QEMU is not woken there.
        exit_timeouts: (!facts.imported).then_some(ExitTimeouts::WITH_LIBVIRTS),
        end: None,
        handle,
        throttle: Throttle::new(),
        compare_at: None,
    };
    monitor.ending(state == DomainState::ShuttingDown);
    let span = tracing::info_span!(parent: None, "domain", uuid = %facts.domain, pid = process.pid());
    tokio::spawn(monitor.run().instrument(span));
    let vmm = Arc::new(LibvirtVmm {
        domain: facts.domain,
        run,
        process,
        link: Arc::clone(link),
        guest,
        restarts: facts.restarts,
        imported: facts.imported,
        taps: facts.taps,
        input: facts.console.map(SocketInput::new),
        _wanted: wanted,
    });
    (Arc::clone(&vmm), LaunchedVmm { vmm, events })
}
