//! Clearing up after a VM: what a sweep is for, and what it may do to what this program did not start.

use std::path::PathBuf;

use crate::id::VmUid;
use crate::kind::VmKind;
use crate::spec::VmSpec;
use crate::store::RunRecord;

/// What a sweep needs to know.
#[derive(Clone, Debug)]
pub struct SweepRequest {
    /// The VM's creation.
    pub uid: VmUid,
    /// The run folder whose users are to end.
    pub dir: PathBuf,
    /// The run as it was recorded, if it was.
    pub run: Option<RunRecord>,
    /// The kind of the VM.
    pub kind: VmKind,
    /// What the VM is, where the caller knows: tells it from another that has come to its place.
    pub spec: Option<VmSpec>,
    /// Whether somebody else made the VM.
    pub imported: bool,
    /// Why: what may be done to what this program did not start depends on it.
    pub purpose: Sweep,
}

impl SweepRequest {
    /// Makes the request for what a managed VM has left in its run folder.
    pub fn of_folder(uid: VmUid, dir: impl Into<PathBuf>) -> Self {
        Self {
            uid,
            dir: dir.into(),
            run: None,
            kind: VmKind::Managed,
            spec: None,
            imported: false,
            purpose: Sweep::Clear,
        }
    }
}

/// Why what is left of a VM is swept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sweep {
    /// A start broke, or a run has ended: what that start has made goes.
    Clear,
    /// The VM is to end by force, and stays on record.
    End,
    /// The VM is being deleted, and does not run: it must not be found again.
    Delete,
    /// The same by force, whatever it is doing.
    ForceDelete,
}

impl Sweep {
    /// Says whether a VMM that somebody else started may be killed, if it is proven the right one.
    pub const fn is_forced(self) -> bool {
        match self {
            Self::Clear | Self::Delete => false,
            Self::End | Self::ForceDelete => true,
        }
    }
}
