//! CreateVm: what it fills in, what it repeats and what it refuses.

use crate::common::*;
use vmm_core::config::{
    BootConfig, ConsoleConfig, CpuConfig, MemoryConfig, NetworkInterface, StorageDevice, VmConfig,
};
use vmm_core::store::{StoreErrorKind, VmRequest};
use vmm_service::DefaultBoot;
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};
use vmm_testkit::memory_store::CommitTreatment;

#[tokio::test(start_paused = true)]
async fn a_repeated_creation_returns_the_vm_unchanged() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let first = vms.create("a", bed.config()).await;
    assert_eq!(vms.create("a", bed.config()).await, first);
    vms.boot("a").await.unwrap();
    assert_eq!(vms.create("a", bed.config()).await, vms.record("a"), "with its state of now");
    assert_eq!(bed.store.vms().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_different_creation_of_the_same_name_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    let mut other = bed.config();
    other.metadata.insert("team".into(), "x".into());
    refused(vms.try_create("a", other).await, "already-exists");
    // As sent: naming the default is not the same as naming nothing.
    refused(vms.try_create_on("fake", "a", bed.config()).await, "already-exists");
    refused(vms.try_create_on("other", "a", bed.config()).await, "already-exists");
    refused(vms.try_create("a", VmConfig::default()).await, "already-exists");
}

#[tokio::test(start_paused = true)]
async fn generated_names_differ() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let a = vms.create("", bed.config()).await;
    let b = vms.create("", bed.config()).await;
    assert_ne!(a.vm_id, b.vm_id);
    for record in [&a, &b] {
        assert!(record.vm_id.as_str().starts_with("vm-"), "{}", record.vm_id);
        assert_eq!(*vms.record(record.vm_id.as_str()), **record);
    }
    assert!(a.vm_id < b.vm_id, "ordered by time");
}

#[tokio::test(start_paused = true)]
async fn omitted_values_are_completed_stored_and_returned() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.with_disk("d");
    config.network = vec![NetworkInterface::default()];
    let record = vms.create("a", config.clone()).await;
    assert_eq!(record.config.storage[0].id, "disk0");
    assert_eq!(record.config.network[0].id, "net0");
    assert!(!record.config.network[0].mac_address.is_empty());
    assert_eq!(
        record.requested.unpack(),
        VmRequest { backend: String::new(), config: config.clone() },
        "as sent"
    );
    assert_eq!(bed.stored("a"), *record);
    assert_eq!(vms.create("a", config).await, record, "generated values do not make another VM of it");
}

#[tokio::test(start_paused = true)]
async fn the_default_kernel_is_used_for_a_vm_without_a_kernel() {
    let mut bed = Bed::new();
    let none = VmConfig { boot: None, ..bed.config() };
    let vms = bed.start().await;
    let found = violations(vms.try_create("a", none.clone()).await);
    assert_eq!(found[0].0, "config.boot.kernel_path");
    assert!(found[0].1.contains("UNKEY_VMCP_DEFAULT_KERNEL"), "{found:?}");
    bed.default_boot = DefaultBoot {
        kernel: bed.path("vmlinux"),
        initrd: String::new(),
        kernel_args: "console=ttyS0".into(),
    };
    let vms = bed.start().await;
    let record = vms.create("a", none).await;
    let boot = record.config.boot.clone().unwrap();
    assert_eq!((boot.kernel_path, boot.kernel_args.as_str()), (bed.path("vmlinux"), "console=ttyS0"));
    assert_eq!(record.requested.unpack().config.boot, None);
}

#[tokio::test(start_paused = true)]
async fn all_violations_are_returned_at_once() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.config();
    config.cpu = Some(CpuConfig { vcpu_count: 0, ..CpuConfig::default() });
    config.memory.as_mut().unwrap().size_bytes = 5;
    config.boot = None;
    config.storage = vec![StorageDevice { path: "relative".into(), ..StorageDevice::default() }];
    let result = vms.try_create_on("nothing", "../x", config).await;
    let text = result.as_ref().unwrap_err().to_string();
    let fields: Vec<String> = violations(result).into_iter().map(|(field, _)| field).collect();
    for field in [
        "vm_id",
        "backend",
        "config.cpu.vcpu_count",
        "config.memory.size_bytes",
        "config.boot.kernel_path",
        "config.storage[0].path",
    ] {
        assert!(fields.iter().any(|found| found == field), "{fields:?} has {field}");
        assert!(text.contains(field), "curl users see no details: {text}");
    }
    assert!(bed.store.vms().is_empty() && bed.store.log().is_empty(), "nothing was touched");
}

#[tokio::test(start_paused = true)]
async fn findings_of_the_host_and_the_backend_are_returned_together() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.config();
    config.cpu = Some(CpuConfig { vcpu_count: 33, ..CpuConfig::default() });
    config.boot = Some(BootConfig {
        kernel_path: bed.path("missing"),
        initrd_path: bed.path("missing-too"),
        ..BootConfig::default()
    });
    config.storage = vec![StorageDevice { path: bed.path("no-disk"), ..StorageDevice::default() }];
    let fields: Vec<String> =
        violations(vms.try_create("a", config).await).into_iter().map(|(field, _)| field).collect();
    assert_eq!(
        fields,
        [
            "config.cpu.vcpu_count",
            "config.boot.kernel_path",
            "config.boot.initrd_path",
            "config.storage[0].path"
        ]
    );
}

