//! A disk without room, under the state and under the sockets. Each is a small file system of the test's own, in a mount
//! namespace that ends with it; making one takes root.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, eventually, hypervisors, is_alive, skipped, vmm_pid};
use crate::needs_qemu;

/// A mount namespace with a small file system in it. It ends with the test.
struct SmallDisk {
    holder: Child,
    dir: PathBuf,
}

impl SmallDisk {
    /// Mounts one on the folder `name` of `world` and has the world's daemons run where it is seen.
    fn under(world: &mut World, name: &str, size: &str, test: &str) -> Option<Self> {
        let dir = world.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        let script = "mount -t tmpfs -o \"$1\" tmpfs \"$2\" && echo mounted && exec sleep 900";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh", size]).arg(&dir);
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(mut holder) = started else {
            skipped(test, "there is no program `unshare`");
            return None;
        };
        let mut line = String::new();
        let _ = BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line);
        let pid = holder.id();
        let disk = Self {
            holder,
            dir: Path::new("/proc").join(pid.to_string()).join("root").join(dir.strip_prefix("/").unwrap()),
        };
        if line.trim() != "mounted" {
            skipped(test, "a file system can only be mounted by root");
            return None;
        }
        world.wrapper = ["nsenter", "--mount", "--target", &pid.to_string()].map(str::to_owned).into();
        Some(disk)
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut hog = fs::File::options().append(true).create(true).open(self.dir.join("hog")).unwrap();
        while hog.write_all(&[1; 4096]).is_ok() {}
    }

    /// Takes all the names that are left.
    fn fill_names(&self) {
        fs::create_dir_all(self.dir.join("names")).unwrap();
        let mut name = 0;
        while fs::File::create(self.dir.join(format!("names/{name}"))).is_ok() {
            name += 1;
        }
    }

    fn free(&self) {
        let _ = fs::remove_file(self.dir.join("hog"));
        let _ = fs::remove_dir_all(self.dir.join("names"));
    }

    /// The folders of VMs, where this disk is that of the sockets.
    fn folders(&self) -> usize {
        fs::read_dir(self.dir.join("vms")).map(Iterator::count).unwrap_or_default()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn on_a_full_state_directory_force_works_and_no_record_is_lost() {
    const TEST: &str = "on_a_full_state_directory_force_works_and_no_record_is_lost";
    needs_qemu!();
    let mut world = World::new(&[]);
    let Some(disk) = SmallDisk::under(&mut world, "state", "size=16m,mode=700", TEST) else { return };
    world.start();
    for name in ["deleted", "down", "stays"] {
        world.create(name, &world.tiny(TinyGuest::Idle));
        world.boot(name);
    }
    world.create("unstarted", &world.tiny(TinyGuest::Idle));
    let (down, stays) = (vmm_pid(&world.info("down")), vmm_pid(&world.info("stays")));
    disk.fill();

    // What the log has room for is still taken; then it is refused, and said why.
    let mut config = world.tiny(TinyGuest::Idle);
    config["metadata"] = json!({"ballast": "x".repeat(20_000)});
    let refused = (0..1000)
        .map(|number| world.call("CreateVm", &json!({"vm_id": format!("late-{number}"), "config": config})))
        .find(|answer| answer.status != 200);
    let message = refused.expect("the disk is full").error("resource_exhausted");
    assert!(message.contains("no room"), "{message}");
    let mut paused = false;
    loop {
        let method = if paused { "ResumeVm" } else { "PauseVm" };
        let answer = world.call(method, &json!({"vm_id": "stays"}));
        if answer.status != 200 {
            answer.error("resource_exhausted");
            break;
        }
        paused = !paused;
    }
    let info = world.info("stays");
    let shown = info["state"].clone();
    assert!(is_alive(stays) && shown != "VM_STATE_SHUTDOWN", "{info:#}");
    assert_eq!(world.get("/_/health").status, 200);
    assert!(world.call("ListVms", &json!({})).ok()["total_count"].as_i64().unwrap() >= 4);

    // Force works all the same, and what it has done is durable.
    for name in ["deleted", "unstarted"] {
        let gone = world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
        assert!(gone["left_behind"].is_null(), "{gone}");
    }
    let ended = world.call("ShutdownVm", &json!({"vm_id": "down", "force": true})).ok();
    assert_eq!(ended["state"], "VM_STATE_SHUTDOWN");
    assert!(!is_alive(down));
    disk.fill();
    world.stop(Signal::KILL);
    disk.fill();
    world.start();
    for name in ["deleted", "unstarted"] {
        world.call("GetVmInfo", &json!({"vm_id": name})).error("not_found");
    }
    assert_eq!(world.info("down")["state"], "VM_STATE_SHUTDOWN");
    let info = world.info("stays");
    assert!(is_alive(stays) && vmm_pid(&info) == stays, "{info:#}");

    disk.free();
    world.create("new", &world.tiny(TinyGuest::Idle));
    world.boot("down");
    for name in ["down", "stays", "new"] {
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
    }
    let reserve = disk.dir.join("vmm-controlplane.db-reserve");
    eventually("room is kept again", || fs::metadata(&reserve).is_ok_and(|file| file.len() == 4 << 20));
    world.assert_nothing_left();
}

#[test]
fn on_a_full_runtime_directory_a_boot_fails_and_other_vms_run_on() {
    const TEST: &str = "on_a_full_runtime_directory_a_boot_fails_and_other_vms_run_on";
    for backend in hypervisors(TEST) {
        let mut world = World::new(&[]);
        let Some(disk) = SmallDisk::under(&mut world, "run", "size=8m,nr_inodes=300", TEST) else { return };
        world.start();
        for name in ["runs", "late"] {
            world.create_on(backend, name, TinyGuest::Idle);
        }
        world.boot("runs");
        let pid = vmm_pid(&world.info("runs"));

        disk.fill_names();
        let message = world.call("BootVm", &json!({"vm_id": "late"})).error("failed_precondition");
        assert!(message.to_lowercase().contains("no space left"), "{backend}: {message}");
        let info = world.info("late");
        assert_eq!(
            (&info["state"], &info["status"]["phase"]),
            (&json!("VM_STATE_CREATED"), &json!("failed")),
            "{backend}: {info:#}"
        );
        assert_eq!((world.vmms(), disk.folders()), (vec![pid], 1), "{backend}: nothing of it is left");
        world.call("PauseVm", &json!({"vm_id": "runs"})).ok();
        world.call("ResumeVm", &json!({"vm_id": "runs"})).ok();
        disk.free();

        // Without room for logs and consoles a VM runs, or its boot fails whole; and it can be deleted.
        disk.fill();
        let boot = world.call("BootVm", &json!({"vm_id": "late"}));
        let state = world.info("late")["state"].clone();
        assert_eq!(state == "VM_STATE_RUNNING", boot.status == 200, "{backend}: {}", boot.body);
        for name in ["runs", "late"] {
            let gone = world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
            assert!(gone["left_behind"].is_null(), "{backend}: {gone}");
        }
        assert_eq!((world.vmms(), disk.folders()), (vec![], 0), "{backend}");
        disk.free();
        world.create_on(backend, "late", TinyGuest::Idle);
        world.boot("late");
    }
}

/// The time of the last sample of `vm`, and its phase.
fn contact(world: &World, vm: &str) -> (i64, String) {
    let info = world.info(vm);
    let at = info["status"]["observed_at"].as_str().and_then(|at| at.parse().ok());
    (at.unwrap_or_default(), info["status"]["phase"].as_str().unwrap().to_owned())
}

#[test]
fn a_temporarily_full_runtime_directory_does_not_make_a_vm_unreachable() {
    const TEST: &str = "a_temporarily_full_runtime_directory_does_not_make_a_vm_unreachable";
    for backend in hypervisors(TEST) {
        let mut world = World::new(&[]);
        let Some(disk) = SmallDisk::under(&mut world, "run", "size=8m,nr_inodes=300", TEST) else { return };
        world.start();
        world.create_on(backend, "runs", TinyGuest::Idle);
        world.boot("runs");
        world.wait_for("runs", "sampled", |info| info["metrics"]["storage_stats"].is_object());
        for room in ["none", "enough"] {
            if room == "none" {
                disk.fill();
            } else {
                disk.free();
            }
            // Some samples later it still runs: a second is what they are apart here.
            let (begin, _) = contact(&world, "runs");
            eventually("it is asked again", || {
                let (at, phase) = contact(&world, "runs");
                assert_eq!(phase, "running", "{backend} with {room} room");
                at >= begin + 4
            });
        }
        let counted = |info: &serde_json::Value| info["metrics"]["storage_stats"].is_object();
        world.wait_for("runs", "counted again", counted);
        world.call("PauseVm", &json!({"vm_id": "runs"})).ok();
        world.call("ShutdownVm", &json!({"vm_id": "runs", "timeout_seconds": 1})).ok();
        world.call("DeleteVm", &json!({"vm_id": "runs"})).ok();
        assert_eq!((world.vmms(), disk.folders()), (vec![], 0), "{backend}");
    }
}
