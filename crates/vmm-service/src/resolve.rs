//! Fills in the values of a configuration that the client left to the program.

use std::collections::HashSet;

use vmm_core::config::{BootConfig, VmConfig};
use vmm_core::id::VmUid;
use vmm_core::spec::MacAddr;

use crate::settings::DefaultBoot;

/// Fills in the values that the client left to the program: the default kernel, device ids, MACs
/// and TAP names.
pub(crate) fn resolve(sent: &VmConfig, uid: VmUid, defaults: &DefaultBoot) -> VmConfig {
    let mut config = sent.clone();
    let boot = config.boot.get_or_insert_with(BootConfig::default);
    if boot.kernel_path.is_empty()
        && !boot.boot_options.contains_key("firmware")
        && !defaults.kernel.is_empty()
    {
        boot.kernel_path.clone_from(&defaults.kernel);
        boot.initrd_path.clone_from(&defaults.initrd);
        if boot.kernel_args.is_empty() {
            boot.kernel_args.clone_from(&defaults.kernel_args);
        }
    }
    fill_ids(config.storage.iter_mut().map(|disk| &mut disk.id), "disk");
    fill_ids(config.network.iter_mut().map(|nic| &mut nic.id), "net");
    for (index, nic) in config.network.iter_mut().enumerate() {
        if nic.mac_address.is_empty() {
            nic.mac_address = MacAddr(uid.mac(index)).to_string();
        }
        if nic.tap_device.is_empty() {
            nic.tap_device = uid.tap_name(index);
        }
    }
    config
}

/// Names devices `disk0`, `disk1` … by their position, and skips names that are taken.
fn fill_ids<'a>(ids: impl Iterator<Item = &'a mut String>, prefix: &str) {
    let ids: Vec<&mut String> = ids.collect();
    let mut taken: HashSet<String> = ids.iter().map(|id| id.to_string()).collect();
    // A number that is taken for one device is taken for all that follow, so the numbers are walked
    // once.
    let mut next = 0;
    for (index, id) in ids.into_iter().enumerate() {
        if !id.is_empty() {
            continue;
        }
        next = next.max(index);
        while !taken.insert(format!("{prefix}{next}")) {
            next += 1;
        }
        *id = format!("{prefix}{next}");
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_core::config::{NetworkInterface, StorageDevice};

    use super::*;

    fn uid() -> VmUid {
        VmUid::new(Uuid::now_v7())
    }

    #[test]
    fn omitted_names_are_generated_and_given_names_are_kept() {
        let named = StorageDevice { id: "disk0".to_owned(), ..StorageDevice::default() };
        let tap = NetworkInterface { tap_device: "tap0".to_owned(), ..NetworkInterface::default() };
        let sent = VmConfig {
            storage: vec![StorageDevice::default(), named],
            network: vec![NetworkInterface::default(), tap],
            ..VmConfig::default()
        };
        let uid = uid();
        let config = resolve(&sent, uid, &DefaultBoot::default());
        let ids: Vec<_> = config.storage.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk1", "disk0"]);
        assert_ne!(config.network[0].mac_address, config.network[1].mac_address);
        assert_eq!(config.network[1].id, "net1");
        let taps: Vec<_> = config.network.iter().map(|nic| nic.tap_device.as_str()).collect();
        assert_eq!(taps, [uid.tap_name(0).as_str(), "tap0"]);
    }

    #[test]
    fn hundreds_of_thousands_of_devices_are_completed_in_one_pass() {
        let mut ids = vec![String::new(); 381_000];
        ids[380_999] = "disk7".to_owned();
        fill_ids(ids.iter_mut(), "disk");
        assert_eq!((ids[6].as_str(), ids[7].as_str(), ids[8].as_str()), ("disk6", "disk8", "disk9"));
        let distinct: HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
    }

    #[test]
    fn the_default_kernel_is_used_only_without_a_kernel() {
        let defaults = DefaultBoot {
            kernel: "/k".to_owned(),
            initrd: "/i".to_owned(),
            kernel_args: "console=ttyS0".to_owned(),
        };
        let filled = resolve(&VmConfig::default(), uid(), &defaults).boot.unwrap();
        assert_eq!((filled.kernel_path.as_str(), filled.initrd_path.as_str()), ("/k", "/i"));
        assert_eq!(filled.kernel_args, "console=ttyS0");
        let own = BootConfig { kernel_path: "/own".to_owned(), ..BootConfig::default() };
        let kept = resolve(&VmConfig { boot: Some(own.clone()), ..VmConfig::default() }, uid(), &defaults);
        assert_eq!(kept.boot, Some(own), "defaults are used together or not at all");
    }
}