/// The one violation of a kernel or disk at `path`.
pub(crate) async fn only_violation(vms: &Vms, config: VmConfig) -> (String, String) {
    let mut found = violations(vms.try_create("a", config).await);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[tokio::test(start_paused = true)]
async fn a_kernel_in_a_format_that_the_backend_cannot_boot_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let fifo = bed.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    std::fs::write(bed.path("text"), "#!/bin/sh").unwrap();
    let mut image = vec![0; 0x210];
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    std::fs::write(bed.path("bzImage"), image).unwrap();
    let dir = bed.dir.path().to_str().unwrap().to_owned();
    let cases = [
        (bed.path("missing"), "does not exist"),
        (fifo, "a FIFO"),
        (dir, "a directory"),
        ("/dev/null".to_owned(), "a character device"),
        (bed.path("text"), "neither a bzImage nor"),
        (bed.path("bzImage"), "is a bzImage; this backend boots"),
    ];
    for (path, expected) in cases {
        let mut config = bed.config();
        config.boot.as_mut().unwrap().kernel_path = path;
        let (field, message) = only_violation(&vms, config).await;
        assert_eq!(field, "config.boot.kernel_path");
        assert!(message.contains(expected), "{message} says {expected:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn all_violations_and_file_findings_are_returned_at_once() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.with_disk("d");
    config.memory = Some(MemoryConfig { size_bytes: 5, ..MemoryConfig::default() });
    config.boot.as_mut().unwrap().kernel_path = bed.path("no-kernel");
    config.boot.as_mut().unwrap().initrd_path = "relative".to_owned();
    config.storage[0].path = bed.path("no-disk");
    config.console = console(bed.path("no-folder/console"));
    let expected = [
        "config.memory.size_bytes",
        "config.boot.initrd_path",
        "config.boot.kernel_path",
        "config.storage[0].path",
        "config.console.output",
    ];
    let fields = |found: Vec<(String, String)>| found.into_iter().map(|(field, _)| field).collect::<Vec<_>>();
    assert_eq!(fields(violations(vms.try_create("a", config.clone()).await)), expected);
    let found = fields(violations(vms.try_create("not a name", config.clone()).await));
    assert_eq!(found, [&["vm_id"], &expected[..]].concat());
    let found = fields(violations(vms.try_create_on("no-backend", "a", config).await));
    assert_eq!(found, [&["backend"], &expected[..]].concat());
}

#[tokio::test(start_paused = true)]
async fn hundreds_of_thousands_of_devices_are_refused_by_their_number() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let config = VmConfig { storage: vec![StorageDevice::default(); 381_000], ..bed.config() };
    let (field, message) = only_violation(&vms, config).await;
    assert_eq!(field, "config.storage");
    assert!(message.contains("381000"), "{message}");
    let mut config = bed.config();
    let options = (0..300_000).map(|number| (format!("key{number}"), String::new()));
    config.boot.as_mut().unwrap().boot_options = options.collect();
    assert_eq!(only_violation(&vms, config).await.0, "config.boot.boot_options");
}

#[tokio::test(start_paused = true)]
async fn one_writable_disk_twice_in_a_vm_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.with_disk("d");
    std::os::unix::fs::symlink(bed.path("d"), bed.path("alias")).unwrap();
    config.storage.push(StorageDevice {
        path: bed.path("alias"),
        read_only: true,
        ..StorageDevice::default()
    });
    let (field, message) = only_violation(&vms, config.clone()).await;
    assert_eq!(field, "config.storage[1].path");
    assert!(message.contains("same disk"), "{message}");
    config.storage[0].read_only = true;
    vms.create("a", config).await;
}

fn console(output: String) -> Option<ConsoleConfig> {
    Some(ConsoleConfig { enabled: true, output, ..ConsoleConfig::default() })
}

#[tokio::test(start_paused = true)]
async fn a_console_file_of_others_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    std::fs::write(bed.path("precious"), "data").unwrap();
    std::os::unix::fs::symlink(bed.path("nowhere"), bed.path("link")).unwrap();
    std::fs::create_dir(bed.path("folder")).unwrap();
    for (taken, why) in [
        ("precious", "was not made by this VM"),
        ("link", "was not made by this VM"),
        ("run-not-there/console", "does not exist"),
        ("folder", "is a directory"),
        ("new/", "names a directory"),
        ("precious/console", "cannot be examined"),
    ] {
        let config = VmConfig { console: console(bed.path(taken)), ..bed.config() };
        let (field, message) = only_violation(&vms, config).await;
        assert_eq!(field, "config.console.output", "{taken}");
        assert!(message.contains(why), "{taken}: {message}");
    }
    let config = VmConfig { console: console(bed.path("out")), ..bed.config() };
    vms.run("a", config.clone()).await;
    assert!(std::fs::exists(bed.path("out")).unwrap());
    vms.shutdown("a").await.unwrap();
    vms.boot("a").await.expect("its own file serves it again");
    let other = violations(vms.try_create("b", config).await);
    assert_eq!(other[0].0, "config.console.output", "what one VM made is not another's");
    assert_eq!(std::fs::read(bed.path("precious")).unwrap(), b"data");
}

