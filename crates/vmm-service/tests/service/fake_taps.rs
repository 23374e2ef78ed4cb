//! TAPs that take no privileges: a table of interfaces that outlives services, as a host's does.

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use vmm_core::id::InstanceId;
use vmm_host::device::DeviceFault;
use vmm_host::net::tap::{OwnedTap, TapError, TapNameOrigin, TapOrigin, TapOwner, Taps};

/// The interfaces of a host in a test. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeTaps(Arc<Mutex<Host>>);

#[derive(Debug, Default)]
struct Host {
    interfaces: BTreeMap<String, Interface>,
    may_not_make: bool,
    may_not_open: bool,
    hang_once_made: bool,
    stuck: bool,
}

#[derive(Debug)]
struct Interface {
    is_tap: bool,
    owner: Option<TapOwner>,
    attached: bool,
}

impl FakeTaps {
    fn host(&self) -> MutexGuard<'_, Host> {
        self.0.lock().unwrap()
    }

    /// Puts an interface there that somebody else made.
    pub(crate) fn put(&self, name: &str, is_tap: bool) {
        let interface = Interface { is_tap, owner: None, attached: false };
        self.host().interfaces.insert(name.to_owned(), interface);
    }

    /// The names of all interfaces.
    pub(crate) fn names(&self) -> Vec<String> {
        self.host().interfaces.keys().cloned().collect()
    }

    /// Whose the interface is.
    pub(crate) fn owner(&self, name: &str) -> Option<TapOwner> {
        self.host().interfaces.get(name).and_then(|interface| interface.owner)
    }

    /// Has a process hold the interface, or let go of it.
    pub(crate) fn attach(&self, name: &str, attached: bool) {
        self.host().interfaces.get_mut(name).expect("the interface exists").attached = attached;
    }

    /// Takes away the right to make TAPs.
    pub(crate) fn deny(&self) {
        self.host().may_not_make = true;
    }

    /// Takes away the right to open TAPs.
    pub(crate) fn shut(&self) {
        self.host().may_not_open = true;
    }

    /// Lets nobody hear any more of a TAP that was made.
    pub(crate) fn hang_once_made(&self, hang: bool) {
        self.host().hang_once_made = hang;
    }

    /// Lets nothing be removed, or everything again.
    pub(crate) fn stick(&self, stuck: bool) {
        self.host().stuck = stuck;
    }
}

#[async_trait]
impl Taps for FakeTaps {
    fn exists(&self, name: &str) -> bool {
        self.host().interfaces.contains_key(name)
    }

    fn may_make(&self, name: &str) -> Result<(), TapError> {
        if self.host().may_not_make { Err(TapError::Denied(name.to_owned())) } else { Ok(()) }
    }

    fn may_use(&self, name: &str) -> Result<(), TapError> {
        if self.host().interfaces[name].is_tap { Ok(()) } else { Err(TapError::NotATap(name.to_owned())) }
    }

    fn may_open(&self) -> Result<(), DeviceFault> {
        let fault = || DeviceFault { finding: "the device is shut".to_owned(), remedy: "open it".to_owned() };
        if self.host().may_not_open { Err(fault()) } else { Ok(()) }
    }

    async fn provide(&self, name: &str, by: TapNameOrigin, owner: TapOwner) -> Result<TapOrigin, TapError> {
        let hang = {
            let mut host = self.host();
            let (may_not_make, hang) = (host.may_not_make, host.hang_once_made);
            match host.interfaces.get_mut(name) {
                Some(found) if !found.is_tap => return Err(TapError::NotATap(name.to_owned())),
                Some(found) if found.owner == Some(owner) => return Ok(TapOrigin::Found),
                Some(_) if by == TapNameOrigin::Program => return Err(TapError::NotOurs(name.to_owned())),
                Some(found) => {
                    if found.owner.is_some_and(|other| other.instance == owner.instance) {
                        found.owner = Some(owner);
                    }
                    return Ok(TapOrigin::Found);
                }
                None if may_not_make => return Err(TapError::Denied(name.to_owned())),
                None => {}
            }
            let made = Interface { is_tap: true, owner: Some(owner), attached: false };
            host.interfaces.insert(name.to_owned(), made);
            hang
        };
        if hang { pending().await } else { Ok(TapOrigin::Made) }
    }

    async fn remove(&self, name: &str, owner: TapOwner) -> Result<bool, TapError> {
        let mut host = self.host();
        if host.interfaces.get(name).and_then(|found| found.owner) != Some(owner) {
            return Ok(false);
        }
        if host.stuck {
            let source = io::Error::other("it is stuck");
            return Err(TapError::Host { name: name.to_owned(), done: "removed", source });
        }
        Ok(host.interfaces.remove(name).is_some())
    }

    async fn of_instance(&self, instance: InstanceId) -> io::Result<Vec<OwnedTap>> {
        let host = self.host();
        let owned = |(name, interface): (&String, &Interface)| {
            let owner = interface.owner.filter(|owner| owner.instance == instance)?;
            Some(OwnedTap { name: name.clone(), owner, attached: interface.attached })
        };
        Ok(host.interfaces.iter().filter_map(owned).collect())
    }
}
