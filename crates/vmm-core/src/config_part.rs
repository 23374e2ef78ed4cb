//! The parts of a configuration that UpdateVm replaces, each as a whole.

use std::fmt;

use crate::config::VmConfig;

/// A part of a [`VmConfig`]. Each field of a configuration is one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConfigPart {
    /// Virtual CPUs.
    Cpu,
    /// Memory.
    Memory,
    /// Kernel and arguments.
    Boot,
    /// Disks.
    Storage,
    /// Network interfaces.
    Network,
    /// The serial console.
    Console,
    /// The client's own labels.
    Metadata,
    /// The policy for the end of a run.
    RestartPolicy,
    /// The protection against DeleteVm.
    DeleteProtection,
}

impl ConfigPart {
    /// Every part, in the order of the wire.
    pub const ALL: [Self; 9] = [
        Self::Cpu,
        Self::Memory,
        Self::Boot,
        Self::Storage,
        Self::Network,
        Self::Console,
        Self::Metadata,
        Self::RestartPolicy,
        Self::DeleteProtection,
    ];

    /// Returns the name of the field on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Boot => "boot",
            Self::Storage => "storage",
            Self::Network => "network",
            Self::Console => "console",
            Self::Metadata => "metadata",
            Self::RestartPolicy => "restart_policy",
            Self::DeleteProtection => "delete_protection",
        }
    }

    /// Returns the part with the name `name`, or `None` if no part has the name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.name() == name)
    }

    /// Returns true if the part describes the machine that a VMM is given when it starts. The other
    /// parts belong to this program alone, so that a change of them takes effect at once.
    pub const fn is_machine(self) -> bool {
        match self {
            Self::Cpu | Self::Memory | Self::Boot | Self::Storage | Self::Network | Self::Console => true,
            Self::Metadata | Self::RestartPolicy | Self::DeleteProtection => false,
        }
    }

    /// Returns true if `config` has this part: a value other than the one that a client gets by
    /// leaving the field out.
    pub fn is_in(self, config: &VmConfig) -> bool {
        !self.is_same(config, &VmConfig::default())
    }

    /// Returns true if `one` and `other` have an equal value of this part.
    pub fn is_same(self, one: &VmConfig, other: &VmConfig) -> bool {
        match self {
            Self::Cpu => one.cpu == other.cpu,
            Self::Memory => one.memory == other.memory,
            Self::Boot => one.boot == other.boot,
            Self::Storage => one.storage == other.storage,
            Self::Network => one.network == other.network,
            Self::Console => one.console == other.console,
            Self::Metadata => one.metadata == other.metadata,
            Self::RestartPolicy => one.restart_policy == other.restart_policy,
            Self::DeleteProtection => one.delete_protection == other.delete_protection,
        }
    }

    /// Replaces this part of `target` by that of `source`.
    pub fn copy(self, source: &VmConfig, target: &mut VmConfig) {
        match self {
            Self::Cpu => target.cpu.clone_from(&source.cpu),
            Self::Memory => target.memory.clone_from(&source.memory),
            Self::Boot => target.boot.clone_from(&source.boot),
            Self::Storage => target.storage.clone_from(&source.storage),
            Self::Network => target.network.clone_from(&source.network),
            Self::Console => target.console.clone_from(&source.console),
            Self::Metadata => target.metadata.clone_from(&source.metadata),
            Self::RestartPolicy => target.restart_policy.clone_from(&source.restart_policy),
            Self::DeleteProtection => target.delete_protection = source.delete_protection,
        }
    }

    /// Returns true if `field` is the path of this part or of a field below it.
    pub fn holds(self, field: &str) -> bool {
        let Some(rest) = field.strip_prefix("config.").and_then(|path| path.strip_prefix(self.name())) else {
            return false;
        };
        rest.is_empty() || rest.starts_with(['.', '['])
    }
}

impl fmt::Display for ConfigPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Returns the names of `parts`, separated by commas, for messages.
pub fn names(parts: impl IntoIterator<Item = ConfigPart>) -> String {
    parts.into_iter().map(ConfigPart::name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        BootConfig, ConsoleConfig, CpuConfig, MemoryConfig, NetworkInterface, RestartPolicyConfig,
        StorageDevice,
    };

    /// Returns a configuration in which every part has a value of its own.
    fn full() -> VmConfig {
        VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 1 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_path: "/k".to_owned(), ..BootConfig::default() }),
            storage: vec![StorageDevice::default()],
            network: vec![NetworkInterface::default()],
            console: Some(ConsoleConfig::default()),
            metadata: [("a".to_owned(), "b".to_owned())].into(),
            restart_policy: Some(RestartPolicyConfig::default()),
            delete_protection: true,
        }
    }

    #[test]
    fn the_parts_together_are_the_whole_configuration() {
        let (source, mut target) = (full(), VmConfig::default());
        for part in ConfigPart::ALL {
            assert!(part.is_in(&source) && !part.is_in(&target), "{part}");
            part.copy(&source, &mut target);
            assert!(part.is_same(&source, &target), "{part}");
        }
        assert_eq!(target, source);
    }

    #[test]
    fn a_part_is_found_by_its_name_and_by_the_path_of_a_field_below_it() {
        for part in ConfigPart::ALL {
            assert_eq!(ConfigPart::named(part.name()), Some(part));
        }
        assert_eq!(ConfigPart::named("kernel"), None);
        assert!(ConfigPart::Storage.holds("config.storage[0].path"));
        assert!(ConfigPart::Cpu.holds("config.cpu") && ConfigPart::Cpu.holds("config.cpu.vcpu_count"));
        assert!(!ConfigPart::Cpu.holds("config.cpus") && !ConfigPart::Cpu.holds("backend"));
    }

    #[test]
    fn a_configuration_of_an_earlier_release_has_no_protection() {
        let config: VmConfig = serde_json::from_str(r#"{"cpu":{"vcpu_count":1}}"#).unwrap();
        assert!(!config.delete_protection);
    }
}
