//! A daemon that is not root, and VMMs whose programs have file capabilities.
//!
//! The kernel hides the executable of such a VMM from the daemon. The daemon, the programs and the
//! guest's kernel are copied to a folder of the test, because the user nobody may not read every
//! checkout.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_core::caller::Caller;
use vmm_core::state::VmState;
use vmm_core::store::{Intent, IntentKind};
use vmm_testkit::guests::TinyGuest;

use crate::adoption::tamper;
use crate::harness::{World, hypervisors, is_alive, on_path, skipped, vmm_pid};

/// The user and the group nobody, as Debian numbers them. The numbers need no entry in a file.
const NOBODY: u32 = 65_534;

/// A world whose daemon runs as the user nobody.
struct Unprivileged {
    world: World,
    programs: TempDir,
}

impl Unprivileged {
    /// Makes the folders and starts no daemon, or returns the reason why this machine cannot run
    /// one.
    fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() || !on_path("setpriv") {
            return Err("only root can become another user, by setpriv".to_owned());
        }
        let programs = tempfile::Builder::new().prefix("vmcp-programs").tempdir().unwrap();
        fs::set_permissions(programs.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let daemon = programs.path().join("vmm-controlplane");
        let built = env!("CARGO_BIN_EXE_vmm-controlplane");
        fs::hard_link(built, &daemon).or_else(|_| fs::copy(built, &daemon).map(drop)).unwrap();
        let mut world = World::new(&[]);
        // The harness appends the path of the daemon that was built, which `shift` removes.
        let user = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".to_owned()];
        world.wrapper = ["setpriv".to_owned()].into_iter().chain(user).collect();
        let instead = ["sh", "-c", "shift; exec \"$0\" \"$@\"", daemon.to_str().unwrap()];
        world.wrapper.extend(instead.map(str::to_owned));
        give(world.dir.path());
        let this = Self { world, programs };
        if !this.may(&["test", "-x", daemon.to_str().unwrap()]) {
            return Err(format!(
                "the user nobody may not run programs in {}",
                this.programs.path().display()
            ));
        }
        Ok(this)
    }

    /// Runs a command as nobody, and returns true if the command succeeds.
    fn may(&self, command: &[&str]) -> bool {
        // The wrapper without the shell.
        let mut run = Command::new(&self.world.wrapper[0]);
        run.args(&self.world.wrapper[1..4]).args(command);
        run.output().is_ok_and(|output| output.status.success())
    }

    /// Copies the program of `backend`, gives the copy file capabilities, and lets the next daemon
    /// use the copy.
    fn with_capabilities(&mut self, backend: &str) -> Result<(), String> {
        let (program, variable) = match backend {
            "qemu" => ("qemu-system-x86_64", "UNKEY_VMCP_QEMU_BINARY"),
            "cloudhypervisor" => ("cloud-hypervisor", "UNKEY_VMCP_CH_BINARY"),
            _ => ("firecracker", "UNKEY_VMCP_FC_BINARY"),
        };
        // QEMU looks for its modules and its firmware by the way from its folder.
        let usr = self.programs.path().join("usr");
        fs::create_dir_all(usr.join("bin")).unwrap();
        for folder in ["lib", "share"] {
            let _ = symlink(Path::new("/usr").join(folder), usr.join(folder));
        }
        let copy = usr.join("bin").join(program);
        let path = std::env::var_os("PATH");
        fs::copy(vmm_host::path::find_program(program, path.as_deref()).unwrap(), &copy).unwrap();
        // The second one opens /dev/kvm, wherever that belongs to root alone.
        let set = Command::new("setcap").arg("cap_net_admin,cap_dac_override+ep").arg(&copy).status();
        if !set.is_ok_and(|status| status.success()) {
            return Err("setcap is missing, or the file system holds no capabilities".to_owned());
        }
        self.world.set_env(variable, copy.to_str());
        Ok(())
    }

