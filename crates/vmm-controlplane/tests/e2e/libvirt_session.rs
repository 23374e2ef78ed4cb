//! QEMU through the libvirt of one user, `qemu:///session`: for users who are not root, and only for them.
//!
//! The daemon runs as another user here, see [`vmm_testkit::libvirt_session`].

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::libvirt_session::UserLibvirt;
use vmm_testkit::libvirtd;

use crate::harness::{World, eventually, is_alive, on_path, skipped, vmm_pid};

const URI: &str = "qemu:///session";

/// A session that `make` made and a daemon of its user, not started yet; or why there can be none.
fn rig(make: fn() -> Result<UserLibvirt, String>) -> Result<(UserLibvirt, World), String> {
    let helper = libvirtd::helper()?;
    let session = make()?;
    let daemon = Path::new(env!("CARGO_BIN_EXE_vmm-controlplane"));
    for program in [daemon, &helper] {
        if !session.may_run(program) {
            return Err(format!("the user nobody may not run {}", program.display()));
        }
    }
    let path =
        format!("{}:{}", helper.parent().unwrap().display(), std::env::var("PATH").unwrap_or_default());
    let mut world = World::new(&[("UNKEY_VMCP_QEMU_ENDPOINT", URI), ("PATH", &path)]);
    session.give(world.dir.path());
    world.wrapper = session.wrapper();
    Ok((session, world))
}

fn reason(info: &Value) -> &str {
    info["status"]["reason"].as_str().unwrap_or_default()
}

#[test]
fn a_user_runs_vms_in_a_session_libvirt() {
    let (session, mut world) = match rig(UserLibvirt::start) {
        Ok(both) => both,
        Err(why) => return skipped("a_user_runs_vms_in_a_session_libvirt", &why),
    };
    // One that libvirt itself started would not end with the test's.
    world.set_env("LIBVIRT_AUTOSTART", Some("0"));
    world.start();
    let banner = TinyGuest::Button.banner();
    world.create("vm", &world.tiny(TinyGuest::Button));
    world.boot("vm");
    world.wait_for_console("vm", &banner, 1);
    let info = world.info("vm");
    assert_eq!(session.virsh(&["domuuid", "vm"]), info["uid"].as_str().unwrap());
    assert_eq!(info["backend_info"]["socket"], session.socket().to_str().unwrap(), "{info:#}");
    assert_eq!(session.qemus(), [vmm_pid(&info)]);

    world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
    assert_eq!(session.virsh(&["domstate", "vm"]), "paused");
    session.virsh(&["resume", "vm"]);
    assert_eq!(reason(&world.wait_for_state("vm", "VM_STATE_RUNNING")), "resumed-from-outside");
    session.virsh(&["reset", "vm"]);
    world.wait_for("vm", "told of as reset", |info| reason(info) == "reset-from-outside");
    world.wait_for_console("vm", &banner, 2);
    world.call("RebootVm", &json!({"vm_id": "vm", "force": true})).ok();
    world.wait_for_console("vm", &banner, 3);
    world.call("RebootVm", &json!({"vm_id": "vm", "timeout_seconds": 60})).ok();
    world.wait_for_console("vm", &banner, 4);

    let before = vmm_pid(&world.info("vm"));
    world.stop(Signal::KILL);
    assert!(is_alive(before));
    world.start();
    assert_eq!(vmm_pid(&world.wait_for_state("vm", "VM_STATE_RUNNING")), before);
    let down = world.call("ShutdownVm", &json!({"vm_id": "vm", "timeout_seconds": 60})).ok();
    assert_eq!((&down["state"], &down["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("acpi")));
    // QEMU has gone; libvirt takes note of that in its own time.
    eventually("virsh sees it too", || session.virsh(&["domstate", "vm"]) == "shut off");
    session.virsh(&["start", "vm"]);
    assert_eq!(reason(&world.wait_for_state("vm", "VM_STATE_RUNNING")), "started-from-outside");
    let gone = world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    assert_eq!(gone["left_behind"], Value::Null, "{gone}");
    eventually("nothing is left", || {
        session.virsh(&["list", "--all", "--name"]).is_empty() && session.qemus().is_empty()
    });
    world.assert_nothing_left();
}

#[test]
fn libvirt_starts_the_users_libvirtd_when_the_daemon_asks() {
    let (_session, mut world) = match rig(UserLibvirt::asleep) {
        Ok(both) => both,
        Err(why) => return skipped("libvirt_starts_the_users_libvirtd_when_the_daemon_asks", &why),
    };
    world.start();
    eventually("the backend can serve", || world.get("/_/health").status == 200);
    world.stop(Signal::TERM);
    // Where that is forbidden, or libvirt finds no place for its socket, it is said what to do.
    for (name, value, advice) in
        [("LIBVIRT_AUTOSTART", "0", "LIBVIRT_AUTOSTART"), ("XDG_RUNTIME_DIR", "/nowhere", "XDG_RUNTIME_DIR")]
    {
        let (_session, mut world) = rig(UserLibvirt::asleep).unwrap();
        world.wrapper.push(format!("{name}={value}"));
        world.start();
        let health = world.get("/_/health");
        assert_eq!(health.status, 503);
        assert!(health.body.to_string().contains(advice), "{}", health.body);
    }
}

#[test]
fn a_session_uri_for_root_is_refused() {
    if !rustix::process::geteuid().is_root() || !on_path("qemu-system-x86_64") {
        return skipped("a_session_uri_for_root_is_refused", "this is not root, or QEMU is missing");
    }
    let world = World::started(&[("UNKEY_VMCP_QEMU_ENDPOINT", URI)]);
    let health = world.get("/_/health");
    assert_eq!(health.status, 503);
    assert!(health.body.to_string().contains("qemu:///system"), "{}", health.body);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let refused = world.call("BootVm", &json!({"vm_id": "vm"}));
    assert!(refused.body["message"].as_str().unwrap().contains("qemu:///system"), "{}", refused.body);
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
}
