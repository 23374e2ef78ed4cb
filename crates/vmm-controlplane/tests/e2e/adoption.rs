//! What a daemon may take for its own when it starts: nothing that is not proven to be the VMM on record.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::json;
use vmm_core::store::{Commit, ProcessIdentity, RecordChange, Store as _, VmRecord};
use vmm_host::process::{Lookup, boot_id, find_by_argument};
use vmm_store::SqliteStore;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, eventually, hypervisors, is_alive, signal, vmm_pid};

/// Changes the record of `vm` in the state directory of a daemon that has ended.
pub(crate) fn tamper(world: &World, change: impl FnOnce(&mut VmRecord)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = SqliteStore::open(&world.dir.path().join("state")).unwrap();
        let mut record =
            store.load().await.unwrap().vms.into_iter().find(|vm| vm.vm_id.as_str() == "vm").unwrap();
        change(&mut record);
        record.generation += 1;
        store.commit(Commit { change: RecordChange::Update(Box::new(record)), event: None }).await.unwrap();
        store.close().await.unwrap();
    });
}

/// A process that has nothing to do with any VM, and its identity. It ends with the test.
struct Bystander(Child, ProcessIdentity);

impl Bystander {
    fn start() -> Self {
        let marker = tempfile::tempdir().unwrap();
        // A shell that waits for what nobody will say, and has the marker among its arguments.
        let mut waits = Command::new("sh");
        waits.args(["-c", "read line", "sh"]).arg(marker.path()).stdin(Stdio::piped());
        let child = waits.spawn().unwrap();
        let found =
            || find_by_argument(marker.path()).unwrap().into_iter().find(|it| it.identity.pid == child.id());
        eventually("the bystander runs", || found().is_some());
        let identity = found().unwrap().identity;
        Self(child, identity)
    }

    fn lives(&self) -> bool {
        is_alive(self.0.id())
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running VM whose daemon has been killed; answers the pid of its VMM.
fn orphaned(world: &mut World, backend: &str) -> u32 {
    world.create_on(backend, "vm", TinyGuest::Idle);
    world.boot("vm");
    let pid = vmm_pid(&world.info("vm"));
    world.stop(Signal::KILL);
    pid
}

#[test]
fn a_reused_pid_is_not_signalled() {
    for backend in hypervisors("a_reused_pid_is_not_signalled") {
        let bystander = Bystander::start();
        let mut world = World::started(&[]);
        let pid = orphaned(&mut world, backend);
        signal(pid, Signal::KILL);
        eventually("the VMM is gone", || !is_alive(pid));
        // The number was given to another process since; its start time is not the one on record.
        tamper(&world, |record| record.run.as_mut().unwrap().process.pid = bystander.1.pid);
        world.start();
        let info = world.info("vm");
        assert_eq!(info["state"], "VM_STATE_SHUTDOWN", "{backend}: {info:#}");
        assert!(bystander.lives());
        // The socket that the dead one left is stale, and in nobody's way.
        world.boot("vm");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert!(bystander.lives(), "{backend}: nothing is touched that is not proven ours");
        world.assert_nothing_left();
    }
}

#[test]
fn a_process_of_another_boot_of_the_host_is_not_signalled() {
    for backend in hypervisors("a_process_of_another_boot_of_the_host_is_not_signalled") {
        let bystander = Bystander::start();
        let mut world = World::started(&[]);
        let pid = orphaned(&mut world, backend);
        signal(pid, Signal::KILL);
        eventually("the VMM is gone", || !is_alive(pid));
        // Pid and start time are those of a living process, as chance may have it after the host was restarted.
        tamper(&world, |record| {
            let boot_id = "00000000-0000-4000-8000-000000000000".to_owned();
            record.run.as_mut().unwrap().process = ProcessIdentity { boot_id, ..bystander.1.clone() };
        });
        world.start();
        let info = world.info("vm");
        assert_eq!(info["state"], "VM_STATE_SHUTDOWN", "{backend}: {info:#}");
        assert_eq!(info["status"]["reason"], "host-reboot", "{backend}: {info:#}");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert!(bystander.lives(), "{backend}");
        world.assert_nothing_left();
    }
}

/// The VMM's socket, as GetVmInfo tells it.
fn socket(world: &World) -> PathBuf {
    PathBuf::from(world.info("vm")["backend_info"]["socket"].as_str().unwrap())
}

#[test]
fn a_silent_socket_is_unreachable_and_delays_no_other_vm() {
    for backend in hypervisors("a_silent_socket_is_unreachable_and_delays_no_other_vm") {
        let mut world = World::started(&[]);
        world.create_on(backend, "other", TinyGuest::Idle);
        world.create_on(backend, "vm", TinyGuest::Idle);
        world.boot("vm");
        let (socket, pid) = (socket(&world), vmm_pid(&world.info("vm")));
        world.stop(Signal::KILL);
        let kept = socket.with_extension("kept");
        std::fs::rename(&socket, &kept).unwrap();
        let silent = UnixListener::bind(&socket).unwrap();
        world.start();
        let info = world.info("vm");
        assert_eq!(
            (&info["state"], &info["status"]["phase"]),
            (&json!("VM_STATE_RUNNING"), &json!("unreachable")),
            "{backend}: {info:#}"
        );
        assert!(is_alive(pid), "{backend}: silence is no death");
        world.boot("other");
        world.call("PauseVm", &json!({"vm_id": "vm"})).error("unavailable");

        // With the right socket again it is taken up again by itself.
        drop(silent);
        std::fs::rename(&kept, &socket).unwrap();
        world.wait_for("vm", "reachable again", |info| info["status"]["phase"] == "running");
        assert_eq!(vmm_pid(&world.info("vm")), pid);
        for name in ["vm", "other"] {
            world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
        }
        assert!(!is_alive(pid));
        world.assert_nothing_left();
    }
}

#[test]
fn the_recorded_identity_is_that_of_the_vmm() {
    // What the tests above rely on: the record says which process it is, and the proof holds for that one alone.
    for backend in hypervisors("the_recorded_identity_is_that_of_the_vmm") {
        let mut world = World::started(&[]);
        let pid = orphaned(&mut world, backend);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tamper(&world, |record| {
            let identity = record.run.clone().unwrap().process;
            assert_eq!((identity.pid, &identity.boot_id), (pid, &boot_id().unwrap()));
            let _guard = runtime.enter();
            assert!(matches!(vmm_host::process::adopt(&identity), Lookup::Alive(_)));
            let other = ProcessIdentity { start_ticks: identity.start_ticks + 1, ..identity };
            assert!(matches!(vmm_host::process::adopt(&other), Lookup::Gone));
        });
        world.start();
        assert_eq!(vmm_pid(&world.info("vm")), pid);
    }
}
