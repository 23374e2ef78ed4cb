//! The claims of running VMs: writable disks, by device and inode, and TAPs, by name. Each serves
//! one running VM at a time. A disk whose file does not answer is claimed by its path until the
//! file answers.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_core::id::{VmId, VmUid};
use vmm_core::store::{DiskKey, HostClaim};

/// The claims of all VMs and their holders. Read-only users share a disk, and a writer has it
/// alone.
#[derive(Default)]
pub(crate) struct Claims {
    holders: Mutex<ClaimTable>,
}

/// The claims by key and by VM. The two maps hold the same claims, so that neither a check nor a
/// release has to walk over VMs that do not take part.
#[derive(Default)]
struct ClaimTable {
    by_key: HashMap<ClaimKey, Vec<ClaimHolder>>,
    by_uid: HashMap<VmUid, Vec<ClaimKey>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum ClaimKey {
    Disk(DiskKey),
    Path(PathBuf),
    Tap(String),
}

struct ClaimHolder {
    uid: VmUid,
    vm_id: VmId,
    exclusive: bool,
    /// True if the VM holds only something that lies on this key, for example a partition of this
    /// disk or the file to which this path led. Partitions conflict with the whole disk only, and
    /// two files that had one name are two files.
    part: bool,
    claim: HostClaim,
    /// The process that holds the claim, if the VM itself is deleted.
    left: Option<Arc<str>>,
}

/// A claim that another VM, or the process of a deleted VM, holds.
#[derive(Debug, thiserror::Error)]
#[error("{} is in use by {holder}", name_of(claim))]
pub(crate) struct ClaimConflict {
    claim: HostClaim,
    holder: ConflictingHolder,
}

/// The holder of a claim that is taken.
#[derive(Debug, thiserror::Error)]
enum ConflictingHolder {
    #[error("VM \"{0}\", which runs; shut that VM down first, or use another")]
    Vm(VmId),
    #[error("{0}, which could not be ended; it is free when that process has gone")]
    Process(Arc<str>),
}

impl Claims {
    /// Takes all of `claims` for one VM in addition to its present claims, or none of them.
    ///
    /// # Errors
    ///
    /// Returns the taken claim and its holder.
    pub(crate) fn acquire(
        &self,
        uid: VmUid,
        vm_id: &VmId,
        claims: &[HostClaim],
    ) -> Result<(), ClaimConflict> {
        let mut holders = self.lock();
        check(&holders, uid, claims)?;
        insert(&mut holders, uid, vm_id, claims);
        Ok(())
    }

    /// Takes all of `claims` for one VM in place of its present claims, or changes nothing.
    ///
    /// # Errors
    ///
    /// Returns the taken claim and its holder.
    pub(crate) fn exchange(
        &self,
        uid: VmUid,
        vm_id: &VmId,
        claims: &[HostClaim],
    ) -> Result<(), ClaimConflict> {
        let mut holders = self.lock();
        // The check comes before the removal, and both happen under one lock. A refusal therefore
        // leaves the old claims in place, and no other VM can take a claim between the two steps.
        check(&holders, uid, claims)?;
        remove(&mut holders, uid);
        insert(&mut holders, uid, vm_id, claims);
        Ok(())
    }

    /// Releases everything that one VM holds. A repeated call is harmless.
    pub(crate) fn release(&self, uid: VmUid) {
        remove(&mut self.lock(), uid);
    }

    /// Assigns `claims` to a process that the deleted VM `uid` has left. `process` is the name of
    /// that process for people.
    pub(crate) fn leave_to(&self, uid: VmUid, vm_id: &VmId, claims: &[HostClaim], process: &str) {
        let mut holders = self.lock();
        remove(&mut holders, uid);
        insert(&mut holders, uid, vm_id, claims);
        let process: Arc<str> = process.into();
        for holder in holders.by_key.values_mut().flatten().filter(|holder| holder.uid == uid) {
            holder.left = Some(Arc::clone(&process));
        }
    }

    /// Returns everything that one VM holds.
    pub(crate) fn held_by(&self, uid: VmUid) -> Vec<HostClaim> {
        let holders = self.lock();
        let keys = holders.by_uid.get(&uid).into_iter().flatten();
        let held =
            keys.filter_map(|key| holders.by_key.get(key)).flatten().filter(|holder| holder.uid == uid);
        // One claim has several keys if one disk lies on another.
        held.map(|holder| holder.claim.clone()).collect::<HashSet<_>>().into_iter().collect()
    }

