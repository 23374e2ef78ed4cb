//! Sweeps: clearing up after a VM, and the limits of what a sweep may end.

use std::path::PathBuf;

use crate::id::VmUid;
use crate::kind::VmKind;
use crate::spec::VmSpec;
use crate::store::RunRecord;

/// The request for a sweep.
#[derive(Clone, Debug)]
pub struct SweepRequest {
    /// The VM's creation.
    pub uid: VmUid,
    /// The run folder whose processes end.
    pub dir: PathBuf,
    /// The run as it was recorded, if one was.
    pub run: Option<RunRecord>,
    /// The kind of the VM.
    pub kind: VmKind,
    /// The VM's specification, if the caller has it. It distinguishes the VM from another one that
    /// has taken its place.
    pub spec: Option<VmSpec>,
    /// True if another program made the VM.
    pub imported: bool,
    /// The purpose. It decides what a sweep may do to a VMM that this program did not start.
    pub purpose: SweepPurpose,
}

impl SweepRequest {
    /// Returns the request that clears up the run folder of a managed VM.
    pub fn of_folder(uid: VmUid, dir: impl Into<PathBuf>) -> Self {
        Self {
            uid,
            dir: dir.into(),
            run: None,
            kind: VmKind::Managed,
            spec: None,
            imported: false,
            purpose: SweepPurpose::Clear,
        }
    }
}

/// The purpose of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SweepPurpose {
    /// A start failed or a run has ended. The remains of that start are removed.
    Clear,
    /// The VM ends by force and stays on record.
    End,
    /// The VM is being deleted and does not run. It must not be discovered again.
    Delete,
    /// The VM is being deleted by force, whatever it is doing.
    ForceDelete,
}

impl SweepPurpose {
    /// Returns true if a VMM that another program started may be killed once it is proven to hold
    /// the VM.
    pub const fn is_forced(self) -> bool {
        match self {
            Self::Clear | Self::Delete => false,
            Self::End | Self::ForceDelete => true,
        }
    }
}
