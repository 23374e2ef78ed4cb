//! The log lines about VMs: one for each operation, at its end, and one for each change that no
//! client requested.
//!
//! ```text
//!   ended well ──────────────► INFO, by the task that carried the operation out
//!   failed ─┬─ a client waits ► WARN, by the server, which counts floods of failures
//!           └─ none waits ────► WARN, by the task that carried the operation out
//!   no client requested it ──► by the journal, with the event
//! ```
//!
//! All lines have the same keys, which `docs/operating.md` lists. After a start of the daemon
//! thousands of VMs may be found running or gone. The first lines of each kind are then written at
//! their level, the others at DEBUG, and one line gives the numbers ([`Beginnings`]).

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tokio::time::Instant;
use vmm_core::cause::Cause;
use vmm_core::event::{EventKind, NewEvent};
use vmm_core::id::{BackendName, VmId, VmUid};
use vmm_core::reason::Reason;
use vmm_core::state::{Phase, VmOperation};
use vmm_core::store::VmRecord;

use crate::error::ServiceError;
use crate::mailbox::OperationOutcome;

/// The number of lines of one kind that the recovery of the VMs writes at their own level.
const LINES_AT_START: u32 = 20;

/// An operation that ends now.
pub(crate) struct Ending<'a> {
    /// The name of the method.
    pub(crate) operation: &'a str,
    /// True if the caller has set `force`.
    pub(crate) force: bool,
    /// The caller, as the event shows it: `system` for the program, as where a restart policy acts.
    pub(crate) actor: &'a (dyn fmt::Display + Sync),
    /// The VM.
    pub(crate) record: &'a VmRecord,
    /// The instant of the request.
    pub(crate) asked: Instant,
}

impl Ending<'_> {
    /// Logs that the operation has succeeded.
    pub(crate) fn done(&self, outcome: &OperationOutcome) {
        let Self { operation, actor, record, .. } = self;
        let (vm_id, uid, backend, duration_ms) = self.keys();
        // A VM that is deleted has no state any more.
        let is_deletion = *operation == VmOperation::Delete.method();
        let state = (!is_deletion).then(|| record.state.name());
        let force = self.force.then_some(true);
        let ended_by = outcome.ended_by.map(|rung| rung.as_str());
        if outcome.left_behind.is_empty() {
            tracing::info!(
                operation, force, %actor, %vm_id, %uid, %backend, outcome = "done", state, ended_by, duration_ms,
                "operation done"
            );
        } else {
            let left: Vec<_> = outcome.left_behind.iter().map(ToString::to_string).collect();
            tracing::warn!(
                operation, force, %actor, %vm_id, %uid, %backend, outcome = "done", state, ended_by, duration_ms,
                detail = left.join("; "),
                "operation done, but something on the host could not be removed"
            );
        }
    }

    /// Logs that the operation has failed, for an operation whose client does not wait or that no
    /// client requested.
    pub(crate) fn failed(&self, error: &ServiceError) {
        let Self { operation, actor, .. } = self;
        let force = self.force.then_some(true);
        let (vm_id, uid, backend, duration_ms) = self.keys();
        let causes = error.causes();
        let causes = (!causes.is_empty()).then(|| causes.join(": "));
        tracing::warn!(
            operation, force, %actor, %vm_id, %uid, %backend, outcome = "failed", reason = error.code(), detail = %error,
            causes, duration_ms,
            "operation failed"
        );
    }

    fn keys(&self) -> (&VmId, VmUid, &BackendName, u64) {
        (&self.record.vm_id, self.record.uid, &self.record.backend, millis_since(self.asked))
    }
}

