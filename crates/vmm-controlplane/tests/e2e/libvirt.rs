//! QEMU through libvirt: what virsh does is seen, what we do virsh sees, and what is not ours is
//! left alone.
//!
//! Each test has a libvirtd of its own, see [`vmm_testkit::libvirtd`].

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::libvirtd::{self, Libvirtd};

use crate::harness::{World, eventually, is_alive, signal, skipped, vmm_pid};

/// A libvirtd and a helper, or the test says that it is skipped.
macro_rules! libvirtd_or_skip {
    () => {
        match libvirtd::helper().and_then(|helper| Ok((helper, Libvirtd::start()?))) {
            Ok(both) => both,
            Err(why) => return skipped(concat!(module_path!(), ":", line!()), &why),
        }
    };
}

mod deletion;
mod foreign;
mod interfaces;
mod kinds;
mod shutdown;
mod waits;

fn world(helper: &Path, uri: &str, more: &[(&str, &str)]) -> World {
    let path = with_helper(helper);
    let mut env = vec![("UNKEY_VMCP_QEMU_ENDPOINT", uri), ("PATH", &*path)];
    env.extend_from_slice(more);
    World::new(&env)
}

fn started(helper: &Path, libvirtd: &Libvirtd, more: &[(&str, &str)]) -> World {
    let mut world = world(helper, &libvirtd.uri(), more);
    world.start();
    world
}

/// The helper's folder in front of PATH.
fn with_helper(helper: &Path) -> String {
    let folder = helper.parent().unwrap().display();
    format!("{folder}:{}", std::env::var("PATH").unwrap_or_default())
}

fn run(world: &World, vm_id: &str, guest: TinyGuest) -> Value {
    world.create(vm_id, &world.tiny(guest));
    world.boot(vm_id);
    world.wait_for_console(vm_id, &guest.banner(), 1);
    world.info(vm_id)
}

fn reason(info: &Value) -> &str {
    info["status"]["reason"].as_str().unwrap_or_default()
}

fn phase_is(phase: &str) -> impl Fn(&Value) -> bool {
    move |info| info["status"]["phase"] == phase
}

#[test]
fn changes_by_virsh_and_by_this_program_are_seen_by_each_other() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let info = run(&world, "vm", TinyGuest::Button);
    assert_eq!(libvirtd.virsh(&["domuuid", "vm"]), info["uid"].as_str().unwrap());
    assert_eq!(libvirtd.virsh(&["domstate", "vm"]), "running");

    libvirtd.virsh(&["suspend", "vm"]);
    assert_eq!(reason(&world.wait_for_state("vm", "VM_STATE_PAUSED")), "paused-from-outside");
    libvirtd.virsh(&["resume", "vm"]);
    assert_eq!(reason(&world.wait_for_state("vm", "VM_STATE_RUNNING")), "resumed-from-outside");
    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    assert_eq!(libvirtd.virsh(&["domstate", "vm"]), "paused");
    world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();
    assert_eq!(libvirtd.virsh(&["domstate", "vm"]), "running");

    libvirtd.virsh(&["reset", "vm"]);
    world.wait_for_console("vm", &TinyGuest::Button.banner(), 2);
    libvirtd.virsh(&["destroy", "vm"]);
    assert_eq!(reason(&world.wait_for_state("vm", "VM_STATE_SHUTDOWN")), "vmm-told-to-end");
    libvirtd.virsh(&["start", "vm"]);
    let again = world.wait_for_state("vm", "VM_STATE_RUNNING");
    assert_eq!((reason(&again), &again["uid"]), ("started-from-outside", &info["uid"]));
    assert_ne!(vmm_pid(&again), vmm_pid(&info));
    world.wait_for_console("vm", &TinyGuest::Button.banner(), 3);
    libvirtd.virsh(&["shutdown", "vm"]);
    assert_eq!(reason(&world.wait_for_state("vm", "VM_STATE_SHUTDOWN")), "guest-power-off");

    // Undefined while it is down or while it runs: the VM is ours, and comes back.
    libvirtd.virsh(&["undefine", "vm"]);
    world.boot("vm");
    libvirtd.virsh(&["undefine", "vm"]);
    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
    world.boot("vm");
    assert_eq!(libvirtd.virsh(&["domstate", "vm"]), "running");
    let gone = world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    assert_eq!(gone["left_behind"], Value::Null, "{gone}");
    eventually("the domain is gone", || libvirtd.domains().is_empty() && libvirtd.qemus().is_empty());
    world.assert_nothing_left();
}