    fn lock(&self) -> MutexGuard<'_, ClaimTable> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(holders: &ClaimTable, uid: VmUid, claims: &[HostClaim]) -> Result<(), ClaimConflict> {
    // A claim conflicts with a claim of another VM on the same key if one of the two is exclusive,
    // so that readers share a disk. The exception are two claims that both hold only a part of the
    // key: two partitions of one disk do not overlap. The VM's own claims never conflict here,
    // because `exchange` replaces them and `acquire` adds to them.
    for claim in claims {
        let exclusive = is_exclusive(claim);
        let other = keys_of(claim).find_map(|(key, part)| {
            let holders = holders.by_key.get(&key).into_iter().flatten();
            holders
                .into_iter()
                .find(|holder| holder.uid != uid && (exclusive || holder.exclusive) && !(part && holder.part))
        });
        if let Some(other) = other {
            let holder = match &other.left {
                None => ConflictingHolder::Vm(other.vm_id.clone()),
                Some(process) => ConflictingHolder::Process(Arc::clone(process)),
            };
            return Err(ClaimConflict { claim: claim.clone(), holder });
        }
    }
    Ok(())
}

fn insert(holders: &mut ClaimTable, uid: VmUid, vm_id: &VmId, claims: &[HostClaim]) {
    for claim in claims {
        for (key, part) in keys_of(claim) {
            holders.by_uid.entry(uid).or_default().push(key.clone());
            let holder = ClaimHolder {
                uid,
                vm_id: vm_id.clone(),
                exclusive: is_exclusive(claim),
                part,
                claim: claim.clone(),
                left: None,
            };
            holders.by_key.entry(key).or_default().push(holder);
        }
    }
}

fn remove(holders: &mut ClaimTable, uid: VmUid) {
    for key in holders.by_uid.remove(&uid).unwrap_or_default() {
        if let Some(list) = holders.by_key.get_mut(&key) {
            list.retain(|holder| holder.uid != uid);
            if list.is_empty() {
                holders.by_key.remove(&key);
            }
        }
    }
}

/// Returns the keys of a claim: the key of the resource itself, and then the keys of the disks
/// below it and of the path that led to it. These latter keys are marked with `true`.
fn keys_of(claim: &HostClaim) -> impl Iterator<Item = (ClaimKey, bool)> + '_ {
    let (own, below, path): (_, &[DiskKey], _) = match claim {
        HostClaim::Disk { device, inode, lies_on, path, writable: _ } => {
            (ClaimKey::Disk(DiskKey { device: *device, inode: *inode }), lies_on, Some(path))
        }
        HostClaim::Path { path, writable: _ } => (ClaimKey::Path(path.clone()), &[], None),
        HostClaim::Tap { name } => (ClaimKey::Tap(name.clone()), &[], None),
    };
    let below = below.iter().map(|key| ClaimKey::Disk(*key));
    let below = below.chain(path.map(|path| ClaimKey::Path(path.clone())));
    std::iter::once((own, false)).chain(below.map(|key| (key, true)))
}

fn is_exclusive(claim: &HostClaim) -> bool {
    match claim {
        HostClaim::Disk { writable, .. } | HostClaim::Path { writable, .. } => *writable,
        HostClaim::Tap { .. } => true,
    }
}

