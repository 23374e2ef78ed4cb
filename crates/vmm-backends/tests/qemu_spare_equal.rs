//! The VM that a spare QEMU is told, and the same one from the command line: a real QEMU shows no
//! difference between them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

mod qemu_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use qemu_support::{Bench, GUEST_REBOOT, NEVER, Tap, make_image, qemu, skipped};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use vmm_backends::qemu::convert::QemuMachine;
use vmm_backends::qemu::qmp::Qmp;
use vmm_core::backend::{SpareRequest, SpareVmms};
use vmm_core::config::{CpuTopology, NetworkInterface, StorageDevice};
use vmm_testkit::guests::TinyGuest;

/// What QEMU is asked, and answers alike.
const QUESTIONS: [&str; 14] = [
    "query-block",
    "query-named-block-nodes",
    "query-blockstats",
    "query-name",
    "query-uuid",
    "query-memory-size-summary",
    "query-cpus-fast",
    "query-hotpluggable-cpus",
    "query-memdev",
    "query-memory-devices",
    "query-chardev",
    "query-status",
    "query-pci",
    "query-acpi-ospm-status",
];
/// What its monitor for people is asked besides.
const LOOKS: [&str; 5] = ["info qtree", "info block -v", "info network", "info roms", "info uuid"];
/// What is another one in each process, or at each moment.
const FLEETING: [&str; 4] = ["date", "idle_time_ns", "rtc-time", "thread-id"];

/// How the name of a backend that a spare made ends.
const BACKEND: &str = "-drive";

/// Everything that is compared, by the question.
type Facts = BTreeMap<String, Value>;

struct Asker(Qmp);

impl Asker {
    async fn ask(&self, command: &'static str, arguments: Value) -> Result<Value, String> {
        self.0.execute(command, arguments).await.map_err(|error| error.to_string())
    }

    async fn look(&self, line: &str) -> String {
        let asked = self.ask("human-monitor-command", json!({ "command-line": line })).await;
        asked.unwrap().as_str().unwrap().to_owned()
    }

    /// The properties of an object and of those that are part of it.
    async fn object(&self, path: String, facts: &mut Facts) {
        let mut paths = vec![path];
        while let Some(path) = paths.pop() {
            let listed = self.ask("qom-list", json!({ "path": path })).await.unwrap();
            for property in listed.as_array().unwrap() {
                let (name, kind) = (property["name"].as_str().unwrap(), property["type"].as_str().unwrap());
                if FLEETING.contains(&name) {
                    continue;
                }
                let place = format!("{path}/{name}");
                if kind.starts_with("child<") {
                    paths.push(place);
                    continue;
                }
                let got = self.ask("qom-get", json!({ "path": path, "property": name })).await;
                facts.insert(place, got.unwrap_or_else(Value::from));
            }
        }
    }
}

/// Asks the QEMU of a bench, to which nobody is connected.
async fn facts(bench: &Bench) -> Facts {
    let (events, _events) = mpsc::channel(16);
    let qmp = Qmp::connect(&bench.dir().join("qmp.sock"), Duration::from_secs(30), events).await.unwrap();
    let asker = Asker(qmp);
    let mut facts = Facts::new();
    for question in QUESTIONS {
        let answer = asker.ask(question, Value::Null).await;
        facts.insert(question.to_owned(), answer.unwrap_or_else(Value::from));
    }
    for look in LOOKS {
        facts.insert(look.to_owned(), asker.look(look).await.into());
    }
    for part in ["/machine", "/objects"] {
        asker.object(part.to_owned(), &mut facts).await;
    }
    for (place, _) in bench.config.storage.iter().enumerate() {
        let backend =
            if QemuMachine::of(&bench.spec()) == Some(QemuMachine::Q35) { "/virtio-backend" } else { "" };
        let line = format!("qemu-io -d /machine/peripheral/disk{place}{backend} \"discard 0 1M\"");
        // How long it took is in the second line.
        let said = asker.look(&line).await.lines().next().unwrap_or_default().to_owned();
        facts.insert(line, said.into());
    }
    facts
}

