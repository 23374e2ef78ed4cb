//! The TAPs of a VM. They exist before its VMM starts, and are removed when the VM is deleted.
//!
//! ```text
//!   BootVm ── claim ── provide ── intent, launch ──► runs           the VM keeps its TAPs through
//!                                   └── fails ──► its new TAPs      shutdown, reboot and restart,
//!                                                 are removed       with addresses and rules
//!   DeleteVm ── VMM ends ── remove the TAPs with this VM's label
//! ```
//!
//! The VM's record determines the TAPs that the VM may have made, and their labels
//! ([`vmm_host::net::tap`]) determine the TAPs that it did make. A start or a deletion that a crash
//! interrupted therefore needs no list of its own. Every TAP is touched under its claim, so that no
//! other VM boots on a TAP that is being removed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_core::config::NetworkInterface;
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::report::FieldReport;
use vmm_core::state::VmState;
use vmm_core::store::{HostClaim, VmRecord};
use vmm_host::net::tap::{OwnedTap, TapError, TapNameOrigin, TapOrigin, TapOwner, Taps};

use super::Actor;
use super::budget::{Budget, EffectError};
use super::hold::Hold;

/// The time in which all TAPs of one VM are to be made. One takes a tenth of a millisecond.
const PROVIDE_LIMIT: Duration = Duration::from_secs(2);
/// The time in which all TAPs of one VM are to be removed. One takes some 16 ms, and many run side
/// by side.
const REMOVE_LIMIT: Duration = Duration::from_secs(5);
/// The time for the same removal within the 5 s of a forced operation.
const FORCED_REMOVE_LIMIT: Duration = Duration::from_millis(700);

impl Actor {
    /// Returns the TAP of each network interface, in their order, and the party that named it.
    ///
    /// An imported VM is started as it is, so it has only the TAPs that its VMM reported by name.
    /// Its other interfaces are no TAPs, or have TAPs that the VMM makes for itself. Such a VM is
    /// never made anew, because its VMM did not report enough. A libvirt domain has no TAPs here,
    /// because libvirt gives it new ones with each run.
    pub(super) fn taps(&self) -> Vec<(String, TapNameOrigin)> {
        if self.record.imported && self.record.kind.domain().is_some() {
            return Vec::new();
        }
        if self.record.imported {
            let given = self.spec().nics.into_iter().filter_map(|nic| nic.tap);
            return given.map(|name| (name, TapNameOrigin::Client)).collect();
        }
        let uid = self.record.uid;
        let by =
            |name: &str| if uid.made_tap_name(name) { TapNameOrigin::Program } else { TapNameOrigin::Client };
        let named = |name: String| {
            let by = by(&name);
            (name, by)
        };
        self.spec().tap_names(uid).into_iter().map(named).collect()
    }

    /// Returns the claims that keep other running VMs off this VM's TAPs.
    pub(super) fn tap_claims(&self) -> impl Iterator<Item = HostClaim> {
        self.taps().into_iter().map(|(name, _)| HostClaim::Tap { name })
    }

    /// Makes sure that every TAP exists, because a VMM that runs as root would make a missing one
    /// itself, and that one would never be removed. The claims are held.
    ///
    /// `made` receives the names of the TAPs that this call has made, or may have made: a TAP whose
    /// creation is cut off by the time limit or by a forced operation may still appear.
    pub(super) async fn provide_taps(
        &mut self,
        budget: Budget,
        made: &mut Vec<String>,
    ) -> Result<(), EffectError> {
        let owner = self.tap_owner();
        let (taps, names) = (Arc::clone(&self.shared.taps), self.taps());
        let providing = async {
            for (index, (name, by)) in names.into_iter().enumerate() {
                // The name is noted before the call, because the call can be cancelled, and is
                // removed after it if the TAP is not new.
                made.push(name.clone());
                let provided = taps.provide(&name, by, owner).await;
                if !matches!(provided, Ok(TapOrigin::Made)) {
                    made.pop();
                }
                if matches!(provided, Ok(TapOrigin::FoundDown)) {
                    tracing::warn!(
                        tap = name,
                        "the TAP is down, and this daemon may not bring it up, so that the guest has no network; \
                         run `ip link set {name} up` as root, or give the daemon CAP_NET_ADMIN"
                    );
                }
                if let Err(error) = provided {
                    return Err(refused(index, error));
                }
            }
            Ok(())
        };
        match self.interruptible(budget, PROVIDE_LIMIT, providing).await {
            Err(EffectError::Backend(error)) if error.kind == BackendErrorKind::Timeout => {
                Err(EffectError::Backend(too_late(made.last().map_or("", String::as_str))))
            }
            provided => provided,
        }
    }

    /// Removes every TAP that was made for this VM, and returns the TAPs that could not be removed.
    /// The claims stay held.
    pub(super) async fn free_taps(&self, budget: Budget) -> Vec<FieldReport> {
        let names = self.taps_to_free(budget).await;
        self.free_named_taps(budget, names).await
    }

    /// Removes those of `names` that were made for this VM, and returns the TAPs that could not be
    /// removed. The claims stay held.
    pub(super) async fn free_named_taps(&self, budget: Budget, names: Vec<String>) -> Vec<FieldReport> {
        let (uid, vm_id) = (self.record.uid, &self.record.vm_id);
        let mut free = Vec::new();
        for name in names {
            let claim = HostClaim::Tap { name: name.clone() };
            // A TAP on which another VM runs belongs to that VM now.
            if self.shared.claims.acquire(uid, vm_id, &[claim]).is_ok() {
                free.push(name);
            }
        }
        self.remove_taps(budget, free).await
    }

