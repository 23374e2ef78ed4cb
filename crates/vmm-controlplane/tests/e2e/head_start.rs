//! A VMM that is started with CreateVm: it becomes the VM's own at BootVm, and is gone soon where nobody boots.

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::Guest;

use crate::harness::{World, eventually, hypervisors, is_alive, signal, vmm_pid};

/// So long that no test waits until one is given up by itself.
const LONG: (&str, &str) = ("UNKEY_VMCP_HEAD_START", "60");

#[test]
fn the_vmm_that_came_with_the_creation_runs_the_guest() {
    for backend in hypervisors("the_vmm_that_came_with_the_creation_runs_the_guest") {
        let world = World::started(&[LONG]);
        world.create_on(backend, "vm", Guest::Idle);
        let ahead = the_one_that_waits(&world);
        assert_eq!(world.info("vm")["state"], "VM_STATE_CREATED", "{backend}");
        world.boot("vm");
        assert_eq!(vmm_pid(&world.info("vm")), ahead, "{backend}");
        world.wait_for_console("vm", &Guest::Idle.banner(), 1);
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn one_that_nobody_boots_is_ended_and_the_vm_boots_later() {
    for backend in hypervisors("one_that_nobody_boots_is_ended_and_the_vm_boots_later") {
        let world = World::started(&[("UNKEY_VMCP_HEAD_START", "1")]);
        world.create_on(backend, "vm", Guest::Idle);
        the_one_that_waits(&world);
        eventually("it is given up", || world.vmms().is_empty());
        world.boot("vm");
        world.wait_for_console("vm", &Guest::Idle.banner(), 1);
    }
}

#[test]
fn deletion_ends_it() {
    for backend in hypervisors("deletion_ends_it") {
        let world = World::started(&[LONG]);
        for force in [false, true] {
            world.create_on(backend, "vm", Guest::Idle);
            let ahead = the_one_that_waits(&world);
            world.call("DeleteVm", &json!({"vm_id": "vm", "force": force})).ok();
            assert!(!is_alive(ahead), "{backend}");
        }
        world.assert_nothing_left();
    }
}

#[test]
fn one_that_dies_while_it_waits_does_no_harm() {
    for backend in hypervisors("one_that_dies_while_it_waits_does_no_harm") {
        let world = World::started(&[LONG]);
        world.create_on(backend, "vm", Guest::Idle);
        let ahead = the_one_that_waits(&world);
        signal(ahead, Signal::KILL);
        eventually("it is gone", || !is_alive(ahead));
        world.boot("vm");
        world.wait_for_console("vm", &Guest::Idle.banner(), 1);
    }
}

#[test]
fn none_is_left_by_a_daemon_that_stops_nor_by_the_next_one_where_it_was_killed() {
    for backend in hypervisors("none_is_left_by_a_daemon_that_stops_nor_by_the_next_one_where_it_was_killed")
    {
        let mut world = World::started(&[LONG]);
        world.create_on(backend, "vm", Guest::Idle);
        the_one_that_waits(&world);
        world.stop(Signal::TERM);
        assert!(world.vmms().is_empty(), "{backend}: {:?}", world.vmms());

        world.start();
        world.create_on(backend, "killed", Guest::Idle);
        the_one_that_waits(&world);
        world.stop(Signal::KILL);
        world.start();
        assert!(world.vmms().is_empty(), "{backend}: {:?}", world.vmms());
        assert_eq!(world.info("killed")["state"], "VM_STATE_CREATED", "{backend}");
        world.boot("killed");
    }
}

/// The process that waits to be asked for.
fn the_one_that_waits(world: &World) -> u32 {
    eventually("a VMM is started with the creation", || world.vmms().len() == 1);
    world.vmms()[0]
}