/// How often the audit trail of a VM tells of a reset from outside.
fn resets_told(world: &World, vm_id: &str) -> usize {
    let events = world.call("ListVmEvents", &json!({"vm_id": vm_id, "page_size": 1000})).ok();
    let events = events["events"].as_array().cloned().unwrap_or_default();
    events.iter().filter(|event| event["cause"] == "reset-from-outside").count()
}

#[test]
fn a_reset_by_virsh_is_reported() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let banner = TinyGuest::Button.banner();
    let mut config = world.tiny(TinyGuest::Button);
    config["restart_policy"] = json!({"mode": "RESTART_MODE_GUEST_REBOOT", "max_restarts": 1});
    world.create("vm", &config);
    world.boot("vm");
    world.wait_for_console("vm", &banner, 1);
    // An operator may reset as often as it pleases: the policy counts what the guest does by
    // itself.
    for reset in 1..=3 {
        libvirtd.virsh(&["reset", "vm"]);
        eventually("it is told", || resets_told(&world, "vm") == reset);
        let info = world.info("vm");
        assert_eq!((info["state"].as_str(), reason(&info)), (Some("VM_STATE_RUNNING"), "reset-from-outside"));
        assert_eq!(info["status"]["restarts"].as_i64().unwrap_or(0), 0, "{info:#}");
        world.wait_for_console("vm", &banner, 1 + reset);
    }
    // Ours is none, though QEMU tells of it in the same words; and one after it is not taken for
    // ours.
    world.call("RebootVm", &json!({"vm_id": "vm", "force": true})).ok();
    world.wait_for_console("vm", &banner, 5);
    assert_eq!(resets_told(&world, "vm"), 3);
    libvirtd.virsh(&["reset", "vm"]);
    eventually("it is told", || resets_told(&world, "vm") == 4);
    world.wait_for_console("vm", &banner, 6);
    // virsh reboot presses the button, and libvirt resets the guest that has shut down: the run
    // goes on.
    let pid = vmm_pid(&world.info("vm"));
    libvirtd.virsh(&["reboot", "vm"]);
    eventually("it is told", || resets_told(&world, "vm") == 5);
    world.wait_for_console("vm", &banner, 7);
    let info = world.info("vm");
    assert_eq!((info["state"].as_str(), vmm_pid(&info)), (Some("VM_STATE_RUNNING"), pid));
    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    libvirtd.virsh(&["reset", "vm"]);
    eventually("it is told", || resets_told(&world, "vm") == 6);
    assert_eq!(world.info("vm")["state"], "VM_STATE_PAUSED", "its CPUs stand as still as before");
    signal(pid, Signal::KILL);
    let down = world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
    assert_eq!(reason(&down), "vmm-failed", "how it nearly ended once is forgotten: {down:#}");

    // Where no reset may go on, QEMU ends at this one too, as it would for virsh without us.
    config["restart_policy"] = json!({"mode": "RESTART_MODE_NEVER"});
    world.create("never", &config);
    world.boot("never");
    world.wait_for_console("never", &banner, 1);
    world.call("RebootVm", &json!({"vm_id": "never", "force": true})).ok();
    world.wait_for_console("never", &banner, 2);
    // virsh fails where QEMU has ended before it answers; the end is what counts.
    let _ = libvirtd.try_virsh(&["reset", "never"]);
    let down = world.wait_for_state("never", "VM_STATE_SHUTDOWN");
    assert_eq!(reason(&down), "vmm-told-to-end", "{down:#}");
    assert!(down["status"]["message"].as_str().unwrap().contains("was reset through libvirt"), "{down:#}");
    for name in ["vm", "never"] {
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
    }
}

