//! The clock of a guest that was paused, as docs/api-reference.md tells of it.

use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use vmm_testkit::guests::{Clocks, TinyGuest, clocks};

use crate::harness::{World, eventually, hypervisors, linux, skipped};
use crate::needs_qemu;

/// The length of the pause.
const QUIET_INTERVAL: Duration = Duration::from_secs(12);
/// The seconds that the answer of a guest in software emulation may take at most on its way.
const ON_THE_WAY: u64 = 5;
/// The word before a guest's two clocks on its console.
const WORD: &str = "vmcp-clocks ";

/// The seconds by which a guest's clocks are behind the host's.
struct Behind {
    system: u64,
    hardware: u64,
}

/// Asks the guest for its clocks, by a line on its console.
fn ask(world: &World, vm_id: &str) -> Behind {
    let read = || {
        let text = world.console(vm_id);
        let reported = text.lines().filter_map(|line| line.trim().strip_prefix(WORD));
        let reported = reported.filter_map(|line| line.split_once(' '));
        reported
            .filter_map(|(system, hardware)| Some((system.parse().ok()?, hardware.parse().ok()?)))
            .collect()
    };
    let before: Vec<(u64, u64)> = read();
    let line = format!("run echo {WORD}$(date +%s) $(cat /sys/class/rtc/rtc0/since_epoch)\n");
    world.type_at_console(vm_id, line.as_bytes());
    eventually("the guest tells its clocks", || read().len() > before.len());
    let host = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let (system, hardware) = read()[before.len()];
    Behind { system: host.saturating_sub(system), hardware: host.saturating_sub(hardware) }
}

#[test]
fn after_a_pause_qemus_guest_clock_is_late_and_its_hardware_clock_is_right() {
    const TEST: &str = "after_a_pause_qemus_guest_clock_is_late_and_its_hardware_clock_is_right";
    needs_qemu!();
    let Some((kernel, initrd)) = linux() else {
        return skipped(TEST, "no guest kernel; `make setup` makes it");
    };
    let world = World::started(&[]);
    let config = json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": 268435456},
        "boot": {"kernel_path": kernel, "initrd_path": initrd, "kernel_args": "console=ttyS0 cryptomgr.notests no_timer_check"},
    });
    world.create("vm", &config);
    world.boot("vm");
    world.wait_for_console("vm", "vmcp-guest: ready", 1);

    let before = ask(&world, "vm");
    assert!(before.hardware <= ON_THE_WAY, "{} s", before.hardware);
    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    let paused = Instant::now();
    eventually("the pause is over", || paused.elapsed() > QUIET_INTERVAL);
    world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();
    let after = ask(&world, "vm");
    assert!(
        after.system + ON_THE_WAY >= before.system + QUIET_INTERVAL.as_secs(),
        "the guest was {} s behind, and is {} s",
        before.system,
        after.system
    );
    assert!(after.hardware <= ON_THE_WAY, "{} s", after.hardware);

    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    world.assert_nothing_left();
}

/// The clocks that a guest has printed, in order.
fn printed(world: &World) -> Vec<Clocks> {
    world.console("vm").lines().filter_map(clocks).collect()
}

#[test]
fn the_guest_clocks_of_cloud_hypervisor_and_firecracker_continue_during_a_pause() {
    const TEST: &str = "the_guest_clocks_of_cloud_hypervisor_and_firecracker_continue_during_a_pause";
    for backend in hypervisors(TEST).into_iter().filter(|backend| *backend != "qemu") {
        let world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Clock);
        world.boot("vm");
        let info = world.info("vm");
        let version = info["backend_info"]["version"].as_str().unwrap().trim_start_matches('v');
        let major: u32 = version.split('.').next().unwrap().parse().unwrap();
        if backend == "cloudhypervisor" && major < 53 {
            skipped(&format!("{TEST} on {backend}"), &format!("version {version} does not move the clock"));
            continue;
        }
        eventually("the guest tells its clocks", || printed(&world).len() > 1);
        world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
        let before = printed(&world);
        let paused = Instant::now();
        eventually("the pause is over", || paused.elapsed() > QUIET_INTERVAL);
        world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();
        // The guest may have read the clocks of the next line before the pause.
        eventually("the guest tells its clocks again", || printed(&world).len() > before.len() + 1);
        let (before, after) = (before[before.len() - 1], *printed(&world).last().unwrap());
        for (clock, before, after) in
            [("kvm-clock", before.kvm_clock, after.kvm_clock), ("the counter", before.counter, after.counter)]
        {
            let gone = Duration::from_nanos(after - before);
            assert!(
                gone >= QUIET_INTERVAL,
                "{backend}: {clock} has gone on by {gone:?} in a pause of {QUIET_INTERVAL:?}"
            );
        }
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}
