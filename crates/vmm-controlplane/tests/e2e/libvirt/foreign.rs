//! A process of another user that claims to be a domain's QEMU is neither believed nor touched.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use super::*;

/// A user that runs no QEMU of libvirt.
const ANOTHER_USER: u32 = 12_345;

/// A process of [`ANOTHER_USER`] whose program is called as QEMU and whose arguments name a domain.
/// Ends with the test, because its stdin ends then.
struct Claimant(Child);

impl Claimant {
    fn of(folder: &Path, uuid: &str) -> Self {
        let program = folder.join("qemu-system-x86_64");
        if !program.exists() {
            std::fs::copy("/bin/sh", &program).unwrap();
            for path in [folder, &program] {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        let mut command = Command::new(&program);
        command.args(["-c", "read line", "sh", "-uuid", uuid]).stdin(Stdio::piped());
        let child = command.uid(ANOTHER_USER).gid(ANOTHER_USER).spawn().unwrap();
        let claims = || std::fs::read(format!("/proc/{}/cmdline", child.id())).unwrap();
        eventually("it claims to be the domain", || {
            claims().windows(uuid.len()).any(|part| part == uuid.as_bytes())
        });
        Self(child)
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Claimant {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A domain of another client whose QEMU runs as the user of libvirt's choice.
fn stranger_of_libvirts_user(world: &World, libvirtd: &Libvirtd) -> String {
    let xml = "<domain type='qemu'><name>stranger</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
               <os><type arch='x86_64' machine='q35'>hvm</type></os>\
               <devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>";
    define(world, libvirtd, "stranger", xml);
    libvirtd.virsh(&["start", "stranger"]);
    libvirtd.virsh(&["domuuid", "stranger"])
}

#[test]
fn another_users_process_with_a_domains_uuid_is_not_its_qemu() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let mut world = world(&helper, &libvirtd.uri(), &[("UNKEY_VMCP_QEMU_IMPORT", "true")]);
    let imported = stranger_of_libvirts_user(&world, &libvirtd);
    world.start();
    let ours = run(&world, "ours", TinyGuest::Idle)["uid"].as_str().unwrap().to_owned();
    world.wait_for_state("stranger", "VM_STATE_RUNNING");
    let folder = tempfile::tempdir().unwrap();
    let mut claimants = [ours.as_str(), &imported].map(|uuid| Claimant::of(folder.path(), uuid));
    let names = ["ours", "stranger"];
    let pids = |world: &World| names.map(|name| vmm_pid(&world.info(name)));

    // Beside domains that run: the next daemon finds the QEMUs that it has on record.
    let before = pids(&world);
    world.stop(Signal::KILL);
    world.start();
    names.iter().for_each(|name| drop(world.wait_for(name, "running", phase_is("running"))));
    assert_eq!(pids(&world), before);

    // The daemon also finds QEMUs that it does not have on record.
    world.stop(Signal::KILL);
    for name in names {
        libvirtd.virsh(&["destroy", name]);
        libvirtd.virsh(&["start", name]);
    }
    world.start();
    names.iter().for_each(|name| drop(world.wait_for(name, "running", phase_is("running"))));
    assert!(pids(&world).iter().all(|pid| !before.contains(pid) && libvirtd.qemus().contains(pid)));

    // Beside domains that have ended: nothing of them runs, and they boot again.
    world.stop(Signal::KILL);
    names.iter().for_each(|name| drop(libvirtd.virsh(&["destroy", name])));
    world.start();
    for name in names {
        world.wait_for_state(name, "VM_STATE_SHUTDOWN");
        world.boot(name);
        world.call("ShutdownVm", &json!({"vm_id": name, "force": true})).ok();
        world.boot(name);
    }
    for name in names {
        let gone = world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
        assert_eq!(gone["left_behind"], Value::Null, "{name}: {gone}");
    }
    eventually("nothing is left", || libvirtd.domains().is_empty() && libvirtd.qemus().is_empty());
    assert!(claimants.iter_mut().all(Claimant::is_alive), "another user's processes go on");
}
