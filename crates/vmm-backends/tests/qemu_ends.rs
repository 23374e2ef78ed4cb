//! The end of a QEMU that has told of it and does not come to it, as QEMU 7.2 does where it was just asked something. Played by
//! the fake, which hangs whenever that is wanted and notes what it was asked too late.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test, though one with a main of its own: a helper that fails fails as loudly as the test itself"
)]

mod qemu_support;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::{BackendErrorKind, Exit, ExitCause};
use vmm_core::state::EndedBy;
use vmm_testkit::fake::qemu::LATE;
use vmm_testkit::guests::TinyGuest;

use qemu_support::{Bench, NEVER, Run, ask_for};

/// The name under which this program is a VMM.
const FAKE_VMM: &str = "fake-qemu";

fn main() -> ExitCode {
    let own_name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&own_name).file_name().is_some_and(|name| name == FAKE_VMM) {
        return vmm_testkit::fake::qemu::main(std::env::args_os());
    }
    let trials = vec![
        Trial::test("one_that_hangs_is_woken", || run(is_woken())),
        Trial::test("one_that_cannot_be_woken_is_killed", || run(is_killed())),
        Trial::test("one_that_ends_is_not_asked_to_shut_down", || run(is_not_asked_to_shut_down())),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn run(trial: impl Future<Output = ()>) -> Result<(), libtest_mimic::Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(trial);
    Ok(())
}

/// A bench whose QEMU is this very program, and behaves as `script` says.
fn bench(script: &str) -> (tempfile::TempDir, Bench) {
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join(FAKE_VMM);
    symlink(std::env::current_exe().unwrap(), &binary).unwrap();
    let backend = QemuBackend::new(QemuOptions { binary, kvm: KvmMode::Off });
    let mut bench = Bench::new(backend, "q35", TinyGuest::Idle, NEVER);
    script.clone_into(&mut bench.config.boot.as_mut().unwrap().kernel_args);
    (folder, bench)
}

/// Asks, as whoever samples and whoever looks after a silence does, until the end is told.
async fn ask_until_gone(run: &mut Run) -> Exit {
    let vmm = run.vmm.clone();
    let asking = async {
        loop {
            vmm.sample().await;
            if let Err(error) = vmm.probe().await {
                assert_eq!(error.kind, BackendErrorKind::Gone, "an end is no silence: {error:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        exit = run.gone() => exit,
        () = asking => unreachable!("it asks for ever"),
    }
}

fn asked_too_late(bench: &Bench) -> String {
    std::fs::read_to_string(bench.dir().join(LATE)).unwrap_or_default()
}

async fn is_woken() {
    let (_binary, bench) = bench("fake.off-after=100 fake.hangs");
    let mut run = bench.launch().await;
    let exit = ask_until_gone(&mut run).await;
    assert_eq!(exit.cause, ExitCause::GuestPowerOff, "{exit:?}");
    assert!(exit.message.contains("15"), "by SIGTERM: {exit:?}");
    // One question may have been under way when the end was told: that is what makes QEMU hang.
    assert!(asked_too_late(&bench).lines().count() <= 1, "{}", asked_too_late(&bench));
}

async fn is_killed() {
    let (_binary, bench) = bench("fake.off-after=100 fake.hangs fake.unwakeable");
    let mut run = bench.launch().await;
    let exit = ask_until_gone(&mut run).await;
    assert_eq!(
        exit.cause,
        ExitCause::GuestPowerOff,
        "why it was to end counts, not how it was made to: {exit:?}"
    );
    assert!(exit.message.contains('9'), "by SIGKILL: {exit:?}");
    assert_eq!(bench.processes(), 0);
}

async fn is_not_asked_to_shut_down() {
    let (_binary, bench) = bench("fake.off-after=100 fake.hangs");
    let run = bench.launch().await;
    // Whoever is told by QEMU that its guest has shut down, and wants it to, has what it wants once QEMU has ended.
    while run.vmm.probe().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(run.vmm.pause().await.unwrap_err().kind, BackendErrorKind::Gone);
    assert_eq!(run.vmm.shutdown(ask_for(30)).await.unwrap(), EndedBy::Guest);
    assert!(!asked_too_late(&bench).contains("system_powerdown"), "{}", asked_too_late(&bench));
}
