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
//! guest) this is done for every operation, and so it is where somebody else has a say: on VMMs that the test starts by hand, and on
//! domains of a libvirtd of its own. On each hypervisor that the daemon starts itself it is done for create, boot, reboot and
//! delete. Each pair of a hypervisor and an operation is a test; the points are not listed here, so that none can be forgotten:
//! what the daemon passes is tried, and at the end every point that the program has must have been tried wherever every operation
//! is, but for those that are known to be beyond it ([`Backend::beyond`]).
//!
//! The VMMs of others are also killed, stopped and taken away ([`trouble`]).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test, though one with a main of its own: a helper that fails fails as loudly as the test itself"
)]

mod case;
#[allow(dead_code, unused_imports, reason = "the harness of tests/e2e, of which this is another user")]
#[path = "../e2e/harness.rs"]
mod harness;
mod hypervisor;
mod inspect;
mod scenario;
mod stage;
mod trial;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Trial};
use vmm_host::fault::FaultPoint;

use hypervisor::Backend;
use scenario::Scenario;
use stage::Stage;
use trouble::Trouble;

/// Trials wait for processes more than they compute.
const THREADS: usize = 8;

fn main() -> ExitCode {
    // The fake VMM is this very program, so that no other one has to be built and found.
    if hypervisor::is_fake_vmm() {
        return vmm_testkit::fake::qemu::main(std::env::args_os());
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(THREADS));
    let passed = Arc::new(Mutex::new(BTreeMap::<Backend, BTreeSet<String>>::new()));
    let mut trials = Vec::new();
    for hypervisor in Backend::ALL {
        for scenario in Scenario::ALL.iter().filter(|scenario| scenario.runs_on(hypervisor)) {
            let name = format!("{}::{}", hypervisor.name(), scenario.name);
            let passed = Arc::clone(&passed);
            trials.push(Trial::test(name.clone(), move || {
                let points = trial::run(&name, hypervisor, scenario);
                passed.lock().unwrap().entry(hypervisor).or_default().extend(points);
                Ok(())
            }));
        }
        for trouble in Trouble::ALL.into_iter().filter(|_| hypervisor.is_placed()) {
            let name = format!("{}::{}", hypervisor.name(), trouble.name());
            trials.push(Trial::test(name.clone(), move || {
                trouble::run(&name, hypervisor, trouble);
                Ok(())
            }));
        }
    }
    // The longest first: a graceful reboot waits for its guest time and again.
    trials.sort_by_key(|trial| !trial.name().contains("reboot"));
    let conclusion = libtest_mimic::run(&arguments, trials);
    Stage::strike();
    let all_ran = conclusion.num_filtered_out == 0 && conclusion.num_passed > 0 && !conclusion.has_failed();
    let wrong: Vec<_> = passed.lock().unwrap().iter().filter_map(|(on, passed)| wrong(*on, passed)).collect();
    if all_ran && !wrong.is_empty() {
        eprintln!("{}", wrong.join("\n"));
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// Which points no operation on a hypervisor passes though they should, or passes though they are said to be beyond it.
fn wrong(hypervisor: Backend, passed: &BTreeSet<String>) -> Option<String> {
    // Where it was skipped nothing is known.
    let beyond = hypervisor.beyond().filter(|_| !passed.is_empty())?;
    let as_wanted = |point: &&FaultPoint| passed.contains(point.name()) != beyond.contains(point);
    let wrong: Vec<_> =
        FaultPoint::ALL.iter().filter(|point| !as_wanted(point)).map(|it| it.name()).collect();
    let name = hypervisor.name();
    (!wrong.is_empty()).then(|| {
        format!(
            "no operation on {name} passes these fault points, or one does that should not: {}",
            wrong.join(", ")
        )
    })
}
