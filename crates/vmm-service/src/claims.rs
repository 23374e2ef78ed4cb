//! What serves one running VM at a time: writable disks, by device and inode, and TAPs, by name.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_core::id::{VmId, VmUid};
use vmm_core::store::HostClaim;

/// Who holds what. Read-only users share a disk; a writer has it alone.
#[derive(Default)]
pub(crate) struct Claims {
    holders: Mutex<Holders>,
}

/// The two maps say the same from both sides, so that neither a look nor a release walks over the VMs that have nothing to do
/// with it.
#[derive(Default)]
struct Holders {
    by_key: HashMap<Key, Vec<Holder>>,
    by_uid: HashMap<VmUid, Vec<Key>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Disk { device: u64, inode: u64 },
    Tap(String),
}

struct Holder {
    uid: VmUid,
    vm_id: VmId,
    exclusive: bool,
}

impl Claims {
    /// Takes all of `claims` for one VM beside what it holds, or none of them.
    ///
    /// # Errors
    ///
    /// Text that names what is taken and the VM that holds it.
    pub(crate) fn acquire(&self, uid: VmUid, vm_id: &VmId, claims: &[HostClaim]) -> Result<(), String> {
        let mut holders = self.lock();
        check(&holders, uid, claims)?;
        insert(&mut holders, uid, vm_id, claims);
        Ok(())
    }

    /// Takes all of `claims` for one VM in place of what it holds; or nothing changes.
    ///
    /// # Errors
    ///
    /// Text that names what is taken and the VM that holds it.
    pub(crate) fn exchange(&self, uid: VmUid, vm_id: &VmId, claims: &[HostClaim]) -> Result<(), String> {
        let mut holders = self.lock();
        check(&holders, uid, claims)?;
        remove(&mut holders, uid);
        insert(&mut holders, uid, vm_id, claims);
        Ok(())
    }

    /// Gives back everything that one VM holds. Harmless when repeated.
    pub(crate) fn release(&self, uid: VmUid) {
        remove(&mut self.lock(), uid);
    }

    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(holders: &Holders, uid: VmUid, claims: &[HostClaim]) -> Result<(), String> {
    for claim in claims {
        let (key, exclusive) = key_of(claim);
        let other = holders
            .by_key
            .get(&key)
            .into_iter()
            .flatten()
            .find(|holder| holder.uid != uid && (exclusive || holder.exclusive));
        if let Some(other) = other {
            return Err(format!(
                "{} is in use by VM \"{}\", which runs; shut that VM down first, or use another",
                name_of(claim),
                other.vm_id
            ));
        }
    }
    Ok(())
}

fn insert(holders: &mut Holders, uid: VmUid, vm_id: &VmId, claims: &[HostClaim]) {
    for claim in claims {
        let (key, exclusive) = key_of(claim);
        holders.by_uid.entry(uid).or_default().push(key.clone());
        holders.by_key.entry(key).or_default().push(Holder { uid, vm_id: vm_id.clone(), exclusive });
    }
}

fn remove(holders: &mut Holders, uid: VmUid) {
    for key in holders.by_uid.remove(&uid).unwrap_or_default() {
        if let Some(list) = holders.by_key.get_mut(&key) {
            list.retain(|holder| holder.uid != uid);
            if list.is_empty() {
                holders.by_key.remove(&key);
            }
        }
    }
}

fn key_of(claim: &HostClaim) -> (Key, bool) {
    match claim {
        HostClaim::Disk { device, inode, writable, .. } => {
            (Key::Disk { device: *device, inode: *inode }, *writable)
        }
        HostClaim::Tap { name } => (Key::Tap(name.clone()), true),
    }
}

fn name_of(claim: &HostClaim) -> String {
    match claim {
        HostClaim::Disk { path, .. } => format!("disk {}", path.display()),
        HostClaim::Tap { name } => format!("TAP {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(inode: u64, writable: bool) -> HostClaim {
        HostClaim::Disk { device: 1, inode, writable, path: "/x".into() }
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let claims = Claims::default();
        let [a, b, c] = [(); 3].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "a".parse().unwrap();
        claims.acquire(a, &id, &[disk(1, false)]).unwrap();
        claims.acquire(b, &id, &[disk(1, false)]).unwrap();
        let refusal = claims.acquire(c, &id, &[disk(2, true), disk(1, true)]).unwrap_err();
        assert!(refusal.contains("VM \"a\""), "{refusal}");
        claims.acquire(b, &id, &[disk(2, true)]).expect("a refused claim takes nothing");
        claims.release(a);
        claims.release(b);
        claims.acquire(c, &id, &[disk(1, true)]).unwrap();
        assert!(claims.acquire(a, &id, &[disk(1, false)]).is_err());
    }

    #[test]
    fn an_exchange_gives_up_what_was_held_or_changes_nothing() {
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
    fn what_is_released_leaves_nothing_behind() {
        let claims = Claims::default();
        let [a, b] = [(); 2].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "a".parse().unwrap();
        claims.acquire(a, &id, &[disk(1, false), disk(1, false), disk(2, true)]).unwrap();
        claims.acquire(b, &id, &[disk(1, false)]).unwrap();
        claims.exchange(a, &id, &[disk(3, true)]).unwrap();
        assert_eq!(sizes(&claims), (2, 2));
        claims.release(a);
        claims.release(b);
        assert_eq!(sizes(&claims), (0, 0));
    }

    #[test]
    fn a_tap_serves_one() {
        let claims = Claims::default();
        let [a, b] = [(); 2].map(|()| VmUid::new(uuid::Uuid::now_v7()));
        let id: VmId = "holder".parse().unwrap();
        let tap = HostClaim::Tap { name: "tap0".into() };
        claims.acquire(a, &id, std::slice::from_ref(&tap)).unwrap();
        assert!(claims.acquire(b, &id, std::slice::from_ref(&tap)).unwrap_err().contains("holder"));
        claims.release(a);
        claims.release(a);
        claims.acquire(b, &id, &[tap]).unwrap();
    }
}