#[tokio::test(start_paused = true)]
async fn a_console_file_that_appears_before_the_first_boot_is_kept() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let config = VmConfig { console: console(bed.path("out")), ..bed.config() };
    vms.create("a", config).await;
    std::fs::write(bed.path("out"), "somebody else's").unwrap();
    let text = refused(vms.boot("a").await, "precondition");
    assert!(text.contains("config.console.output"), "{text}");
    assert_eq!(std::fs::read(bed.path("out")).unwrap(), b"somebody else's");
    assert_eq!(vms.world.calls(ScriptedMethod::Launch), 0);
}

#[tokio::test(start_paused = true)]
async fn names_with_path_characters_are_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for vm_id in ["..", "../x", "a/b", "-a", ".a", "a b", "a\n", "ä", "a\0", &"x".repeat(64)] {
        let found = violations(vms.try_create(vm_id, bed.config()).await);
        assert_eq!(found[0].0, "vm_id", "{vm_id:?}");
        refused(vms.boot(vm_id).await, "not-found");
        refused(vms.force_delete(vm_id).await, "not-found");
    }
    vms.create(&"x".repeat(63), bed.config()).await;
}

#[tokio::test(start_paused = true)]
async fn firmware_alone_is_unimplemented_and_with_violations_invalid() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.config();
    config.boot.as_mut().unwrap().boot_options.insert("firmware".into(), "/x".into());
    refused(vms.try_create("a", config.clone()).await, "unsupported");
    config.cpu = None;
    refused(vms.try_create("a", config).await, "invalid");
}

#[tokio::test(start_paused = true)]
async fn validation_returns_the_findings_of_creation_and_changes_nothing() {
    let bed = Bed::new();
    let vms = bed.start().await;
    // The backend, the host's capacity and the network each have a warning.
    let mut config = bed.with_tap("tap0");
    config.cpu = Some(CpuConfig { vcpu_count: 1, max_vcpu_count: 4, ..CpuConfig::default() });
    config.memory = Some(MemoryConfig { size_bytes: 1 << 20, ..MemoryConfig::default() });
    let requested = VmRequest { backend: String::new(), config: config.clone() };
    let report = vms.service.validate(&requested).await.expect("the files answer");
    assert!(report.is_ok());
    let fields: Vec<_> = report.warnings.iter().map(|warning| warning.field.as_str()).collect();
    let expected = ["config.cpu.max_vcpu_count", "config.memory.size_bytes", "config.network[0].tap_device"];
    assert_eq!(fields, expected);
    assert!(bed.store.vms().is_empty());
    let created = vms.try_create("a", config.clone()).await.unwrap();
    assert_eq!(created.warnings, report.warnings);
    assert_eq!(vms.try_create("a", config).await.unwrap().warnings, report.warnings, "each time alike");
    assert!(!bed.runtime_dir().exists(), "creation starts nothing and makes no folder");
}

#[tokio::test(start_paused = true)]
async fn an_unavailable_backend_is_a_warning() {
    use vmm_core::backend::{BackendErrorKind, Effect};
    let bed = Bed::new();
    bed.world.always(
        ScriptedMethod::Ping,
        ScriptedResult::Fail(BackendErrorKind::NotInstalled, Effect::NotApplied),
    );
    let vms = bed.start().await;
    assert!(vms.service.default_backend().unwrap().health.version.is_err());
    let created = vms.try_create("a", bed.config()).await.unwrap();
    assert_eq!(created.warnings[0].field, "backend");
    bed.world.behave();
    tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    assert_eq!(vms.service.default_backend().unwrap().health.version, Ok("1.0".into()), "it is asked again");
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_the_store_refuses_leaves_its_name_free() {
    use StoreErrorKind::{Full, Io};
    let bed = Bed::new();
    let vms = bed.start().await;
    let cases = [
        (CommitTreatment::Refuse(Full), "exhausted"),
        (CommitTreatment::Refuse(Io), "unavailable"),
        (CommitTreatment::Lose(Io), "unavailable"),
        (CommitTreatment::WriteAndFail(Io), "unavailable"),
    ];
    for (verdict, expected) in cases {
        bed.store.next([verdict]);
        refused(vms.try_create("a", bed.config()).await, expected);
        refused(vms.service.get("a").map(drop), "not-found");
        assert!(bed.store.vms().is_empty(), "{verdict:?}");
    }
    vms.create("a", bed.config()).await;
}

#[tokio::test(start_paused = true)]
async fn a_creation_completes_without_its_client() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let client = vms.begin({
        let (vms, config) = (vms.clone(), bed.config());
        async move { vms.create("a", config).await }
    });
    client.await.abort();
    eventually("the VM", || vms.service.get("a").is_ok()).await;
    assert_eq!(bed.store.vms().len(), 1);
}
