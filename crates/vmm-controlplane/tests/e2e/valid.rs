//! A configuration that ValidateVm calls ok boots on this host unless a warning says that BootVm
//! will fail, and one that ValidateVm refuses cannot be created.
//!
//! The configurations are drawn at random from legal, odd and wrong values. The seed is printed
//! with a failure; `VMCP_VALID_SEED` and `VMCP_VALID_COUNT` repeat a run or make it longer. Huge
//! pages are left out, because a host has some or none of them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use fastrand::Rng;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, hypervisors};

const DEFAULT_COUNT: usize = 25;

/// Draws configurations whose files lie below `dir`.
struct Generator {
    rng: Rng,
    dir: PathBuf,
    kernel: String,
    made: usize,
}

impl Generator {
    fn config(&mut self, backend: &str) -> Value {
        let mut config = json!({"cpu": self.cpu(), "memory": self.memory(), "boot": self.boot(backend)});
        let disks: Vec<Value> = (0..self.rng.usize(0..4)).map(|_| self.disk(backend)).collect();
        if !disks.is_empty() {
            config["storage"] = json!(disks);
        }
        let nics: Vec<Value> = (0..self.rng.usize(0..3)).map(|_| self.nic()).collect();
        if !nics.is_empty() {
            config["network"] = json!(nics);
        }
        if self.rng.bool() {
            config["console"] = self.console();
        }
        if self.rng.bool() {
            config["restart_policy"] =
                json!({"mode": self.mostly(&[0, 1, 2, 3, 4], 5), "max_restarts": self.mostly(&[0, 3], -1)});
        }
        if self.rng.bool() {
            config["metadata"] = json!({"team": "x".repeat(self.rng.usize(0..200))});
        }
        config
    }

    fn one<T: Clone>(&mut self, values: &[T]) -> T {
        self.rng.choice(values).expect("there are values").clone()
    }

    /// Draws one of `legal`, or in one of 12 cases `wrong`.
    fn mostly<T: Clone>(&mut self, legal: &[T], wrong: T) -> T {
        if self.rarely(12) { wrong } else { self.one(legal) }
    }

    /// Says yes in one of `times` cases.
    fn rarely(&mut self, times: u32) -> bool {
        self.rng.u32(0..times) == 0
    }

    fn path(&mut self, ending: &str) -> PathBuf {
        self.made += 1;
        self.dir.join(format!("made-{}{ending}", self.made))
    }

    fn cpu(&mut self) -> Value {
        let wrong = self.one(&[0, -1, 2000]);
        let count = self.mostly(&[1, 2, 3, 4], wrong);
        let mut cpu = json!({"vcpu_count": count});
        if self.rarely(3) {
            cpu["max_vcpu_count"] = json!(count + self.mostly(&[0, 1, 2], -1));
        }
        if self.rarely(4) {
            let threads = self.one(&[1, 2]);
            cpu["topology"] = json!({"sockets": 1, "cores_per_socket": count, "threads_per_core": threads});
        }
        cpu
    }

    fn memory(&mut self) -> Value {
        let mib = self.rng.u64(16..160);
        let size = (mib << 20) + if self.rarely(12) { 1 } else { 0 };
        let mut memory = json!({"size_bytes": size.to_string()});
        if self.rarely(4) {
            memory["hotplug_enabled"] = json!(self.rng.bool());
            let growth = self.mostly(&[128, 256], 1);
            memory["max_size_bytes"] = json!(((mib + growth) << 20).to_string());
        }
        if self.rarely(3) {
            memory["backing"] = json!({"shared": self.mostly(&["true", "false"], "yes")});
        }
        memory
    }

    fn boot(&mut self, backend: &str) -> Value {
        let mut boot = json!({"kernel_path": self.kernel});
        if self.rarely(3) {
            let initrd = self.path(".initrd");
            if !self.rarely(6) {
                fs::write(&initrd, vec![0; self.rng.usize(1..20_000)]).unwrap();
            }
            boot["initrd_path"] = json!(initrd);
        }
        if self.rng.bool() {
            let length = {
                let near = self.rng.usize(1980..2049);
                self.mostly(&[20, 500, 1900, near], 2048)
            };
            boot["kernel_args"] = json!(format!("console=ttyS0 note={}", "x".repeat(length - 18)));
        }
        if backend == "qemu" && self.rng.bool() {
            boot["boot_options"] = json!({"qemu.machine": self.mostly(&["q35", "microvm"], "pc")});
        } else if self.rarely(8) {
            // A key of another backend is a warning there.
            boot["boot_options"] = json!({"qemu.machine": "microvm"});
        }
        boot
    }

    fn disk(&mut self, backend: &str) -> Value {
        let path = self.path(".img");
        let mut options = serde_json::Map::new();
        if backend != "firecracker" && self.rarely(3) {
            let made =
                Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("4M").output();
            assert!(made.expect("qemu-img is there; `make setup` installs it").status.success());
            options.insert("format".to_owned(), json!(self.mostly(&["qcow2"], "raw")));
        } else if !self.rarely(12) {
            let size = self.one(&[0, 100, 512, 1000, 4096, 1 << 20, (1 << 20) + 100]);
            File::create(&path).unwrap().set_len(size).unwrap();
        }
        let legal = [("cache", "unsafe"), ("direct_io", "true"), ("rate_limit.bytes_per_second", "1000000")];
        let wrong =
            [("backing_files", "yes"), ("rate_limit.operations_per_second", "0"), ("cahce", "unsafe")];
        if self.rarely(3) {
            let wrong = self.one(&wrong);
            let (key, value) = self.mostly(&legal, wrong);
            options.insert(key.to_owned(), json!(value));
        }
        let mut disk = json!({"path": path, "read_only": self.rng.bool()});
        if self.rarely(4) {
            disk["is_root_device"] = json!(true);
        }
        if !options.is_empty() {
            disk["options"] = Value::Object(options);
        }
        disk
    }

