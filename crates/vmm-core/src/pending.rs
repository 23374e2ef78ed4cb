//! The work that is left on a VM beside its run and its intent.
//!
//! ```text
//!   restart ──► the next daemon waits for the start by policy again
//!   process ──┬─ none ─────────► nothing to search for
//!             ├─ leftover ─────► ended by the next daemon; it runs no guest
//!             └─ out of reach ─► searched for; its guest may run
//! ```
//!
//! The daemon decides by this work, and never by the status, which is text for clients.

use serde::{Deserialize, Serialize};

use crate::state::{Phase, Status};

/// The work that is left on a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingWork {
    /// True if the restart policy is to start the VM again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
    /// The process that may be left.
    #[serde(default, skip_serializing_if = "PendingProcess::is_none")]
    pub process: PendingProcess,
}

/// A process that a VM may have, and that the daemon does not reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PendingProcess {
    /// There is no such process.
    #[default]
    None,
    /// The process of a start that was cancelled before its VMM received any data. It runs no
    /// guest.
    Leftover,
    /// A process that may run the guest, and that does not answer or is not held.
    OutOfReach,
}

impl PendingProcess {
    /// Returns true if there is no such process.
    const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

impl PendingWork {
    /// Returns the work that a record of an earlier release means. Such a record tells of the work
    /// in its status alone.
    pub(crate) fn of_earlier_release(status: &Status) -> Self {
        let process = match status.phase {
            Phase::Unreachable => PendingProcess::OutOfReach,
            _ => PendingProcess::None,
        };
        Self { restart: status.phase == Phase::Restarting, process }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_work_is_read_from_the_status_of_an_earlier_release() {
        for (phase, restart, process) in [
            (Phase::Stopped, false, PendingProcess::None),
            (Phase::Failed, false, PendingProcess::None),
            (Phase::Restarting, true, PendingProcess::None),
            (Phase::Unreachable, false, PendingProcess::OutOfReach),
        ] {
            let work = PendingWork::of_earlier_release(&Status::plain(phase, 1));
            assert_eq!(work, PendingWork { restart, process }, "{phase:?}");
        }
    }

    #[test]
    fn written_pending_work_is_read_back() {
        for restart in [false, true] {
            for process in [PendingProcess::None, PendingProcess::Leftover, PendingProcess::OutOfReach] {
                let work = PendingWork { restart, process };
                let json = serde_json::to_string(&work).unwrap();
                assert_eq!(serde_json::from_str::<PendingWork>(&json).unwrap(), work, "{json}");
            }
        }
        assert_eq!(serde_json::to_string(&PendingWork::default()).unwrap(), "{}");
    }
}
