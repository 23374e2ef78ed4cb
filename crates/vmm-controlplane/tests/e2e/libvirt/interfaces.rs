//! The network interfaces of a domain that somebody else made: libvirt's own doing, and no TAPs of the daemon's.

use super::*;

/// Makes a domain that has `interface` and does not run.
fn define_with(world: &World, libvirtd: &Libvirtd, name: &str, interface: &str) {
    let kernel = TinyGuest::Idle.write_to(world.dir.path()).unwrap();
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel></os>\
         <devices><controller type='usb' model='none'/>{interface}<memballoon model='none'/></devices>\
         <seclabel type='static' model='dac' relabel='no'><label>+0:+0</label></seclabel></domain>",
        kernel.display()
    );
    define(world, libvirtd, name, &xml);
}

/// The TAPs on this host that a daemon has named.
fn taps_of_daemons() -> Vec<String> {
    let all = std::fs::read_dir("/sys/class/net").unwrap().flatten();
    all.map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("vmt"))
        .collect()
}

fn sampled(info: &Value) -> bool {
    info["metrics"]["memory_usage_bytes"].as_str().is_some_and(|bytes| bytes != "0")
}

#[test]
fn an_imported_domain_keeps_its_own_interfaces() {
    let (helper, libvirtd) = libvirtd_or_skip!();
    let env = [("UNKEY_VMCP_QEMU_IMPORT", "true"), ("UNKEY_VMCP_METRICS_INTERVAL", "1")];
    let mut world = world(&helper, &libvirtd.uri(), &env);
    let kinds = [("user", "<interface type='user'><model type='virtio'/></interface>")];
    for (name, interface) in kinds {
        define_with(&world, &libvirtd, name, interface);
    }
    world.start();
    for (name, _) in kinds {
        world.wait_for_state(name, "VM_STATE_SHUTDOWN");
        world.boot(name);
        let uid = world.info(name)["uid"].as_str().unwrap().replace('-', "");
        let ours: Vec<_> = taps_of_daemons()
            .into_iter()
            .filter(|tap| tap.get(3..13).is_some_and(|tail| uid.ends_with(tail)))
            .collect();
        assert_eq!(ours, Vec::<String>::new(), "{name}: its interface is none of the daemon's");
        world.wait_for(name, "sampled", sampled);
    }
    // The next daemon finds it by what libvirt says, not by what the daemon would have made.
    world.stop(Signal::KILL);
    world.start();
    for (name, _) in kinds {
        let info = world.wait_for(name, "sampled", sampled);
        assert_eq!(info["status"]["phase"], "running", "{info:#}");
        world.call("PauseVm", &json!({"vm_id": name})).ok();
        world.call("ResumeVm", &json!({"vm_id": name})).ok();
        world.call("ShutdownVm", &json!({"vm_id": name, "force": true})).ok();
        world.boot(name);
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).ok();
    }
}
