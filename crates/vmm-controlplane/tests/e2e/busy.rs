//! One VM that hangs, with all the calls that wait for it, is nobody else's concern.

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, call, eventually, hypervisors, post, signal, vmm_pid};

/// More calls than may wait for one VM.
const CALLS: usize = 48;

#[test]
fn a_hanging_vm_with_a_full_mailbox_delays_no_reader_and_no_other_vm() {
    for backend in hypervisors("a_hanging_vm_with_a_full_mailbox_delays_no_reader_and_no_other_vm") {
        // Rarely sampled, so that it is the calls that find out.
        let world = World::started(&[("UNKEY_VMCP_METRICS_INTERVAL", "3600")]);
        for name in ["hung", "well"] {
            world.create_on(backend, name, TinyGuest::Idle);
            world.boot(name);
        }
        // The first sample is due one second after the start, whatever the interval.
        world.wait_for("hung", "sampled", |info| !info["metrics_observed_at"].is_null());
        signal(vmm_pid(&world.info("hung")), Signal::STOP);
        let calls: Vec<_> = (0..CALLS)
            .map(|_| {
                let url = world.url().to_owned();
                std::thread::spawn(move || call(&url, "PauseVm", &json!({"vm_id": "hung"})))
            })
            .collect();
        // The first that is refused says that the others wait.
        eventually("the inbox is full", || calls.iter().any(std::thread::JoinHandle::is_finished));

        let list = world.call("ListVms", &json!({})).ok();
        assert_eq!(list["total_count"], 2, "{backend}");
        assert_eq!(world.info("hung")["state"], "VM_STATE_RUNNING", "{backend}");
        assert_eq!(world.get("/_/health").status, 200, "{backend}");
        assert_eq!(world.get("/health").status, 200, "{backend}");
        let health = post(&format!("{}/grpc.health.v1.Health/Check", world.url()), &json!({})).ok();
        assert_eq!(health["status"], "SERVING", "{backend}");
        world.call("PauseVm", &json!({"vm_id": "well"})).ok();
        assert!(calls.iter().any(|call| !call.is_finished()), "{backend}: all of that while it hung");

        world.call("DeleteVm", &json!({"vm_id": "hung", "force": true})).ok();
        let codes: Vec<Value> =
            calls.into_iter().map(|call| call.join().unwrap().body["code"].take()).collect();
        let reported = |code: &str| codes.iter().filter(|reported| **reported == code).count();
        assert!(reported("unavailable") > 0, "{backend}: {codes:?}");
        assert_eq!(
            reported("unavailable") + reported("aborted") + reported("not_found"),
            CALLS,
            "{backend}: {codes:?}"
        );
        world.call("DeleteVm", &json!({"vm_id": "well", "force": true})).ok();
        world.assert_nothing_left();
    }
}