#[test]
fn a_restart_of_libvirtd_loses_no_vm() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let before = run(&world, "vm", TinyGuest::Idle);
    run(&world, "other", TinyGuest::Idle);

    libvirtd.stop();
    world.wait_for("vm", "unreachable", phase_is("unreachable"));
    assert_eq!(world.info("vm")["state"], "VM_STATE_RUNNING", "the last proven state");
    let refused = world.call("PauseVm", &json!({"vm_id": "vm"})).error("unavailable");
    assert!(refused.contains("unreachable"), "{refused}");
    // The sampler may notice the silence before the health page is brought up to date.
    eventually("unhealthy", || world.get("/_/health").status == 503);
    // Force needs no libvirtd, and an end is seen without it.
    let other = vmm_pid(&world.info("other"));
    world.call("ShutdownVm", &json!({"vm_id": "other", "force": true})).ok();
    assert!(!is_alive(other));

    libvirtd.start_again();
    let after = world.wait_for("vm", "reachable", phase_is("running"));
    assert_eq!((vmm_pid(&after), &after["uid"]), (vmm_pid(&before), &before["uid"]));
    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    world.call("ResumeVm", &json!({"vm_id": "vm"})).ok();
    eventually("healthy again", || world.get("/_/health").status == 200);
    world.boot("other");

    // While nobody can tell, one is stopped and one killed: both are told afterwards.
    libvirtd.stop();
    signal(vmm_pid(&world.info("vm")), Signal::KILL);
    world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
    libvirtd.start_again();
    libvirtd.virsh(&["suspend", "other"]);
    world.wait_for_state("other", "VM_STATE_PAUSED");
    for name in ["vm", "other"] {
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
    }
}

#[test]
fn doctor_examines_libvirt_beside_the_daemon_and_without_it() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let mut world = world(&helper, &libvirtd.uri(), &[]);
    let finding = |world: &World| {
        let output = world.command().args(["doctor", "--json"]).output().unwrap();
        let diagnosis: Value = serde_json::from_slice(&output.stdout).unwrap();
        let mut checks = diagnosis["checks"].as_array().unwrap().clone();
        checks.retain(|check| check["name"] == "backend qemu");
        (output.status.code(), checks[0]["finding"].as_str().unwrap().to_owned())
    };
    let (code, alone) = finding(&world);
    assert!(code == Some(0) && alone.contains(&libvirtd.uri()) && alone.contains("libvirt"), "{alone}");
    world.start();
    run(&world, "vm", TinyGuest::Idle);
    assert_eq!(finding(&world), (Some(0), alone));
    assert_eq!(world.info("vm")["status"]["phase"], "running");
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    libvirtd.stop();
    let (code, down) = finding(&world);
    assert!(code == Some(1) && down.contains("libvirt-daemon-system"), "{down}");
}

#[test]
fn a_hanging_libvirtd_does_not_prevent_force() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let pid = vmm_pid(&run(&world, "vm", TinyGuest::Idle));
    libvirtd.freeze(true);
    world.wait_for("vm", "unreachable", phase_is("unreachable"));
    world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
    assert!(!is_alive(pid), "its process has really gone");
    libvirtd.freeze(false);
    // A question from before the thaw may still run out of time, and then the connection is made
    // anew: UNAVAILABLE says to try again.
    eventually("it boots", || match world.call("BootVm", &json!({"vm_id": "vm"})) {
        answer if answer.status == 503 => false,
        answer => answer.ok()["state"] == "VM_STATE_RUNNING",
    });
    eventually("healthy again", || world.get("/_/health").status == 200);
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2);
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
}

#[test]
fn a_restarted_daemon_finds_its_domains() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let mut world = started(&helper, &libvirtd, &[]);
    for name in ["running", "paused", "destroyed", "restarted", "resumed"] {
        run(&world, name, TinyGuest::Idle);
    }
    for name in ["paused", "resumed"] {
        world.call("PauseVm", &json!({"vm_id": name})).ok();
    }
    let before = vmm_pid(&world.info("running"));
    let restarted = vmm_pid(&world.info("restarted"));
    world.stop(Signal::KILL);
    assert!(is_alive(before));
    libvirtd.virsh(&["destroy", "destroyed"]);
    libvirtd.virsh(&["destroy", "restarted"]);
    libvirtd.virsh(&["start", "restarted"]);
    libvirtd.virsh(&["resume", "resumed"]);
    world.start();

    assert_eq!(vmm_pid(&world.wait_for_state("running", "VM_STATE_RUNNING")), before);
    world.wait_for_state("paused", "VM_STATE_PAUSED");
    world.wait_for_state("destroyed", "VM_STATE_SHUTDOWN");
    world.wait_for_state("resumed", "VM_STATE_RUNNING");
    let found = world.wait_for_state("restarted", "VM_STATE_RUNNING");
    assert_ne!(vmm_pid(&found), restarted, "it is shown with the process that it has now");
    for name in ["running", "restarted", "resumed"] {
        world.call("PauseVm", &json!({"vm_id": name})).ok();
    }
    for name in ["running", "paused", "destroyed", "restarted", "resumed"] {
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
    }
    eventually("nothing is left", || libvirtd.domains().is_empty() && libvirtd.qemus().is_empty());
}

