//! Returns the violations and warnings about a [`VmSpec`] on Firecracker. Reads nothing but the
//! specification.

use vmm_core::report::CheckReport;
use vmm_core::spec::{
    Boot, Console, Cpu, Disk, DiskFormat, Memory, Nic, PageSize, RestartPolicy, Topology, VmSpec,
};

use super::convert::{added_by_firecracker, kernel_args, needs_reboot_argument, wants_smt};
use crate::kernel_args::{PanicReport, check_length, check_panic};
use crate::rest::options::check_keys;

/// The most vCPUs.
pub(super) const MAX_VCPUS: u32 = 32;
/// The most disks and network interfaces together: the interrupt lines of the machine, less those
/// of its own devices.
pub(super) const MAX_DEVICES: usize = 16;

/// Returns the findings about `spec`.
pub(super) fn check(spec: &VmSpec) -> CheckReport {
    let mut report = CheckReport::default();
    check_keys(&mut report, spec, "fc.");
    // Each struct is taken apart without `..`, so that a new field compiles only after this check
    // covers or ignores it.
    let VmSpec { cpu, memory, boot, disks, nics, console, restart, options: _ } = spec;
    check_cpu(&mut report, cpu);
    check_memory(&mut report, memory);
    disks.iter().for_each(|disk| check_disk(&mut report, disk));
    for nic in nics {
        let Nic { id: _, mac: _, tap: _, limits: _ } = nic;
    }
    let devices = disks.len() + nics.len();
    if devices > MAX_DEVICES {
        let list = if disks.len() >= nics.len() { "config.storage" } else { "config.network" };
        let message = format!(
            "firecracker has room for {MAX_DEVICES} disks and network interfaces together, not {devices}"
        );
        report.reject(list, message);
    }
    let Boot { kernel: _, initrd: _, args: _ } = boot;
    if needs_reboot_argument(spec) {
        report.emulate(
            "config.boot.kernel_args",
            "reboot=k is added: without it Firecracker does not see that the guest reboots",
        );
    }
    check_length(&mut report, spec, kernel_args(spec).len() + added_by_firecracker(devices));
    check_panic(&mut report, spec, PanicReport::None("Firecracker"));
    match console {
        Console::Off | Console::Kept | Console::File(_) => {}
    }
    let RestartPolicy { mode, max_restarts: _ } = restart;
    // The default differs from the other backends, so the client is warned although nothing is
    // wrong.
    if mode.is_none() {
        report.emulate(
            "config.restart_policy.mode",
            "is RESTART_MODE_NEVER on firecracker, where a reset is how a guest ends: set RESTART_MODE_GUEST_REBOOT to have the guest start again",
        );
    }
    report
}

fn check_cpu(report: &mut CheckReport, cpu: &Cpu) {
    let Cpu { count, max, topology } = *cpu;
    if count > MAX_VCPUS {
        report.reject(
            "config.cpu.vcpu_count",
            format!("must be at most {MAX_VCPUS} on the firecracker backend, not {count}"),
        );
    }
    if max > count {
        report.ignore("config.cpu.max_vcpu_count", "has no effect: Firecracker has no CPU hot-plug");
    }
    let Some(Topology { sockets, cores: _, threads }) = topology else { return };
    if sockets != 1 {
        report.reject(
            "config.cpu.topology.sockets",
            format!("must be 1 on the firecracker backend, not {sockets}"),
        );
    }
    if !matches!(threads, 1 | 2) {
        report.reject(
            "config.cpu.topology.threads_per_core",
            format!("must be 1 or 2 on the firecracker backend, not {threads}"),
        );
    }
    if wants_smt(cpu) && count != 1 && count % 2 == 1 {
        report.reject(
            "config.cpu.vcpu_count",
            format!("must be 1 or even where two threads share a core, not {count}"),
        );
    }
}

fn check_memory(report: &mut CheckReport, memory: &Memory) {
    let Memory { size_bytes: _, hotplug_max_bytes, pages, shared } = *memory;
    if hotplug_max_bytes.is_some() {
        report.ignore(
            "config.memory.hotplug_enabled",
            "has no effect: memory cannot grow on the firecracker backend",
        );
    }
    if shared {
        report.reject(
            "config.memory.backing[\"shared\"]",
            "Firecracker has no shared memory: leave it out, or use another backend",
        );
    }
    if pages == PageSize::Huge && memory.size_mib() % 2 == 1 {
        report.reject("config.memory.size_bytes", "must be a whole number of 2 MiB where hugepages is true");
    }
}