    fn nic(&mut self) -> Value {
        let mut nic = json!({});
        if self.rarely(3) {
            self.made += 1;
            let made = format!("vv{}-{}", std::process::id() % 100_000, self.made);
            let odd = self.one(&["lo".to_owned(), "a/b".to_owned(), "x".repeat(16), "%d".to_owned()]);
            nic["tap_device"] = json!(self.mostly(&[made], odd));
        }
        if self.rarely(3) {
            let address = format!("02:00:00:00:00:{:02x}", self.rng.u8(..));
            nic["mac_address"] = json!(self.mostly(&[address], "01:00:00:00:00:01".to_owned()));
        }
        if self.rarely(4) {
            nic["interface_type"] = json!(self.mostly(&["tap", "virtio-net"], "e1000"));
        }
        if self.rarely(4) {
            let legal =
                [("rate_limit.bytes_per_second", "1000000"), ("rate_limit.packets_per_second", "1000")];
            let (key, value) = self.mostly(&legal, ("rate_limit.bytes_per_second", "much"));
            nic["options"] = json!({key: value});
        }
        nic
    }

    fn console(&mut self) -> Value {
        let output = match self.rng.u32(0..4) {
            0 => self.path(".console").display().to_string(),
            1 if self.rarely(4) => self.dir.join("missing/console").display().to_string(),
            _ => String::new(),
        };
        json!({"enabled": !self.rarely(4), "output": output})
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// The failure of BootVm that the warnings of an answer foretell.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Foretold {
    Nothing,
    /// The backend could not serve at that moment, as where a probe took too long on a busy host.
    Perhaps,
    /// A network interface has no TAP.
    Failure,
}

fn foretold(answer: &Value) -> Foretold {
    let warnings = answer["warnings"].as_array().into_iter().flatten();
    let fails = |warning: &&Value| warning["message"].as_str().unwrap().contains("BootVm will fail");
    let mut fields = warnings.filter(fails).map(|warning| &warning["field"]).peekable();
    match (fields.peek().is_some(), fields.any(|field| field != "backend")) {
        (_, true) => Foretold::Failure,
        (true, false) => Foretold::Perhaps,
        (false, false) => Foretold::Nothing,
    }
}

/// Returns the warnings by field, without those about the backend, whose health may change between
/// two calls. The messages are not compared, because a generated TAP has another name for each
/// creation.
fn warned_fields(answer: &Value) -> Vec<&str> {
    let warnings = answer["warnings"].as_array().into_iter().flatten();
    warnings.map(|warning| warning["field"].as_str().unwrap()).filter(|field| *field != "backend").collect()
}

/// Returns the verdict of ValidateVm after it was held against CreateVm and BootVm.
fn try_out(world: &World, backend: &str, config: &Value) -> bool {
    let verdict = world.call("ValidateVm", &json!({"backend": backend, "config": config})).ok();
    let created = world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config}));
    if verdict["ok"] != true {
        assert_ne!(verdict["violations"], Value::Null, "refused without a violation");
        assert_eq!(created.status, 400, "ValidateVm refuses, and CreateVm does not: {verdict:#}");
        return false;
    }
    let created = created.ok();
    assert_eq!(warned_fields(&created), warned_fields(&verdict), "{created:#} {verdict:#}");
    let booted = world.call("BootVm", &json!({"vm_id": "vm"}));
    match (foretold(&created), booted.status) {
        (Foretold::Nothing | Foretold::Perhaps, 200) => {
            let info = world.info("vm");
            assert_eq!(info["state"], "VM_STATE_RUNNING", "{info:#}");
        }
        (Foretold::Nothing, _) => panic!("ValidateVm says ok, and BootVm fails: {} {verdict:#}", booted.body),
        (Foretold::Failure, 200) => panic!("a warning says that BootVm will fail: {verdict:#}"),
        (Foretold::Perhaps | Foretold::Failure, _) => {}
    }
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    true
}

/// Prints how to repeat a run when its thread panics.
struct OnFailure<'a>(&'a str, u64, &'a Value);

impl Drop for OnFailure<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: VMCP_VALID_SEED={} drew {:#}", self.0, self.1, self.2);
        }
    }
}

#[test]
fn a_valid_configuration_boots_and_a_refused_one_cannot_be_created() {
    let count = number("VMCP_VALID_COUNT").map_or(DEFAULT_COUNT, |count| usize::try_from(count).unwrap());
    for backend in hypervisors("a_valid_configuration_boots_and_a_refused_one_cannot_be_created") {
        let world = World::started(&[]);
        let seed = number("VMCP_VALID_SEED").unwrap_or_else(|| fastrand::u64(..));
        let kernel = TinyGuest::Idle.write_to(world.dir.path()).unwrap().display().to_string();
        let dir = Path::new(world.dir.path()).to_owned();
        let mut generator = Generator { rng: Rng::with_seed(seed), dir, kernel, made: 0 };
        let (mut drawn, mut valid) = (0, 0);
        // About a sixth of the configurations for Firecracker is valid, so that few draws can have
        // none. More are drawn until enough were booted.
        while drawn < count || valid * 5 < count {
            assert!(drawn < 20 * count, "{backend}: hardly a configuration is valid (seed {seed})");
            let config = generator.config(backend);
            let reported = OnFailure(backend, seed, &config);
            valid += usize::from(try_out(&world, backend, &config));
            drawn += 1;
            drop(reported);
        }
        println!("{backend}: {valid} of {drawn} configurations are valid (seed {seed})");
        world.assert_nothing_left();
    }
}
