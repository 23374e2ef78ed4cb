//! The state directory under attack: a database that is cut short or overwritten, and a second daemon.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use serde_json::json;
use vmm_store::SqliteStore;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{WAIT_TIMEOUT, World, is_alive, vmm_pid};
use crate::needs_qemu;

fn database(world: &World) -> PathBuf {
    world.dir.path().join("state/vmm-controlplane.db")
}

/// Every file below a folder, with its bytes and when they last changed.
fn files(dir: &Path) -> BTreeMap<PathBuf, (Vec<u8>, SystemTime)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let (path, about) = (entry.path(), entry.metadata().unwrap());
        if about.is_dir() {
            found.extend(files(&path));
        } else if about.is_file() {
            found.insert(path.clone(), (fs::read(&path).unwrap(), about.modified().unwrap()));
        }
    }
    found
}

/// Starts a daemon that is to fail, and answers what it says.
#[track_caller]
fn fails_to_start(world: &World) -> String {
    let mut child = world.command().stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    let deadline = Instant::now() + WAIT_TIMEOUT;
    let ended = loop {
        match child.try_wait().unwrap() {
            None if Instant::now() < deadline => rest(Duration::from_millis(50)),
            ended => break ended,
        }
    };
    // One that serves goes on until it is told to end.
    let _ = child.kill();
    let _ = child.wait();
    let message = reader.join().unwrap();
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "{message}");
    message
}

#[test]
fn a_damaged_database_is_refused_and_no_vm_is_touched() {
    needs_qemu!();
    let mut world = World::started(&[]);
    for name in ["runs", "created"] {
        world.create(name, &world.tiny(TinyGuest::Idle));
    }
    world.boot("runs");
    let pid = vmm_pid(&world.info("runs"));
    world.stop(Signal::TERM);
    // Its log, which would make a damaged database whole again, is moved into it.
    drop(SqliteStore::open(&world.dir.path().join("state")).unwrap());
    let path = database(&world);
    let whole = fs::read(&path).unwrap();
    let middle = whole.len() / 2;
    let cut = whole[..middle].to_vec();
    let overwritten = [&whole[..middle], &vec![0x5a; 3 * 4096], &whole[middle + 3 * 4096..]].concat();
    assert_eq!(overwritten.len(), whole.len());

    for damaged in [cut, overwritten, Vec::new()] {
        fs::write(&path, &damaged).unwrap();
        let message = fails_to_start(&world);
        assert!(message.contains("damaged") && message.contains("vmm-controlplane.db"), "{message}");
        assert!(message.contains("restore"), "it says what to do: {message}");
        assert_eq!(fs::read(&path).unwrap(), damaged, "nothing is repaired or made anew in silence");
        assert!(is_alive(pid), "the VM goes on");
    }
    fs::write(&path, &whole).unwrap();
    world.start();
    assert_eq!(vmm_pid(&world.info("runs")), pid);
    assert_eq!(world.info("created")["state"], "VM_STATE_CREATED");
    for name in ["runs", "created"] {
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
    }
    world.assert_nothing_left();
}

#[test]
fn a_database_overwritten_under_a_running_daemon_causes_no_false_answers() {
    needs_qemu!();
    for cut in [false, true] {
        let mut world = World::started(&[]);
        for number in 0..20 {
            let mut config = world.tiny(TinyGuest::Idle);
            config["metadata"] = json!({"ballast": "x".repeat(8000)});
            world.create(&format!("vm-{number}"), &config);
        }
        world.boot("vm-7");
        let pid = vmm_pid(&world.info("vm-7"));
        settle(&world);
        let file = fs::File::options().write(true).open(database(&world)).unwrap();
        let length = file.metadata().unwrap().len();
        if cut {
            file.set_len(length / 2).unwrap();
        } else {
            file.write_all_at(&vec![0x5a; usize::try_from(length).unwrap() / 2], length / 4).unwrap();
        }

        // Reads come from memory. A change is recorded or refused, and never half of each.
        assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 20);
        for (method, done) in [("PauseVm", "VM_STATE_PAUSED"), ("ResumeVm", "VM_STATE_RUNNING")] {
            let before = world.info("vm-7")["state"].clone();
            let answer = world.call(method, &json!({"vm_id": "vm-7"}));
            let now = world.info("vm-7")["state"].clone();
            if answer.status == 200 {
                assert_eq!(now, done);
            } else {
                let code = answer.body["code"].as_str().unwrap();
                assert!(["internal", "unavailable"].contains(&code), "{}", answer.body);
                assert!(now == before || now == done, "{now}");
            }
        }
        assert!(is_alive(pid));
        world.stop(Signal::KILL);
        // The log may hold all that was lost; if not, the next daemon says so.
        match SqliteStore::open(&world.dir.path().join("state")) {
            Ok(whole) => {
                drop(whole);
                world.start();
                assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 20);
                assert_eq!(vmm_pid(&world.info("vm-7")), pid);
            }
            Err(_) => {
                let message = fails_to_start(&world);
                assert!(message.contains("damaged"), "{message}");
            }
        }
        assert!(is_alive(pid), "the VM goes on");
    }
}

/// Waits until the daemon has nothing more to write: its log is moved into the database half a second after the last change.
fn settle(world: &World) {
    let state = world.dir.path().join("state");
    let mut before = files(&state);
    loop {
        rest(Duration::from_millis(900));
        let now = files(&state);
        if now == before {
            return;
        }
        before = now;
    }
}

#[expect(clippy::disallowed_methods, reason = "a test's own thread waits for other processes")]
fn rest(time: Duration) {
    std::thread::sleep(time);
}

#[test]
fn a_second_daemon_changes_nothing() {
    needs_qemu!();
    let world = World::started(&[("UNKEY_VMCP_METRICS_INTERVAL", "3600")]);
    for name in ["runs", "created"] {
        world.create(name, &world.tiny(TinyGuest::Idle));
    }
    world.boot("runs");
    world.wait_for_console("runs", &TinyGuest::Idle.banner(), 1);
    settle(&world);
    let (state, run) = (world.dir.path().join("state"), world.dir.path().join("run"));
    let (before, vms) = ((files(&state), files(&run)), (world.info("runs"), world.info("created")));

    let message = fails_to_start(&world);
    assert!(message.contains(&world.pid().to_string()), "the holder is named: {message}");

    let after = (files(&state), files(&run));
    assert_eq!(before.0.keys().collect::<Vec<_>>(), after.0.keys().collect::<Vec<_>>());
    assert!(before == after, "not a byte, not a time");
    let now = (world.info("runs"), world.info("created"));
    for (before, now) in [(&vms.0, &now.0), (&vms.1, &now.1)] {
        for key in ["uid", "state", "generation", "backend_info"] {
            assert_eq!(before[key], now[key], "{key}");
        }
    }
    assert!(is_alive(vmm_pid(&now.0)));
    world.call("PauseVm", &json!({"vm_id": "runs"})).ok();
}
