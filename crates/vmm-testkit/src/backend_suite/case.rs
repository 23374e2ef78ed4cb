//! A case of the suite: its steps, and its row in the matrix.

use std::sync::Arc;

use super::results::CaseVerdict;
use super::rig::{DaemonLife, Rig, StepFuture};

/// A case, which is one row of the matrix.
#[derive(Debug)]
pub struct Case {
    /// The name of the case and of its test.
    pub id: &'static str,
    /// The row's title in the matrix.
    pub title: &'static str,
    /// The part of the matrix that the case belongs to.
    pub group: CaseGroup,
    /// The steps, in order.
    pub(super) steps: &'static [CaseStep],
}

/// A part of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseGroup {
    /// The state table.
    States,
    /// CPUs, memory and boot.
    Configuration,
    /// Disks, network and console.
    Devices,
    /// The ends of runs.
    Ends,
    /// Failures of the VMM.
    VmmFailures,
    /// Observations of a running guest.
    Observation,
    /// Restarts of the daemon.
    Restart,
}

impl CaseGroup {
    /// Every part, in the matrix's order.
    pub const ALL: [Self; 7] = [
        Self::States,
        Self::Configuration,
        Self::Devices,
        Self::Ends,
        Self::VmmFailures,
        Self::Observation,
        Self::Restart,
    ];

    /// Returns the heading of the part.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::States => "The state table",
            Self::Configuration => "CPUs, memory, boot",
            Self::Devices => "Disks, network, console, labels",
            Self::Ends => "How a run ends",
            Self::VmmFailures => "When the VMM fails",
            Self::Observation => "What is seen of a running guest",
            Self::Restart => "When the daemon restarts",
        }
    }
}

/// A step of a case.
#[derive(Debug)]
pub(super) enum CaseStep {
    /// The life of one daemon. The verdict of the last life is the verdict of the case.
    Life(fn(DaemonLife) -> StepFuture<CaseVerdict>),
    /// An action while no daemon runs.
    Away(fn(Arc<Rig>) -> StepFuture<()>),
}
