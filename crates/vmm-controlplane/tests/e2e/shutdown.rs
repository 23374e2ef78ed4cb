//! ShutdownVm without force: the time belongs to the guest, however slow its VMM is.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{
    World, call, eventually, hypervisors, is_alive, linux, on_path, pause, signal, skipped, vmm_pid,
};

pub(crate) const NO_LINUX: &str =
    "no Linux that this hypervisor boots fast enough here; `make setup` makes the kernel";

/// Starts a guest that obeys its button, and waits until it listens. `false`, and a word about it, where there is none for this
/// hypervisor.
fn run_obedient(world: &World, backend: &str, test: &str) -> bool {
    let (config, ready) = match backend {
        "qemu" => (world.tiny(TinyGuest::Button), TinyGuest::Button.banner()),
        "firecracker" => (world.tiny(TinyGuest::Obey), TinyGuest::Obey.banner()),
        _ => match linux_config(backend, "") {
            Some(config) => (config, "vmcp-guest: ready".to_owned()),
            None => {
                skipped(&format!("{test} on {backend}"), NO_LINUX);
                return false;
            }
        },
    };
    world.call("CreateVm", &json!({"vm_id": backend, "backend": backend, "config": config})).ok();
    world.boot(backend);
    world.wait_for_console(backend, &ready, 1);
    true
}

/// A VM with Linux, where this hypervisor can run it here: Firecracker boots no bzImage, and a KVM in software is far too slow.
pub(crate) fn linux_config(backend: &str, arguments: &str) -> Option<Value> {
    let able = match backend {
        "qemu" => true,
        "firecracker" => false,
        _ => vmm_host::kvm::hardware_virtualisation(),
    };
    let (kernel, initrd) = linux().filter(|_| able)?;
    let arguments = format!("console=ttyS0 cryptomgr.notests no_timer_check {arguments}");
    Some(json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": "268435456"},
        "boot": {"kernel_path": kernel, "initrd_path": initrd, "kernel_args": arguments},
    }))
}

#[test]
fn a_temporarily_stopped_vmm_does_not_shorten_the_guest_timeout() {
    const TEST: &str = "a_temporarily_stopped_vmm_does_not_shorten_the_guest_timeout";
    // Rarely sampled, so that nobody notices the silence before the call.
    let world = World::started(&[("UNKEY_VMCP_METRICS_INTERVAL", "3600")]);
    for backend in hypervisors(TEST) {
        if !run_obedient(&world, backend, TEST) {
            continue;
        }
        let pid = vmm_pid(&world.info(backend));
        signal(pid, Signal::STOP);
        let (url, body) = (world.url().to_owned(), json!({"vm_id": backend, "timeout_seconds": 60}));
        let shutting_down = std::thread::spawn(move || call(&url, "ShutdownVm", &body));
        // Longer than a single request to a VMM waits for its answer.
        let until = Instant::now() + Duration::from_secs(7);
        while Instant::now() < until {
            assert!(is_alive(pid), "{backend}: killed while it had time");
            pause();
        }
        signal(pid, Signal::CONT);
        let ended = shutting_down.join().unwrap().ok();
        let by_guest = if backend == "firecracker" { "ctrl-alt-del" } else { "acpi" };
        assert_eq!(ended["ended_by"], by_guest, "{backend}: {ended}");
    }
}

#[test]
fn a_silent_vmm_is_ended_by_force_alone() {
    const TEST: &str = "a_silent_vmm_is_ended_by_force_alone";
    let world = World::started(&[("UNKEY_VMCP_METRICS_INTERVAL", "3600")]);
    for backend in hypervisors(TEST) {
        for method in ["ShutdownVm", "RebootVm"] {
            let vm_id = format!("{backend}-{method}");
            world.create_on(backend, &vm_id, TinyGuest::Idle);
            world.boot(&vm_id);
            world.wait_for_console(&vm_id, &TinyGuest::Idle.banner(), 1);
            let pid = vmm_pid(&world.info(&vm_id));
            signal(pid, Signal::STOP);
            let message =
                world.call(method, &json!({"vm_id": vm_id, "timeout_seconds": 2})).error("unavailable");
            assert!(message.contains("use force"), "{backend}: {message}");
            let info = world.info(&vm_id);
            assert!(is_alive(pid), "{backend}");
            assert_eq!(
                (&info["state"], &info["status"]["phase"]),
                (&json!("VM_STATE_RUNNING"), &json!("unreachable")),
                "{backend}: {info:#}"
            );
            let ended = world.call("ShutdownVm", &json!({"vm_id": vm_id, "force": true})).ok();
            assert_eq!(ended["ended_by"], "sigkill", "{backend}");
            assert!(!is_alive(pid), "{backend}");
            world.call("DeleteVm", &json!({"vm_id": vm_id})).ok();
        }
    }
    world.assert_nothing_left();
}

#[test]
fn a_booting_guest_gets_the_shutdown_request_again() {
    const TEST: &str = "a_booting_guest_gets_the_shutdown_request_again";
    let world = World::started(&[]);
    for backend in hypervisors(TEST) {
        let Some(config) = linux_config(backend, "vmcp.deaf=10") else {
            skipped(&format!("{TEST} on {backend}"), NO_LINUX);
            continue;
        };
        world.call("CreateVm", &json!({"vm_id": backend, "backend": backend, "config": config})).ok();
        world.boot(backend);
        world.wait_for_console(backend, "vmcp-guest: deaf", 1);
        // The first request comes now, and is lost; the guest listens long before its time is up.
        let ended = world.call("ShutdownVm", &json!({"vm_id": backend, "timeout_seconds": 80})).ok();
        assert_eq!(ended["ended_by"], "acpi", "{backend}: {ended}");
        assert!(world.console(backend).contains("vmcp-guest: poweroff cause=power-button"), "{backend}");
    }
}

/// Linux needs longer than three seconds in software emulation until it hears its button.
#[test]
fn linux_obeys_a_shutdown_three_seconds_after_its_start() {
    const TEST: &str = "linux_obeys_a_shutdown_three_seconds_after_its_start";
    let Some(config) = linux_config("qemu", "").filter(|_| on_path("qemu-system-x86_64")) else {
        return skipped(TEST, NO_LINUX);
    };
    let world = World::started(&[]);
    world.create("vm", &config);
    world.boot("vm");
    let booted = Instant::now();
    eventually("three seconds have passed", || booted.elapsed() > Duration::from_secs(3));
    let ended = world.call("ShutdownVm", &json!({"vm_id": "vm", "timeout_seconds": 80})).ok();
    assert_eq!(ended["ended_by"], "acpi", "{ended}");
    assert!(world.console("vm").contains("vmcp-guest: poweroff cause=power-button"));
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.assert_nothing_left();
}
