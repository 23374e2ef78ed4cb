//! The list of cases, in the order of the matrix.

use std::sync::Arc;

use super::results::Verdict;
use super::rig::{Doing, Rig, Vms};
use super::{daemon, ends, fields, fields_devices, life, states, trouble};

/// One case: one row of the matrix.
#[derive(Debug)]
pub struct Case {
    /// Its name, which is also its test's.
    pub id: &'static str,
    /// What it is about, as the matrix says it.
    pub title: &'static str,
    /// Where it belongs.
    pub group: Group,
    /// What is done, one after the other.
    pub(super) steps: &'static [Step],
}

/// A part of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The state table.
    States,
    /// CPUs, memory and boot.
    Configuration,
    /// Disks, network and console.
    Devices,
    /// How runs end.
    Ends,
    /// What happens to the VMM.
    Trouble,
    /// What is seen of a running guest.
    Observation,
    /// Over the end of the daemon.
    Restart,
}

impl Group {
    /// Every part, in the matrix's order.
    pub const ALL: [Self; 7] = [
        Self::States,
        Self::Configuration,
        Self::Devices,
        Self::Ends,
        Self::Trouble,
        Self::Observation,
        Self::Restart,
    ];

    /// Its heading.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::States => "The state table",
            Self::Configuration => "CPUs, memory, boot",
            Self::Devices => "Disks, network, console, labels",
            Self::Ends => "How a run ends",
            Self::Trouble => "When the VMM fails",
            Self::Observation => "What is seen of a running guest",
            Self::Restart => "When the daemon restarts",
        }
    }
}

/// A part of a case.
#[derive(Debug)]
pub(super) enum Step {
    /// A daemon's life. The last one's verdict is the case's.
    Life(fn(Vms) -> Doing<Verdict>),
    /// What happens while no daemon runs.
    Away(fn(Arc<Rig>) -> Doing<()>),
}

macro_rules! life {
    ($case:path) => {
        Step::Life(|vms| Box::pin($case(vms)))
    };
}

macro_rules! away {
    ($case:path) => {
        Step::Away(|rig| Box::pin($case(rig)))
    };
}