/// Defines the domain `name` as another client of libvirt would.
fn define(world: &World, libvirtd: &Libvirtd, name: &str, xml: &str) {
    let file = world.dir.path().join(format!("{name}.xml"));
    std::fs::write(&file, xml).unwrap();
    libvirtd.virsh(&["define", file.to_str().unwrap()]);
}

/// A domain that somebody else has made, and runs.
fn stranger(world: &World, libvirtd: &Libvirtd) -> String {
    let kernel = TinyGuest::Idle.write_to(world.dir.path()).unwrap();
    let xml = format!(
        "<domain type='qemu'><name>stranger</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel></os>\
         <devices><controller type='usb' model='none'/><memballoon model='none'/></devices>\
         <seclabel type='static' model='dac' relabel='no'><label>+0:+0</label></seclabel></domain>",
        kernel.display()
    );
    define(world, libvirtd, "stranger", &xml);
    libvirtd.virsh(&["start", "stranger"]);
    libvirtd.virsh(&["domuuid", "stranger"])
}

#[test]
fn foreign_domains_are_not_touched() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let uuid = stranger(&world, &libvirtd);
    let before = libvirtd.virsh(&["dumpxml", "stranger"]);

    // A namesake of it can be created, for nothing is asked of libvirt then, and not booted.
    world.create("stranger", &world.tiny(TinyGuest::Idle));
    for _ in 0..2 {
        let refused = world.call("BootVm", &json!({"vm_id": "stranger"})).error("failed_precondition");
        assert!(refused.contains("not this program's") && refused.contains(&uuid), "{refused}");
    }
    assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 1);
    world.call("ShutdownVm", &json!({"vm_id": "stranger", "force": true})).error("failed_precondition");
    world.call("DeleteVm", &json!({"vm_id": "stranger", "force": true})).ok();
    libvirtd.virsh(&["suspend", "stranger"]);
    libvirtd.virsh(&["resume", "stranger"]);
    assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"].as_i64().unwrap_or(0), 0);
    assert_eq!(libvirtd.virsh(&["domstate", "stranger"]), "running");
    assert_eq!(libvirtd.virsh(&["dumpxml", "stranger"]), before);
}

#[test]
fn foreign_domains_are_imported_if_the_setting_asks_for_them() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let mut world = world(&helper, &libvirtd.uri(), &[("UNKEY_VMCP_QEMU_IMPORT", "true")]);
    let uuid = stranger(&world, &libvirtd);
    world.start();
    let info = world.wait_for_state("stranger", "VM_STATE_RUNNING");
    assert_eq!(info["config"]["memory"]["size_bytes"], "67108864", "{info:#}");
    assert_ne!(info["uid"], uuid.as_str(), "the uid is ours, the domain's UUID its place");

    world.call("PauseVm", &json!({"vm_id": "stranger"})).ok();
    assert_eq!(libvirtd.virsh(&["domstate", "stranger"]), "paused");
    libvirtd.virsh(&["resume", "stranger"]);
    world.wait_for_state("stranger", "VM_STATE_RUNNING");
    // Its guest does not obey, and nobody ends what is not ours without force.
    let pid = vmm_pid(&world.info("stranger"));
    let refused = world.call("ShutdownVm", &json!({"vm_id": "stranger", "timeout_seconds": 1}));
    assert!(refused.error("deadline_exceeded").contains("use force"));
    assert!(is_alive(pid));

    // The next daemon knows it still, and what became of it meanwhile.
    world.stop(Signal::KILL);
    libvirtd.virsh(&["destroy", "stranger"]);
    world.start();
    world.wait_for_state("stranger", "VM_STATE_SHUTDOWN");
    world.boot("stranger");
    assert_eq!(libvirtd.virsh(&["domstate", "stranger"]), "running");
    world.call("ShutdownVm", &json!({"vm_id": "stranger", "force": true})).ok();
    assert_eq!(libvirtd.virsh(&["domstate", "stranger"]), "shut off");
    libvirtd.virsh(&["undefine", "stranger"]);
    eventually("it is off the record", || {
        world.call("GetVmInfo", &json!({"vm_id": "stranger"})).status == 404
    });
}

