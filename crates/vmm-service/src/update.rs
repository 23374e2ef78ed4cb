//! UpdateVm: the change of a configuration, from the parts that a client names to the configuration
//! in force.
//!
//! ```text
//!   fields ──► parts ──► merge into the stored configuration ──► fill in ──► the changed parts
//!               │ none: every part that the sent configuration has      │
//!               └ an unknown name: INVALID_ARGUMENT                     └ none: nothing to do
//! ```
//!
//! Nothing here touches the host or the record. The actor checks and commits the result
//! (`actor/update.rs`).

use std::collections::HashSet;

use serde::Serialize;
use vmm_core::caller::Caller;
use vmm_core::config::{NetworkInterface, StorageDevice, VmConfig};
use vmm_core::config_part::{self, ConfigPart};
use vmm_core::id::VmUid;
use vmm_core::report::FieldReport;
use vmm_core::spec::MacAddr;
use vmm_core::store::VmRecord;

use crate::error::ServiceError;
use crate::failure::UpdateFailure;
use crate::resolve::resolve;
use crate::settings::DefaultBoot;

/// The request of an UpdateVm, apart from the name of the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ConfigUpdate {
    /// The new values of the parts. The other parts are not read.
    pub config: VmConfig,
    /// The names of the parts to replace. Empty means every part that `config` has.
    pub fields: Vec<String>,
    /// The generation that the VM must have; 0 means any.
    pub if_generation: i64,
}

impl ConfigUpdate {
    /// Checks what can be checked without the VM.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Invalid`] with every violation.
    pub(crate) fn check_request(&self) -> Result<(), ServiceError> {
        let mut violations: Vec<_> = self
            .fields
            .iter()
            .enumerate()
            .filter(|(_, name)| ConfigPart::named(name).is_none())
            .map(|(index, _)| {
                let names = config_part::names(ConfigPart::ALL);
                FieldReport::new(format!("fields[{index}]"), format!("must be one of {names}"))
            })
            .take(vmm_core::report::MAX_FINDINGS)
            .collect();
        if self.if_generation < 0 {
            let message = format!(
                "must be 0 (any) or the generation that GetVmInfo returned, not {}",
                self.if_generation
            );
            violations.push(FieldReport::new("if_generation", message));
        }
        if violations.is_empty() { Ok(()) } else { Err(ServiceError::Invalid(violations)) }
    }

    /// Returns true if the update is for the generation of `record`.
    pub(crate) fn is_for(&self, record: &VmRecord) -> bool {
        self.if_generation == 0 || u64::try_from(self.if_generation) == Ok(record.generation)
    }

    /// Returns the parts that the update replaces, in the order of the wire.
    fn parts(&self) -> Vec<ConfigPart> {
        let named = |part: &ConfigPart| self.fields.iter().any(|name| name == part.name());
        let is_replaced =
            |part: &ConfigPart| if self.fields.is_empty() { part.is_in(&self.config) } else { named(part) };
        ConfigPart::ALL.into_iter().filter(is_replaced).collect()
    }

    /// Returns the stored configuration with the new parts, exactly as the client sent them.
    pub(crate) fn merge(&self, stored: &VmConfig) -> VmConfig {
        let mut merged = stored.clone();
        for part in self.parts() {
            part.copy(&self.config, &mut merged);
        }
        merged
    }

    /// Fills in what the client left to the program in `merged`: a device that stays keeps its
    /// generated values, and every other value is generated as at a creation.
    pub(crate) fn fill_in(
        &self,
        stored: &VmConfig,
        merged: &VmConfig,
        uid: VmUid,
        defaults: &DefaultBoot,
    ) -> VmConfig {
        let mut config = merged.clone();
        let parts = self.parts();
        if parts.contains(&ConfigPart::Storage) {
            keep_disk_ids(&stored.storage, &mut config.storage);
        }
        if parts.contains(&ConfigPart::Network) {
            keep_nic_values(&stored.network, &mut config.network);
            generate_nic_values(&mut config.network, uid);
        }
        let filled = resolve(&config, uid, defaults);
        // The other parts stay as they are on record, even if this release would fill them in
        // otherwise.
        for part in parts {
            part.copy(&filled, &mut config);
        }
        config
    }
}