    /// Creates and boots a VM, and kills the daemon. Returns the VMM's process id, or `None` where
    /// the kernel shows the VMM's program to nobody.
    fn orphaned(&mut self, backend: &str) -> Option<u32> {
        self.world.start();
        let config = self.world.tiny(TinyGuest::Idle);
        give(Path::new(config["boot"]["kernel_path"].as_str().unwrap()));
        self.world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config})).ok();
        self.world.boot("vm");
        let pid = vmm_pid(&self.world.info("vm"));
        self.world.stop(Signal::KILL);
        assert!(is_alive(pid), "{backend}");
        (!self.may(&["readlink", &format!("/proc/{pid}/exe")])).then_some(pid)
    }

    /// Changes the record of the VM to that of a first start whose VMM is not on record yet.
    fn forget_the_run(&self) {
        tamper(&self.world, |record| {
            record.run = None;
            record.state = VmState::Created;
            let kind = IntentKind::Boot { claims: Vec::new() };
            record.intent = Some(Intent { kind, caller: Caller::system(), since_ms: 0, scope: None });
        });
        // The test wrote as root.
        give_all(&self.world.dir.path().join("state"));
    }
}

fn give(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
}

fn give_all(folder: &Path) {
    give(folder);
    for entry in fs::read_dir(folder).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        if path.is_dir() { give_all(&path) } else { give(&path) }
    }
}

/// Runs `trial` for each hypervisor with a fresh world whose VMMs have file capabilities.
fn each(test: &str, trial: impl Fn(&mut Unprivileged, &str, u32)) {
    for backend in hypervisors(test) {
        let mut there = match Unprivileged::new() {
            Ok(there) => there,
            Err(why) => return skipped(test, &why),
        };
        let ready = there.with_capabilities(backend);
        if let Err(why) = ready {
            return skipped(test, &why);
        }
        let Some(pid) = there.orphaned(backend) else {
            return skipped(test, "this kernel shows the program of a VMM with capabilities");
        };
        trial(&mut there, backend, pid);
        there.world.assert_nothing_left();
    }
}

#[test]
fn a_vmm_with_file_capabilities_is_adopted_after_an_unrecorded_boot() {
    each("a_vmm_with_file_capabilities_is_adopted_after_an_unrecorded_boot", |there, backend, pid| {
        there.forget_the_run();
        there.world.start();
        let info = there.world.wait_for("vm", "settled", |info| info["status"]["phase"] != "starting");
        assert_eq!(
            (&info["state"], vmm_pid(&info)),
            (&json!("VM_STATE_RUNNING"), pid),
            "{backend}: {info:#}"
        );
        there.world.call("PauseVm", &json!({"vm_id": "vm"})).ok();
        let gone = there.world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(gone["left_behind"], Value::Null, "{backend}: {gone}");
        assert!(!is_alive(pid), "{backend}");
    });
}

#[test]
fn an_unrecorded_vmm_with_file_capabilities_is_ended() {
    each("an_unrecorded_vmm_with_file_capabilities_is_ended", |there, backend, pid| {
        tamper(&there.world, |record| {
            record.run = None;
            record.state = VmState::Created;
        });
        give_all(&there.world.dir.path().join("state"));
        there.world.start();
        assert!(!is_alive(pid), "{backend}: its guest runs for no record");
        there.world.boot("vm");
        let down = there.world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        assert_eq!(down["state"], "VM_STATE_SHUTDOWN", "{backend}: {down}");
        there.world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    });
}

#[test]
fn an_unwritable_console_file_is_a_violation() {
    const TEST: &str = "an_unwritable_console_file_is_a_violation";
    let mut there = match Unprivileged::new() {
        Ok(there) => there,
        Err(why) => return skipped(TEST, &why),
    };
    let closed = there.programs.path().join("closed");
    fs::create_dir(&closed).unwrap();
    there.world.start();
    let mut config = there.world.tiny(TinyGuest::Idle);
    config["console"] = json!({"enabled": true, "output": closed.join("console")});
    let validated = there.world.call("ValidateVm", &json!({"config": config})).ok();
    let [violation] = &validated["violations"].as_array().unwrap()[..] else { panic!("{validated}") };
    assert_eq!(violation["field"], "config.console.output", "{validated}");
    let message = there.world.call("CreateVm", &json!({"config": config})).error("invalid_argument");
    assert!(message.contains(closed.to_str().unwrap()) && message.contains("Permission denied"), "{message}");

    // A folder that becomes writable serves.
    give(&closed);
    let validated = there.world.call("ValidateVm", &json!({"config": config})).ok();
    assert_eq!(validated["ok"], true, "{validated}");
}