#[test]
fn a_missing_part_of_libvirt_is_named() {
    let missing = |env: &[(&str, &str)], words: &[&str]| {
        let world = World::started(env);
        let health = world.get("/_/health");
        assert_eq!(health.status, 503);
        let backends = world.call("ListBackends", &json!({})).ok();
        let qemu = backends["backends"].as_array().unwrap().iter().find(|backend| backend["name"] == "qemu");
        let reported = qemu.unwrap()["reason"].as_str().unwrap().to_owned();
        // A VM can be created, fails to boot for the same reason, and can be deleted.
        world.create("vm", &world.tiny(TinyGuest::Idle));
        let refused = world.call("BootVm", &json!({"vm_id": "vm"}));
        assert_ne!(refused.status, 200);
        let refused = refused.body["message"].as_str().unwrap().to_owned();
        for word in words {
            for said in [&health.body.to_string(), &reported, &refused] {
                assert!(said.contains(word), "{word} is not in {said}");
            }
        }
        world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
        world.assert_nothing_left();
    };
    let uri = "qemu+unix:///system?socket=/nowhere/libvirt-sock";
    let nobody = ("UNKEY_VMCP_QEMU_ENDPOINT", uri);
    let plain = std::env::var("PATH").unwrap_or_default();
    missing(&[nobody, ("PATH", &plain)], &["vmm-libvirt-helper", "libvirt-dev"]);

    // A helper whose library is not there says what the dynamic loader says.
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("vmm-libvirt-helper");
    let said = "error while loading shared libraries: libvirt.so.0: cannot open shared object file";
    std::fs::write(&broken, format!("#!/bin/sh\necho '{said}' >&2\nexit 127\n")).unwrap();
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755)).unwrap();
    missing(&[nobody, ("PATH", &with_helper(&broken))], &["libvirt0"]);

    match libvirtd::helper() {
        Ok(helper) => {
            missing(
                &[nobody, ("PATH", &with_helper(&helper))],
                &["libvirt-daemon-system", "/nowhere/libvirt-sock"],
            );
        }
        Err(why) => skipped(concat!(module_path!(), ":", line!()), &why),
    }
}

#[test]
fn a_helper_that_dies_is_started_again() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let before = vmm_pid(&run(&world, "vm", TinyGuest::Idle));
    let helpers = || {
        let task = format!("/proc/{}/task", world.pid());
        let children = std::fs::read_dir(task).unwrap().flatten();
        let children =
            children.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        let pids: Vec<u32> = children
            .flat_map(|pids| pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
            .collect();
        let is_helper = |pid: &u32| {
            std::fs::read_link(format!("/proc/{pid}/exe"))
                .is_ok_and(|exe| exe.ends_with("vmm-libvirt-helper"))
        };
        pids.into_iter().filter(is_helper).collect::<Vec<_>>()
    };
    for how in [Signal::KILL, Signal::STOP] {
        let old = helpers();
        assert_eq!(old.len(), 1);
        signal(old[0], how);
        eventually("there is another helper", || helpers().iter().any(|pid| !old.contains(pid)));
        world.wait_for("vm", "reachable", phase_is("running"));
        eventually("it serves", || {
            world.call("PauseVm", &json!({"vm_id": "vm"})).status == 200
                && world.call("ResumeVm", &json!({"vm_id": "vm"})).status == 200
        });
        assert_eq!(vmm_pid(&world.info("vm")), before);
    }
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
}
