//! Counts the parts of a configuration before any other check.
//!
//! A request of a megabyte has room for hundreds of thousands of devices. The checks that compare
//! devices or keys with each other are written for the few that a VM can have. Therefore a
//! configuration with more is refused by its counts alone.

use super::parse::{MAX_DEVICES, MAX_METADATA};
use crate::config::{
    BootConfig, ConsoleConfig, CpuConfig, MemoryConfig, NetworkInterface, Options, StorageDevice, VmConfig,
};
use crate::report::CheckReport;

/// The most keys of one free map.
const MAX_KEYS: usize = 64;
/// The longest text, in bytes. A field may have a lower limit of its own.
const MAX_TEXT: usize = 16 << 10;
/// The most bytes of all texts of one configuration.
///
/// GetVmInfo returns the configuration, and default clients take 4 MiB. In JSON a text may have six
/// times its length.
const MAX_CONFIG: usize = 512 << 10;

/// Returns the violations of a configuration that holds too much to be checked; `None` for any
/// other.
pub fn too_many(config: &VmConfig) -> Option<CheckReport> {
    let VmConfig {
        cpu,
        memory,
        boot,
        storage,
        network,
        console,
        metadata,
        restart_policy: _,
        delete_protection: _,
    } = config;
    let mut count = PartCounter { report: CheckReport::default(), size: 0 };
    if let Some(CpuConfig { vcpu_count: _, max_vcpu_count: _, topology: _, features }) = cpu {
        count.map("config.cpu.features", features);
    }
    if let Some(MemoryConfig { size_bytes: _, hotplug_enabled: _, max_size_bytes: _, backing }) = memory {
        count.map("config.memory.backing", backing);
    }
    if let Some(BootConfig { kernel_path, initrd_path, kernel_args, boot_options }) = boot {
        count.text("config.boot.kernel_path", kernel_path);
        count.text("config.boot.initrd_path", initrd_path);
        count.text("config.boot.kernel_args", kernel_args);
        count.map("config.boot.boot_options", boot_options);
    }
    if let Some(ConsoleConfig { enabled: _, output, input, console_type }) = console {
        count.text("config.console.output", output);
        count.text("config.console.input", input);
        count.text("config.console.console_type", console_type);
    }
    count.metadata(metadata);
    // A list that is too long is not iterated over, because that would cost the time that the count
    // saves.
    if count.list("config.storage", storage.len()) {
        storage.iter().enumerate().for_each(|(index, disk)| count.disk(index, disk));
    }
    if count.list("config.network", network.len()) {
        network.iter().enumerate().for_each(|(index, nic)| count.nic(index, nic));
    }
    count.whole();
    (!count.report.is_ok()).then_some(count.report)
}

struct PartCounter {
    report: CheckReport,
    /// The bytes of all texts so far.
    size: usize,
}

impl PartCounter {
    fn list(&mut self, field: &str, count: usize) -> bool {
        let fits = count <= MAX_DEVICES;
        if !fits {
            self.report.reject(field, format!("must have at most {MAX_DEVICES} entries, not {count}"));
        }
        fits
    }

    fn disk(&mut self, index: usize, disk: &StorageDevice) {
        let StorageDevice { id, path, read_only: _, is_root_device: _, interface_type, options } = disk;
        let field = |name: &str| format!("config.storage[{index}].{name}");
        self.text(&field("id"), id);
        self.text(&field("path"), path);
        self.text(&field("interface_type"), interface_type);
        self.map(&field("options"), options);
    }

    fn nic(&mut self, index: usize, nic: &NetworkInterface) {
        let NetworkInterface { id, mac_address, tap_device, interface_type, options } = nic;
        let field = |name: &str| format!("config.network[{index}].{name}");
        self.text(&field("id"), id);
        self.text(&field("mac_address"), mac_address);
        self.text(&field("tap_device"), tap_device);
        self.text(&field("interface_type"), interface_type);
        self.map(&field("options"), options);
    }

    fn map(&mut self, field: &str, options: &Options) {
        self.size += size_of_all(options);
        if options.len() > MAX_KEYS {
            self.report.reject(field, format!("must have at most {MAX_KEYS} keys, not {}", options.len()));
        } else if options.iter().any(|(key, value)| key.len().max(value.len()) > MAX_TEXT) {
            self.report.reject(field, format!("must have no key and no value longer than {MAX_TEXT} bytes"));
        }
    }

    fn metadata(&mut self, metadata: &Options) {
        let size = size_of_all(metadata);
        self.size += size;
        if size > MAX_METADATA {
            self.report.reject(
                "config.metadata",
                format!("must be at most {MAX_METADATA} bytes in all, not {size}"),
            );
        }
    }

    fn whole(&mut self) {
        // Other findings refuse the configuration already, and the sum would only repeat them.
        if self.size > MAX_CONFIG && self.report.is_ok() {
            let size = self.size;
            self.report
                .reject("config", format!("must be at most {MAX_CONFIG} bytes of text in all, not {size}"));
        }
    }

    fn text(&mut self, field: &str, text: &str) {
        self.size += text.len();
        if text.len() > MAX_TEXT {
            self.report.reject(field, format!("must be at most {MAX_TEXT} bytes, not {}", text.len()));
        }
    }
}

fn size_of_all(options: &Options) -> usize {
    options.iter().map(|(key, value)| key.len() + value.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(config: &VmConfig) -> Vec<String> {
        let report = too_many(config).unwrap_or_default();
        report.violations.into_iter().map(|violation| violation.field).collect()
    }

    #[test]
    fn every_list_map_and_text_has_a_limit() {
        assert_eq!(fields(&VmConfig::default()), [""; 0]);
        let keys: Options = (0..65).map(|number| (number.to_string(), String::new())).collect();
        let long = "x".repeat(MAX_TEXT + 1);
        let value: Options = [("a".to_owned(), long.clone())].into();
        let disk = StorageDevice { options: keys.clone(), path: long.clone(), ..StorageDevice::default() };
        let config = VmConfig {
            cpu: Some(CpuConfig { features: keys.clone(), ..CpuConfig::default() }),
            memory: Some(MemoryConfig { backing: value, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_args: long.clone(), boot_options: keys, ..BootConfig::default() }),
            storage: vec![disk],
            network: vec![NetworkInterface::default(); 65],
            console: Some(ConsoleConfig { output: long.clone(), ..ConsoleConfig::default() }),
            metadata: (0..5).map(|number| (number.to_string(), long.clone())).collect(),
            ..VmConfig::default()
        };
        assert_eq!(
            fields(&config),
            [
                "config.cpu.features",
                "config.memory.backing",
                "config.boot.kernel_args",
                "config.boot.boot_options",
                "config.console.output",
                "config.metadata",
                "config.storage[0].path",
                "config.storage[0].options",
                "config.network",
            ]
        );
    }

    #[test]
    fn the_sum_of_all_texts_has_a_limit() {
        let disks = |count: usize| {
            let options: Options = [("ch.x".to_owned(), "x".repeat(MAX_TEXT))].into();
            let disk = StorageDevice { options, ..StorageDevice::default() };
            VmConfig { storage: vec![disk; count], ..VmConfig::default() }
        };
        assert_eq!(fields(&disks(31)), [""; 0]);
        assert_eq!(fields(&disks(32)), ["config"]);
    }

    #[test]
    fn an_overlong_list_has_one_violation_and_none_for_its_entries() {
        let storage = vec![StorageDevice::default(); 381_000];
        assert_eq!(fields(&VmConfig { storage, ..VmConfig::default() }), ["config.storage"]);
    }
}
