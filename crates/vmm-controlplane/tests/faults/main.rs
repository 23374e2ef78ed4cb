//! The daemon is killed -9 between every two steps of every operation, started again, and the world is inspected.
//!
//! ```text
//!   survey: the operation runs unharmed, and every fault point that it passes is noted
//!      │
//!      └─► for each of them, in a world of its own:
//!            prepare ─► call ─► SIGKILL at the point ─► start again ─► inspect ─► the same call again ─► use and delete the VM
//! ```
//!
//! The daemon is the real one, with its real store, over its API. On the fake (a process that speaks QEMU's protocol and runs no
//! guest) this is done for every operation, on each real hypervisor that is here for create, boot, reboot and delete. Each pair of
//! a hypervisor and an operation is a test; the points are not listed here, so that none can be forgotten: what the daemon passes
//! is tried, and at the end every point that the program has must have been tried on the fake.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test, though one with a main of its own: a helper that fails fails as loudly as the test itself"
)]

#[allow(dead_code, reason = "the harness of tests/e2e, of which this is another user")]
#[path = "../e2e/harness.rs"]
mod harness;
mod hypervisor;
mod inspect;
mod scenario;
mod trial;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Trial};
use vmm_host::fault::FaultPoint;

use hypervisor::Backend;
use scenario::Scenario;

/// Trials wait for processes more than they compute.
const THREADS: usize = 8;

fn main() -> ExitCode {
    // The fake VMM is this very program, so that no other one has to be built and found.
    if hypervisor::is_fake_vmm() {
        return vmm_testkit::fake::qemu::main(std::env::args_os());
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(THREADS));
    let passed = Arc::new(Mutex::new(BTreeSet::new()));
    let mut trials = Vec::new();
    for hypervisor in Backend::ALL {
        for scenario in Scenario::ALL.iter().filter(|scenario| scenario.runs_on(hypervisor)) {
            let name = format!("{}::{}", hypervisor.name(), scenario.name);
            let passed = Arc::clone(&passed);
            trials.push(Trial::test(name.clone(), move || {
                let points = trial::run(&name, hypervisor, scenario);
                if hypervisor == Backend::Fake {
                    passed.lock().unwrap().extend(points);
                }
                Ok(())
            }));
        }
    }
    // The longest first: a graceful reboot waits for its guest time and again.
    trials.sort_by_key(|trial| !trial.name().contains("reboot"));
    let conclusion = libtest_mimic::run(&arguments, trials);
    let all_ran = conclusion.num_filtered_out == 0 && conclusion.num_passed > 0 && !conclusion.has_failed();
    if all_ran && let Some(missed) = missed(&passed.lock().unwrap()) {
        eprintln!("no operation on the fake passes these fault points: {missed}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// The points that nobody has passed.
fn missed(passed: &BTreeSet<String>) -> Option<String> {
    let names = FaultPoint::ALL.iter().map(|point| point.name()).filter(|name| !passed.contains(*name));
    let missed: Vec<_> = names.collect();
    (!missed.is_empty()).then(|| missed.join(", "))
}
