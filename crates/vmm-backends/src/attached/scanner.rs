//! Examines every socket that no handle holds.
//!
//! ```text
//!   a socket appears ─┐
//!   the interval ─────┼─► visit ─ meet ─┬─ holds a VM ───► DiscoveredVm, with a handle if it runs
//!   a handle leaves ──┘                 └─ serves, fails ─► Health, where that is news
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument;
use vmm_core::discovery::{DiscoveredVm, Discovery, DiscoveryEvent};
use vmm_core::state::VmState;
use vmm_host::clock::now_ms;
use vmm_host::endpoint::{self, EndpointError};
use vmm_host::process::age;
use vmm_host::socket::DirWatch;

use super::backend::new_run;
use super::socket::{AttachedSocket, ScanMemory, SocketHealth};
use super::{AttachedHypervisor, AttachedVmmParts, GuestPhase, IdentifiedVmm, vm_names};

/// The most findings that wait for the receiver.
const QUEUE: usize = 64;
/// The interval of scans after a sign of change, because the VMM may not listen yet.
const EAGER_SCAN_INTERVAL: Duration = Duration::from_millis(100);
/// The time for which these scans go on.
const EAGER_SCAN_LIMIT: Duration = Duration::from_secs(2);
/// The least time between a scan that has met a VMM and the next scan that a change of the socket's
/// file causes, because a local user may change that file as often as desired.
const MIN_SCAN_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time in which a VMM must report its version and its VM. Shorter than the time limit
/// of an adoption.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest time of the first scan at the start of the daemon, for all sockets in parallel.
const FIRST_SCAN_TIMEOUT: Duration = Duration::from_secs(6);

/// Examines every socket once and returns the VMs that were found. Starts a task per socket that
/// goes on.
pub(super) async fn begin<H: AttachedHypervisor>(
    kind: &Arc<H>,
    sockets: &[Arc<AttachedSocket>],
    interval: Duration,
) -> Discovery {
    let (sender, later) = mpsc::channel(QUEUE);
    // The sockets are examined in parallel, because one VMM that does not answer must not delay the
    // others or the start of the daemon. A scan that times out is repeated by the task of its
    // socket.
    let first = sockets.iter().map(async |socket| {
        let looked = tokio::time::timeout(FIRST_SCAN_TIMEOUT, examine(&**kind, socket)).await;
        looked.ok().and_then(|scan| scan.found)
    });
    let present = futures::future::join_all(first).await.into_iter().flatten().collect();
    for socket in sockets {
        let scanner = SocketScanner {
            kind: Arc::clone(kind),
            socket: Arc::clone(socket),
            interval,
            findings: sender.clone(),
        };
        let span = tracing::info_span!(parent: None, "scanner", place = socket.place);
        tokio::spawn(scanner.run().instrument(span));
    }
    Discovery { present, later }
}

struct SocketScanner<H> {
    kind: Arc<H>,
    socket: Arc<AttachedSocket>,
    interval: Duration,
    findings: mpsc::Sender<DiscoveryEvent>,
}

impl<H: AttachedHypervisor> SocketScanner<H> {
    async fn run(self) {
        let mut watch = self.watch();
        let mut eager_until = Instant::now();
        let mut met_last = Instant::now();
        loop {
            // Three signs cause a scan: the interval, a handle that was dropped, and a change in
            // the socket's folder. The last two often come before the new VMM listens, so the scans
            // repeat at a short interval for 2 s, or until a VMM was met.
            let pause = if Instant::now() < eager_until { EAGER_SCAN_INTERVAL } else { self.interval };
            let not_before = met_last + MIN_SCAN_INTERVAL;
            let signed = tokio::select! {
                () = self.findings.closed() => return,
                () = tokio::time::sleep(pause) => false,
                () = self.socket.wait_for_release() => true,
                changed = wait_for_socket(watch.as_ref()) => {
                    if changed.is_err() {
                        watch = None;
                    }
                    tokio::time::sleep_until(not_before).await;
                    true
                }
            };
            if signed {
                eager_until = Instant::now() + EAGER_SCAN_LIMIT;
            }
            // The folder of the socket may have been created after the daemon started.
            watch = watch.or_else(|| self.watch());
            let scan = examine(&*self.kind, &self.socket).await;
            if scan.settled {
                eager_until = Instant::now();
                met_last = eager_until;
            }
            if !self.report(scan).await {
                return;
            }
        }
    }