fn check_disk(report: &mut CheckReport, disk: &Disk) {
    let Disk {
        index: _,
        id: _,
        path: _,
        read_only: _,
        is_root: _,
        format,
        backing_files: _,
        cache: _,
        direct_io,
        limits: _,
    } = disk;
    let options = format!("{}.options", disk.field());
    if *format == DiskFormat::Qcow2 {
        report.reject(
            format!("{options}[\"format\"]"),
            "Firecracker reads raw images only: convert the image (qemu-img convert -O raw), or use another backend",
        );
    }
    if *direct_io {
        report.reject(
            format!("{options}[\"direct_io\"]"),
            "Firecracker cannot pass by the host's page cache: leave it out, or use another backend",
        );
    }
}

#[cfg(test)]
mod tests {
    use vmm_core::config::{BootConfig, CpuConfig, CpuTopology, MemoryConfig, StorageDevice, VmConfig};

    use super::*;

    fn findings(change: impl FnOnce(&mut VmConfig)) -> (Vec<String>, Vec<String>) {
        let mut config = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 128 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig { kernel_path: "/k".to_owned(), ..BootConfig::default() }),
            ..VmConfig::default()
        };
        change(&mut config);
        let report = check(&VmSpec::parse(&config).unwrap());
        let violations = report.violations.into_iter().map(|found| found.field).collect();
        (violations, report.warnings.into_iter().map(|warning| warning.field).collect())
    }

    fn option(key: &str, value: &str) -> vmm_core::config::Options {
        [(key.to_owned(), value.to_owned())].into()
    }

    fn disk(key: &str, value: &str) -> StorageDevice {
        StorageDevice {
            id: "a".to_owned(),
            path: "/d".to_owned(),
            options: option(key, value),
            ..StorageDevice::default()
        }
    }

    #[test]
    fn unsupported_guest_visible_values_are_refused() {
        let cpu = |count: i32, sockets, cores, threads| {
            move |config: &mut VmConfig| {
                let topology =
                    Some(CpuTopology { sockets, cores_per_socket: cores, threads_per_core: threads });
                config.cpu = Some(CpuConfig { vcpu_count: count, topology, ..CpuConfig::default() });
            }
        };
        assert_eq!(findings(cpu(2, 1, 1, 2)).0, [""; 0]);
        assert_eq!(findings(cpu(4, 2, 2, 1)).0, ["config.cpu.topology.sockets"]);
        assert_eq!(findings(cpu(4, 1, 1, 4)).0, ["config.cpu.topology.threads_per_core"]);
        assert_eq!(
            findings(|config| config.cpu.as_mut().unwrap().vcpu_count = 33).0,
            ["config.cpu.vcpu_count"]
        );
        let backing = |key: &'static str| {
            move |config: &mut VmConfig| config.memory.as_mut().unwrap().backing = option(key, "true")
        };
        assert_eq!(findings(backing("shared")).0, ["config.memory.backing[\"shared\"]"]);
        assert_eq!(findings(backing("hugepages")).0, [""; 0]);
        assert_eq!(findings(backing("fc.x")).0, ["config.memory.backing[\"fc.x\"]"]);
        for (key, value) in [("format", "qcow2"), ("direct_io", "true")] {
            let (violations, _) = findings(|config| config.storage.push(disk(key, value)));
            assert_eq!(violations, [format!("config.storage[0].options[\"{key}\"]")]);
        }
    }

    #[test]
    fn ignored_limits_and_hints_are_warnings() {
        let (violations, warnings) = findings(|config| {
            config.cpu.as_mut().unwrap().max_vcpu_count = 4;
            let memory = config.memory.as_mut().unwrap();
            memory.hotplug_enabled = true;
            memory.max_size_bytes = 256 << 20;
            memory.backing = option("ch.x", "y");
        });
        assert_eq!(violations, [""; 0]);
        assert_eq!(
            warnings,
            [
                "config.memory.backing[\"ch.x\"]",
                "config.cpu.max_vcpu_count",
                "config.memory.hotplug_enabled",
                "config.boot.kernel_args",
                "config.restart_policy.mode",
            ]
        );
    }
}
