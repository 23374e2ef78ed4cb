//! VMs that live in a place which another program provides: a VMM or a libvirt domain.
//!
//! ```text
//!                       ┌─ Made      a VMM is started for each VM; its kind is kind_of_new
//!   Backend::places() ──┼─ Fixed     a fixed number of VMs, each in a VMM that waits there
//!                       └─ Imported  VMs of other programs only
//!
//!   a VM starts elsewhere ─► discover: DiscoveredVm ─┬─ the place is free ─► imported, new record
//!                                                      └─ a record holds the place ──► its actor
//! ```
//!
//! A place is a [`VmKind`] that names a socket or a libvirt domain. A VM's record holds its place.
//! Therefore a place is taken as long as there is a record, even if nothing runs there.

use std::fmt;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::backend::LaunchedVmm;
use crate::config::VmConfig;
use crate::id::{VmId, VmUid};
use crate::kind::VmKind;
use crate::state::VmState;

/// The places in which the VMs of a hypervisor live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Places {
    /// A VMM is started for each VM, so CreateVm needs no place.
    Made,
    /// Each place takes one VM. CreateVm takes the first one that no record holds.
    Fixed {
        /// The places.
        places: Vec<VmKind>,
        /// The variable of the setting that names the places; for people.
        setting: &'static str,
    },
    /// Each place takes one VM that another program made. CreateVm is refused.
    Imported {
        /// The places.
        places: Vec<VmKind>,
        /// The reason why no VM can be created, and the remedy; for people.
        why: String,
    },
}

impl Places {
    /// Returns true if `kind` is one of these places. Made VMMs have none.
    pub fn contains(&self, kind: &VmKind) -> bool {
        match self {
            Self::Made => false,
            Self::Fixed { places, .. } | Self::Imported { places, .. } => places.contains(kind),
        }
    }
}

/// Finds VMs that another program made or started, an ability of some hypervisors.
#[async_trait]
pub trait Discoverer: Send + Sync {
    /// Searches for such VMs, and continues the search. Called once, after the adoption of every
    /// recorded VM, because a VM whose handle is held is never found.
    async fn discover(&self) -> Discovery;
}

/// The VMs of a hypervisor that another program made or started, and the source of later findings.
#[derive(Debug)]
pub struct Discovery {
    /// The VMs that exist now.
    pub present: Vec<DiscoveredVm>,
    /// The later findings. The channel ends with the backend.
    pub later: mpsc::Receiver<DiscoveryEvent>,
}

/// A finding of a hypervisor.
#[derive(Debug)]
pub enum DiscoveryEvent {
    /// A VM exists, or exists again.
    Found(Box<DiscoveredVm>),
    /// The VM in this place does not exist any more, not even stopped. An imported VM loses its
    /// record; a VM that this program made keeps it.
    Lost {
        /// The place.
        place: VmKind,
    },
    /// The health of the hypervisor has changed. [`crate::backend::Backend::ping`] reads it.
    Health,
}

/// A VM that another program made or started.
pub struct DiscoveredVm {
    /// The place of the VM.
    pub place: VmKind,
    /// The uid, if this program made the VM and another one started it.
    pub uid: Option<VmUid>,
    /// The names for a VM that is not on record, of which the first free one is taken. There is at
    /// least one, and the last should be one that no client chooses.
    pub names: Vec<VmId>,
    /// The configuration, as far as the VMM reports it.
    pub config: VmConfig,
    /// The properties that a configuration cannot express; for people. A VM with such properties
    /// can be started as it is, but not made anew.
    pub unrepresented: Vec<String>,
    /// The state.
    pub state: VmState,
    /// The handle and events; `Some` exactly if `state` is live.
    pub launched: Option<LaunchedVmm>,
}

impl fmt::Debug for DiscoveredVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Found")
            .field("place", &self.place)
            .field("uid", &self.uid)
            .field("names", &self.names)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
