//! WatchVms, ListVmEvents and WaitVm over the wire: what a client sees of a guest's life, and
//! across the daemon's death.

use std::collections::HashSet;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, call, vmm_pid};
use crate::needs_qemu;

fn is(message: &Value, kind: &str) -> bool {
    message["type"] == kind
}

/// Every event, page by page.
fn listed(world: &World, vm_id: &str) -> Vec<Value> {
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let request = json!({"vm_id": vm_id, "page_size": 3, "page_token": token});
        let page = world.call("ListVmEvents", &request).ok();
        all.extend(page["events"].as_array().cloned().unwrap_or_default());
        token = page["next_page_token"].as_str().unwrap_or_default().to_owned();
        if token.is_empty() {
            return all;
        }
    }
}

#[test]
fn a_watch_reports_the_start_and_the_end_of_a_guest() {
    needs_qemu!();
    let world = World::started(&[]);
    world.create("old", &world.tiny(TinyGuest::Idle));
    let stream = world.stream("WatchVms", &json!({}));
    let beginning = stream.until(|message| is(message, "synced"));
    let [present, synced] = beginning.as_slice() else { panic!("{beginning:#?}") };
    assert_eq!((&present["type"], &present["vm_id"]), (&json!("present"), &json!("old")));
    assert_eq!(present["state"], "VM_STATE_CREATED");
    assert!(synced.get("vm_id").is_none() && synced["token"].is_string(), "{synced}");

    let created = world.create("vm", &world.tiny(TinyGuest::PowerOff));
    world.boot("vm");
    let seen = stream.until(|message| is(message, "vmm-exited"));
    let kinds: Vec<_> = seen.iter().map(|it| it["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["created", "operation-started", "state-changed", "vmm-exited"]);
    let end = &seen[3];
    assert_eq!((&end["state"], &end["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("guest")));
    assert_eq!(end["status"]["reason"], "guest-power-off");
    assert_eq!(end["actor"], "system");
    for event in &seen[..3] {
        assert_eq!(event["actor"], "anonymous@127.0.0.1");
        assert_eq!(event["uid"], created["uid"]);
        assert_ne!(event["token"], synced["token"]);
    }
    assert_eq!((&seen[0]["cause"], &seen[2]["cause"]), (&json!("CreateVm"), &json!("BootVm")));
    assert_eq!(world.info("vm")["state"], "VM_STATE_SHUTDOWN", "a read knows what an event told");

    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    let rest = stream.until(|message| is(message, "deleted"));
    let trail = listed(&world, "vm");
    assert_eq!(trail, [seen, rest].concat(), "the trail of a VM that is gone is what the watch told");
    world.call("ListVmEvents", &json!({"page_size": -1})).error("invalid_argument");
    world.call("ListVmEvents", &json!({"page_token": "nonsense"})).error("invalid_argument");
}

#[test]
fn a_watch_resumes_after_a_killed_daemon() {
    needs_qemu!();
    let mut world = World::started(&[]);
    let stream = world.stream("WatchVms", &json!({}));
    let synced = stream.next();
    assert!(is(&synced, "synced"), "{synced}");
    world.create("vm", &world.tiny(TinyGuest::Idle));
    world.boot("vm");
    let mut seen = stream.until(|message| message["state"] == "VM_STATE_RUNNING");
    let last = seen.last().unwrap()["token"].clone();
    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    world.stop(Signal::KILL);
    world.start();
    world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();

    let resumed = world.stream("WatchVms", &json!({"resume_token": last}));
    seen.extend(resumed.until(|message| is(message, "state-changed") && message["cause"] == "ResumeVm"));
    assert_eq!(seen, listed(&world, ""), "nothing lost, nothing twice, and no marker");
    let from_marker = world.stream("WatchVms", &json!({"resume_token": synced["token"]}));
    let again = from_marker.until(|message| is(message, "state-changed") && message["cause"] == "ResumeVm");
    assert_eq!(again, seen);

    let (code, _) = world.stop(Signal::TERM);
    assert_eq!(code, Some(0));
    assert_eq!(resumed.error()["code"], "unavailable");
    world.start();
    for (token, code) in [("nonsense", "invalid_argument"), (&format!("e{}", "0".repeat(40)), "out_of_range")]
    {
        let refused = world.stream("WatchVms", &json!({"resume_token": token})).error();
        assert_eq!(refused["code"], code, "{refused}");
        assert!(!refused["message"].as_str().unwrap_or_default().is_empty());
    }
}

#[test]
fn many_watches_get_the_events_in_one_order() {
    let world = World::started(&[]);
    let label = |config: &Value| {
        let mut config = config.clone();
        config["metadata"] = json!({"team": "even"});
        config
    };
    let plain = world.tiny(TinyGuest::Idle);
    let labelled = label(&plain);
    let all = world.stream("WatchVms", &json!({}));
    let even = world.stream("WatchVms", &json!({"metadata_filter": {"team": "even"}}));
    assert!(is(&all.next(), "synced") && is(&even.next(), "synced"));
    std::thread::scope(|scope| {
        for number in 0..20 {
            let config = if number % 2 == 0 { &labelled } else { &plain };
            let url = world.url();
            scope.spawn(move || {
                let vm_id = format!("vm-{number}");
                call(url, "CreateVm", &json!({"vm_id": vm_id, "config": config})).ok();
                call(url, "DeleteVm", &json!({"vm_id": vm_id})).ok();
            });
        }
    });
    // A VM that neither filter has heard of ends both streams.
    world.create("last", &labelled);
    let reported = all.until(|message| message["vm_id"] == "last");
    assert_eq!(reported, listed(&world, ""));
    assert_eq!(reported.len(), 20 * 3 + 1);
    let tokens: HashSet<_> = reported.iter().map(|it| it["token"].as_str().unwrap()).collect();
    assert_eq!(tokens.len(), reported.len());
    let told_even = even.until(|message| message["vm_id"] == "last");
    assert_eq!(told_even.len(), 10 * 3 + 1);
    assert!(told_even.iter().all(|it| reported.contains(it)));
}

#[test]
fn events_are_kept_for_the_configured_time() {
    let mut world = World::started(&[("UNKEY_VMCP_EVENT_RETENTION", "1s")]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let token = listed(&world, "")[0]["token"].clone();
    world.create("vm2", &world.tiny(TinyGuest::Idle));
    crate::harness::eventually("the events expire", || listed(&world, "").is_empty());
    let message = world.stream("WatchVms", &json!({"resume_token": token})).error();
    assert_eq!(message["code"], "out_of_range", "{message}");
    world.stop(Signal::KILL);
    world.start();
    let message = world.stream("WatchVms", &json!({"resume_token": token})).error();
    assert_eq!(message["code"], "out_of_range", "{message}");
    let beginning = world.stream("WatchVms", &json!({"vm_id": "vm"})).until(|message| is(message, "synced"));
    assert_eq!(beginning.len(), 2, "the VM is there all the same: {beginning:#?}");
}

#[test]
fn a_wait_ends_with_the_power_off_of_the_guest() {
    needs_qemu!();
    let world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    world.create("off", &world.tiny(TinyGuest::PowerOff));
    world.boot("vm");
    world.boot("off");
    let url = world.url();
    let wait = |vm_id: &str, states: &[&str], seconds: i32| {
        let request = json!({"vm_id": vm_id, "states": states, "timeout_seconds": seconds});
        call(url, "WaitVm", &request)
    };
    let reached = wait("off", &["VM_STATE_SHUTDOWN", "VM_STATE_PAUSED"], 60).ok();
    assert_eq!((&reached["vm_id"], &reached["state"]), (&json!("off"), &json!("VM_STATE_SHUTDOWN")));
    assert_eq!(reached["status"]["reason"], "guest-power-off");
    let message = wait("vm", &["VM_STATE_SHUTDOWN"], 1).error("deadline_exceeded");
    assert!(message.contains("RUNNING"), "{message}");
    wait("unknown", &["VM_STATE_SHUTDOWN"], 1).error("not_found");
    wait("vm", &[], 1).error("invalid_argument");
    wait("vm", &["VM_STATE_UNSPECIFIED"], 1).error("invalid_argument");
    wait("vm", &["VM_STATE_SHUTDOWN"], -1).error("invalid_argument");
    wait("vm", &["VM_STATE_SHUTDOWN"], 100_000).error("invalid_argument");

    let pid = vmm_pid(&world.info("vm"));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait("vm", &["VM_STATE_SHUTDOWN"], 60).ok());
        crate::harness::signal(pid, Signal::KILL);
        assert_eq!(waiting.join().unwrap()["state"], "VM_STATE_SHUTDOWN");
    });
}
