//! The clock of a guest that was paused, as docs/api-reference.md tells of it.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use crate::harness::{World, eventually, linux, skipped};
use crate::needs_qemu;

/// The length of the pause.
const PAUSE: Duration = Duration::from_secs(12);
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
fn ask(world: &World, console: &mut UnixStream, vm_id: &str) -> Behind {
    let read = || {
        let text = world.console(vm_id);
        let told = text.lines().filter_map(|line| line.trim().strip_prefix(WORD));
        let told = told.filter_map(|line| line.split_once(' '));
        told.filter_map(|(system, hardware)| Some((system.parse().ok()?, hardware.parse().ok()?))).collect()
    };
    let before: Vec<(u64, u64)> = read();
    let line = format!("run echo {WORD}$(date +%s) $(cat /sys/class/rtc/rtc0/since_epoch)\n");
    console.write_all(line.as_bytes()).unwrap();
    eventually("the guest tells its clocks", || read().len() > before.len());
    let host = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let (system, hardware) = read()[before.len()];
    Behind { system: host.saturating_sub(system), hardware: host.saturating_sub(hardware) }
}

#[test]
fn after_a_pause_qemus_guest_is_behind_and_its_hardware_clock_is_right() {
    const TEST: &str = "after_a_pause_qemus_guest_is_behind_and_its_hardware_clock_is_right";
    needs_qemu!();
    let Some((kernel, initrd)) = linux() else {
        return skipped(TEST, "no guest kernel; `make setup` makes it");
    };
    let world = World::started(&[]);
    let config = json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": 268435456},
        "boot": {"kernel_path": kernel, "initrd_path": initrd, "kernel_args": "console=ttyS0 cryptomgr.notests"},
    });
    let created = world.create("vm", &config);
    world.boot("vm");
    world.wait_for_console("vm", "vmcp-guest: ready", 1);
    let uid = created["uid"].as_str().unwrap().replace('-', "");
    let socket = world.dir.path().join("run/vms").join(uid).join("console.sock");
    let mut console = UnixStream::connect(socket).unwrap();
    // A guest waits for whoever is connected and does not read.
    let mut output = console.try_clone().unwrap();
    let reading = std::thread::spawn(move || while output.read(&mut [0; 4096]).is_ok_and(|read| read > 0) {});

    let before = ask(&world, &mut console, "vm");
    assert!(before.hardware <= ON_THE_WAY, "{} s", before.hardware);
    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    let paused = Instant::now();
    eventually("the pause is over", || paused.elapsed() > PAUSE);
    world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();
    let after = ask(&world, &mut console, "vm");
    assert!(
        after.system + ON_THE_WAY >= before.system + PAUSE.as_secs(),
        "the guest was {} s behind, and is {} s",
        before.system,
        after.system
    );
    assert!(after.hardware <= ON_THE_WAY, "{} s", after.hardware);

    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    reading.join().unwrap();
    world.assert_nothing_left();
}
