//! What becomes of a configuration on QEMU's command line, and which configurations are refused.
//! Nothing is started.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

use std::ffi::OsString;
use std::path::Path;

use vmm_backends::qemu::convert::{
    Accelerator, ImageKind, InexpressibleVm, QemuInputs, QemuMachine, SpareQemuConfig, SpareQemuInputs,
    arguments, spare_arguments, spare_config,
};
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::Backend;
use vmm_core::config::{
    BootConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface, Options, RestartPolicyConfig,
    StorageDevice, VmConfig,
};
use vmm_core::spec::VmSpec;

const UID: &str = "01890000-0000-7000-8000-0000000000aa";

fn options(pairs: &[(&str, &str)]) -> Options {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn config(machine: Option<&str>) -> VmConfig {
    VmConfig {
        cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
        memory: Some(MemoryConfig { size_bytes: 512 << 20, ..MemoryConfig::default() }),
        boot: Some(BootConfig {
            kernel_path: "/boot/vmlinux".to_owned(),
            kernel_args: "console=ttyS0".to_owned(),
            boot_options: machine.map(|machine| options(&[("qemu.machine", machine)])).unwrap_or_default(),
            ..BootConfig::default()
        }),
        ..VmConfig::default()
    }
}

fn disk(id: &str, path: &str, pairs: &[(&str, &str)]) -> StorageDevice {
    StorageDevice {
        id: id.to_owned(),
        path: path.to_owned(),
        options: options(pairs),
        ..StorageDevice::default()
    }
}

fn nic(id: &str, mac: &str) -> NetworkInterface {
    NetworkInterface { id: id.to_owned(), mac_address: mac.to_owned(), ..NetworkInterface::default() }
}

/// Everything that a configuration can say, with paths that would be misread if they were parsed.
fn full(machine: Option<&str>) -> VmConfig {
    let mut config = config(machine);
    config.cpu = Some(CpuConfig {
        vcpu_count: 2,
        max_vcpu_count: 8,
        topology: Some(CpuTopology { sockets: 2, cores_per_socket: 2, threads_per_core: 2 }),
        features: options(&[("qemu.model", "Skylake-Server,-avx512f")]),
    });
    config.memory = Some(MemoryConfig {
        size_bytes: 1 << 30,
        hotplug_enabled: true,
        max_size_bytes: 4 << 30,
        backing: options(&[("hugepages", "true"), ("shared", "true")]),
    });
    config.boot.as_mut().unwrap().initrd_path = "/boot/initrd, with a comma".to_owned();
    let mut root = disk("root", "/images/ro,ot\"=.qcow2", &[("format", "qcow2"), ("direct_io", "true")]);
    root.is_root_device = true;
    let mut data = disk("data-with-a-name-that-is-too-long", "/dev/sdz", &[("cache", "unsafe")]);
    data.read_only = true;
    let limited = [("rate_limit.bytes_per_second", "1000"), ("rate_limit.operations_per_second", "10")];
    let chained = [("format", "qcow2"), ("backing_files", "true")];
    config.storage =
        vec![data, root, disk("limited", "/images/l", &limited), disk("chained", "/images/c", &chained)];
    config.network = vec![nic("a", "02:00:00:00:00:01"), nic("b", "02:00:00:00:00:02")];
    config.restart_policy = Some(RestartPolicyConfig { mode: 1, max_restarts: 0 });
    config
}

/// The command line, an option to a line.
fn line(config: &VmConfig, accelerator: Accelerator, console: Option<&str>) -> String {
    line_in("/run/v,m/0a", config, accelerator, console)
}

fn line_in(dir: &str, config: &VmConfig, accelerator: Accelerator, console: Option<&str>) -> String {
    lines(with_inputs(dir, config, accelerator, console, |inputs| arguments(inputs).unwrap()))
}

/// What a waiting QEMU is told of `config`.
fn told_in(
    dir: &str,
    config: &VmConfig,
    accelerator: Accelerator,
    console: Option<&str>,
) -> Result<SpareQemuConfig, InexpressibleVm> {
    with_inputs(dir, config, accelerator, console, spare_config)
}

fn with_inputs<T>(
    dir: &str,
    config: &VmConfig,
    accelerator: Accelerator,
    console: Option<&str>,
    convert: impl FnOnce(&QemuInputs<'_>) -> T,
) -> T {
    let spec = VmSpec::parse(config).unwrap();
    let images: Vec<ImageKind> = spec
        .disks
        .iter()
        .map(|disk| if disk.path.starts_with("/dev") { ImageKind::BlockDevice } else { ImageKind::File })
        .collect();
    let taps: Vec<String> = (0..spec.nics.len()).map(|index| format!("vmt{index}")).collect();
    convert(&QemuInputs {
        uid: UID.parse().unwrap(),
        vm_id: &"web-1".parse().unwrap(),
        spec: &spec,
        machine: QemuMachine::of(&spec).unwrap(),
        accelerator,
        dir: Path::new(dir),
        console: console.map(Path::new),
        taps: &taps,
        images: &images,
    })
}

fn lines(words: Vec<OsString>) -> String {
    let mut text = String::new();
    for word in words {
        let word = word.into_string().unwrap();
        let begins_option = word.starts_with('-') && !text.ends_with("-append");
        text.push_str(if begins_option { "\n" } else { " " });
        text.push_str(&word);
    }
    text
}

#[test]
fn a_minimal_vm_on_q35() {
    insta::assert_snapshot!(line(&config(None), Accelerator::Kvm, Some("/run/v,m/0a/console.log")));
}

#[test]
fn a_minimal_vm_on_microvm() {
    insta::assert_snapshot!(line_in("/run/vm/0a", &config(Some("microvm")), Accelerator::Tcg, None));
}

#[test]
fn a_full_vm_on_q35() {
    insta::assert_snapshot!(line(&full(Some("q35")), Accelerator::Tcg, Some("/var/log/c,1")));
}

#[test]
fn a_full_vm_on_microvm() {
    insta::assert_snapshot!(line(&full(Some("microvm")), Accelerator::Kvm, Some("/var/log/c,1")));
}

#[test]
fn devices_keep_their_slots() {
    let mut many = config(None);
    for index in 0..64 {
        many.storage.push(disk(&format!("d{index}"), &format!("/images/{index}"), &[]));
    }
    many.network = vec![nic("a", "02:00:00:00:00:01")];
    let text = line(&many, Accelerator::Tcg, None);
    for place in
        [r#""addr":"2.0""#, r#""addr":"2.7""#, r#""addr":"3.0""#, r#""addr":"9.7""#, r#""addr":"10.0""#]
    {
        assert_eq!(text.matches(place).count(), 1, "{place}");
    }
    many.storage.truncate(1);
    assert!(line(&many, Accelerator::Tcg, None).contains(r#""addr":"10.0""#), "the interface has not moved");
}

#[test]
fn the_command_line_of_a_spare_vmm() {
    let words = |dir: &str, accelerator| {
        lines(spare_arguments(&SpareQemuInputs {
            uid: UID.parse().unwrap(),
            accelerator,
            dir: Path::new(dir),
        }))
    };
    insta::assert_snapshot!(words("/run/vm/0a", Accelerator::Kvm));
    let comma = words("/run/v,m/0a", Accelerator::Tcg);
    assert!(comma.contains("-pidfile /run/v,m/0a/qemu.pid"), "found by its folder's name: {comma}");
}

#[test]
fn the_spare_file_of_a_minimal_vm_on_q35() {
    let reported = told_in("/run/v,m/0a", &config(None), Accelerator::Kvm, Some("/run/v,m/0a/console.log"));
    insta::assert_snapshot!(reported.unwrap().file);
}

#[test]
fn the_spare_file_of_a_minimal_vm_on_microvm() {
    let reported = told_in("/run/vm/0a", &config(Some("microvm")), Accelerator::Tcg, Some("/run/vm/0a/c"));
    insta::assert_snapshot!(reported.unwrap().file);
}

#[test]
fn the_spare_file_of_a_full_vm_on_q35() {
    let reported = told_in("/run/v,m/0a", &full(Some("q35")), Accelerator::Tcg, Some("/var/log/c,1"));
    insta::assert_snapshot!(reported.unwrap().file);
}

#[test]
fn the_spare_file_of_a_full_vm_on_microvm() {
    let reported = told_in("/run/v,m/0a", &full(Some("microvm")), Accelerator::Kvm, Some("/var/log/c,1"));
    insta::assert_snapshot!(reported.unwrap().file);
}

#[test]
fn a_spare_vmm_fits_only_an_equal_specification() {
    let (dir, tcg) = ("/run/vm/0a", Accelerator::Tcg);
    let spare = spare_arguments(&SpareQemuInputs {
        uid: UID.parse().unwrap(),
        accelerator: tcg,
        dir: Path::new(dir),
    });
    let suits = |dir: &str, config: &VmConfig, accelerator, console| {
        told_in(dir, config, accelerator, console).unwrap().ahead == spare
    };
    for console in ["/run/vm/0a/console.log", "/var/log/mine"] {
        assert!(suits(dir, &config(None), tcg, Some(console)));
        assert!(suits(dir, &config(Some("microvm")), tcg, Some(console)));
    }
    assert!(!suits(dir, &config(None), tcg, None), "a console cannot be told away");
    assert!(!suits(dir, &config(None), Accelerator::Kvm, Some("/c")));
    assert!(!suits("/run/vm/0b", &config(None), tcg, Some("/c")));
    let mut model = config(None);
    model.cpu.as_mut().unwrap().features = options(&[("qemu.model", "Skylake-Server")]);
    assert!(!suits(dir, &model, tcg, Some("/c")));
    model.cpu.as_mut().unwrap().features = options(&[("qemu.model", "max")]);
    assert!(suits(dir, &model, tcg, Some("/c")), "the usual one by its name");
}

#[test]
fn values_that_the_spare_file_cannot_carry_are_refused() {
    let dir = "/run/vm/0a";
    let tell = |config: &VmConfig| told_in(dir, config, Accelerator::Tcg, Some("/c"));
    let why = |config: &VmConfig| tell(config).unwrap_err().to_string();
    let with_args = |args: &str| {
        let mut config = config(None);
        args.clone_into(&mut config.boot.as_mut().unwrap().kernel_args);
        config
    };
    let most = 1023 - r#" append = """#.len() - 1;
    assert!(tell(&with_args(&"a".repeat(most))).is_ok());
    assert_eq!(
        why(&with_args(&"a".repeat(most + 1))),
        "QEMU's configuration file cannot carry the append of machine: it is too long"
    );
    assert!(why(&with_args("dyndbg=\"file x +p\"")).ends_with("append of machine: it has a quotation mark"));
    let console = told_in(dir, &config(None), Accelerator::Tcg, Some("/run/a\nb"));
    assert_eq!(
        console.unwrap_err().to_string(),
        "QEMU's configuration file cannot carry the logfile of chardev console: it has a control character"
    );

    let mut kernel = config(None);
    kernel.boot.as_mut().unwrap().kernel_path = "/boot/a\"b".to_owned();
    assert!(why(&kernel).ends_with("kernel of machine: it has a quotation mark"));

    let with_disk = |path: &str| VmConfig { storage: vec![disk("d", path, &[])], ..config(None) };
    let long = format!("/images/{}", "a".repeat(900));
    assert_eq!(
        why(&with_disk(&long)),
        "QEMU's configuration file cannot carry the file of drive disk0-format-drive: it is too long"
    );
    let odd = tell(&with_disk("/images/it's\"\\, 100%.raw")).unwrap().file;
    let expected = r"'filename':'/images/it\u0027s\u0022\\, 100%.raw'";
    assert!(odd.contains(expected), "{odd}");
}

/// A file that is cut off must not make a QEMU that gets ready.
#[test]
fn the_console_is_the_last_section_of_the_spare_file() {
    for machine in ["q35", "microvm"] {
        let reported = told_in("/run/vm/0a", &full(Some(machine)), Accelerator::Tcg, Some("/c")).unwrap();
        assert_eq!(reported.file.matches("[chardev ").count(), 1);
        let (_, console) = reported.file.split_once("[chardev \"console\"]\n").unwrap();
        assert!(!console.contains('['), "{console}");
        assert!(console.ends_with(" backend = \"pipe\"\n"), "{console}");
    }
}

/// The findings of the check, without KVM.
fn findings(config: &VmConfig) -> (Vec<String>, Vec<String>) {
    let backend = QemuBackend::new(QemuOptions { kvm: KvmMode::Off, ..QemuOptions::default() });
    let report = backend.check(&VmSpec::parse(config).unwrap());
    let violations = report.violations.into_iter().map(|found| found.field).collect();
    (violations, report.warnings.into_iter().map(|warning| warning.field).collect())
}

const NONE: [String; 0] = [];

#[test]
fn supported_qemu_values_have_no_findings() {
    assert_eq!(findings(&config(None)), (NONE.to_vec(), NONE.to_vec()));
    assert_eq!(findings(&full(Some("q35"))), (NONE.to_vec(), NONE.to_vec()));
}

#[test]
fn known_keys_pass_and_foreign_keys_warn_and_unknown_keys_are_refused() {
    let mut config = config(Some("pc"));
    config.cpu.as_mut().unwrap().features = options(&[("qemu.modle", "max"), ("ch.x", "1")]);
    config.memory.as_mut().unwrap().backing = options(&[("fc.y", "1")]);
    config.storage = vec![disk("d", "/d", &[("qemu.aio", "native")])];
    let mut nic = nic("n", "02:00:00:00:00:01");
    nic.options = options(&[("rate_limit.bytes_per_second", "1"), ("qemu.vhost", "on")]);
    config.network = vec![nic];
    let (violations, warnings) = findings(&config);
    let expected = [
        "config.cpu.features[\"qemu.modle\"]",
        "config.boot.boot_options[\"qemu.machine\"]",
        "config.storage[0].options[\"qemu.aio\"]",
        "config.network[0].options[\"qemu.vhost\"]",
    ];
    assert_eq!(violations, expected);
    let expected = [
        "config.cpu.features[\"ch.x\"]",
        "config.memory.backing[\"fc.y\"]",
        "config.network[0].options[\"rate_limit.bytes_per_second\"]",
    ];
    assert_eq!(warnings, expected);
}

#[test]
fn the_limits_depend_on_the_machine_model() {
    let mut many = config(None);
    many.cpu.as_mut().unwrap().vcpu_count = 255;
    assert_eq!(findings(&many).0, NONE);
    many.cpu.as_mut().unwrap().vcpu_count = 256;
    assert_eq!(findings(&many).0, ["config.cpu.vcpu_count"]);
    many.cpu = Some(CpuConfig { vcpu_count: 1, max_vcpu_count: 288, ..CpuConfig::default() });
    assert_eq!(findings(&many).0, ["config.cpu.max_vcpu_count"]);

    let mut small = config(Some("microvm"));
    small.boot.as_mut().unwrap().kernel_args = "tsc_early_khz=2000000".to_owned();
    small.storage = (0..23).map(|index| disk(&format!("d{index}"), "/d", &[])).collect();
    assert_eq!(findings(&small), (NONE.to_vec(), NONE.to_vec()));
    small.network = vec![nic("n", "02:00:00:00:00:01")];
    assert_eq!(findings(&small).0, ["config.storage"]);
}

#[test]
fn ignored_values_on_microvm_are_warnings() {
    let (violations, warnings) = findings(&full(Some("microvm")));
    assert_eq!(violations, NONE);
    let expected = [
        "config.cpu.max_vcpu_count",
        "config.memory.hotplug_enabled",
        "config.boot.boot_options[\"qemu.machine\"]",
    ];
    assert_eq!(warnings, expected, "no hot-plug; and Linux may not find its clock where QEMU emulates");
}

#[test]
fn a_cpu_model_has_a_name_and_features() {
    for (model, good) in [
        ("max", true),
        ("Skylake-Server-v4,-avx512f,+pcid,kvm=off", true),
        ("host", false),
        ("host,-avx", false),
        ("help", false),
        ("", false),
        ("-S", false),
        ("a b", false),
        ("x;y", false),
    ] {
        let mut config = config(None);
        config.cpu.as_mut().unwrap().features = options(&[("qemu.model", model)]);
        assert_eq!(findings(&config).0.is_empty(), good, "{model:?}");
    }
}
