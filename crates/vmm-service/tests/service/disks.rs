//! CreateVm and ValidateVm: the checks of disks.

use crate::common::*;
use crate::creation::only_violation;
use vmm_core::config::{StorageDevice, VmConfig};
use vmm_core::state::VmState;
use vmm_core::store::VmRequest;

#[tokio::test(start_paused = true)]
async fn an_image_in_another_format_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    bed.disk("base");
    bed.qcow2("plain.qcow2", None);
    bed.qcow2("backed.qcow2", Some(("base", "raw")));
    let with = |name: &str, options: &[(&str, &str)]| {
        let mut config = bed.with_disk(name);
        config.storage[0].options = options.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        config
    };
    let (field, message) = only_violation(&vms, with("plain.qcow2", &[])).await;
    assert_eq!(field, "config.storage[0].options[\"format\"]");
    assert!(message.contains("set format to \"qcow2\""), "{message}");
    let (_, message) = only_violation(&vms, with("raw", &[("format", "qcow2")])).await;
    assert!(message.contains("is not a qcow2 image"), "{message}");
    let (field, message) = only_violation(&vms, with("backed.qcow2", &[("format", "qcow2")])).await;
    assert_eq!(field, "config.storage[0].options[\"backing_files\"]");
    assert!(message.contains("backing_files"), "{message}");
    vms.create("b", with("plain.qcow2", &[("format", "qcow2")])).await;
    vms.create("c", with("backed.qcow2", &[("format", "qcow2"), ("backing_files", "true")])).await;
}

/// The violation of the only disk of a VM, which is `disk`.
async fn violation_of(bed: &Bed, vms: &Vms, disk: StorageDevice) -> (String, String) {
    only_violation(vms, VmConfig { storage: vec![disk], ..bed.config() }).await
}

#[tokio::test]
async fn each_fault_of_a_backing_chain_is_named() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let rebase = |name: &str, base: &str| {
        let mut command = std::process::Command::new("qemu-img");
        command.args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, name]);
        assert!(command.current_dir(bed.dir.path()).status().unwrap().success());
    };
    bed.disk("base");
    let mut names = vec!["base".to_owned()];
    for number in 0..34 {
        let name = format!("link{number}");
        let format = if number == 0 { "raw" } else { "qcow2" };
        bed.qcow2(&name, Some((names[number].as_str(), format)));
        names.push(name);
    }
    let chained =
        |name: &str| StorageDevice { path: bed.path(name), ..bed.qcow2("top", Some(("base", "raw"))) };
    let (field, message) = violation_of(&bed, &vms, chained("link33")).await;
    assert_eq!(field, "config.storage[0].options[\"backing_files\"]");
    assert!(message.contains("more than 32 files"), "{message}");
    vms.create("deep", VmConfig { storage: vec![chained("link31")], ..bed.config() }).await;
    rebase("link1", "link3");
    let (_, message) = violation_of(&bed, &vms, chained("link2")).await;
    assert!(message.contains("is based on itself"), "{message}");
    for (base, expected) in [
        ("gone", "does not exist"),
        ("base", "is not a qcow2 image"),
        ("nbd://host/x", "which is no path"),
        ("json:{}", "which is no path"),
    ] {
        rebase("link0", base);
        let (_, message) = violation_of(&bed, &vms, chained("link0")).await;
        assert!(message.contains(expected), "{message}");
    }
}

/// The warnings of a VM whose only disk is `disk`, which ValidateVm calls ok.
async fn warnings_of(bed: &Bed, vms: &Vms, disk: StorageDevice) -> Vec<(String, String)> {
    let config = VmConfig { storage: vec![disk], ..bed.config() };
    let report = vms.service.validate(&VmRequest { backend: String::new(), config }).await.unwrap();
    assert!(report.is_ok(), "{report:?}");
    report.warnings.into_iter().map(|warning| (warning.field, warning.message)).collect()
}

#[tokio::test]
async fn an_unusable_disk_size_is_refused_and_a_rounded_one_is_a_warning() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let sized = |bytes: u64, direct_io: bool| {
        let path = bed.path("sized");
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        let options = direct_io.then(|| ("direct_io".to_owned(), "true".to_owned())).into_iter().collect();
        StorageDevice { path, options, ..StorageDevice::default() }
    };
    for (bytes, direct_io, expected) in [
        (0, false, "less than a sector"),
        (511, false, "less than a sector"),
        (1_000_000, true, "as direct_io needs"),
        (1_000_448, true, "no multiple of 4096"),
        (512, true, "no multiple of 4096"),
    ] {
        let config = VmConfig { storage: vec![sized(bytes, direct_io)], ..bed.config() };
        let report = vms.service.validate(&VmRequest { backend: String::new(), config }).await.unwrap();
        let [violation] = &report.violations[..] else { panic!("{report:?}") };
        assert_eq!(violation.field, "config.storage[0].path");
        assert!(violation.message.contains(expected), "{violation}");
    }
    for (bytes, direct_io, read_only, expected) in [
        (1_000_000, false, false, "no multiple of 512"),
        (1_000_000, true, true, "no multiple of 512"),
        (1_000_448, true, true, "no multiple of 4096"),
    ] {
        let disk = StorageDevice { read_only, ..sized(bytes, direct_io) };
        let found = warnings_of(&bed, &vms, disk).await;
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, "config.storage[0].path");
        assert!(found[0].1.contains(expected), "{found:?}");
    }
    assert_eq!(warnings_of(&bed, &vms, sized(1_000_448, false)).await, []);
    assert_eq!(warnings_of(&bed, &vms, sized(1 << 20, true)).await, []);
}

