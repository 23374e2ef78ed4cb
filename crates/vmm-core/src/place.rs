//! VMs that live where somebody else says: in a VMM that this program did not start, or in another program's domain.
//!
//! ```text
//!                    ┌─ places: Made      a VMM is made for each VM, and the VM's kind is kind_of_new
//!   Backend ─ says ──┼─ places: Fixed     so many VMs and no more, each in a VMM that waits there
//!                    └─ places: Imported  VMs come from elsewhere only
//!
//!   somebody starts a VM ──► discover ──► Found ──┬─ no record holds the place ──► imported, with a record of its own
//!                                                 └─ one does ──► its actor: the VM is there again
//! ```
//!
//! A place is a [`VmKind`] that names a socket or a libvirt domain. The VM's record holds the place, and therefore the place is
//! taken as long as there is a record, whether or not anything runs there.

use std::fmt;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::backend::Launched;
use crate::config::VmConfig;
use crate::id::{VmId, VmUid};
use crate::kind::VmKind;
use crate::state::VmState;

/// Where the VMs of a hypervisor live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Places {
    /// A VMM is made for each VM: CreateVm needs no place.
    Made,
    /// One VM in each of these. CreateVm takes the first that no record holds.
    Fixed(Vec<VmKind>),
    /// One VM in each of these, made by somebody else: CreateVm is refused.
    Imported {
        /// The places.
        places: Vec<VmKind>,
        /// Why none can be created, and what to do; for people.
        why: String,
    },
}

impl Places {
    /// Returns true if `kind` is one of these.
    pub fn contains(&self, kind: &VmKind) -> bool {
        match self {
            Self::Made => false,
            Self::Fixed(places) | Self::Imported { places, .. } => places.contains(kind),
        }
    }
}

/// Finds VMs that somebody else made or started: an ability that not every hypervisor has.
#[async_trait]
pub trait Discover: Send + Sync {
    /// Looks for such VMs, and goes on looking. Called once, after every VM on record was adopted, because a VM whose handle is
    /// held is never found.
    async fn discover(&self) -> Discovery;
}

/// What a hypervisor holds that somebody else made or started, and the way in which it tells of more.
#[derive(Debug)]
pub struct Discovery {
    /// What is there now.
    pub present: Vec<Found>,
    /// What comes, goes or comes back from now on. Ends with the backend.
    pub later: mpsc::Receiver<Finding>,
}

/// Something that a hypervisor has found out by itself.
#[derive(Debug)]
pub enum Finding {
    /// A VM is there, or there again.
    Found(Box<Found>),
    /// The VM that lived in this place is there no more, not even as something that could be started. What was imported from
    /// there leaves the record; what this program made stays.
    Lost {
        /// The place.
        place: VmKind,
    },
    /// Whether the hypervisor can serve has changed: [`crate::backend::Backend::ping`] is worth asking.
    Health,
}

/// A VM that somebody else made or started.
pub struct Found {
    /// The place of the VM.
    pub place: VmKind,
    /// The creation that it bears, where it bears one: a VM that this program made and somebody else started.
    pub uid: Option<VmUid>,
    /// What to call it where it is not on record: the first of these that is free. There is at least one, and the last should
    /// be one that nobody else chooses.
    pub names: Vec<VmId>,
    /// Its configuration, as far as the VMM tells.
    pub config: VmConfig,
    /// What it has beside, that a configuration cannot say; for people. While this is not empty, the VM can be started as it
    /// is, but not made anew.
    pub untold: Vec<String>,
    /// Where it is.
    pub state: VmState,
    /// Its handle and events; there is one exactly where `state` is live.
    pub launched: Option<Launched>,
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Found")
            .field("place", &self.place)
            .field("uid", &self.uid)
            .field("names", &self.names)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