/// Returns the mode and the group of a device, if the user nobody may not open the device.
fn closed_to_nobody(device: &str) -> Option<(u32, u32)> {
    use std::os::unix::fs::MetadataExt as _;
    let facts = fs::metadata(device).ok()?;
    (facts.mode() & 0o6 != 0o6).then_some((facts.mode() & 0o777, facts.gid()))
}

#[test]
fn doctor_names_the_permission_that_a_device_lacks() {
    const TEST: &str = "doctor_names_the_permission_that_a_device_lacks";
    let there = match Unprivileged::new() {
        Ok(there) => there,
        Err(why) => return skipped(TEST, &why),
    };
    let done = crate::operator::run(&there.world, &["doctor", "--json"]);
    let diagnosis: Value = serde_json::from_str(&done.out).unwrap_or_else(|_| panic!("{}", done.err));
    let line = |name: &str| {
        let mut lines = diagnosis["checks"].as_array().unwrap().iter();
        lines.find(|line| line["name"] == name).unwrap_or_else(|| panic!("{name}: {diagnosis:#}")).clone()
    };
    let devices = ["/dev/kvm", "/dev/net/tun"].map(|device| (device, closed_to_nobody(device)));
    if devices.iter().all(|(_, closed)| closed.is_none()) {
        return skipped(TEST, "this host has no device that the user nobody may not open");
    }
    for (device, closed) in devices {
        let Some((mode, group)) = closed else { continue };
        let (line, serves_group) = (line(device), group != 0 && mode & 0o060 == 0o060);
        let (finding, remedy) = (line["finding"].as_str().unwrap(), line["remedy"].as_str().unwrap());
        assert!(finding.contains(&format!("with mode {mode:04o}")), "{line:#}");
        assert_eq!(remedy.starts_with("add that user to the group"), serves_group, "{line:#}");
        assert_eq!(remedy.contains(&format!("{device}` as root")), !serves_group, "{line:#}");
        assert!(!remedy.contains("modprobe"), "{line:#}");
    }
}

#[test]
fn a_network_that_the_daemon_cannot_provide_is_a_warning() {
    const TEST: &str = "a_network_that_the_daemon_cannot_provide_is_a_warning";
    for backend in hypervisors(TEST) {
        let mut there = match Unprivileged::new() {
            Ok(there) => there,
            Err(why) => return skipped(TEST, &why),
        };
        there.world.start();
        let mut config = there.world.tiny(TinyGuest::Idle);
        config["network"] = json!([{}]);
        let asked = json!({"vm_id": "vm", "backend": backend, "config": config});
        let about_tap = |answer: &Value| {
            let mut warnings = answer["warnings"].as_array().unwrap().iter();
            let warning = warnings.find(|warning| warning["field"] == "config.network[0].tap_device");
            warning.unwrap_or_else(|| panic!("{backend}: {answer:#}"))["message"].as_str().unwrap().to_owned()
        };
        let validated = there.world.call("ValidateVm", &json!({"backend": backend, "config": config})).ok();
        assert!(about_tap(&validated).starts_with("BootVm will fail: TAP "), "{backend}: {validated:#}");
        let created = there.world.call("CreateVm", &asked).ok();
        let reported = about_tap(&created);
        let reason =
            reported.strip_prefix("BootVm will fail: ").unwrap_or_else(|| panic!("{backend}: {reported}"));
        // The user nobody may not start every hypervisor, and the TAPs come first.
        let refused = there.world.call("BootVm", &json!({"vm_id": "vm"})).error("failed_precondition");
        assert!(refused.contains(reason), "{backend}: {refused}\n{reason}");
        there.world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
        there.world.assert_nothing_left();
    }
}
