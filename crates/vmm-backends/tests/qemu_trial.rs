//! The proof that a QEMU starts VMs, with the real QEMU: whole, without some of its parts, and
//! behind a program that hangs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

mod qemu_support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu_support::{Bench, NEVER, skipped};
use tempfile::TempDir;
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::Backend as _;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::qemu_copy::QemuCopy;

/// The machines of a trial.
const MACHINES: [&str; 2] = ["q35", "microvm"];

fn backend(binary: impl Into<PathBuf>) -> QemuBackend {
    QemuBackend::new(QemuOptions { binary: binary.into(), kvm: KvmMode::Off })
}

/// Returns a whole copy of QEMU that starts VMs, or `None` after saying that `test` is skipped.
async fn whole_copy(test: &str) -> Option<(TempDir, QemuCopy)> {
    let folder = tempfile::tempdir().unwrap();
    let Some(copy) = QemuCopy::in_folder(folder.path()).unwrap() else {
        skipped(test, "qemu-system-x86_64 is not on PATH; `make setup` installs it");
        return None;
    };
    let health = backend(copy.program()).ping().await;
    match health.version {
        Ok(_) => {
            assert_eq!(health.problems, [""; 0]);
            Some((folder, copy))
        }
        Err(why) => {
            skipped(test, &format!("a copy of this QEMU does not find its parts: {why}"));
            None
        }
    }
}

/// Writes a program that answers `--version` as QEMU does and runs `body` otherwise.
fn script(folder: &Path, body: &str) -> PathBuf {
    let (path, fresh) = (folder.join("qemu-script"), folder.join("fresh"));
    let version = "case \"$1\" in --version) echo 'QEMU emulator version 7.2.0'; exit 0;; esac";
    fs::write(&fresh, format!("#!/bin/sh\n{version}\n{body}\n")).unwrap();
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(fresh, &path).unwrap();
    path
}

/// Returns the messages of the warnings about the host for a VM on `machine`.
fn warned(bench: &Bench) -> Vec<String> {
    let mut report = CheckReport::default();
    bench.backend.advise_on_host(&VmSpec::parse(&bench.config).unwrap(), &mut report);
    assert!(report.is_ok());
    report.warnings.into_iter().map(|warning| warning.message).collect()
}

#[tokio::test]
async fn a_program_has_one_trial_until_its_file_changes() {
    const TEST: &str = "a_program_has_one_trial_until_its_file_changes";
    if qemu_support::qemu(TEST).await.is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let starts = || fs::read_to_string(folder.path().join("starts")).unwrap_or_default().lines().count();
    let body = format!("echo start >> '{}/starts'; exec qemu-system-x86_64 \"$@\"", folder.path().display());
    let backend = backend(script(folder.path(), &body));
    for _ in 0..3 {
        assert_eq!(backend.ping().await.version, Ok("7.2.0".to_owned()));
    }
    assert_eq!(starts(), MACHINES.len(), "one start for each machine");
    script(folder.path(), &body);
    tokio::join!(backend.ping(), backend.ping());
    assert_eq!(starts(), 2 * MACHINES.len(), "two calls share a trial");
}

#[tokio::test]
async fn a_missing_part_is_named_with_its_package_until_it_is_installed() {
    const TEST: &str = "a_missing_part_is_named_with_its_package_until_it_is_installed";
    let Some((_folder, copy)) = whole_copy(TEST).await else { return };
    for (part, package) in [("qboot.rom", "qemu-system-data"), ("accel-tcg", "qemu-system-common")] {
        let backend = backend(copy.program());
        let taken = copy.take(part).unwrap();
        if taken.is_empty() {
            skipped(&format!("{TEST}: {part}"), "this QEMU has no such file");
            continue;
        }
        let why = backend.ping().await.version.unwrap_err();
        assert!(why.contains(package) && why.contains(&copy.program().display().to_string()), "{why}");
        copy.put_back(taken).unwrap();
        assert!(backend.ping().await.version.is_ok(), "a failure is not remembered");
    }
}

#[tokio::test]
async fn a_machine_model_that_fails_its_trial_warns_only_for_its_vms() {
    const TEST: &str = "a_machine_model_that_fails_its_trial_warns_only_for_its_vms";
    let Some((_folder, copy)) = whole_copy(TEST).await else { return };
    copy.take("bios-microvm.bin").unwrap();
    for machine in MACHINES {
        let bench = Bench::new(backend(copy.program()), machine, TinyGuest::Idle, NEVER);
        assert_eq!(warned(&bench), [""; 0], "nothing is known before the trial");
        let health = bench.backend.ping().await;
        assert!(health.version.is_ok());
        let [problem] = &health.problems[..] else { panic!("{health:?}") };
        assert!(problem.contains("microvm") && problem.contains("bios-microvm.bin"), "{problem}");
        let warned = warned(&bench);
        let boots = bench.try_launch().await;
        if machine == "microvm" {
            assert!(
                warned[0].contains("BootVm will fail") && warned[0].contains("qemu-system-data"),
                "{warned:?}"
            );
            let error = boots.err().unwrap();
            assert!(error.message.contains("bios-microvm.bin"), "{}", error.message);
        } else {
            assert_eq!(warned, [""; 0]);
            boots.unwrap().vmm.kill().await.unwrap();
        }
        assert_eq!(bench.processes(), 0);
    }
}

#[tokio::test]
async fn a_failed_launch_discards_the_earlier_trial() {
    const TEST: &str = "a_failed_launch_discards_the_earlier_trial";
    let Some((_folder, copy)) = whole_copy(TEST).await else { return };
    let bench = Bench::new(backend(copy.program()), "q35", TinyGuest::Idle, NEVER);
    assert!(bench.backend.ping().await.version.is_ok());
    copy.take("qboot.rom").unwrap();
    assert!(bench.backend.ping().await.version.is_ok(), "the program's file has not changed");
    bench.try_launch().await.err().unwrap();
    let why = bench.backend.ping().await.version.unwrap_err();
    assert!(why.contains("qboot.rom"), "{why}");
}

#[tokio::test]
async fn a_program_that_ends_with_text_is_quoted() {
    let folder = tempfile::tempdir().unwrap();
    for (body, quoted) in [
        (
            "echo 'the moon is in the wrong phase' >&2; exit 7",
            "the moon is in the wrong phase (exit status: 7)",
        ),
        ("echo 'not a machine'", "not a machine (exit status: 0)"),
        ("kill -KILL $$", "nothing (signal: 9 (SIGKILL))"),
    ] {
        let why = backend(script(folder.path(), body)).ping().await.version.unwrap_err();
        assert!(why.contains(quoted), "{why}");
    }
}

#[tokio::test]
async fn a_program_that_hangs_is_unavailable_and_leaves_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let seconds = format!("86400.{}", std::process::id());
    let backend = backend(script(folder.path(), &format!("sleep {seconds}")));
    let sleepers = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter(|entry| {
                let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                line.split(|byte| *byte == 0).any(|argument| argument == seconds.as_bytes())
            })
            .count()
    };
    let why = backend.ping().await.version.unwrap_err();
    assert!(why.contains("has not proven"), "{why}");
    tokio::join!(backend.ping(), backend.ping());
    assert!(sleepers() <= MACHINES.len(), "no second trial begins beside the first");
    // The trial is killed after its limit. A look that comes then would begin another one.
    for _ in 0..600 {
        if sleepers() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("a process is left");
}