fn name_of(claim: &HostClaim) -> String {
    match claim {
        HostClaim::Disk { path, .. } | HostClaim::Path { path, .. } => format!("disk {}", path.display()),
        HostClaim::Tap { name } => format!("TAP {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(inode: u64, writable: bool) -> HostClaim {
        HostClaim::Disk { device: 1, inode, writable, path: "/x".into(), lies_on: Vec::new() }
    }

    /// A partition of the disk with the number `whole`.
    fn partition(device: u64, whole: u64, writable: bool) -> HostClaim {
        let lies_on = vec![DiskKey { device: whole, inode: 0 }];
        HostClaim::Disk { device, inode: 0, writable, path: "/p".into(), lies_on }
    }

    #[test]
    fn a_partition_conflicts_with_its_disk_and_not_with_its_sibling() {
        let claims = Claims::default();
        let [a, b, c] = [(); 3].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "a".parse().unwrap();
        let whole =
            [HostClaim::Disk { device: 8, inode: 0, writable: true, path: "/w".into(), lies_on: vec![] }];
        claims.acquire(a, &id, &[partition(9, 8, true)]).unwrap();
        claims.acquire(b, &id, &[partition(10, 8, true)]).expect("its neighbour has other bytes");
        assert!(claims.acquire(c, &id, &whole).unwrap_err().to_string().contains("VM \"a\""));
        assert!(claims.acquire(c, &id, &[partition(10, 8, false)]).is_err(), "the very same partition");
        claims.release(a);
        claims.acquire(c, &id, &whole).expect_err("b still has a part of it");
        claims.release(b);
        claims.acquire(c, &id, &whole).unwrap();
        claims.acquire(a, &id, &[partition(9, 8, false)]).expect_err("a writer of the whole writes the part");
    }

    #[test]
    fn a_path_that_hangs_conflicts_with_the_same_path_of_another_vm() {
        let claims = Claims::default();
        let [a, b] = [(); 2].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "a".parse().unwrap();
        let by_path = |path: &str, writable| [HostClaim::Path { path: path.into(), writable }];
        claims.acquire(a, &id, &by_path("/x", true)).unwrap();
        assert!(claims.acquire(b, &id, &[disk(1, false)]).unwrap_err().to_string().contains("disk /x"));
        claims.acquire(b, &id, &by_path("/x", false)).expect_err("they may be one disk");
        claims.acquire(b, &id, &by_path("/y", true)).expect("another disk, as far as the paths tell");
        claims.exchange(a, &id, &[disk(1, true)]).expect("the file has answered");
        claims.acquire(b, &id, &[disk(2, true)]).expect("another file that bears the name by now");
        claims.acquire(b, &id, &[disk(1, true)]).expect_err("the very disk");
        claims.release(a);
        claims.release(b);
        claims.acquire(a, &id, &by_path("/x", false)).unwrap();
        claims.acquire(b, &id, &[disk(1, false)]).expect("readers share");
        claims.exchange(b, &id, &[disk(1, true)]).expect_err("one of them writes");
    }

    #[test]
    fn readers_share_a_disk_and_a_writer_excludes_others() {
        let claims = Claims::default();
        let [a, b, c] = [(); 3].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "a".parse().unwrap();
        claims.acquire(a, &id, &[disk(1, false)]).unwrap();
        claims.acquire(b, &id, &[disk(1, false)]).unwrap();
        let refusal = claims.acquire(c, &id, &[disk(2, true), disk(1, true)]).unwrap_err().to_string();
        assert!(refusal.contains("VM \"a\""), "{refusal}");
        claims.acquire(b, &id, &[disk(2, true)]).expect("a refused claim takes nothing");
        claims.release(a);
        claims.release(b);
        claims.acquire(c, &id, &[disk(1, true)]).unwrap();
        assert!(claims.acquire(a, &id, &[disk(1, false)]).is_err());
    }

    #[test]
    fn an_exchange_of_claims_is_complete_or_changes_nothing() {
        let claims = Claims::default();
        let [a, b] = [(); 2].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "a".parse().unwrap();
        claims.acquire(a, &id, &[disk(1, true)]).unwrap();
        claims.acquire(b, &id, &[disk(2, true)]).unwrap();
        claims.exchange(a, &id, &[disk(2, true)]).unwrap_err();
        claims.acquire(b, &id, &[disk(1, true)]).expect_err("it still holds what it held");
        claims.exchange(a, &id, &[disk(1, true), disk(3, true)]).expect("its own is in nobody's way");
        claims.exchange(a, &id, &[disk(3, true)]).unwrap();
        claims.acquire(b, &id, &[disk(1, true)]).expect("what it holds no more is free");
    }

    fn sizes(claims: &Claims) -> (usize, usize) {
        let holders = claims.lock();
        (holders.by_key.len(), holders.by_uid.len())
    }

    #[test]
    fn a_released_claim_leaves_no_entry() {
        let claims = Claims::default();
        let [a, b] = [(); 2].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "a".parse().unwrap();
        claims.acquire(a, &id, &[disk(1, false), disk(1, false), disk(2, true)]).unwrap();
        claims.acquire(b, &id, &[disk(1, false)]).unwrap();
        claims.exchange(a, &id, &[disk(3, true)]).unwrap();
        assert_eq!(sizes(&claims), (3, 2), "two disks under one path");
        claims.release(a);
        claims.release(b);
        assert_eq!(sizes(&claims), (0, 0));
    }

    #[test]
    fn a_tap_has_one_holder() {
        let claims = Claims::default();
        let [a, b] = [(); 2].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "holder".parse().unwrap();
        let tap = HostClaim::Tap { name: "tap0".into() };
        claims.acquire(a, &id, std::slice::from_ref(&tap)).unwrap();
        assert!(
            claims.acquire(b, &id, std::slice::from_ref(&tap)).unwrap_err().to_string().contains("holder")
        );
        claims.release(a);
        claims.release(a);
        claims.acquire(b, &id, &[tap]).unwrap();
    }
}
