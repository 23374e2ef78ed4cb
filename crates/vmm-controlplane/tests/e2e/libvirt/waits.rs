//! A domain whose QEMU stands still, and a libvirtd that does.

use std::collections::BTreeMap;

use super::*;
use crate::harness::call;

/// The number of domains. Each is a QEMU of its own in software emulation: more take this machine longer than a minute to start.
const DOMAINS: usize = 30;
/// The number of domains that are started or deleted at a time.
const AT_A_TIME: usize = 4;

/// Backs `Call::waits_for` of `vmm-libvirt-wire` with libvirt's own behaviour.
#[test]
fn a_domain_with_a_stopped_qemu_can_be_described_and_redefined_but_not_undefined() {
    let (_, libvirtd) = libvirtd_or_skip!();
    let folder = tempfile::tempdir().unwrap();
    libvirtd.run_foreign_domain("vm", &TinyGuest::Idle.write_to(folder.path()).unwrap());
    let [qemu] = libvirtd.qemus()[..] else { panic!("one domain has one QEMU") };
    signal(qemu, Signal::STOP);
    let file = folder.path().join("vm.xml");
    std::thread::scope(|scope| {
        let suspending = scope.spawn(|| libvirtd.try_virsh(&["suspend", "vm"]));
        let undefining = scope.spawn(|| {
            // Once libvirt waits for QEMU, what it waits for is another call's turn.
            eventually("libvirt waits for QEMU", || {
                libvirtd.virsh(&["domcontrol", "vm"]).starts_with("occupied")
            });
            libvirtd.try_virsh(&["undefine", "vm"])
        });
        eventually("libvirt waits for QEMU", || {
            libvirtd.virsh(&["domcontrol", "vm"]).starts_with("occupied")
        });
        for _ in 0..5 {
            assert_eq!(libvirtd.virsh(&["domstate", "vm"]), "running");
            std::fs::write(&file, libvirtd.virsh(&["dumpxml", "--inactive", "vm"])).unwrap();
            libvirtd.virsh(&["define", file.to_str().unwrap()]);
            assert_eq!(libvirtd.domains(), ["vm"]);
        }
        assert!(!undefining.is_finished(), "it waits for the call that waits for QEMU");
        signal(qemu, Signal::CONT);
        suspending.join().unwrap().unwrap();
        undefining.join().unwrap().unwrap();
    });
    libvirtd.virsh(&["destroy", "vm"]);
    eventually("nothing is left", || libvirtd.domains().is_empty() && libvirtd.qemus().is_empty());
}

/// Calls each of the methods, in order, for every VM.
fn for_each(world: &World, names: &[String], calls: &[(&str, Value)]) {
    let url = world.url();
    std::thread::scope(|scope| {
        for share in names.chunks(names.len().div_ceil(AT_A_TIME)) {
            scope.spawn(move || {
                for name in share {
                    for (method, body) in calls {
                        let mut body = body.clone();
                        body["vm_id"] = json!(name);
                        call(url, method, &body).ok();
                    }
                }
            });
        }
    });
}

/// Returns the phase of each VM as ListVms shows it.
fn phases(world: &World) -> BTreeMap<String, String> {
    let listed = world.call("ListVms", &json!({})).ok();
    let vms = listed["vms"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    vms.iter().map(|vm| (text(&vm["vm_id"]), text(&vm["status"]["phase"]))).collect()
}

#[test]
fn a_stopped_libvirtd_makes_only_its_own_vms_unreachable() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let world = started(&helper, &libvirtd, &[]);
    let names: Vec<String> = (0..DOMAINS).map(|number| format!("vm-{number:02}")).collect();
    let config = world.tiny(TinyGuest::Idle);
    for_each(&world, &names, &[("CreateVm", json!({"config": config})), ("BootVm", json!({}))]);
    let mut others = vec![("defined", "created")];
    world.create("defined", &config);
    if crate::harness::hypervisors(module_path!()).contains(&"firecracker") {
        let other = json!({"vm_id": "other", "config": config, "backend": "firecracker"});
        world.call("CreateVm", &other).ok();
        world.boot("other");
        others.push(("other", "running"));
    }
    let pids = |name: &String| vmm_pid(&world.info(name));
    let before: Vec<u32> = names.iter().map(pids).collect();

    libvirtd.freeze(true);
    eventually("all domains are unreachable", || {
        let phases = phases(&world);
        assert_eq!(phases.len(), DOMAINS + others.len());
        for (name, phase) in &others {
            assert_eq!(phases[*name], *phase);
            assert_eq!(world.info(name)["status"]["phase"], *phase);
        }
        names.iter().all(|name| phases[name] == "unreachable")
    });
    for name in &names {
        assert_eq!(world.info(name)["state"], "VM_STATE_RUNNING", "{name}: the last proven state");
    }

    libvirtd.freeze(false);
    eventually("all domains are there again", || {
        let phases = phases(&world);
        names.iter().all(|name| phases[name] == "running")
    });
    assert_eq!(names.iter().map(pids).collect::<Vec<_>>(), before);
    for_each(&world, &names, &[("PauseVm", json!({})), ("DeleteVm", json!({"force": true}))]);
    for (name, _) in others {
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
    }
    eventually("nothing is left", || libvirtd.domains().is_empty() && libvirtd.qemus().is_empty());
    world.assert_nothing_left();
}
