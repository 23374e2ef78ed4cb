//! Consoles in trouble, on each hypervisor: a guest that prints without end, a client that stops reading, a daemon that is killed
//! meanwhile, an update that moves the console, and bytes that a terminal would act on.

use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::{TinyGuest, flood_byte};

use crate::console::Console;
use crate::harness::{WAIT_TIMEOUT, World, hypervisors, pause};

/// The history of consoles that are flooded.
const HISTORY: u64 = 16 << 10;
/// What a guest prints in this time may come on top of the history, because the daemon shares its CPUs with the guest here.
const SLACK: Duration = Duration::from_secs(3);
/// A block of the file system.
const BLOCK: u64 = 4096;

/// The kept console of a VM.
fn kept_file(world: &World, vm_id: &str) -> PathBuf {
    let uid = world.info(vm_id)["uid"].as_str().unwrap().replace('-', "");
    world.dir.path().join("run/vms").join(uid).join("console.log")
}

/// Creates and boots a VM that prints without end, and returns the position of its first number.
fn flood(world: &World, backend: &str, vm_id: &str) -> u64 {
    world.create_on(backend, vm_id, TinyGuest::Flood);
    world.boot(vm_id);
    let mut console = Console::stream(world, vm_id, &json!({"follow": true}));
    let banner = format!("{}\r\n", TinyGuest::Flood.banner());
    console.until(&banner, 1);
    assert_eq!(console.pieces[0].0, 0, "the stream begins with the first byte");
    (console.text().find(&banner).unwrap() + banner.len()) as u64
}

/// Fails unless each byte of `console` is the one that the guest printed at that position.
#[track_caller]
fn assert_flood(console: &Console, numbers: u64) {
    for (offset, bytes) in &console.pieces {
        for (place, byte) in bytes.iter().enumerate() {
            let position = offset + place as u64;
            if let Some(position) = position.checked_sub(numbers) {
                assert_eq!(*byte, flood_byte(position), "at {position} of the numbers");
            }
        }
    }
}

/// Reads until `console` has come to `position`.
#[track_caller]
fn read_to(console: &mut Console, position: u64) {
    while console.position() < position {
        assert!(console.take() && console.end.is_none(), "{} of {position}", console.position());
    }
}

/// Looks at a file that grows until it has `length` bytes. A guest on a busy host takes minutes, so that only a standstill is a
/// failure.
#[track_caller]
fn until_length(path: &PathBuf, length: u64, mut look: impl FnMut(&std::fs::Metadata)) {
    let mut last = (0, Instant::now());
    while last.0 < length {
        let facts = std::fs::metadata(path).unwrap();
        look(&facts);
        if facts.len() > last.0 {
            last = (facts.len(), Instant::now());
        }
        assert!(last.1.elapsed() < WAIT_TIMEOUT, "the guest prints no more after {} bytes", last.0);
        pause();
    }
}

#[test]
fn a_guest_that_prints_without_end_stays_within_its_history_and_delays_nobody() {
    const TEST: &str = "a_guest_that_prints_without_end_stays_within_its_history_and_delays_nobody";
    for backend in hypervisors(TEST) {
        let world = World::started(&[("UNKEY_VMCP_CONSOLE_HISTORY", &HISTORY.to_string())]);
        let numbers = flood(&world, backend, "flood");
        // This client sends its call and reads nothing.
        let (read, mut idle) = Console::unread(&world, "flood", &json!({"offset": 0, "follow": true}));
        world.create_on(backend, "other", TinyGuest::Idle);
        world.boot("other");
        let mut lengths: VecDeque<(Instant, u64)> = VecDeque::new();
        until_length(&kept_file(&world, "flood"), numbers + 12 * HISTORY, |facts| {
            let now = Instant::now();
            lengths.push_back((now, facts.len()));
            while lengths.get(1).is_some_and(|(at, _)| now.duration_since(*at) > SLACK) {
                lengths.pop_front();
            }
            let fresh = facts.len() - lengths[0].1;
            let taken = facts.blocks() * 512;
            assert!(
                taken <= 2 * HISTORY + fresh + 2 * BLOCK,
                "{backend}: {taken} bytes, {fresh} of them fresh"
            );
        });
        // The other VM, and the calls on the one that prints, go on.
        for vm_id in ["other", "flood"] {
            world.call("PauseVm", &json!({"vm_id": vm_id})).ok();
            world.type_at_console(vm_id, b"typed");
            world.call("ResumeVm", &json!({"vm_id": vm_id})).ok();
        }
        // The guest was not stopped by the client that does not read.
        let path = kept_file(&world, "flood");
        let now = std::fs::metadata(&path).unwrap().len();
        until_length(&path, now + HISTORY, |_| {});
        // A stream that begins before the history begins with the first byte that is kept.
        let mut late = Console::stream(&world, "flood", &json!({"offset": 0, "follow": true}));
        read_to(&mut late, now + 2 * HISTORY);
        let length = std::fs::metadata(&path).unwrap().len();
        let first = late.pieces[0].0;
        assert!((1..=length - HISTORY).contains(&first), "{backend}: {first} of {length}");
        assert_flood(&late, numbers);
        // The client reads again: what it missed is skipped, and nothing is wrong or doubled.
        read.send(()).unwrap();
        read_to(&mut idle, now);
        assert_flood(&idle, numbers);
        for vm_id in ["flood", "other"] {
            world.call("DeleteVm", &json!({"vm_id": vm_id, "force": true})).ok();
        }
        world.assert_nothing_left();
    }
}

