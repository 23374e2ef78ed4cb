//! A thousand VMs come and go under one daemon, and nothing of them stays.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::host::{Found, Held, TapGuard, can_make_taps, ledger, left_for_good};
use super::load::rest;
use super::plan::{self, Kernels, Vm};
use crate::harness::{World, call, eventually, hypervisors};

/// Cycles of a plain `cargo test`, on each backend.
const SHORT: u64 = 30;
/// VMs that come and go side by side.
const WORKERS: u64 = 4;
/// The share of cycles, in percent, after which caches and pools count as warm.
const WARM: u64 = 20;
/// How much resident memory may grow after that: what an allocator keeps and a log remembers, not what a leak of one VM's
/// record in each cycle would take.
const GROWTH_KIB: u64 = 8 * 1024;

#[test]
fn repeated_vm_lifecycles_leave_nothing_on_the_host() {
    const TEST: &str = "repeated_vm_lifecycles_leave_nothing_on_the_host";
    let backends = hypervisors(TEST);
    if backends.is_empty() {
        return;
    }
    let taps = can_make_taps(TEST);
    let cycles = plan::number("VMCP_CHAOS_CYCLES").unwrap_or(SHORT);
    let mut guard = TapGuard(None);
    let world = World::started(&[]);
    let instance = ledger(&world).1["instance"].as_str().unwrap().to_owned();
    guard.0 = Some(instance.clone());
    for backend in backends {
        let started = Instant::now();
        let (before, after) = cycle(&world, backend, taps, cycles);
        println!(
            "{cycles} cycles on {backend} in {:.0} s: descriptors {} -> {}, threads {} -> {}, resident {} -> {} KiB",
            started.elapsed().as_secs_f64(),
            before.descriptors,
            after.descriptors,
            before.threads,
            after.threads,
            before.rss_kib,
            after.rss_kib,
        );
        assert!(
            after.rss_kib <= before.rss_kib + GROWTH_KIB,
            "{backend}: the daemon grew from {before:?} to {after:?}"
        );
        Found::nothing(&world, &instance, backend);
        let (code, ledger) = ledger(&world);
        assert_eq!((code, &ledger["items"]), (Some(0), &json!([])), "{backend}: {ledger:#}");
    }
}

/// Lets VMs come and go; answers what the daemon held once it was warm, and at the end.
fn cycle(world: &World, backend: &'static str, taps: bool, cycles: u64) -> (Held, Held) {
    let kernels = Kernels::write_to(world.dir.path());
    let warm = (cycles * WARM / 100).max(WORKERS);
    come_and_go(world, backend, taps, &kernels, 0..warm);
    let before = at_rest(world, None);
    come_and_go(world, backend, taps, &kernels, warm..cycles);
    (before, at_rest(world, Some(before)))
}

/// Creates, boots and deletes a VM for each number, a few side by side.
fn come_and_go(world: &World, backend: &'static str, taps: bool, kernels: &Kernels, numbers: Range<u64>) {
    let url = world.url();
    let next = AtomicU64::new(numbers.start);
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= numbers.end {
                        return;
                    }
                    let name = format!("{backend}{number}");
                    let vm = Vm { name: name.clone(), backend, nic: taps, restarts: false, echoes: false };
                    call(url, "CreateVm", &vm.create(kernels, 0)).ok();
                    call(url, "BootVm", &json!({"vm_id": name})).ok();
                    let deleted = call(url, "DeleteVm", &json!({"vm_id": name, "force": true})).ok();
                    assert_eq!(left_for_good(&deleted), Vec::<String>::new());
                }
            });
        }
    });
}

/// What the daemon holds between two cycles: no more than `before`, if that is given.
fn at_rest(world: &World, before: Option<Held>) -> Held {
    let Some(before) = before else {
        // What the last cycle still closes is gone within a second.
        let looks = (0..10).map(|_| {
            rest(Duration::from_millis(100));
            Held::by(world.pid())
        });
        return looks.min_by_key(|held| (held.descriptors, held.threads)).expect("it was looked at");
    };
    // Blocking threads end ten seconds after their last task.
    eventually("as few descriptors and threads as before", || {
        let now = Held::by(world.pid());
        now.descriptors <= before.descriptors && now.threads <= before.threads
    });
    Held::by(world.pid())
}