    /// Returns the TAPs that may be this VM's. The configuration lists them. Where it is not
    /// understood, or is not the one that they were made for because another program started
    /// another VM in its place, the labels list them.
    async fn taps_to_free(&self, budget: Budget) -> Vec<String> {
        if !matches!(self.hold, Hold::Quarantined { .. }) && !self.record.imported {
            return self.taps().into_iter().map(|(name, _)| name).collect();
        }
        let listing = self.shared.taps.of_instance(self.shared.instance);
        match tokio::time::timeout(budget.at_most(FORCED_REMOVE_LIMIT), listing).await {
            Ok(Ok(labelled)) => {
                let ours = labelled.into_iter().filter(|tap| tap.owner.uid == self.record.uid);
                ours.map(|tap| tap.name).collect()
            }
            // The next start of the daemon removes them as orphans.
            Ok(Err(_)) | Err(_) => Vec::new(),
        }
    }

    /// Removes those of `names` that bear this VM's label, and returns the ones that could not be
    /// removed. No VMM of this VM is left.
    pub(super) async fn remove_taps(&self, budget: Budget, names: Vec<String>) -> Vec<FieldReport> {
        let owner = self.tap_owner();
        let deadline = budget.at_most(if budget.forced { FORCED_REMOVE_LIMIT } else { REMOVE_LIMIT });
        let removals = names.into_iter().map(async |name| {
            let removal = self.shared.taps.remove(&name, owner);
            let problem = match tokio::time::timeout(deadline, removal).await {
                Ok(Ok(_)) => return None,
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("the kernel did not remove it within {} ms", deadline.as_millis()),
            };
            Some(FieldReport::new(format!("tap {name}"), problem))
        });
        join_all(removals).await.into_iter().flatten().collect()
    }

    fn tap_owner(&self) -> TapOwner {
        TapOwner { instance: self.shared.instance, uid: self.record.uid }
    }
}

fn refused(index: usize, error: TapError) -> BackendError {
    let message = format!("config.network[{index}].tap_device: {error}");
    BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message).caused_by(error)
}

fn too_late(name: &str) -> BackendError {
    let message = format!("TAP {name} was not there within {} s", PROVIDE_LIMIT.as_secs());
    BackendError::new(BackendErrorKind::Timeout, Effect::Unknown, message)
}

/// The TAPs that the VMs on record may have.
#[derive(Default)]
pub(crate) struct KnownTaps(HashMap<VmUid, Option<HashSet<String>>>);

impl KnownTaps {
    /// Adds the TAPs that the configuration of `record` names. A VM that never ran and is not being
    /// started owns no TAP.
    pub(crate) fn add(&mut self, record: &VmRecord) {
        if record.state == VmState::Created && record.intent.is_none() {
            return;
        }
        if record.imported {
            return self.add_unknown(record.uid);
        }
        let nics = record.config.network.iter().enumerate();
        // A record of an earlier release has no name where the client gave none.
        let name = |(index, nic): (usize, &NetworkInterface)| {
            if nic.tap_device.is_empty() { record.uid.tap_name(index) } else { nic.tap_device.clone() }
        };
        self.0.insert(record.uid, Some(nics.map(name).collect()));
    }

    /// Adds a VM that may own any TAP with its label, because its configuration does not name them.
    pub(crate) fn add_unknown(&mut self, uid: VmUid) {
        self.0.insert(uid, None);
    }

    fn contains(&self, tap: &OwnedTap) -> bool {
        match self.0.get(&tap.owner.uid) {
            Some(Some(names)) => names.contains(&tap.name),
            Some(None) => true,
            None => false,
        }
    }
}

/// Removes the TAPs of this installation that are not `known`. The VM of such a TAP is not on record
/// any more because its deletion could not remove the TAP, or never ran, or an UpdateVm removed the
/// interface and the daemon died before it removed the TAP.
pub(crate) async fn remove_orphans(taps: &dyn Taps, instance: InstanceId, known: &KnownTaps) {
    let labelled = match tokio::time::timeout(REMOVE_LIMIT, taps.of_instance(instance)).await {
        Ok(Ok(labelled)) => labelled,
        Ok(Err(error)) => {
            return tracing::warn!(%error, "the host's TAPs could not be listed; a TAP of a deleted VM may stay");
        }
        Err(_) => {
            return tracing::warn!("the host's TAPs were not listed in time; a TAP of a deleted VM may stay");
        }
    };
    let orphans = labelled.into_iter().filter(|tap| !known.contains(tap));
    let removals = orphans.map(async |tap| {
        let (name, uid) = (&tap.name, tap.owner.uid);
        if tap.attached {
            tracing::warn!(tap = name, %uid, "the TAP of a deleted VM is used by a process; it is left alone");
            return;
        }
        match tokio::time::timeout(REMOVE_LIMIT, taps.remove(name, tap.owner)).await {
            Ok(Ok(_)) => tracing::info!(tap = name, %uid, "the TAP of a deleted VM was removed"),
            Ok(Err(error)) => tracing::warn!(tap = name, %uid, %error, "the TAP of a deleted VM could not be removed"),
            Err(_) => tracing::warn!(tap = name, %uid, "the TAP of a deleted VM was not removed in time"),
        }
    });
    join_all(removals).await;
}