#[test]
fn nothing_is_lost_when_the_daemon_is_killed_while_a_guest_prints() {
    const TEST: &str = "nothing_is_lost_when_the_daemon_is_killed_while_a_guest_prints";
    for backend in hypervisors(TEST) {
        let mut world = World::started(&[("UNKEY_VMCP_CONSOLE_HISTORY", "512M")]);
        let numbers = flood(&world, backend, "vm");
        let mut position = 0;
        for _ in 0..3 {
            let mut console = Console::stream(&world, "vm", &json!({"offset": position, "follow": true}));
            read_to(&mut console, position + 4096);
            world.stop(Signal::KILL);
            // The bytes of the stream that reached the client before its end.
            while console.end.is_none() && console.take() {}
            assert_eq!(
                console.pieces[0].0, position,
                "{backend}: the stream goes on where the one before ended"
            );
            let gaps = console.pieces.windows(2).filter(|two| two[0].0 + two[0].1.len() as u64 != two[1].0);
            assert_eq!(gaps.count(), 0, "{backend}: nothing within the history is left out");
            assert_flood(&console, numbers);
            position = console.position();
            world.start();
            world.wait_for_state("vm", "VM_STATE_RUNNING");
        }
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn every_byte_value_reaches_the_guest_and_comes_back() {
    const TEST: &str = "every_byte_value_reaches_the_guest_and_comes_back";
    for backend in hypervisors(TEST) {
        let world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Echo);
        world.boot("vm");
        let mut console = Console::stream(&world, "vm", &json!({"follow": true}));
        let banner = format!("{}\r\n", TinyGuest::Echo.banner());
        console.until(&banner, 1);
        world.wait_for_state("vm", "VM_STATE_RUNNING");
        // End of input, interrupt, stop of output, escape, the bytes of UTF-8, and all the others.
        let typed: Vec<u8> = (0..=255).collect();
        world.type_at_console("vm", &typed);
        let begin = (console.text().find(&banner).unwrap() + banner.len()) as u64;
        read_to(&mut console, begin + 256);
        let all: Vec<u8> = console.pieces.iter().flat_map(|(_, bytes)| bytes).copied().collect();
        assert_eq!(all[all.len() - 256..], typed, "{backend}");
        world.type_at_console("vm", b"and on");
        console.until("and on", 1);
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(console.read_to_end(), "");
        world.assert_nothing_left();
    }
}

#[test]
fn a_stream_follows_a_console_that_an_update_moves() {
    const TEST: &str = "a_stream_follows_a_console_that_an_update_moves";
    for backend in hypervisors(TEST) {
        let world = World::started(&[]);
        let banner = format!("{}\r\n", TinyGuest::Echo.banner());
        world.create_on(backend, "vm", TinyGuest::Echo);
        world.boot("vm");
        let mut kept = Console::stream(&world, "vm", &json!({"follow": true}));
        kept.until(&banner, 1);
        let mut moving = Console::stream(&world, "vm", &json!({"offset": kept.position(), "follow": true}));
        world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        let output = world.dir.path().join("own.log");
        let console = |config| json!({"vm_id": "vm", "fields": ["console"], "config": {"console": config}});
        world.call("UpdateVm", &console(json!({"enabled": true, "output": output}))).ok();
        world.boot("vm");
        moving.until(&banner, 1);
        assert_eq!(moving.pieces[0].0, 0, "{backend}: offsets count in the new file");
        world.type_at_console("vm", b"typed into the new file");
        moving.until("typed into the new file", 1);
        world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.call("UpdateVm", &console(json!({"enabled": false}))).ok();
        assert_eq!(moving.read_to_end(), "failed_precondition", "{backend}");
        world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
        world.assert_nothing_left();
    }
}