fn millis_since(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Logs a change that no client requested. `is_logged` is false if the line is one of many at the
/// start of the daemon. The start by a restart policy has a line of its own.
pub(crate) fn unrequested(event: &NewEvent, backend: &BackendName, is_logged: bool) {
    if event.cause == Cause::RestartPolicy {
        return;
    }
    let NewEvent { vm_id, uid, status, cause, .. } = event;
    let failed = match event.kind {
        EventKind::Unreachable | EventKind::OperationFailed => true,
        EventKind::VmmExited => status.phase == Phase::Failed || is_failure(&status.reason),
        _ => {
            status.phase == Phase::Failed || matches!(status.reason, Reason::PlaceTaken | Reason::SocketsGone)
        }
    };
    let cause = cause.as_str();
    let (operation, state) = (event.kind.as_str(), event.state.name());
    let (actor, origin) = (&event.caller, origin_of(event));
    let (reason, detail) = (status.reason.as_str(), status.message.as_str());
    let reason = (!reason.is_empty()).then_some(reason);
    let detail = (!detail.is_empty()).then_some(detail);
    let (phase, outcome) = (status.phase.as_str(), if failed { "failed" } else { "done" });
    // The macros take the level and the message as literals.
    macro_rules! line {
        ($level:ident, $message:literal) => {
            tracing::$level!(
                operation, %actor, origin, %vm_id, %uid, %backend, outcome, reason, detail, cause, state, phase,
                restarts = status.restarts,
                $message
            )
        };
    }
    macro_rules! leveled {
        ($message:literal) => {
            match (is_logged, failed) {
                (false, _) => line!(debug, $message),
                (true, true) => line!(warn, $message),
                (true, false) => line!(info, $message),
            }
        };
    }
    match event.kind {
        EventKind::Adopted => leveled!("the running VMM was taken over"),
        EventKind::VmmExited if failed => leveled!("the VM's run ended by a failure"),
        EventKind::VmmExited => leveled!("the VM's run ended"),
        EventKind::GuestReset => leveled!("the guest reset itself in place and runs again"),
        EventKind::Unreachable => leveled!("the VMM cannot be reached; the VM is left alone"),
        EventKind::Reachable => leveled!("the VMM answers again"),
        EventKind::Created => leveled!("a VM of another program was imported"),
        EventKind::StateChanged
        | EventKind::OperationStarted
        | EventKind::OperationFailed
        | EventKind::Updated
        | EventKind::Deleted
        | EventKind::Unknown => leveled!("the VM changed without a request"),
    }
}

fn is_failure(reason: &Reason) -> bool {
    matches!(reason, Reason::GuestCrash | Reason::VmmFailed | Reason::Unknown | Reason::RestartLoop)
}

/// Returns the thing with which a change began that no client requested.
fn origin_of(event: &NewEvent) -> &'static str {
    match (event.kind, &event.status.reason) {
        (
            _,
            Reason::PausedFromOutside
            | Reason::ResumedFromOutside
            | Reason::ResetFromOutside
            | Reason::StartedFromOutside
            | Reason::Imported
            | Reason::PlaceTaken,
        ) => "another-program",
        (_, Reason::HostReboot) => "host",
        (EventKind::GuestReset, _)
        | (
            EventKind::VmmExited,
            Reason::GuestReset | Reason::GuestPowerOff | Reason::GuestCrash | Reason::RestartLoop,
        ) => "guest",
        (EventKind::VmmExited, _) => "vmm",
        _ => "daemon",
    }
}

/// The number of changes that the recovery of the VMs has found, while the daemon starts.
#[derive(Default)]
pub(crate) struct Beginnings {
    is_over: AtomicBool,
    adopted: AtomicU32,
    ended: AtomicU32,
    unreachable: AtomicU32,
    imported: AtomicU32,
    other: AtomicU32,
}

impl Beginnings {
    /// Counts a change of `kind`. Returns true if its line is to be written at its own level.
    pub(crate) fn count(&self, kind: EventKind) -> bool {
        if self.is_over.load(Ordering::Relaxed) {
            return true;
        }
        let counter = match kind {
            EventKind::Adopted => &self.adopted,
            EventKind::VmmExited => &self.ended,
            EventKind::Unreachable => &self.unreachable,
            EventKind::Created => &self.imported,
            _ => &self.other,
        };
        counter.fetch_add(1, Ordering::Relaxed) < LINES_AT_START
    }

    /// Logs the numbers. From now on every line is written at its own level. `vms` is the number of
    /// VMs on record.
    pub(crate) fn end(&self, vms: usize) {
        self.is_over.store(true, Ordering::Relaxed);
        let [adopted, ended, unreachable, imported, other] =
            [&self.adopted, &self.ended, &self.unreachable, &self.imported, &self.other]
                .map(|counter| counter.load(Ordering::Relaxed));
        let at_debug: u32 = [adopted, ended, unreachable, imported, other]
            .map(|count| count.saturating_sub(LINES_AT_START))
            .iter()
            .sum();
        tracing::info!(
            vms,
            adopted,
            ended,
            unreachable,
            imported,
            at_debug,
            "the VMs on record were recovered"
        );
    }
}
