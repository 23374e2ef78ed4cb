//! The VMM is killed, crashes or hangs: while its guest runs, stands still, is being shut down or is being started.
//!
//! The states without a VMM, CREATED and SHUTDOWN, have nothing to be signalled.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{Answer, World, call, eventually, hypervisors, is_alive, pause, signal, vmm_pid};

/// Where the VM is when its VMM is signalled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Running,
    Paused,
    /// ShutdownVm waits for a guest that ignores it.
    Stopping,
}

const EVERYWHERE: [At; 3] = [At::Running, At::Paused, At::Stopping];

/// Calls a method on another thread.
fn begin(world: &World, method: &'static str, body: Value) -> JoinHandle<Answer> {
    let url = world.url().to_owned();
    std::thread::spawn(move || call(&url, method, &body))
}

/// Brings a new VM to where it is to be signalled; answers its pid, and the call that is under way.
fn bring(world: &World, backend: &str, at: At) -> (u32, Option<JoinHandle<Answer>>) {
    world.create_on(backend, "vm", TinyGuest::Idle);
    world.boot("vm");
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
    let pid = vmm_pid(&world.info("vm"));
    match at {
        At::Running => (pid, None),
        At::Paused => {
            world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
            (pid, None)
        }
        At::Stopping => {
            let asked = begin(world, "ShutdownVm", json!({"vm_id": "vm", "timeout_seconds": 80}));
            world.wait_for("vm", "being shut down", |info| info["status"]["phase"] == "stopping");
            (pid, Some(asked))
        }
    }
}

#[test]
fn a_vmm_killed_in_any_state_is_shut_down_and_can_be_started() {
    for backend in hypervisors("a_vmm_killed_in_any_state_is_shut_down_and_can_be_started") {
        let world = World::started(&[]);
        for deadly in [Signal::KILL, Signal::SEGV] {
            for at in EVERYWHERE {
                let (pid, asked) = bring(&world, backend, at);
                // Again and again: a program in Rust takes the first SIGSEGV that comes from outside for a stray one.
                eventually("the VMM dies", || {
                    signal(pid, deadly);
                    !is_alive(pid)
                });
                let place = format!("{backend}, {at:?}, {deadly:?}");
                let info = world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
                match asked {
                    // It has ended, which is what was asked for.
                    Some(asked) => {
                        assert_eq!(asked.join().unwrap().ok()["state"], "VM_STATE_SHUTDOWN", "{place}")
                    }
                    None => {
                        assert_eq!(info["status"]["phase"], "failed", "{place}: {info:#}");
                        assert_eq!(info["status"]["reason"], "vmm-failed", "{place}: {info:#}");
                        assert_ne!(info["status"]["message"], "", "{place}: {info:#}");
                    }
                }
                // The socket and the lock that the dead one left are in nobody's way.
                world.boot("vm");
                world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2);
                world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
                world.assert_nothing_left();
            }
        }
    }
}

