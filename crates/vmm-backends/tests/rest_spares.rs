//! Spare VMMs of Firecracker and Cloud Hypervisor, against the real ones: the launch of their VM uses them, or they are gone.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy takes what the tests share for no test, because macros make the tests"
)]

mod rest_support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rest_support::{Bench, FORCE, UNSET, usable};
use vmm_backends::cloud_hypervisor::CloudHypervisorBackend;
use vmm_backends::firecracker::FirecrackerBackend;
use vmm_core::backend::{
    Backend, BackendErrorKind, ExitCause, GuestState, LaunchRequest, SpareRequest, SpareVmms,
};
use vmm_host::process::{Lookup, Process, Signal, adopt, find_by_argument};
use vmm_testkit::guests::TinyGuest;

/// Makes a test of each backend of one that takes the backend's maker.
macro_rules! on_both {
    ($($test:ident)*) => {
        mod firecracker {
            $(#[tokio::test]
            async fn $test() {
                super::$test(concat!("firecracker::", stringify!($test)), "firecracker", super::firecracker).await;
            })*
        }
        mod cloud_hypervisor {
            $(#[tokio::test]
            async fn $test() {
                super::$test(concat!("cloud_hypervisor::", stringify!($test)), "cloud-hypervisor", super::cloud_hypervisor).await;
            })*
        }
    };
}

on_both! {
    a_launch_uses_the_spare_vmm
    an_unfitting_spare_vmm_is_ended_and_a_new_process_is_started
    a_dead_or_hanging_spare_vmm_does_not_fail_the_launch
    a_spare_vmm_can_be_dismissed_and_swept_and_ends_with_its_backend
    a_spare_vmm_of_a_replaced_program_is_not_used
    a_failed_launch_leaves_nothing
}

fn firecracker(program: &Path) -> FirecrackerBackend {
    FirecrackerBackend::new(program)
}

fn cloud_hypervisor(program: &Path) -> CloudHypervisorBackend {
    CloudHypervisorBackend::new(program)
}

/// A bench of a backend of `program`, or `None` after saying that `test` is skipped.
async fn bench<B: Backend + SpareVmms>(test: &str, program: &str, make: fn(&Path) -> B) -> Option<Bench<B>> {
    Some(Bench::new(usable(test, make(Path::new(program))).await?, TinyGuest::Idle, UNSET))
}

fn request<B: Backend + SpareVmms>(bench: &Bench<B>) -> SpareRequest {
    SpareRequest { uid: bench.uid, dir: bench.dir().to_path_buf(), console: bench.console_file() }
}

/// Starts a spare VMM on a bench, and answers its process.
async fn start<B: Backend + SpareVmms>(bench: &Bench<B>) -> Process {
    std::fs::write(bench.console_file(), "").unwrap();
    bench.backend.start_spare(request(bench)).await.unwrap();
    let found = find_by_argument(bench.dir()).unwrap();
    let [found] = found.as_slice() else { panic!("{found:?}") };
    match adopt(&found.identity) {
        Lookup::Alive(process) => process,
        other => panic!("{other:?}"),
    }
}

async fn a_launch_uses_the_spare_vmm<B: Backend + SpareVmms>(
    test: &str,
    program: &str,
    make: fn(&Path) -> B,
) {
    let Some(mut bench) = bench(test, program, make).await else { return };
    bench.add_disk("data");
    let spare = start(&bench).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.console(), "", "no guest runs");
    let mut run = bench.launch().await;
    assert_eq!(run.vmm.run().process.pid, spare.pid());
    bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
    run.vmm.pause().await.unwrap();
    assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Paused);
    run.vmm.shutdown(FORCE).await.unwrap();
    assert_eq!(run.gone().await.cause, ExitCause::Requested);

    let mut again = bench.launch().await;
    bench.console_shows(&TinyGuest::Idle.banner(), 2).await;
    again.vmm.kill().await.unwrap();
    again.gone().await;
}

async fn an_unfitting_spare_vmm_is_ended_and_a_new_process_is_started<B: Backend + SpareVmms>(
    test: &str,
    program: &str,
    make: fn(&Path) -> B,
) {
    let Some(bench) = bench(test, program, make).await else { return };
    let spare = start(&bench).await;
    let silent = LaunchRequest { console: None, ..bench.request() };
    let launched = bench.backend.launch(silent).await.unwrap();
    assert!(spare.has_ended());
    assert_ne!(launched.vmm.run().process.pid, spare.pid());
    assert_eq!(bench.processes(), 1);
    launched.vmm.kill().await.unwrap();
    assert_eq!(bench.console(), "");
}

async fn a_dead_or_hanging_spare_vmm_does_not_fail_the_launch<B: Backend + SpareVmms>(
    test: &str,
    program: &str,
    make: fn(&Path) -> B,
) {
    let Some(bench) = bench(test, program, make).await else { return };
    for signal in [Signal::KILL, Signal::STOP] {
        let spare = start(&bench).await;
        spare.signal(signal).unwrap();
        if signal == Signal::KILL {
            spare.wait().await;
        }
        let mut run = bench.launch().await;
        assert!(spare.has_ended());
        assert_eq!(bench.processes(), 1);
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        run.vmm.kill().await.unwrap();
        run.gone().await;
    }
}

async fn a_spare_vmm_can_be_dismissed_and_swept_and_ends_with_its_backend<B: Backend + SpareVmms>(
    test: &str,
    program: &str,
    make: fn(&Path) -> B,
) {
    let Some(mut bench) = bench(test, program, make).await else { return };
    let dismissed = start(&bench).await;
    bench.backend.dismiss_spare(bench.uid).await;
    assert!(dismissed.has_ended());
    bench.backend.dismiss_spare(bench.uid).await;
    bench.sweep().await;

    let swept = start(&bench).await;
    bench.sweep().await;
    assert!(swept.has_ended());

    let last = start(&bench).await;
    let other = make(Path::new(program));
    other.dismiss_spare(bench.uid).await;
    assert!(!last.has_ended(), "it is another backend's");
    drop(std::mem::replace(&mut bench.backend, other));
    last.wait().await;
}

async fn a_spare_vmm_of_a_replaced_program_is_not_used<B: Backend + SpareVmms>(
    test: &str,
    program: &str,
    make: fn(&Path) -> B,
) {
    let Some(found) = bench(test, program, make).await else { return };
    let installed = vmm_host::path::find_program(program, std::env::var_os("PATH").as_deref()).unwrap();
    let path = found.dir().join(program);
    let install = || {
        let fresh: PathBuf = found.dir().join("fresh");
        std::fs::copy(&installed, &fresh).unwrap();
        std::fs::rename(&fresh, &path).unwrap();
    };
    install();
    let bench = Bench::new(make(&path), TinyGuest::Idle, UNSET);
    let spare = start(&bench).await;
    install();
    let mut run = bench.launch().await;
    assert!(spare.has_ended());
    run.vmm.kill().await.unwrap();
    run.gone().await;
}

async fn a_failed_launch_leaves_nothing<B: Backend + SpareVmms>(
    test: &str,
    program: &str,
    make: fn(&Path) -> B,
) {
    let Some(found) = bench(test, program, make).await else { return };
    let bench = Bench::new(make(&found.dir().join("nothing")), TinyGuest::Idle, UNSET);
    let error = bench.backend.start_spare(request(&bench)).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::NotInstalled);
    assert_eq!(bench.processes(), 0);
}
