//! The list of cases, in the order of the matrix.

use super::case::{Case, CaseGroup, CaseStep};
use super::{consoles, daemon, ends, fields, fields_devices, life, states, vmm_failures};

macro_rules! life {
    ($case:path) => {
        CaseStep::Life(|vms| Box::pin($case(vms)))
    };
}

macro_rules! away {
    ($case:path) => {
        CaseStep::Away(|rig| Box::pin($case(rig)))
    };
}

/// Makes a case of one life.
macro_rules! case {
    ($group:ident, $module:ident::$id:ident, $title:literal) => {
        Case { id: stringify!($id), title: $title, group: CaseGroup::$group, steps: &[life!($module::$id)] }
    };
}

/// Every case.
pub static CASES: &[Case] = &[
    case!(States, states::boot_in_every_state, "BootVm from every state"),
    case!(States, states::shutdown_in_every_state, "ShutdownVm from every state"),
    case!(States, states::pause_in_every_state, "PauseVm from every state"),
    case!(States, states::resume_in_every_state, "ResumeVm from every state"),
    case!(States, states::reboot_in_every_state, "RebootVm from every state"),
    case!(States, states::delete_in_every_state, "DeleteVm from every state"),
    case!(States, states::force_delete_in_every_state, "DeleteVm with `force` from every state"),
    case!(States, states::force_reboot, "RebootVm with `force`"),
    case!(States, states::boot_after_shutdown, "BootVm after ShutdownVm, again and again"),
    case!(States, states::a_paused_guest_stands_still, "a paused guest uses no CPU time"),
    case!(Configuration, fields::vcpu_count, "`cpu.vcpu_count`"),
    case!(Configuration, fields::too_many_vcpus, "more vCPUs than the backend's limit"),
    case!(Configuration, fields::max_vcpu_count, "`cpu.max_vcpu_count` above `vcpu_count`"),
    case!(Configuration, fields::topology_threads, "`cpu.topology` with two threads on a core"),
    case!(Configuration, fields::topology_sockets, "`cpu.topology` with two sockets"),
    case!(Configuration, fields::memory_size, "`memory.size_bytes`"),
    case!(Configuration, fields::memory_updated, "`memory.size_bytes` by UpdateVm, then BootVm"),
    case!(Configuration, fields::memory_hotplug, "`memory.hotplug_enabled`, `max_size_bytes`"),
    case!(Configuration, fields::memory_shared, "`memory.backing[\"shared\"]`"),
    case!(Configuration, fields::memory_hugepages, "`memory.backing[\"hugepages\"]`"),
    case!(Configuration, fields::initrd, "`boot.initrd_path`"),
    case!(Configuration, fields::kernel_args, "`boot.kernel_args`"),
    case!(Configuration, fields::bzimage_kernel, "a bzImage as `boot.kernel_path`"),
    case!(Configuration, fields::unknown_key, "an unknown key in a free map"),
    case!(Configuration, fields::key_of_another_backend, "a key of another backend"),
    case!(Devices, fields_devices::several_disks, "several disks"),
    case!(Devices, fields_devices::root_device, "`storage[].is_root_device`"),
    case!(Devices, fields_devices::qcow2_disk, "`storage[].options[\"format\"]` = qcow2"),
    case!(Devices, fields_devices::read_only_disk, "`storage[].read_only`"),
    case!(Devices, fields_devices::disk_rate_limits, "`storage[].options[\"rate_limit.…\"]`"),
    case!(Devices, fields_devices::cache_unsafe, "`storage[].options[\"cache\"]` = unsafe"),
    case!(Devices, fields_devices::direct_io, "`storage[].options[\"direct_io\"]`"),
    case!(Devices, fields_devices::nics_on_taps, "several NICs with MACs on TAPs that exist"),
    case!(Devices, fields_devices::nic_rate_limits, "`network[].options[\"rate_limit.…\"]`"),
    case!(Devices, fields_devices::tap_made_by_name, "a TAP that does not exist, by name"),
    case!(Devices, fields_devices::tap_named_by_the_program, "a TAP that the program names"),
    case!(Devices, fields_devices::one_tap_one_vm, "a TAP that a running VM holds is refused"),
    case!(Devices, fields_devices::one_disk_one_vm, "a writable disk that a running VM holds is refused"),
    case!(
        Devices,
        fields_devices::console_kept,
        "console kept over boots and reboots, first message included"
    ),
    case!(Devices, fields_devices::console_to_a_file, "`console.output`"),
    case!(Devices, fields_devices::console_off, "`console.enabled` = false"),
    case!(Devices, consoles::console_streamed, "StreamConsole follows the console over boots"),
    case!(Devices, consoles::console_input, "WriteConsole: while running, paused and after a reboot"),
    case!(Devices, fields::metadata, "`metadata`"),
    case!(Ends, ends::guest_obeys_shutdown, "ShutdownVm: the guest obeys"),
    case!(Ends, ends::paused_guest_obeys_shutdown, "ShutdownVm while paused: the guest obeys"),
    case!(Ends, ends::guest_ignores_shutdown, "ShutdownVm: the guest does not obey"),
    case!(Ends, ends::forced_shutdown, "ShutdownVm with `force`"),
    case!(Ends, ends::guest_powers_off, "the guest powers off"),
    case!(Ends, ends::power_off_under_always, "the guest powers off under ALWAYS"),
    case!(Ends, ends::reset_under_never, "the guest resets itself under NEVER"),
    case!(Ends, ends::reset_under_guest_reboot, "the guest resets itself under GUEST_REBOOT"),
    case!(Ends, ends::triple_fault_under_never, "a triple fault under NEVER"),
    case!(Ends, ends::triple_fault_under_guest_reboot, "a triple fault under GUEST_REBOOT"),
    case!(Ends, ends::panic_under_never, "the guest panics under NEVER"),
    case!(Ends, ends::panic_under_on_failure, "the guest panics under ON_FAILURE"),
    case!(Ends, ends::restart_policy_unset, "`restart_policy` left out"),
    case!(VmmFailures, vmm_failures::vmm_killed_while_running, "the VMM is killed while RUNNING"),
    case!(VmmFailures, vmm_failures::vmm_killed_while_paused, "the VMM is killed while PAUSED"),
    case!(VmmFailures, vmm_failures::vmm_crashes_while_running, "the VMM crashes while RUNNING"),
    case!(VmmFailures, vmm_failures::vmm_crashes_while_paused, "the VMM crashes while PAUSED"),
    case!(VmmFailures, vmm_failures::vmm_killed_while_stopping, "the VMM is killed during ShutdownVm"),
    case!(VmmFailures, ends::on_failure_starts_again, "ON_FAILURE starts it again"),
    case!(VmmFailures, vmm_failures::vmm_hangs, "the VMM hangs: reads go on, `force` works"),
    case!(VmmFailures, vmm_failures::hanging_vmm_is_deleted, "the VMM hangs: DeleteVm with `force`"),
    case!(VmmFailures, vmm_failures::vmm_comes_back, "the VMM hangs for a while"),
    case!(VmmFailures, vmm_failures::broken_kernel_leaves_nothing, "a kernel without code"),
    case!(Observation, life::metrics_move, "metrics move"),
    case!(
        Observation,
        life::linux_sees_its_machine,
        "Linux finds its CPUs, disks and NIC, and its writes are counted"
    ),
    Case {
        id: "daemon_restart_while_running",
        title: "the daemon restarts while RUNNING",
        group: CaseGroup::Restart,
        steps: &[life!(daemon::leave_running), life!(daemon::find_running)],
    },
    Case {
        id: "daemon_restart_while_paused",
        title: "the daemon restarts while PAUSED",
        group: CaseGroup::Restart,
        steps: &[life!(daemon::leave_paused), life!(daemon::find_paused)],
    },
    Case {
        id: "vmm_dies_while_no_daemon_runs",
        title: "the VMM dies while no daemon runs",
        group: CaseGroup::Restart,
        steps: &[life!(daemon::leave_running), away!(daemon::vmm_dies), life!(daemon::find_dead)],
    },
    Case {
        id: "hanging_vmm_at_daemon_start",
        title: "the VMM hangs when the daemon starts",
        group: CaseGroup::Restart,
        steps: &[life!(daemon::leave_running), away!(daemon::vmm_hangs), life!(daemon::find_hanging)],
    },
];