/// Returns the parts in which two configurations differ.
pub(crate) fn changed_parts(before: &VmConfig, after: &VmConfig) -> Vec<ConfigPart> {
    ConfigPart::ALL.into_iter().filter(|part| !part.is_same(before, after)).collect()
}

/// Refuses the deletion of a protected VM. The protection does not bind the program itself, which
/// removes the record of an imported VM after its owner has removed the VM.
pub(crate) fn check_protection(record: &VmRecord, caller: &Caller) -> Result<(), ServiceError> {
    if !record.config.delete_protection || caller.is_system() {
        return Ok(());
    }
    Err(UpdateFailure::Protected { vm_id: record.vm_id.clone() }.into())
}

/// Gives each disk without an id the id of a stored disk with the same path.
fn keep_disk_ids(stored: &[StorageDevice], disks: &mut [StorageDevice]) {
    let mut taken: HashSet<String> = disks.iter().map(|disk| disk.id.clone()).collect();
    for disk in disks.iter_mut().filter(|disk| disk.id.is_empty()) {
        let same = stored.iter().find(|known| known.path == disk.path && !taken.contains(&known.id));
        if let Some(known) = same {
            taken.insert(known.id.clone());
            disk.id.clone_from(&known.id);
        }
    }
}

/// Gives each interface that stays the values of the stored one that the client left out.
///
/// An interface with an id stays if a stored one has the id. An interface without an id stays if a
/// stored one has its address, or else its TAP, or else its position, and no other interface has
/// the stored one's id.
fn keep_nic_values(stored: &[NetworkInterface], nics: &mut [NetworkInterface]) {
    let mut taken: HashSet<String> = nics.iter().map(|nic| nic.id.clone()).collect();
    for (index, nic) in nics.iter_mut().enumerate() {
        let known = if nic.id.is_empty() {
            let is_free = |known: &&NetworkInterface| !taken.contains(&known.id);
            let with_mac = |known: &&NetworkInterface| known.mac_address == nic.mac_address;
            let with_tap = |known: &&NetworkInterface| known.tap_device == nic.tap_device;
            let free = || stored.iter().filter(is_free);
            free()
                .find(with_mac)
                .or_else(|| free().find(with_tap))
                .or_else(|| stored.get(index).filter(is_free))
        } else {
            stored.iter().find(|known| known.id == nic.id)
        };
        let Some(known) = known else { continue };
        taken.insert(known.id.clone());
        nic.id.clone_from(&known.id);
        if nic.mac_address.is_empty() {
            nic.mac_address.clone_from(&known.mac_address);
        }
        if nic.tap_device.is_empty() {
            nic.tap_device.clone_from(&known.tap_device);
        }
    }
}

