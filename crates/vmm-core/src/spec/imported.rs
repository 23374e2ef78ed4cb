//! The [`VmSpec`] of a VM that another program made, from the configuration that its VMM reports.
//!
//! Such a VM exists, so nothing about it is refused. A value that does not parse is left out. The
//! console and the restart policy are off, because this program does not keep them for the VM. A
//! client that makes the VM anew goes through [`VmSpec::parse`] like any other.

use std::path::PathBuf;

use super::parse::{parse_backing, parse_disk, parse_nic};
use super::{BackendOptions, Boot, Console, Cpu, MIB, Memory, RestartPolicy, VmSpec};
use crate::config::VmConfig;
use crate::report::CheckReport;

impl VmSpec {
    /// Returns the specification of an imported VM, as far as `config` describes it.
    pub fn imported(config: &VmConfig) -> Self {
        let cpu = config.cpu.clone().unwrap_or_default();
        let count = u32::try_from(cpu.vcpu_count).unwrap_or(1).max(1);
        let memory = config.memory.clone().unwrap_or_default();
        let boot = config.boot.clone().unwrap_or_default();
        let mut ignored = CheckReport::default();
        let devices = config.storage.iter().enumerate();
        let disks = devices.filter_map(|(index, device)| parse_disk(&mut ignored, index, device)).collect();
        let nics = config.network.iter().enumerate();
        let nics = nics.filter_map(|(index, nic)| parse_nic(&mut ignored, index, nic)).collect();
        let (pages, shared) = parse_backing(&mut ignored, &memory.backing);
        Self {
            cpu: Cpu {
                count,
                max: u32::try_from(cpu.max_vcpu_count).unwrap_or(count).max(count),
                topology: None,
            },
            memory: Memory {
                size_bytes: u64::try_from(memory.size_bytes).unwrap_or(MIB).max(MIB),
                hotplug_max_bytes: None,
                pages,
                shared,
            },
            boot: Boot {
                kernel: PathBuf::from(boot.kernel_path),
                initrd: (!boot.initrd_path.is_empty()).then(|| PathBuf::from(boot.initrd_path)),
                args: boot.kernel_args,
            },
            disks,
            nics,
            console: Console::Off,
            // No client has set a policy, so no number of resets by its guest ends the VM.
            restart: RestartPolicy { mode: None, max_restarts: u32::MAX },
            options: BackendOptions::of(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CpuConfig, MemoryConfig, NetworkInterface, StorageDevice};

    #[test]
    fn every_configuration_of_a_vmm_can_be_imported() {
        let nothing = VmSpec::imported(&VmConfig::default());
        assert_eq!((nothing.cpu.count, nothing.memory.size_bytes), (1, MIB));
        let odd = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 4, max_vcpu_count: -1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 5, ..MemoryConfig::default() }),
            storage: vec![
                StorageDevice { path: "relative".to_owned(), ..StorageDevice::default() },
                StorageDevice { path: "/disk".to_owned(), ..StorageDevice::default() },
            ],
            network: vec![NetworkInterface { mac_address: "none".to_owned(), ..NetworkInterface::default() }],
            ..VmConfig::default()
        };
        let spec = VmSpec::imported(&odd);
        assert_eq!((spec.cpu.count, spec.cpu.max), (4, 4));
        assert_eq!(spec.disks.iter().map(|disk| disk.index).collect::<Vec<_>>(), [1]);
        assert_eq!(spec.nics, []);
        assert_eq!((spec.console, spec.restart.mode), (Console::Off, None));
    }
}
