//! `watch`: every event once, also across deaths of the server.

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{Running, World, has_qemu};

trials![
    a_watch_prints_the_start_and_the_end_of_a_guest,
    a_watch_continues_without_a_gap_after_a_restart_of_the_server,
    a_watch_accepts_a_name_before_its_vm_exists,
    a_watch_begins_after_a_given_event,
    an_unknown_token_is_refused_at_once,
];

/// Returns the events of `watch -o json`.
fn events(lines: &[String]) -> Vec<Value> {
    lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Returns the tokens of those events that have one and are of a VM.
fn tokens(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .filter(|event| event.get("vm_id").is_some())
        .filter_map(|event| event["token"].as_str())
        .collect()
}

fn a_watch_prints_the_start_and_the_end_of_a_guest() {
    if !has_qemu("watch::a_watch_prints_the_start_and_the_end_of_a_guest") {
        return;
    }
    let world = World::started(&[]);
    world.create("old", TinyGuest::Idle);
    let watch = Running::start(world.command(&["watch"]));
    Running::until(&watch.stdout, "present");
    world.create("vm", TinyGuest::PowerOff);
    world.run(&["boot", "vm"]).ok();
    let lines = Running::until(&watch.stdout, "vmm-exited");
    assert!(
        lines.iter().any(|line| line.contains("created") && line.contains("CreateVm by anonymous@127.0.0.1"))
    );
    let last = lines.last().unwrap();
    assert!(
        last.contains("  vm  ") && last.contains("shutdown") && last.contains("guest-power-off"),
        "{last}"
    );
}

fn a_watch_continues_without_a_gap_after_a_restart_of_the_server() {
    let mut world = World::started(&[]);
    let watch = Running::start(world.command(&["watch", "-o", "json"]));
    let mut lines = Running::until(&watch.stdout, "\"synced\"");
    for signal in [Signal::KILL, Signal::TERM] {
        let name = format!("before-{}", signal.as_raw());
        world.create(&name, TinyGuest::Idle);
        lines.extend(Running::until(&watch.stdout, &name));
        world.stop(signal);
        let said = Running::until(&watch.stderr, "lost");
        assert!(said.last().unwrap().starts_with(&format!("vmcp: lost {}", world.url())), "{said:?}");
        world.start();
        // The first event after the loss is what tells that the server is back.
        let name = format!("after-{}", signal.as_raw());
        world.create(&name, TinyGuest::Idle);
        lines.extend(Running::until(&watch.stdout, &name));
        Running::until(&watch.stderr, "again");
    }
    let seen = events(&lines);
    let recorded = world.call("ListVmEvents", &json!({}));
    let recorded = recorded["events"].as_array().unwrap();
    assert_eq!(tokens(&seen), tokens(recorded), "every event once, in order");
    assert_eq!(
        seen.iter().filter(|event| event["type"] == "synced").count(),
        1,
        "it resumed, and did not begin anew"
    );
}

fn a_watch_accepts_a_name_before_its_vm_exists() {
    let world = World::started(&[]);
    let watch = Running::start(world.command(&["watch", "later", "-o", "json"]));
    Running::until(&watch.stdout, "\"synced\"");
    world.create("other", TinyGuest::Idle);
    world.create("later", TinyGuest::Idle);
    let lines = Running::until(&watch.stdout, "\"later\"");
    assert!(lines.iter().all(|line| !line.contains("other")), "{lines:?}");
}

fn a_watch_begins_after_a_given_event() {
    let world = World::started(&[]);
    world.create("a", TinyGuest::Idle);
    world.create("b", TinyGuest::Idle);
    let recorded = world.run(&["events", "a", "-o", "json"]).json();
    let token = recorded["events"][0]["token"].as_str().unwrap();
    let watch = Running::start(world.command(&["watch", "--resume-token", token, "-o", "name"]));
    assert_eq!(Running::until(&watch.stdout, "b"), ["b"]);
}

fn an_unknown_token_is_refused_at_once() {
    let world = World::started(&[]);
    let error = world.run(&["watch", "--resume-token", "nonsense"]).failed(13);
    assert!(error.contains("(invalid_argument)") || error.contains("resume_token"), "{error}");
}
