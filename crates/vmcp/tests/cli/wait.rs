//! `wait`, also where the server or the VM goes away meanwhile.

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{Running, WAIT_TIMEOUT, World, has_qemu, pause};

trials![
    a_wait_ends_at_the_wanted_state,
    a_wait_that_times_out_names_the_state,
    a_wait_continues_after_a_restart_of_the_server,
    a_wait_for_a_deleted_vm_is_not_found,
];

fn a_wait_ends_at_the_wanted_state() {
    if !has_qemu("wait::a_wait_ends_at_the_wanted_state") {
        return;
    }
    let world = World::started(&[]);
    world.create("vm", TinyGuest::PowerOff);
    let mut wait = Running::start(world.command(&["wait", "vm", "shutdown", "-o", "json"]));
    world.run(&["boot", "vm"]).ok();
    assert_eq!(wait.code(), 0);
    let message: String = wait.stdout.iter().collect();
    let message: serde_json::Value = serde_json::from_str(&message).unwrap();
    assert_eq!((&message["vm_id"], &message["state"]), (&json!("vm"), &json!("VM_STATE_SHUTDOWN")));
    assert_eq!(message["status"]["reason"], "guest-power-off");
    assert_eq!(world.run(&["wait", "vm", "shutdown"]).ok(), "vm: shutdown (guest-power-off)\n");
}

fn a_wait_that_times_out_names_the_state() {
    let world = World::started(&[]);
    world.create("vm", TinyGuest::Idle);
    let error = world.run(&["wait", "vm", "running", "--timeout", "1s"]).failed(14);
    assert!(error.contains("CREATED") && error.contains("(deadline_exceeded)"), "{error}");
}

fn a_wait_continues_after_a_restart_of_the_server() {
    if !has_qemu("wait::a_wait_continues_after_a_restart_of_the_server") {
        return;
    }
    let mut world = World::started(&[]);
    world.create("vm", TinyGuest::Idle);
    world.run(&["boot", "vm"]).ok();
    let (mut wait, said) = wait_that_lost_its_server(&mut world);
    assert!(said.starts_with(&format!("vmcp: lost {}", world.url())), "{said}");
    // The daemon that comes back has taken up the guest, and the wait is told of its end.
    world.run(&["shutdown", "vm", "--force"]).ok();
    assert_eq!(wait.code(), 0);
    assert!(wait.stdout.iter().any(|line| line.starts_with("vm: shutdown")));
    assert!(wait.stderr.iter().any(|line| line.ends_with("again")));
}

/// Kills the daemon under a wait, and starts it again. Returns the wait, and the first line that it
/// said. A wait that lost the server before it had begun fails, and is tried later in its life.
fn wait_that_lost_its_server(world: &mut World) -> (Running, String) {
    for turns in 1..20 {
        let wait = Running::start(world.command(&["wait", "vm", "shutdown"]));
        (0..turns * 10).for_each(|_| pause());
        world.stop(Signal::KILL);
        world.start();
        let said = wait.stderr.recv_timeout(WAIT_TIMEOUT).expect("the wait says something");
        if said.starts_with("vmcp: ") {
            return (wait, said);
        }
    }
    panic!("the wait never began");
}

fn a_wait_for_a_deleted_vm_is_not_found() {
    let world = World::started(&[]);
    world.create("vm", TinyGuest::Idle);
    let mut wait = Running::start(world.command(&["wait", "vm", "running", "shutdown"]));
    world.run(&["delete", "vm"]).ok();
    assert_eq!(wait.code(), 15);
    let error: String = wait.stderr.iter().collect();
    assert!(error.contains("(not_found)"), "{error}");
}