/// Generates the missing addresses and TAP names. An interface gets those of its position, or those
/// of the first later position that no other interface has.
fn generate_nic_values(nics: &mut [NetworkInterface], uid: VmUid) {
    let mut macs: HashSet<String> = nics.iter().map(|nic| nic.mac_address.to_ascii_lowercase()).collect();
    let mut taps: HashSet<String> = nics.iter().map(|nic| nic.tap_device.clone()).collect();
    for (index, nic) in nics.iter_mut().enumerate() {
        // A VM has at most 64 interfaces, so that one of 256 names is free.
        let places = || index..index + 256;
        if nic.mac_address.is_empty() {
            let mut all = places().map(|place| MacAddr(uid.mac(place)).to_string());
            nic.mac_address = all.find(|mac| macs.insert(mac.clone())).unwrap_or_default();
        }
        if nic.tap_device.is_empty() {
            let mut all = places().map(|place| uid.tap_name(place));
            nic.tap_device = all.find(|tap| taps.insert(tap.clone())).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_core::config::{BootConfig, CpuConfig};

    use super::*;

    fn uid() -> VmUid {
        VmUid::new(Uuid::now_v7())
    }

    fn disk(id: &str, path: &str) -> StorageDevice {
        StorageDevice { id: id.to_owned(), path: path.to_owned(), ..StorageDevice::default() }
    }

    fn nic(id: &str) -> NetworkInterface {
        NetworkInterface { id: id.to_owned(), ..NetworkInterface::default() }
    }

    fn updated(stored: &VmConfig, update: &ConfigUpdate, uid: VmUid) -> VmConfig {
        let defaults = DefaultBoot::default();
        update.fill_in(stored, &update.merge(stored), uid, &defaults)
    }

    fn stored(uid: VmUid) -> VmConfig {
        let sent = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            boot: Some(BootConfig { kernel_path: "/k".to_owned(), ..BootConfig::default() }),
            storage: vec![disk("", "/a"), disk("", "/b")],
            network: vec![nic(""), nic(""), nic("")],
            ..VmConfig::default()
        };
        resolve(&sent, uid, &DefaultBoot::default())
    }

    #[test]
    fn without_fields_an_update_replaces_the_parts_that_its_configuration_has() {
        let uid = uid();
        let stored = stored(uid);
        let cpu = Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() });
        let config = VmConfig { cpu: cpu.clone(), ..VmConfig::default() };
        let new = updated(&stored, &ConfigUpdate { config, ..ConfigUpdate::default() }, uid);
        assert_eq!(new, VmConfig { cpu, ..stored });
    }

    #[test]
    fn a_part_that_is_named_and_absent_is_cleared() {
        let uid = uid();
        let stored = VmConfig { delete_protection: true, ..stored(uid) };
        let fields = ["storage", "delete_protection"].map(str::to_owned).to_vec();
        let new = updated(&stored, &ConfigUpdate { fields, ..ConfigUpdate::default() }, uid);
        assert_eq!(new, VmConfig { storage: Vec::new(), delete_protection: false, ..stored });
    }

    #[test]
    fn a_disk_keeps_its_id_at_another_position_and_a_new_one_gets_a_free_id() {
        let uid = uid();
        let stored = stored(uid);
        let storage = vec![disk("", "/new"), disk("", "/b"), disk("", "/a")];
        let config = VmConfig { storage, ..VmConfig::default() };
        let new = updated(&stored, &ConfigUpdate { config, ..ConfigUpdate::default() }, uid);
        let ids: Vec<_> = new.storage.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk2", "disk1", "disk0"]);
    }

    #[test]
    fn an_interface_keeps_its_address_and_tap_after_the_removal_of_an_earlier_one() {
        let uid = uid();
        let stored = stored(uid);
        let config = VmConfig { network: vec![nic("net2"), nic("")], ..VmConfig::default() };
        let new = updated(&stored, &ConfigUpdate { config, ..ConfigUpdate::default() }, uid).network;
        assert_eq!(new[0], stored.network[2]);
        assert_eq!(new[1], stored.network[1], "the interface without an id is the one of its position");
        let config = VmConfig { network: vec![nic("net1"), nic("net2"), nic("x")], ..VmConfig::default() };
        let new = updated(&stored, &ConfigUpdate { config, ..ConfigUpdate::default() }, uid).network;
        let of = |nics: &[NetworkInterface]| {
            let both = nics.iter().flat_map(|nic| [nic.mac_address.clone(), nic.tap_device.clone()]);
            both.collect::<HashSet<_>>().len()
        };
        assert_eq!(of(&new), 6, "nothing is given twice: {new:?}");
    }

    #[test]
    fn a_repeated_creation_request_changes_nothing() {
        let uid = uid();
        let stored = stored(uid);
        let config = VmConfig {
            storage: vec![disk("", "/a"), disk("", "/b")],
            network: vec![nic(""), nic(""), nic("")],
            ..VmConfig::default()
        };
        let new = updated(&stored, &ConfigUpdate { config, ..ConfigUpdate::default() }, uid);
        assert_eq!(changed_parts(&stored, &new), []);
    }

    #[test]
    fn an_unknown_field_and_a_negative_generation_are_both_named() {
        let update = ConfigUpdate {
            fields: vec!["cpu".to_owned(), "kernel".to_owned()],
            if_generation: -1,
            ..ConfigUpdate::default()
        };
        let ServiceError::Invalid(found) = update.check_request().unwrap_err() else { panic!("violations") };
        let fields: Vec<_> = found.iter().map(|report| report.field.as_str()).collect();
        assert_eq!(fields, ["fields[1]", "if_generation"]);
        assert!(found[0].message.contains("restart_policy, delete_protection"), "{}", found[0]);
    }
}