#[tokio::test]
async fn a_partition_table_on_a_generated_root_device_is_a_warning() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut head = vec![0; 1 << 20];
    head[512..520].copy_from_slice(b"EFI PART");
    std::fs::write(bed.path("gpt"), head).unwrap();
    let disk =
        |is_root_device| StorageDevice { path: bed.path("gpt"), is_root_device, ..StorageDevice::default() };
    let found = warnings_of(&bed, &vms, disk(true)).await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0, "config.storage[0].is_root_device");
    assert!(found[0].1.contains("root=/dev/vda1"), "{found:?}");
    assert_eq!(warnings_of(&bed, &vms, disk(false)).await, []);
    let mut config = VmConfig { storage: vec![disk(true)], ..bed.config() };
    config.boot.as_mut().unwrap().kernel_args = "root=/dev/vda1".to_owned();
    let report = vms.service.validate(&VmRequest { backend: String::new(), config }).await.unwrap();
    assert_eq!(report.warnings, []);
}

#[tokio::test]
async fn a_partition_table_inside_an_image_is_a_warning() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut head = vec![0; 1 << 20];
    head[512..520].copy_from_slice(b"EFI PART");
    std::fs::write(bed.path("gpt"), head).unwrap();
    let convert = |options: &[&str], name: &str| {
        let mut command = std::process::Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2"]).args(options).args(["gpt", name]);
        let made = command.current_dir(bed.dir.path()).output().expect("qemu-img is there");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    };
    convert(&[], "plain");
    convert(&["-c", "-o", "cluster_size=4096"], "compressed");
    convert(&["-c", "-o", "compression_type=zstd"], "zstd");
    let image = |name: &str, backing_files: &str| StorageDevice {
        path: bed.path(name),
        is_root_device: true,
        options: [("format", "qcow2"), ("backing_files", backing_files)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        ..StorageDevice::default()
    };
    bed.qcow2("on-raw", Some(("gpt", "raw")));
    bed.qcow2("on-image", Some(("compressed", "qcow2")));
    for (name, backing_files) in
        [("plain", "false"), ("compressed", "false"), ("on-raw", "true"), ("on-image", "true")]
    {
        let found = warnings_of(&bed, &vms, image(name, backing_files)).await;
        let [(field, message)] = &found[..] else { panic!("{name}: {found:?}") };
        assert_eq!(field, "config.storage[0].is_root_device");
        assert!(message.contains("root=/dev/vda1"), "{message}");
    }
    bed.qcow2("empty", None);
    for without in [
        StorageDevice { is_root_device: false, ..image("plain", "false") },
        image("empty", "false"),
        // The data of such an image is not read here.
        image("zstd", "false"),
    ] {
        assert_eq!(warnings_of(&bed, &vms, without).await, []);
    }
}

#[tokio::test]
async fn an_image_with_unknown_features_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for (features, expected) in [(0x02, "is marked as corrupt"), (0x40, "bits 0x40"), (0x60, "bits 0x60")] {
        let disk = bed.qcow2("special", None);
        let mut image = std::fs::read(&disk.path).unwrap();
        image[79] = features;
        std::fs::write(&disk.path, image).unwrap();
        let (field, message) = violation_of(&bed, &vms, disk).await;
        assert_eq!(field, "config.storage[0].options[\"format\"]");
        assert!(message.contains(expected), "{message}");
    }
}

#[tokio::test]
async fn an_image_with_external_data_or_encryption_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    // The format luks would measure the speed of the host, which fails where the host is busy.
    let secret = ["--object", "secret,id=key,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=key"];
    for (options, expected) in
        [(&["-o", "data_file=data"][..], "keeps its data in another file"), (&secret[..], "is encrypted")]
    {
        let mut command = std::process::Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).args(options).args(["image", "1M"]);
        assert!(command.current_dir(bed.dir.path()).status().unwrap().success());
        let disk = StorageDevice { path: bed.path("image"), ..bed.qcow2("other", None) };
        let (field, message) = violation_of(&bed, &vms, disk).await;
        assert_eq!(field, "config.storage[0].options[\"format\"]");
        assert!(message.contains(expected), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn data_written_to_a_raw_disk_does_not_prevent_a_boot() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_disk("d")).await;
    std::fs::write(bed.path("d"), b"QFI\xfb\0\0\0\x03 written by the guest").unwrap();
    vms.reboot("a").await.expect("the disk was declared raw");
    vms.machine("a").power_off();
    vms.until("a", |record| record.state == VmState::Shutdown).await;
    vms.boot("a").await.expect("the disk was declared raw");
    let found = violations(vms.try_create("b", bed.with_disk("d")).await);
    assert_eq!(found[0].0, "config.storage[0].options[\"format\"]", "a new VM must say which it is");
}