/// Takes out what is not about the VM, and what is known to differ: the backend between device and
/// block nodes has no name where those are made by the command line, and people are told the
/// topmost node instead.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.retain(|key, _| !FLEETING.contains(&key.as_str()));
            if let Some(Value::String(backend)) = object.get_mut("device")
                && backend.ends_with(BACKEND)
            {
                backend.clear();
            }
            object.values_mut().for_each(tidy);
        }
        Value::Array(list) => list.iter_mut().for_each(tidy),
        // What nobody named, as a backing file, has a number by chance.
        Value::String(text) if text.starts_with("#block") => "#block".clone_into(text),
        Value::String(text) => {
            for disk in ["disk0", "disk1", "disk2", "disk3"] {
                for node in [format!("{disk}-format"), disk.to_owned()] {
                    let backend = format!("{node}{BACKEND}");
                    *text = text.replace(&format!("{backend} ({node})"), &node).replace(&backend, &node);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Fills a disk, so that what is discarded shows.
fn fill(path: &PathBuf, beginning: &[u8]) {
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(beginning).unwrap();
    file.write_all(&vec![1; (4 << 20) - beginning.len()]).unwrap();
    file.sync_all().unwrap();
}

/// Adds a disk, and answers the path of its image.
fn add_disk(bench: &mut Bench, name: &str, read_only: bool, options: &[(&str, &str)]) -> PathBuf {
    let path = bench.dir().join(name);
    bench.add_disk(StorageDevice {
        id: format!("id-{}", bench.config.storage.len()),
        path: path.to_str().unwrap().to_owned(),
        read_only,
        options: options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..StorageDevice::default()
    });
    path
}

/// Gives a bench everything that a VM can have. Answers the images, and their first bytes where
/// they are filled anew.
fn furnish(bench: &mut Bench) -> Vec<(PathBuf, &'static [u8])> {
    let config = &mut bench.config;
    let cpu = config.cpu.as_mut().unwrap();
    (cpu.vcpu_count, cpu.max_vcpu_count) = (2, 4);
    cpu.topology = Some(CpuTopology { sockets: 2, cores_per_socket: 1, threads_per_core: 2 });
    let memory = config.memory.as_mut().unwrap();
    memory.backing.insert("shared".to_owned(), "true".to_owned());
    (memory.hotplug_enabled, memory.max_size_bytes) = (true, 256 << 20);
    let boot = config.boot.as_mut().unwrap();
    boot.kernel_args = "console=ttyS0, a 'b' \\c äöü 100%".to_owned();
    let initrd = bench.dir().join("initrd, with a comma");
    std::fs::write(&initrd, vec![7; 12345]).unwrap();
    bench.config.boot.as_mut().unwrap().initrd_path = initrd.to_str().unwrap().to_owned();
    let read_only = add_disk(bench, "read only", true, &[]);
    // Its guest may write what it likes into a raw disk: it stays one.
    let written = add_disk(bench, "it's \"raw\", 100%\\", false, &[("direct_io", "true")]);
    let unsafe_cache = add_disk(bench, "unsafe", false, &[("cache", "unsafe")]);
    let limits = [("rate_limit.bytes_per_second", "1000000"), ("rate_limit.operations_per_second", "100")];
    let limited = add_disk(bench, "limited", false, &limits);
    bench.config.storage[2].is_root_device = true;
    vec![(read_only, b""), (written, b"QFI\xfb\0\0\0\x03"), (unsafe_cache, b""), (limited, b"")]
}

/// Runs the bench's VM on images that `make_images` makes, says what QEMU says of it, and ends it.
async fn shown(bench: &Bench, make_images: impl Fn()) -> (u32, Facts) {
    make_images();
    let run = bench.launch().await;
    bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
    std::fs::write(bench.console_file(), "").unwrap();
    let pid = run.vmm.run().process.pid;
    drop(run);
    let mut facts = facts(bench).await;
    bench.sweep().await;
    facts.values_mut().for_each(tidy);
    for disk in &bench.config.storage {
        let blocks = std::fs::metadata(&disk.path).unwrap().blocks();
        facts.insert(format!("blocks of {}", disk.path), blocks.into());
    }
    (pid, facts)
}

async fn begin_spare(bench: &Bench) {
    let request =
        SpareRequest { uid: bench.uid, dir: bench.dir().to_path_buf(), console: bench.console_file() };
    bench.backend.start_spare(request).await.unwrap();
}

fn assert_equal(ordinary: &Facts, reported: &Facts) {
    let questions: BTreeSet<&String> = ordinary.keys().chain(reported.keys()).collect();
    let differing: Vec<_> = questions
        .into_iter()
        .map(|question| (question, ordinary.get(question), reported.get(question)))
        .filter(|(_, ordinary, reported)| ordinary != reported)
        .collect();
    assert!(differing.is_empty(), "question, as ever, as told: {differing:#?}");
}

#[tokio::test]
async fn a_vm_on_a_spare_vmm_equals_a_vm_on_a_new_process() {
    let test = "a_vm_on_a_spare_vmm_equals_a_vm_on_a_new_process";
    for machine in ["q35", "microvm"] {
        let Some(backend) = qemu(test).await else { return };
        let mut bench = Bench::new(backend, machine, TinyGuest::Idle, NEVER);
        let images = furnish(&mut bench);
        let tap = Tap::new("vmspare");
        match &tap {
            Some(tap) => {
                bench.taps = vec![tap.0.clone()];
                bench.config.network.push(NetworkInterface {
                    id: "n".to_owned(),
                    mac_address: "02:00:00:00:12:34".to_owned(),
                    ..NetworkInterface::default()
                });
            }
            None => skipped(test, "no TAP can be made here, so no network interface is compared"),
        }
        let fill_all = || images.iter().for_each(|(image, beginning)| fill(image, beginning));
        let (_, ordinary) = shown(&bench, fill_all).await;
        begin_spare(&bench).await;
        let waiting = vmm_host::process::find_by_argument(bench.dir()).unwrap();
        let (pid, reported) = shown(&bench, fill_all).await;
        assert_eq!(waiting.iter().map(|found| found.identity.pid).collect::<Vec<_>>(), [pid]);
        assert_equal(&ordinary, &reported);
        let nodes = reported["query-named-block-nodes"].to_string();
        assert!(!nodes.contains("qcow2"), "a raw disk that begins like another is not probed: {nodes}");
        assert!(reported.len() > 200, "only {} facts were compared", reported.len());
    }
}

#[tokio::test]
async fn a_qcow2_disk_is_equal_on_a_spare_vmm() {
    let test = "a_qcow2_disk_is_equal_on_a_spare_vmm";
    if std::process::Command::new("qemu-img").arg("--version").output().is_err() {
        return skipped(test, "qemu-img is not installed (Debian: qemu-utils)");
    }
    for machine in ["q35", "microvm"] {
        let Some(backend) = qemu(test).await else { return };
        let mut bench = Bench::new(backend, machine, TinyGuest::Idle, GUEST_REBOOT);
        let plain = add_disk(&mut bench, "plain", false, &[("format", "qcow2")]);
        let base = bench.dir().join("base");
        make_image(&base, "raw", 1 << 20);
        let chained = [("format", "qcow2"), ("backing_files", "true")];
        let chained = add_disk(&mut bench, "chained", true, &chained);
        let make_images = || {
            make_image(&plain, "qcow2", 8 << 20);
            let made = std::process::Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
                .args([&base, &chained])
                .status();
            assert!(made.unwrap().success());
        };
        let (_, ordinary) = shown(&bench, make_images).await;
        begin_spare(&bench).await;
        let (_, reported) = shown(&bench, make_images).await;
        assert_equal(&ordinary, &reported);
        let opened = |image: &PathBuf| {
            let name = Value::from(image.to_str().unwrap());
            let nodes = reported["query-named-block-nodes"].as_array().unwrap();
            nodes.iter().filter(|node| node["file"] == name).count()
        };
        // A node for the image and one for its content.
        assert_eq!((opened(&plain), opened(&chained), opened(&base)), (2, 2, 2));
    }
}