#[test]
fn a_vmm_that_hangs_in_any_state_keeps_the_state_until_force_ends_it() {
    for backend in hypervisors("a_vmm_that_hangs_in_any_state_keeps_the_state_until_force_ends_it") {
        let world = World::started(&[]);
        for at in EVERYWHERE {
            let (pid, asked) = bring(&world, backend, at);
            signal(pid, Signal::STOP);
            let place = format!("{backend}, {at:?}");
            let state = if at == At::Paused { "VM_STATE_PAUSED" } else { "VM_STATE_RUNNING" };
            if at != At::Stopping {
                let info =
                    world.wait_for("vm", "unreachable", |info| info["status"]["phase"] == "unreachable");
                assert_eq!(info["state"], state, "{place}: the last proven state");
                world.call("ShutdownVm", &json!({"vm_id": "vm"})).error("unavailable");
            }
            assert_eq!(world.info("vm")["state"], state, "{place}");
            assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 1);
            assert_eq!(world.get("/_/health").status, 200);
            assert!(is_alive(pid), "{place}: nobody touches it");
            let down = world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
            assert_eq!((&down["state"], &down["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("sigkill")));
            assert!(!is_alive(pid), "{place}: success means that it has gone");
            if let Some(asked) = asked {
                asked.join().unwrap().error("aborted");
            }
            world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
            world.assert_nothing_left();
        }
    }
}

/// A hypervisor that does `first`, and is itself from then on. It answers `--version` at once.
fn world_with(backend: &str, first: &str) -> (tempfile::TempDir, World) {
    let (program, variable) = match backend {
        "qemu" => ("qemu-system-x86_64", "UNKEY_VMCP_QEMU_BINARY"),
        "cloudhypervisor" => ("cloud-hypervisor", "UNKEY_VMCP_CH_BINARY"),
        _ => ("firecracker", "UNKEY_VMCP_FC_BINARY"),
    };
    let real = std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join(program);
    let real = real.display();
    let script =
        format!("#!/bin/sh\ncase \"$1\" in --version|-version) ;; *) {first};; esac\nexec {real} \"$@\"\n");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let world = World::started(&[(variable, &path.display().to_string())]);
    (folder, world)
}

#[test]
fn a_vmm_killed_during_its_launch_leaves_nothing() {
    for backend in hypervisors("a_vmm_killed_during_its_launch_leaves_nothing") {
        for deadly in ["KILL", "SEGV"] {
            let again = format!("while kill -{deadly} $$; do sleep 0.01; done");
            // At once, and at some later step of the start; the last may come when the guest runs already.
            for first in [
                format!("kill -{deadly} $$"),
                format!("(sleep 0.01; {again}) &"),
                format!("(sleep 0.05; {again}) &"),
            ] {
                let place = format!("{backend}: {first}");
                let (_folder, world) = world_with(backend, &first);
                world.create_on(backend, "vm", TinyGuest::Idle);
                let boot = world.call("BootVm", &json!({"vm_id": "vm"}));
                if boot.status == 200 {
                    world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
                } else {
                    let message = boot.error("failed_precondition");
                    assert!(message.contains("could not boot"), "{place}: {message}");
                    let info = world.info("vm");
                    assert_eq!(info["state"], "VM_STATE_CREATED", "{place}: {info:#}");
                    assert_eq!(info["status"]["phase"], "failed", "{place}: {info:#}");
                }
                // The script's own part ends with what it signals.
                eventually("no process is left", || world.vmms().is_empty());
                world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
                world.assert_nothing_left();
            }
        }
    }
}

#[test]
fn a_vmm_that_hangs_during_its_launch_is_ended_by_force() {
    for backend in hypervisors("a_vmm_that_hangs_during_its_launch_is_ended_by_force") {
        for deletes in [false, true] {
            let (_folder, world) = world_with(backend, "kill -STOP $$");
            world.create_on(backend, "vm", TinyGuest::Idle);
            let boot = begin(&world, "BootVm", json!({"vm_id": "vm"}));
            world.wait_for("vm", "starting", |info| info["status"]["phase"] == "starting");
            eventually("its VMM is there", || !world.vmms().is_empty());
            assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 1);
            if deletes {
                let gone = world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
                assert!(gone["left_behind"].is_null(), "{backend}: {gone}");
                boot.join().unwrap().error("aborted");
            } else {
                world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
                boot.join().unwrap().error("aborted");
                assert_eq!(world.vmms(), Vec::<u32>::new(), "{backend}");
                assert_eq!(world.info("vm")["state"], "VM_STATE_SHUTDOWN", "{backend}");
                world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
            }
            world.assert_nothing_left();
        }
    }
}

/// Signals that arrive at the daemon without an end, from a thread of the test.
///
/// SIGSTOP and SIGCONT interrupt the waits of a program that handles no signal: `epoll_wait`, the
/// waits of futexes with a timeout and others fail with EINTR. SIGCHLD and SIGWINCH are the signals
/// that a terminal and a process manager send most often.
struct SignalFlood {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<u32>>,
}

impl SignalFlood {
    fn at(pid: u32) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let flood = move || {
            let mut rounds = 0;
            while !told.load(Ordering::Relaxed) {
                for each in [Signal::CHILD, Signal::WINCH, Signal::STOP, Signal::CONT] {
                    signal(pid, each);
                }
                rounds += 1;
                pause();
            }
            rounds
        };
        Self { ends, thread: Some(std::thread::spawn(flood)) }
    }

    /// Ends the flood, and returns the number of rounds.
    fn end(mut self) -> u32 {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for SignalFlood {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_daemon_interrupted_by_signals_all_the_time_carries_out_every_operation() {
    for backend in hypervisors("a_daemon_interrupted_by_signals_all_the_time_carries_out_every_operation") {
        let world = World::started(&[]);
        let flood = SignalFlood::at(world.pid());
        for _ in 0..3 {
            world.create_on(backend, "vm", TinyGuest::Idle);
            world.boot("vm");
            world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
            for method in ["PauseVm", "ResumeVm", "RebootVm"] {
                let body = if method == "RebootVm" {
                    json!({"vm_id": "vm", "force": true})
                } else {
                    json!({"vm_id": "vm"})
                };
                world.call(method, &body).ok();
            }
            assert_eq!(world.info("vm")["status"]["phase"], "running", "{backend}");
            world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
            let deleted = world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
            assert!(deleted["left_behind"].as_array().is_none_or(Vec::is_empty), "{deleted}");
        }
        let rounds = flood.end();
        assert!(rounds > 0, "{backend}: {rounds} rounds of signals");
        world.assert_nothing_left();
    }
}
