//! A file system that never answers, under the kernels and disks of some VMs: those VMs wait in vain, and nobody else does.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, call, hypervisors};
use crate::hung_mount::HungMount;

/// Clients that validate side by side, and what each of them validates: far more looks than the daemon has threads for.
const CLIENTS: usize = 64;
const CALLS: usize = 5;
/// VMs on the mount that are started side by side: more than looks may be under way at once.
const STUCK: usize = 40;

/// A configuration whose kernel and disk lie below `dir`.
fn below(world: &World, dir: &Path) -> Value {
    let mut config = world.tiny(TinyGuest::Idle);
    config["storage"] = json!([{"path": dir.join("disk")}]);
    config["boot"]["kernel_path"] = json!(dir.join("kernel"));
    config
}

/// Validates against the mount until every thread for such looks hangs and many calls wait behind.
fn validate_in_vain(url: &str, config: &Value) {
    let body = json!({"config": config});
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                for _ in 0..CALLS {
                    let message = call(url, "ValidateVm", &body).error("unavailable");
                    assert!(message.contains("the host's files do not answer"), "{message}");
                }
            });
        }
    });
}

/// Boots every stuck VM at once.
fn boot_in_vain(url: &str) {
    std::thread::scope(|scope| {
        for number in 0..STUCK {
            scope.spawn(move || {
                let stuck = json!({"vm_id": format!("stuck-{number}")});
                let message = call(url, "BootVm", &stuck).error("unavailable");
                assert!(message.contains("the host's files do not answer"), "{message}");
            });
        }
    });
}

/// Makes the folder that hangs in the daemon's namespace, and one beside it with a kernel and a disk that answer.
fn folders(world: &World) -> (PathBuf, PathBuf) {
    let (hung, fine) = (world.dir.path().join("hung"), world.dir.path().join("fine"));
    for dir in [&hung, &fine] {
        std::fs::create_dir(dir).unwrap();
    }
    std::fs::write(fine.join("disk"), [0; 4096]).unwrap();
    let kernel = TinyGuest::Idle.write_to(&fine).unwrap();
    std::fs::rename(kernel, fine.join("kernel")).unwrap();
    (hung, fine)
}

#[test]
fn a_hanging_mount_delays_no_other_vm() {
    let test = "a_hanging_mount_delays_no_other_vm";
    let mut world = World::new(&[]);
    let (hung, fine) = folders(&world);
    let Some(mount) = HungMount::on(&mut world, &hung, test) else { return };
    world.start();
    for backend in hypervisors(test) {
        for name in ["runs", "waits"] {
            world.create_on(backend, &format!("{name}-{backend}"), TinyGuest::Idle);
        }
        world.boot(&format!("runs-{backend}"));
    }
    // The stuck VMs were created on files that answered, and their files have moved since.
    let link = world.dir.path().join("link");
    symlink(&fine, &link).unwrap();
    for number in 0..STUCK {
        let mut config = below(&world, &link);
        config["storage"][0]["read_only"] = json!(true);
        world.create(&format!("stuck-{number}"), &config);
    }
    std::fs::remove_file(&link).unwrap();
    symlink(&hung, &link).unwrap();
    validate_in_vain(world.url(), &below(&world, &hung));
    world.call("CreateVm", &json!({"config": below(&world, &hung)})).error("unavailable");
    boot_in_vain(world.url());
    for backend in hypervisors(test) {
        let (runs, waits) = (format!("runs-{backend}"), format!("waits-{backend}"));
        world.boot(&waits);
        world.call("ShutdownVm", &json!({"vm_id": runs, "force": true})).ok();
        world.boot(&runs);
        world.call("DeleteVm", &json!({"vm_id": waits, "force": true})).ok();
    }
    world.stop(Signal::TERM);
    world.start();
    for backend in hypervisors(test) {
        let runs = format!("runs-{backend}");
        assert_eq!(world.info(&runs)["state"], "VM_STATE_RUNNING");
        world.call("DeleteVm", &json!({"vm_id": runs, "force": true})).ok();
    }
    for number in 0..STUCK {
        world.call("DeleteVm", &json!({"vm_id": format!("stuck-{number}"), "force": true})).ok();
    }
    world.assert_nothing_left();
    drop(mount);
}
