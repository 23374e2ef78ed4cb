//! A libvirtd that is slow to answer costs no guest its time.

use std::time::{Duration, Instant};

use super::*;
use crate::harness::call;
use crate::shutdown::{NO_LINUX, linux_config};

#[test]
fn a_temporarily_stopped_libvirtd_causes_no_destroy() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    run(&world, "vm", TinyGuest::Button);
    libvirtd.freeze(true);
    let ended = std::thread::scope(|scope| {
        let url = world.url();
        let patient = json!({"vm_id": "vm", "timeout_seconds": 60});
        let call = scope.spawn(move || call(url, "ShutdownVm", &patient));
        // Longer than libvirtd once had to answer.
        let frozen = Instant::now();
        eventually("some seconds have passed", || frozen.elapsed() > Duration::from_secs(4));
        libvirtd.freeze(false);
        call.join().unwrap().ok()
    });
    assert_eq!((&ended["state"], &ended["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("acpi")));
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
}

#[test]
fn a_domain_of_a_silent_libvirtd_runs_on_without_force() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let pid = vmm_pid(&run(&world, "vm", TinyGuest::Idle));
    libvirtd.freeze(true);
    let refused = world.call("ShutdownVm", &json!({"vm_id": "vm", "timeout_seconds": 2}));
    let reported = refused.error("unavailable");
    assert!(reported.contains("force"), "{reported}");
    assert!(is_alive(pid), "nobody has ended it");
    libvirtd.freeze(false);
    world.wait_for("vm", "reachable", phase_is("running"));
    // A guest that hears nothing is powered off when its time is up, by a libvirtd that answers.
    let ended = world.call("ShutdownVm", &json!({"vm_id": "vm", "timeout_seconds": 1})).ok();
    assert_eq!(ended["ended_by"], "vmm", "{ended}");
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
}

#[test]
fn a_booting_domain_gets_the_shutdown_request_again() {
    const TEST: &str = "libvirt::a_booting_domain_gets_the_shutdown_request_again";
    let (helper, libvirtd) = libvirtd_or_skip!();
    let Some(config) = linux_config("qemu", "vmcp.deaf=10") else { return skipped(TEST, NO_LINUX) };
    let world = started(&helper, &libvirtd, &[]);
    world.create("vm", &config);
    world.boot("vm");
    world.wait_for_console("vm", "vmcp-guest: deaf", 1);
    // The first request comes now, and is lost.
    let ended = world.call("ShutdownVm", &json!({"vm_id": "vm", "timeout_seconds": 80})).ok();
    assert_eq!(ended["ended_by"], "acpi", "{ended}");
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.assert_nothing_left();
}
