//! The look at every seat that no handle holds.
//!
//! ```text
//!   a socket appears ─┐
//!   the interval ─────┼──► visit ─ meet ──┬─ holds a VM ───► Found, with a handle if it runs
//!   a handle leaves ──┘                   └─ serves, fails ─► Health, where that is news
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::Instrument;
use vmm_core::place::{Discovery, Finding, Found};
use vmm_core::state::VmState;
use vmm_host::clock::now_ms;
use vmm_host::endpoint::{self, VisitError};
use vmm_host::process::age;
use vmm_host::socket::DirWatch;

use super::backend::new_run;
use super::seat::{Memory, Seat, View};
use super::{Guest, Hypervisor, Met, Parts, place};

/// Findings that may wait.
const QUEUE: usize = 64;
/// After a sign that something has changed, a VMM that does not listen yet is looked for so often, for so long.
const EAGER: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// The least time between a look that has met a VMM and one for which a change of the socket's file is the reason. A local user
/// may be able to change that file as often as he likes.
const SPACING: Duration = Duration::from_secs(1);
/// How long a VMM may take to say what it is and holds. Shorter than an adoption may take.
const MEETING: Duration = Duration::from_secs(3);
/// How long a look may take at the start of the daemon, all seats side by side.
const FIRST_LOOK: Duration = Duration::from_secs(6);

/// Looks at every seat once, and goes on looking.
pub(super) async fn begin<H: Hypervisor>(
    kind: &Arc<H>,
    seats: &[Arc<Seat>],
    interval: Duration,
) -> Discovery {
    let (sender, later) = mpsc::channel(QUEUE);
    let first = seats.iter().map(async |seat| {
        let looked = tokio::time::timeout(FIRST_LOOK, look(&**kind, seat)).await;
        looked.ok().and_then(|look| look.found)
    });
    let present = futures::future::join_all(first).await.into_iter().flatten().collect();
    for seat in seats {
        let patrol =
            Patrol { kind: Arc::clone(kind), seat: Arc::clone(seat), interval, findings: sender.clone() };
        let span = tracing::info_span!(parent: None, "patrol", place = seat.place);
        tokio::spawn(patrol.run().instrument(span));
    }
    Discovery { present, later }
}

struct Patrol<H> {
    kind: Arc<H>,
    seat: Arc<Seat>,
    interval: Duration,
    findings: mpsc::Sender<Finding>,
}

impl<H: Hypervisor> Patrol<H> {
    async fn run(self) {
        let mut watch = self.watch();
        let mut eager_until = Instant::now();
        let mut met_last = Instant::now();
        loop {
            let pause = if Instant::now() < eager_until { EAGER.0 } else { self.interval };
            let not_before = met_last + SPACING;
            let signed = tokio::select! {
                () = self.findings.closed() => return,
                () = tokio::time::sleep(pause) => false,
                () = self.seat.left() => true,
                changed = appeared(watch.as_ref()) => {
                    if changed.is_err() {
                        watch = None;
                    }
                    tokio::time::sleep_until(not_before).await;
                    true
                }
            };
            if signed {
                eager_until = Instant::now() + EAGER.1;
            }
            // The folder may have come after the daemon.
            watch = watch.or_else(|| self.watch());
            let look = look(&*self.kind, &self.seat).await;
            if look.settled {
                eager_until = Instant::now();
                met_last = eager_until;
            }
            if !self.tell(look).await {
                return;
            }
        }
    }

    /// Says whether anybody listens.
    async fn tell(&self, look: Look) -> bool {
        if look.is_news && self.findings.send(Finding::Health).await.is_err() {
            return false;
        }
        match look.found {
            Some(found) => self.findings.send(Finding::Found(Box::new(found))).await.is_ok(),
            None => true,
        }
    }

    fn watch(&self) -> Option<DirWatch> {
        let watch = DirWatch::for_file(&self.seat.socket);
        watch.inspect_err(|error| tracing::debug!(%error, "the socket's folder cannot be watched")).ok()
    }
}

async fn appeared(watch: Option<&DirWatch>) -> std::io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// What a look at a seat has brought.
#[derive(Default)]
struct Look {
    found: Option<Found>,
    /// Whether it can be used is not as it was.
    is_news: bool,
    /// A VMM was met, so there is nothing to be eager for.
    settled: bool,
}

async fn look<H: Hypervisor>(kind: &H, seat: &Arc<Seat>) -> Look {
    if seat.is_held() {
        return Look::default();
    }
    let mut memory = seat.turn.lock().await;
    // Whoever had the turn may have taken the seat.
    if seat.is_held() {
        return Look::default();
    }
    let before = seat.view();
    let (met, view) = meet(kind, seat).await;
    let is_news = before != Some(view);
    let settled = met.is_ok();
    let found = met.ok().and_then(|met| found(kind, seat, &mut memory, met));
    Look { found, is_news, settled }
}

/// Meets the VMM at a seat, and remembers how that went. The caller has the turn.
pub(super) async fn meet<H: Hypervisor>(
    kind: &H,
    seat: &Arc<Seat>,
) -> (Result<Met<H::Client>, VisitError>, View) {
    let met = match endpoint::visit(&seat.socket).await {
        Ok(visit) => {
            tokio::time::timeout(MEETING, kind.meet(&seat.socket, visit)).await.unwrap_or_else(|_| {
                let seconds = MEETING.as_secs();
                Err(VisitError::Failed(format!(
                    "its VMM did not answer within {seconds} s; it may be stopped or stuck"
                )))
            })
        }
        Err(error) => Err(error),
    };
    let view = match &met {
        Ok(met) => View::Serves(met.version.clone()),
        Err(error) => View::Fails(seat.failure(kind, error)),
    };
    if seat.note(view.clone()) {
        match &view {
            View::Serves(version) => tracing::info!(place = seat.place, version, "a VMM listens"),
            View::Fails(why) => tracing::warn!(place = seat.place, why, "no VMM can be used"),
        }
    }
    (met, view)
}

fn found<H: Hypervisor>(
    kind: &H,
    seat: &Arc<Seat>,
    memory: &mut Memory,
    met: Met<H::Client>,
) -> Option<Found> {
    let holds = met.holds.as_ref()?;
    let guest = holds.guest;
    let state = match guest {
        Guest::AtRest => VmState::Created,
        Guest::Running => VmState::Running,
        Guest::Paused => VmState::Paused,
    };
    if guest == Guest::AtRest && !holds.startable {
        return None;
    }
    if guest == Guest::AtRest {
        let process = met.process.identity();
        if memory.told.as_ref() == Some(process) {
            return None;
        }
        memory.told = Some(process.clone());
    }
    let (config, untold) = (holds.config.clone(), holds.untold.clone());
    let launched = guest.is_live().then(|| {
        // When its guest began nobody tells; its VMM did not begin later.
        let age = age(met.process.identity()).unwrap_or_default();
        let started = now_ms().saturating_sub(i64::try_from(age.as_millis()).unwrap_or(0));
        let parts =
            Parts { run: new_run(seat, &met, started), guest, dir: None, held: seat.hold(), console: None };
        kind.attend(met, parts)
    });
    Some(Found {
        place: seat.kind(),
        uid: None,
        names: place::names(&seat.socket),
        config,
        untold,
        state,
        launched,
    })
}
