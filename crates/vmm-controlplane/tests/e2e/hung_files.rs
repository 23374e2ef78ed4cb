//! A file system that never answers, under the kernels and disks of some VMs: those VMs wait in vain, and nobody else does.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::Guest;

use crate::harness::{World, call, hypervisors, skipped};

/// Clients that validate side by side, and what each of them validates: far more looks than the daemon has threads for.
const CLIENTS: usize = 64;
const CALLS: usize = 5;

/// A mount namespace in which a FUSE file system stands under one folder. Nobody serves it, so the kernel keeps every process
/// waiting that looks at a file there. The end of its holder ends all such waits.
struct HungMount {
    holder: Child,
}

impl HungMount {
    /// Mounts one on the folder `dir` of `world` and has the world's daemons run where the folder is seen so.
    fn on(world: &mut World, dir: &Path, test: &str) -> Option<Self> {
        let script = "exec 3<>/dev/fuse && mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 hung \"$1\" \
                      && echo mounted && exec sleep 900";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(dir);
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(holder) = started else {
            skipped(test, "there is no program `unshare`");
            return None;
        };
        let mut mount = Self { holder };
        let mut line = String::new();
        let _ = BufReader::new(mount.holder.stdout.take().unwrap()).read_line(&mut line);
        if line.trim() != "mounted" {
            skipped(test, "a FUSE file system can only be mounted by root, with /dev/fuse");
            return None;
        }
        let pid = mount.holder.id().to_string();
        world.wrapper = ["nsenter", "--mount", "--target", &pid].map(str::to_owned).into();
        Some(mount)
    }
}

impl Drop for HungMount {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A configuration whose kernel and disk lie below `dir`.
fn below(world: &World, dir: &Path) -> Value {
    let mut config = world.tiny(Guest::Idle);
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

/// Makes the folder that hangs in the daemon's namespace, and one beside it with a kernel and a disk that answer.
fn folders(world: &World) -> (PathBuf, PathBuf) {
    let (hung, fine) = (world.dir.path().join("hung"), world.dir.path().join("fine"));
    for dir in [&hung, &fine] {
        std::fs::create_dir(dir).unwrap();
    }
    std::fs::write(fine.join("disk"), [0; 4096]).unwrap();
    let kernel = Guest::Idle.write_to(&fine).unwrap();
    std::fs::rename(kernel, fine.join("kernel")).unwrap();
    (hung, fine)
}

#[test]
fn a_mount_that_does_not_answer_holds_up_nobody_else() {
    let test = "a_mount_that_does_not_answer_holds_up_nobody_else";
    let mut world = World::new(&[]);
    let (hung, fine) = folders(&world);
    let Some(mount) = HungMount::on(&mut world, &hung, test) else { return };
    world.start();
    for backend in hypervisors(test) {
        for name in ["runs", "waits"] {
            world.create_on(backend, &format!("{name}-{backend}"), Guest::Idle);
        }
        world.boot(&format!("runs-{backend}"));
    }
    // The stuck VM was created on files that answered, and its files have moved since.
    let link = world.dir.path().join("link");
    symlink(&fine, &link).unwrap();
    world.create("stuck", &below(&world, &link));
    std::fs::remove_file(&link).unwrap();
    symlink(&hung, &link).unwrap();
    validate_in_vain(world.url(), &below(&world, &hung));
    world.call("CreateVm", &json!({"config": below(&world, &hung)})).error("unavailable");
    let message = world.call("BootVm", &json!({"vm_id": "stuck"})).error("unavailable");
    assert!(message.contains("the host's files do not answer"), "{message}");
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
    world.call("DeleteVm", &json!({"vm_id": "stuck", "force": true})).ok();
    world.assert_nothing_left();
    drop(mount);
}
