//! The suite that every [`Backend`](vmm_core::backend::Backend) must pass: one list of cases that
//! use the service like a client, against the real program.
//!
//! ```text
//!   Case ──► Rig (folders, store) ──► life 1: runtime + VmService ──► Backend ──► the hypervisor
//!              │                      away: no daemon runs
//!              │                      life 2: the next daemon on the same store
//!              ▼
//!        nothing left? ──► CaseVerdict ─► target/backend-suite/<column>.json
//!                                                         └──► docs/backend-support.md
//! ```
//!
//! A [`Column`] is a hypervisor with a machine model, and a column of the matrix. A case returns a
//! [`CaseVerdict`], or panics and so fails. The expectations come from the backend's own `check`,
//! capabilities and facts, and every accepted configuration is really booted. A verdict that
//! differs from the cell of the committed document fails the test too.
//!
//! Put `vmm_testkit::backend_suite!(make_column);` into a module of a test file. Each case becomes
//! a test there.

#![expect(clippy::panic, reason = "a suite gives up as loudly as the tests that it is made of")]

mod case;
mod cases;
mod column;
mod consoles;
mod daemon;
mod ends;
mod fake_column;
mod fields;
mod fields_devices;
mod imported;
mod life;
pub mod matrix;
pub mod results;
mod rig;
mod states;
mod tap;
mod vmm_failures;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

pub use case::{Case, CaseGroup};
pub use cases::CASES;
pub use column::{Column, LinuxGuest, ObeyingGuest, real};
pub use fake_column::FakeColumn;
pub use results::{CaseVerdict, MatrixWord};
use rig::Rig;
pub use tap::TestTap;

use crate::skip::skipped;

/// Makes a test of each case of the suite, each with a column made by the function `$make`.
#[macro_export]
macro_rules! backend_suite {
    ($make:path) => {
        $crate::backend_suite!(@each $make:
            boot_in_every_state
            shutdown_in_every_state
            pause_in_every_state
            resume_in_every_state
            reboot_in_every_state
            delete_in_every_state
            force_delete_in_every_state
            force_reboot
            boot_after_shutdown
            a_paused_guest_stands_still
            vcpu_count
            too_many_vcpus
            max_vcpu_count
            topology_threads
            topology_sockets
            memory_size
            memory_updated
            memory_hotplug
            memory_shared
            memory_hugepages
            initrd
            kernel_args
            bzimage_kernel
            unknown_key
            key_of_another_backend
            several_disks
            root_device
            qcow2_disk
            read_only_disk
            disk_rate_limits
            cache_unsafe
            direct_io
            nics_on_taps
            nic_rate_limits
            tap_made_by_name
            tap_named_by_the_program
            one_tap_one_vm
            one_disk_one_vm
            console_kept
            console_to_a_file
            console_off
            console_streamed
            console_input
            metadata
            guest_obeys_shutdown
            paused_guest_obeys_shutdown
            guest_ignores_shutdown
            forced_shutdown
            guest_powers_off
            power_off_under_always
            reset_under_never
            reset_under_guest_reboot
            triple_fault_under_never
            triple_fault_under_guest_reboot
            panic_under_never
            panic_under_on_failure
            restart_policy_unset
            vmm_killed_while_running
            vmm_killed_while_paused
            vmm_crashes_while_running
            vmm_crashes_while_paused
            vmm_killed_while_stopping
            on_failure_starts_again
            vmm_hangs
            hanging_vmm_is_deleted
            vmm_comes_back
            broken_kernel_leaves_nothing
            metrics_move
            linux_sees_its_machine
            daemon_restart_while_running
            daemon_restart_while_paused
            vmm_dies_while_no_daemon_runs
            hanging_vmm_at_daemon_start
        );
    };
    (@each $make:path: $($case:ident)*) => {
        $(
            #[test]
            fn $case() {
                $crate::backend_suite::run($make(), stringify!($case), module_path!());
            }
        )*

        #[test]
        fn the_suite_has_a_test_for_every_case() {
            let tests = [$(stringify!($case)),*];
            let cases: Vec<&str> = $crate::backend_suite::CASES.iter().map(|case| case.id).collect();
            assert_eq!(cases, tests);
        }
    };
}

/// Runs one case on one column and records its verdict.
///
/// # Panics
/// If the case fails, or its verdict differs from the committed document.
pub fn run(column: Arc<dyn Column>, case: &str, module: &str) {
    let Some(case) = CASES.iter().find(|known| known.id == case) else { panic!("there is no case {case}") };
    let test = format!("{module}::{}", case.id);
    let version = match column::version(&*column) {
        Ok(version) => version,
        Err(why) => return skipped(&test, &format!("{} cannot serve here: {why}", column.name())),
    };
    let rig = Arc::new(Rig::new(Arc::clone(&column), case.id));
    // The panic of a case is caught, because its processes must be ended and its verdict recorded
    // first.
    let outcome = catch_unwind(AssertUnwindSafe(|| rig.play(case)));
    rig.clear_away();
    let verdict = match &outcome {
        Ok(verdict) => verdict.clone(),
        Err(panic) => CaseVerdict::Failed(panic_text(&**panic)),
    };
    results::record(column.name(), &version, case.id, &verdict);
    match (outcome, verdict) {
        (Err(panic), _) => resume_unwind(panic),
        (Ok(_), CaseVerdict::NotRun(why)) => skipped(&test, &why),
        (Ok(_), verdict) => matrix::assert_committed(column.name(), case, &verdict),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}