    /// Sends the findings of a scan. Returns false if the receiver has been dropped.
    async fn report(&self, scan: ScanResult) -> bool {
        if scan.is_news && self.findings.send(DiscoveryEvent::Health).await.is_err() {
            return false;
        }
        match scan.found {
            Some(found) => self.findings.send(DiscoveryEvent::Found(Box::new(found))).await.is_ok(),
            None => true,
        }
    }

    fn watch(&self) -> Option<DirWatch> {
        let watch = DirWatch::for_file(&self.socket.path);
        watch.inspect_err(|error| tracing::debug!(%error, "the socket's folder cannot be watched")).ok()
    }
}

async fn wait_for_socket(watch: Option<&DirWatch>) -> std::io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// The result of one scan of a socket.
#[derive(Default)]
struct ScanResult {
    found: Option<DiscoveredVm>,
    /// True if the usability of the socket has changed.
    is_news: bool,
    /// True if a VMM was met, so the fast attempts can end.
    settled: bool,
}

async fn examine<H: AttachedHypervisor>(kind: &H, socket: &Arc<AttachedSocket>) -> ScanResult {
    if socket.is_held() {
        return ScanResult::default();
    }
    let mut memory = socket.turn.lock().await;
    // The operation that had the turn before may have given the socket to a handle.
    if socket.is_held() {
        return ScanResult::default();
    }
    let before = socket.health();
    let (met, view) = identify(kind, socket).await;
    let is_news = before != Some(view);
    let settled = met.is_ok();
    let found = met.ok().and_then(|met| discovered_vm(kind, socket, &mut memory, met));
    ScanResult { found, is_news, settled }
}

/// Visits the VMM at a socket, and records the result. The caller has the turn.
pub(super) async fn identify<H: AttachedHypervisor>(
    kind: &H,
    socket: &Arc<AttachedSocket>,
) -> (Result<IdentifiedVmm<H::Client>, EndpointError>, SocketHealth) {
    let met = match endpoint::visit(&socket.path).await {
        Ok(visit) => tokio::time::timeout(REPORT_TIMEOUT, kind.identify(&socket.path, visit))
            .await
            .unwrap_or_else(|_| {
                let seconds = REPORT_TIMEOUT.as_secs();
                Err(EndpointError::Failed(format!(
                    "the VMM did not answer within {seconds} s; it may be stopped or stuck"
                )))
            }),
        Err(error) => Err(error),
    };
    let view = match &met {
        Ok(met) => SocketHealth::Serves(met.version.clone()),
        Err(error) => SocketHealth::Fails(socket.failure(kind, error)),
    };
    if socket.set_health(view.clone()) {
        match &view {
            SocketHealth::Serves(version) => {
                tracing::info!(place = socket.place, version, "a VMM answers at the endpoint")
            }
            SocketHealth::Fails(why) => {
                tracing::warn!(place = socket.place, detail = why, "the endpoint has no usable VMM")
            }
        }
    }
    (met, view)
}

fn discovered_vm<H: AttachedHypervisor>(
    kind: &H,
    socket: &Arc<AttachedSocket>,
    memory: &mut ScanMemory,
    met: IdentifiedVmm<H::Client>,
) -> Option<DiscoveredVm> {
    let holds = met.holds.as_ref()?;
    let guest = holds.guest;
    let state = match guest {
        GuestPhase::AtRest => VmState::Created,
        GuestPhase::Running => VmState::Running,
        GuestPhase::Paused => VmState::Paused,
    };
    if guest == GuestPhase::AtRest && !holds.startable {
        return None;
    }
    if guest == GuestPhase::AtRest {
        let process = met.process.identity();
        if memory.reported.as_ref() == Some(process) {
            return None;
        }
        memory.reported = Some(process.clone());
    }
    let (config, unrepresented) = (holds.config.clone(), holds.unrepresented.clone());
    let launched = guest.is_live().then(|| {
        // The start of the guest is not known. The start of its VMM is the earliest possible time.
        let age = age(met.process.identity()).unwrap_or_default();
        let started = now_ms().saturating_sub(i64::try_from(age.as_millis()).unwrap_or(0));
        let parts = AttachedVmmParts {
            run: new_run(socket, &met, started),
            guest,
            dir: None,
            held: socket.lease(),
            console: None,
        };
        kind.attend(met, parts)
    });
    Some(DiscoveredVm {
        place: socket.kind(),
        uid: None,
        names: vm_names::names(&socket.path),
        config,
        unrepresented,
        state,
        launched,
    })
}