/// Every case.
pub static CASES: &[Case] = &[
    Case {
        id: "boot_in_every_state",
        title: "BootVm from every state",
        group: Group::States,
        steps: &[life!(states::boot_in_every_state)],
    },
    Case {
        id: "shutdown_in_every_state",
        title: "ShutdownVm from every state",
        group: Group::States,
        steps: &[life!(states::shutdown_in_every_state)],
    },
    Case {
        id: "pause_in_every_state",
        title: "PauseVm from every state",
        group: Group::States,
        steps: &[life!(states::pause_in_every_state)],
    },
    Case {
        id: "resume_in_every_state",
        title: "ResumeVm from every state",
        group: Group::States,
        steps: &[life!(states::resume_in_every_state)],
    },
    Case {
        id: "reboot_in_every_state",
        title: "RebootVm from every state",
        group: Group::States,
        steps: &[life!(states::reboot_in_every_state)],
    },
    Case {
        id: "delete_in_every_state",
        title: "DeleteVm from every state",
        group: Group::States,
        steps: &[life!(states::delete_in_every_state)],
    },
    Case {
        id: "force_delete_in_every_state",
        title: "DeleteVm with `force` from every state",
        group: Group::States,
        steps: &[life!(states::force_delete_in_every_state)],
    },
    Case {
        id: "force_reboot",
        title: "RebootVm with `force`",
        group: Group::States,
        steps: &[life!(states::force_reboot)],
    },
    Case {
        id: "boot_after_shutdown",
        title: "BootVm after ShutdownVm, again and again",
        group: Group::States,
        steps: &[life!(states::boot_after_shutdown)],
    },
    Case {
        id: "a_paused_guest_stands_still",
        title: "a paused guest uses no CPU time",
        group: Group::States,
        steps: &[life!(states::a_paused_guest_stands_still)],
    },
    Case {
        id: "vcpu_count",
        title: "`cpu.vcpu_count`",
        group: Group::Configuration,
        steps: &[life!(fields::vcpu_count)],
    },
    Case {
        id: "max_vcpu_count",
        title: "`cpu.max_vcpu_count` above `vcpu_count`",
        group: Group::Configuration,
        steps: &[life!(fields::max_vcpu_count)],
    },
    Case {
        id: "topology_threads",
        title: "`cpu.topology` with two threads on a core",
        group: Group::Configuration,
        steps: &[life!(fields::topology_threads)],
    },
    Case {
        id: "topology_sockets",
        title: "`cpu.topology` with two sockets",
        group: Group::Configuration,
        steps: &[life!(fields::topology_sockets)],
    },
    Case {
        id: "memory_size",
        title: "`memory.size_bytes`",
        group: Group::Configuration,
        steps: &[life!(fields::memory_size)],
    },
    Case {
        id: "memory_hotplug",
        title: "`memory.hotplug_enabled`, `max_size_bytes`",
        group: Group::Configuration,
        steps: &[life!(fields::memory_hotplug)],
    },
    Case {
        id: "memory_shared",
        title: "`memory.backing[\"shared\"]`",
        group: Group::Configuration,
        steps: &[life!(fields::memory_shared)],
    },
    Case {
        id: "memory_hugepages",
        title: "`memory.backing[\"hugepages\"]`",
        group: Group::Configuration,
        steps: &[life!(fields::memory_hugepages)],
    },
    Case {
        id: "initrd",
        title: "`boot.initrd_path`",
        group: Group::Configuration,
        steps: &[life!(fields::initrd)],
    },
    Case {
        id: "kernel_args",
        title: "`boot.kernel_args`",
        group: Group::Configuration,
        steps: &[life!(fields::kernel_args)],
    },
    Case {
        id: "bzimage_kernel",
        title: "a bzImage as `boot.kernel_path`",
        group: Group::Configuration,
        steps: &[life!(fields::bzimage_kernel)],
    },
    Case {
        id: "unknown_key",
        title: "an unknown key in a free map",
        group: Group::Configuration,
        steps: &[life!(fields::unknown_key)],
    },
    Case {
        id: "key_of_another_backend",
        title: "a key of another backend",
        group: Group::Configuration,
        steps: &[life!(fields::key_of_another_backend)],
    },
    Case {
        id: "several_disks",
        title: "several disks",
        group: Group::Devices,
        steps: &[life!(fields_devices::several_disks)],
    },
    Case {
        id: "root_device",
        title: "`storage[].is_root_device`",
        group: Group::Devices,
        steps: &[life!(fields_devices::root_device)],
    },
    Case {
        id: "qcow2_disk",
        title: "`storage[].options[\"format\"]` = qcow2",
        group: Group::Devices,
        steps: &[life!(fields_devices::qcow2_disk)],
    },
    Case {
        id: "read_only_disk",
        title: "`storage[].read_only`",
        group: Group::Devices,
        steps: &[life!(fields_devices::read_only_disk)],
    },
    Case {
        id: "disk_rate_limits",
        title: "`storage[].options[\"rate_limit.…\"]`",
        group: Group::Devices,
        steps: &[life!(fields_devices::disk_rate_limits)],
    },
    Case {
        id: "cache_unsafe",
        title: "`storage[].options[\"cache\"]` = unsafe",
        group: Group::Devices,
        steps: &[life!(fields_devices::cache_unsafe)],
    },
    Case {
        id: "direct_io",
        title: "`storage[].options[\"direct_io\"]`",
        group: Group::Devices,
        steps: &[life!(fields_devices::direct_io)],
    },
    Case {
        id: "nics_on_taps",
        title: "several NICs with MACs on TAPs that exist",
        group: Group::Devices,
        steps: &[life!(fields_devices::nics_on_taps)],
    },
    Case {
        id: "nic_rate_limits",
        title: "`network[].options[\"rate_limit.…\"]`",
        group: Group::Devices,
        steps: &[life!(fields_devices::nic_rate_limits)],
    },
    Case {
        id: "tap_made_by_name",
        title: "a TAP that does not exist, by name",
        group: Group::Devices,
        steps: &[life!(fields_devices::tap_made_by_name)],
    },
    Case {
        id: "tap_named_by_the_program",
        title: "a TAP that the program names",
        group: Group::Devices,
        steps: &[life!(fields_devices::tap_named_by_the_program)],
    },
    Case {
        id: "one_tap_one_vm",
        title: "a TAP that a running VM holds is refused",
        group: Group::Devices,
        steps: &[life!(fields_devices::one_tap_one_vm)],
    },
    Case {
        id: "one_disk_one_vm",
        title: "a writable disk that a running VM holds is refused",
        group: Group::Devices,
        steps: &[life!(fields_devices::one_disk_one_vm)],
    },
    Case {
        id: "console_kept",
        title: "console kept over boots and reboots, first message included",
        group: Group::Devices,
        steps: &[life!(fields_devices::console_kept)],
    },
    Case {
        id: "console_to_a_file",
        title: "`console.output`",
        group: Group::Devices,
        steps: &[life!(fields_devices::console_to_a_file)],
    },
    Case {
        id: "console_off",
        title: "`console.enabled` = false",
        group: Group::Devices,
        steps: &[life!(fields_devices::console_off)],
    },
    Case { id: "metadata", title: "`metadata`", group: Group::Devices, steps: &[life!(fields::metadata)] },
    Case {
        id: "restart_policy_unset",
        title: "`restart_policy` left out",
        group: Group::Devices,
        steps: &[life!(fields::restart_policy_unset)],
    },
    Case {
        id: "guest_obeys_shutdown",
        title: "ShutdownVm: the guest obeys",
        group: Group::Ends,
        steps: &[life!(ends::guest_obeys_shutdown)],
    },
    Case {
        id: "paused_guest_obeys_shutdown",
        title: "ShutdownVm while paused: the guest obeys",
        group: Group::Ends,
        steps: &[life!(ends::paused_guest_obeys_shutdown)],
    },
    Case {
        id: "guest_ignores_shutdown",
        title: "ShutdownVm: the guest does not obey",
        group: Group::Ends,
        steps: &[life!(ends::guest_ignores_shutdown)],
    },
    Case {
        id: "forced_shutdown",
        title: "ShutdownVm with `force`",
        group: Group::Ends,
        steps: &[life!(ends::forced_shutdown)],
    },
    Case {
        id: "guest_powers_off",
        title: "the guest powers off",
        group: Group::Ends,
        steps: &[life!(ends::guest_powers_off)],
    },
    Case {
        id: "power_off_under_always",
        title: "the guest powers off under ALWAYS",
        group: Group::Ends,
        steps: &[life!(ends::power_off_under_always)],
    },
    Case {
        id: "reset_under_never",
        title: "the guest resets itself under NEVER",
        group: Group::Ends,
        steps: &[life!(ends::reset_under_never)],
    },
    Case {
        id: "reset_under_guest_reboot",
        title: "the guest resets itself under GUEST_REBOOT",
        group: Group::Ends,
        steps: &[life!(ends::reset_under_guest_reboot)],
    },
    Case {
        id: "triple_fault_under_never",
        title: "a triple fault under NEVER",
        group: Group::Ends,
        steps: &[life!(ends::triple_fault_under_never)],
    },
    Case {
        id: "triple_fault_under_guest_reboot",
        title: "a triple fault under GUEST_REBOOT",
        group: Group::Ends,
        steps: &[life!(ends::triple_fault_under_guest_reboot)],
    },
    Case {
        id: "vmm_killed_while_running",
        title: "the VMM is killed while RUNNING",
        group: Group::Trouble,
        steps: &[life!(trouble::vmm_killed_while_running)],
    },
    Case {
        id: "vmm_killed_while_paused",
        title: "the VMM is killed while PAUSED",
        group: Group::Trouble,
        steps: &[life!(trouble::vmm_killed_while_paused)],
    },
    Case {
        id: "vmm_crashes_while_running",
        title: "the VMM crashes while RUNNING",
        group: Group::Trouble,
        steps: &[life!(trouble::vmm_crashes_while_running)],
    },
    Case {
        id: "vmm_crashes_while_paused",
        title: "the VMM crashes while PAUSED",
        group: Group::Trouble,
        steps: &[life!(trouble::vmm_crashes_while_paused)],
    },
    Case {
        id: "vmm_killed_while_stopping",
        title: "the VMM is killed during ShutdownVm",
        group: Group::Trouble,
        steps: &[life!(trouble::vmm_killed_while_stopping)],
    },
    Case {
        id: "on_failure_starts_again",
        title: "ON_FAILURE starts it again",
        group: Group::Trouble,
        steps: &[life!(ends::on_failure_starts_again)],
    },
    Case {
        id: "vmm_hangs",
        title: "the VMM hangs: reads go on, `force` works",
        group: Group::Trouble,
        steps: &[life!(trouble::vmm_hangs)],
    },
    Case {
        id: "hanging_vmm_is_deleted",
        title: "the VMM hangs: DeleteVm with `force`",
        group: Group::Trouble,
        steps: &[life!(trouble::hanging_vmm_is_deleted)],
    },
    Case {
        id: "vmm_comes_back",
        title: "the VMM hangs for a while",
        group: Group::Trouble,
        steps: &[life!(trouble::vmm_comes_back)],
    },
    Case {
        id: "broken_kernel_leaves_nothing",
        title: "a kernel without code",
        group: Group::Trouble,
        steps: &[life!(trouble::broken_kernel_leaves_nothing)],
    },
    Case {
        id: "metrics_move",
        title: "metrics move",
        group: Group::Observation,
        steps: &[life!(life::metrics_move)],
    },
    Case {
        id: "linux_sees_its_machine",
        title: "Linux finds its CPUs, disks and NIC, and its writes are counted",
        group: Group::Observation,
        steps: &[life!(life::linux_sees_its_machine)],
    },
    Case {
        id: "daemon_restart_while_running",
        title: "the daemon restarts while RUNNING",
        group: Group::Restart,
        steps: &[life!(daemon::leave_running), life!(daemon::find_running)],
    },
    Case {
        id: "daemon_restart_while_paused",
        title: "the daemon restarts while PAUSED",
        group: Group::Restart,
        steps: &[life!(daemon::leave_paused), life!(daemon::find_paused)],
    },
    Case {
        id: "vmm_dies_while_no_daemon_runs",
        title: "the VMM dies while no daemon runs",
        group: Group::Restart,
        steps: &[life!(daemon::leave_running), away!(daemon::vmm_dies), life!(daemon::find_dead)],
    },
    Case {
        id: "hanging_vmm_at_daemon_start",
        title: "the VMM hangs when the daemon starts",
        group: Group::Restart,
        steps: &[life!(daemon::leave_running), away!(daemon::vmm_hangs), life!(daemon::find_hanging)],
    },
];
