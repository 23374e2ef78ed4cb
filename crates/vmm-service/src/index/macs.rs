//! The hardware addresses that clients chose, with the VMs that have them. An address that the
//! program chose is unique, because 40 of its bits are random, and is not stored here.

use std::collections::HashMap;

use vmm_core::id::VmUid;
use vmm_core::spec::MacAddr;
use vmm_core::store::VmRecord;

/// The VMs by address, in the order of their creation or of the daemon's start.
#[derive(Debug, Default)]
pub(super) struct MacTable(HashMap<MacAddr, Vec<VmUid>>);

impl MacTable {
    /// Adds the addresses of a VM.
    pub(super) fn insert(&mut self, record: &VmRecord) {
        for mac in chosen(record) {
            self.0.entry(mac).or_default().push(record.uid);
        }
    }

    /// Undoes [`MacTable::insert`].
    pub(super) fn remove(&mut self, record: &VmRecord) {
        for mac in chosen(record) {
            let Some(holders) = self.0.get_mut(&mac) else { continue };
            holders.retain(|uid| *uid != record.uid);
            if holders.is_empty() {
                self.0.remove(&mac);
            }
        }
    }

    /// Returns the first VM other than `uid` that has the address.
    pub(super) fn other_holder(&self, mac: MacAddr, uid: VmUid) -> Option<VmUid> {
        self.0.get(&mac)?.iter().find(|holder| **holder != uid).copied()
    }
}

fn chosen(record: &VmRecord) -> impl Iterator<Item = MacAddr> {
    let parsed = record.config.network.iter().map(|nic| nic.mac_address.parse::<MacAddr>().ok());
    parsed.enumerate().filter_map(|(index, mac)| mac.filter(|mac| *mac != MacAddr(record.uid.mac(index))))
}
