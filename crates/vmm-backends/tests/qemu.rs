//! The QEMU backend against a real QEMU, which emulates.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

mod qemu_support;

use std::time::Duration;

use qemu_support::{Bench, GUEST_REBOOT, NEVER, Run, ask_for, qemu};
use vmm_backends::qemu::convert::QemuMachine;
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::{
    Adoption, Backend, BackendErrorKind, Effect, ExitCause, GuestState, LadderOptions, LaunchRequest,
    ResetOutcome, VmmEvent,
};
use vmm_core::config::StorageDevice;
use vmm_core::run_permit::RunPermit;
use vmm_core::state::EndedBy;
use vmm_host::process::Signal;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::logs::a_silent_vmm_is_trimmed;

const MACHINES: [&str; 2] = ["q35", "microvm"];
const FORCE: LadderOptions = LadderOptions { guest_timeout: None };

/// A bench per machine; none where QEMU is missing, after saying that `test` is skipped.
async fn benches(test: &str, guest: TinyGuest, restart: i32) -> Vec<Bench> {
    let mut benches = Vec::new();
    for machine in MACHINES {
        let Some(backend) = qemu(test).await else { break };
        benches.push(Bench::new(backend, machine, guest, restart));
    }
    benches
}

#[tokio::test]
async fn a_guest_is_started_paused_resumed_and_killed() {
    for bench in benches("a_guest_is_started_paused_resumed_and_killed", TinyGuest::Idle, GUEST_REBOOT).await
    {
        let mut run = bench.launch().await;
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        assert!(bench.console().starts_with(&TinyGuest::Idle.banner()), "no firmware before the guest");
        run.vmm.pause().await.unwrap();
        run.vmm.pause().await.unwrap();
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Paused);
        run.vmm.resume().await.unwrap();
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
        let record = run.vmm.run().clone();
        assert_eq!((record.accelerator.as_str(), record.claims.len()), ("tcg", 0));
        assert!(record.version.starts_with(|c: char| c.is_ascii_digit()), "{record:?}");
        assert!(run.vmm.sample().await.memory_bytes.unwrap() > 1 << 20);
        run.no_event();
        run.vmm.kill().await.unwrap();
        run.vmm.kill().await.unwrap();
        assert_eq!(run.gone().await.cause, ExitCause::Requested);
        assert_eq!(bench.processes(), 0);
        assert_eq!(run.vmm.pause().await.unwrap_err().kind, BackendErrorKind::Gone);
        assert_eq!(run.vmm.probe().await.unwrap_err().kind, BackendErrorKind::Gone);
    }
}

#[tokio::test]
async fn no_guest_runs_before_the_run_permit() {
    for bench in benches("no_guest_runs_before_the_run_permit", TinyGuest::Idle, GUEST_REBOOT).await {
        let (issuer, permit) = RunPermit::pending();
        let launching = bench.backend.launch(LaunchRequest { permit, ..bench.request() });
        let opening = async {
            while !bench.dir().join("qmp.sock").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // Much longer than a guest that ran would take to say its first word.
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!((bench.processes(), bench.console().as_str()), (1, ""));
            issuer.grant();
        };
        let (launched, ()) = tokio::join!(launching, opening);
        let run = launched.unwrap();
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        run.vmm.kill().await.unwrap();

        let (_, permit) = RunPermit::pending();
        let called_off = bench.backend.launch(LaunchRequest { permit, ..bench.request() }).await.unwrap_err();
        assert_eq!((called_off.effect, bench.processes()), (Effect::NotApplied, 0), "{called_off}");
    }
}

#[tokio::test]
async fn a_second_run_in_the_same_folder_appends_to_the_console() {
    for bench in
        benches("a_second_run_in_the_same_folder_appends_to_the_console", TinyGuest::PowerOff, NEVER).await
    {
        for times in 1..=2 {
            let mut run = bench.launch().await;
            assert_eq!(run.gone().await.cause, ExitCause::GuestPowerOff);
            bench.console_shows(&TinyGuest::PowerOff.banner(), times).await;
        }
    }
}

#[tokio::test]
async fn an_ordered_reset_in_place_causes_no_event() {
    for bench in benches("an_ordered_reset_in_place_causes_no_event", TinyGuest::Idle, GUEST_REBOOT).await {
        let mut run = bench.launch().await;
        for boots in 2..=4 {
            bench.console_shows(&TinyGuest::Idle.banner(), boots - 1).await;
            assert_eq!(run.vmm.reset().await.unwrap(), ResetOutcome::InPlace);
            bench.console_shows(&TinyGuest::Idle.banner(), boots).await;
        }
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
        run.no_event();
        run.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_reset_works_under_a_policy_that_ends_guest_resets() {
    let test = "a_reset_works_under_a_policy_that_ends_guest_resets";
    for bench in benches(test, TinyGuest::Obey, NEVER).await {
        let mut run = bench.launch().await;
        bench.console_shows(&TinyGuest::Obey.banner(), 1).await;
        assert_eq!(run.vmm.reset().await.unwrap(), ResetOutcome::InPlace);
        bench.console_shows(&TinyGuest::Obey.banner(), 2).await;
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
        run.no_event();
        // The guest's own reset still ends the run.
        type_at_console(&run, b"R").await;
        assert_eq!(run.gone().await.cause, ExitCause::GuestReset);
    }
}

async fn type_at_console(run: &Run, bytes: &[u8]) {
    let input = run.vmm.console_input().unwrap();
    input.write_console(bytes, Duration::from_secs(5)).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_ignores_its_power_button_is_powered_off() {
    let test = "a_guest_that_ignores_its_power_button_is_powered_off";
    for bench in benches(test, TinyGuest::Idle, GUEST_REBOOT).await {
        for ladder in [ask_for(1), FORCE] {
            let mut run = bench.launch().await;
            assert_eq!(run.vmm.shutdown(ladder).await.unwrap(), EndedBy::Vmm);
            assert_eq!(run.gone().await.cause, ExitCause::Requested);
            assert_eq!(bench.processes(), 0);
        }
    }
}

#[tokio::test]
async fn a_guest_that_obeys_the_power_button_ends_by_acpi() {
    let test = "a_guest_that_obeys_the_power_button_ends_by_acpi";
    let Some(backend) = qemu(test).await else { return };
    let bench = Bench::new(backend, "q35", TinyGuest::Button, GUEST_REBOOT);
    let mut run = bench.launch().await;
    bench.console_shows(&TinyGuest::Button.banner(), 1).await;
    assert_eq!(run.vmm.shutdown(ask_for(30)).await.unwrap(), EndedBy::Acpi);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn the_end_of_a_guest_is_reported_with_its_cause() {
    let test = "the_end_of_a_guest_is_reported_with_its_cause";
    let ends = [
        (TinyGuest::PowerOff, ExitCause::GuestPowerOff),
        (TinyGuest::Reset, ExitCause::GuestReset),
        (TinyGuest::TripleFault, ExitCause::GuestReset),
    ];
    for (guest, cause) in ends {
        for bench in benches(test, guest, NEVER).await {
            let mut run = bench.launch().await;
            let exit = run.gone().await;
            assert_eq!(exit.cause, cause, "{guest:?} {}: {exit:?}", run.vmm.run().machine);
            assert!(exit.message.starts_with("exit status 0"), "{exit:?}");
            bench.console_shows(&guest.banner(), 1).await;
        }
    }
}

#[tokio::test]
async fn a_guest_reset_is_done_in_place_under_its_policy() {
    for guest in [TinyGuest::Reset, TinyGuest::TripleFault] {
        for bench in benches("a_guest_reset_is_done_in_place_under_its_policy", guest, GUEST_REBOOT).await {
            let mut run = bench.launch().await;
            for boots in 2..=4 {
                assert_eq!(run.event().await, VmmEvent::GuestReset);
                bench.console_shows(&guest.banner(), boots).await;
            }
            run.vmm.kill().await.unwrap();
        }
    }
}

#[tokio::test]
async fn one_reset_of_a_guest_is_one_event() {
    for bench in benches("one_reset_of_a_guest_is_one_event", TinyGuest::Obey, GUEST_REBOOT).await {
        let mut run = bench.launch().await;
        for boots in 1..=3 {
            bench.console_shows(&TinyGuest::Obey.banner(), boots).await;
            type_at_console(&run, b"R").await;
            assert_eq!(run.event().await, VmmEvent::GuestReset);
        }
        bench.console_shows(&TinyGuest::Obey.banner(), 4).await;
        // Answered after every event that was sent before.
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
        run.no_event();
        type_at_console(&run, b"P").await;
        assert_eq!(run.gone().await.cause, ExitCause::GuestPowerOff);
    }
}

#[tokio::test]
async fn a_killed_vmm_is_reported_with_its_signal() {
    for bench in benches("a_killed_vmm_is_reported_with_its_signal", TinyGuest::Idle, GUEST_REBOOT).await {
        let mut run = bench.launch().await;
        run.signal(Signal::KILL);
        let exit = run.gone().await;
        assert_eq!(exit.cause, ExitCause::VmmFailed);
        assert!(exit.message.contains("SIGKILL"), "{exit:?}");
        let mut run = bench.launch().await;
        run.signal(Signal::TERM);
        let exit = run.gone().await;
        assert_eq!(exit.cause, ExitCause::VmmFailed);
        assert!(exit.message.contains("terminating on signal 15"), "{exit:?}");
    }
}

/// QEMU 7.2 hangs in its end where it was just answering; enough tries find that.
#[tokio::test]
async fn an_exit_during_a_call_is_reported_as_an_end() {
    for bench in benches("an_exit_during_a_call_is_reported_as_an_end", TinyGuest::Idle, GUEST_REBOOT).await {
        for _ in 0..10 {
            let mut run = bench.launch().await;
            let vmm = run.vmm.clone();
            let asking = tokio::spawn(async move { while vmm.probe().await.is_ok() {} });
            tokio::time::sleep(Duration::from_millis(5)).await;
            run.signal(Signal::TERM);
            assert_eq!(run.gone().await.cause, ExitCause::VmmFailed);
            asking.await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_stopped_vmm_is_unreachable_and_not_ended() {
    let test = "a_stopped_vmm_is_unreachable_and_not_ended";
    let Some(backend) = qemu(test).await else { return };
    let bench = Bench::new(backend, "microvm", TinyGuest::Idle, GUEST_REBOOT);
    let run = bench.launch().await;
    run.signal(Signal::STOP);
    let error = run.vmm.probe().await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Timeout, Effect::Unknown));
    let record = run.vmm.run().clone();
    drop(run);
    match bench.backend.adopt(bench.adoption(Some(record))).await.unwrap() {
        Adoption::Unreachable { reason, launched: Some(launched), .. } => {
            assert_eq!(reason.as_str(), "vmm-does-not-answer");
            let mut run = Run::from(launched);
            let error = run.vmm.pause().await.unwrap_err();
            assert_eq!((error.kind, error.effect), (BackendErrorKind::Unreachable, Effect::NotApplied));
            run.vmm.kill().await.unwrap();
            assert_eq!(run.gone().await.cause, ExitCause::Requested);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_forced_shutdown_of_a_stopped_vmm_ends_in_time() {
    let test = "a_forced_shutdown_of_a_stopped_vmm_ends_in_time";
    let Some(backend) = qemu(test).await else { return };
    let bench = Bench::new(backend, "microvm", TinyGuest::Idle, GUEST_REBOOT);
    let mut run = bench.launch().await;
    run.signal(Signal::STOP);
    let forced = tokio::time::timeout(Duration::from_secs(5), run.vmm.shutdown(FORCE)).await;
    assert_eq!(forced.expect("within what the contract allows").unwrap(), EndedBy::Sigkill);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn a_vmm_outlives_its_handle_and_can_be_adopted() {
    for bench in benches("a_vmm_outlives_its_handle_and_can_be_adopted", TinyGuest::Obey, NEVER).await {
        let first = bench.launch().await;
        bench.console_shows(&TinyGuest::Obey.banner(), 1).await;
        first.vmm.pause().await.unwrap();
        let record = first.vmm.run().clone();
        drop(first);
        for (known, state) in [(Some(record.clone()), GuestState::Paused), (None, GuestState::Running)] {
            let (mut run, guest) = match bench.backend.adopt(bench.adoption(known)).await.unwrap() {
                Adoption::Alive { launched, guest } => (Run::from(launched), guest),
                other => panic!("{other:?}"),
            };
            assert_eq!(guest, state);
            let adopted = run.vmm.run();
            assert_eq!((&adopted.process, &adopted.version), (&record.process, &record.version));
            assert_eq!((&adopted.accelerator, &adopted.machine), (&record.accelerator, &record.machine));
            run.vmm.resume().await.unwrap();
            assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
            run.no_event();
        }
        let last = bench.backend.adopt(bench.adoption(Some(record))).await.unwrap();
        let Adoption::Alive { launched, .. } = last else { panic!("{last:?}") };
        let mut run = Run::from(launched);
        type_at_console(&run, b"R").await;
        assert_eq!(
            run.gone().await.cause,
            ExitCause::GuestReset,
            "told by an event, for the status is unknown"
        );
    }
}

#[tokio::test]
async fn a_missing_program_and_an_early_exit_are_explained() {
    let missing = QemuBackend::new(QemuOptions { binary: "/nowhere/qemu".into(), kvm: KvmMode::Off });
    let why = missing.ping().await.version.unwrap_err();
    assert!(why.contains("/nowhere/qemu") && why.contains("qemu-system-x86"), "{why}");
    let not_qemu = QemuBackend::new(QemuOptions { binary: "/bin/true".into(), kvm: KvmMode::Off });
    let why = not_qemu.ping().await.version.unwrap_err();
    assert!(why.contains("does not look like QEMU"), "{why}");

    for mut bench in
        benches("a_missing_program_and_an_early_exit_are_explained", TinyGuest::Idle, NEVER).await
    {
        let error = missing.launch(bench.request()).await.unwrap_err();
        assert_eq!((error.kind, error.effect), (BackendErrorKind::NotInstalled, Effect::NotApplied));
        let features = &mut bench.config.cpu.as_mut().unwrap().features;
        features.insert("qemu.model".to_owned(), "NoSuchModel".to_owned());
        let error = bench.try_launch().await.err().unwrap();
        assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
        assert!(error.message.contains("NoSuchModel"), "QEMU's own words: {}", error.message);
        assert_eq!(bench.processes(), 0);
    }
}

#[tokio::test]
async fn an_ended_vmm_is_adopted_as_gone_and_an_unrecorded_vmm_is_found() {
    let test = "an_ended_vmm_is_adopted_as_gone_and_an_unrecorded_vmm_is_found";
    for bench in benches(test, TinyGuest::Idle, NEVER).await {
        let found = bench.backend.adopt(bench.adoption(None)).await.unwrap();
        assert!(matches!(found, Adoption::Gone { .. }), "{found:?}");
        let mut run = bench.launch().await;
        let record = run.vmm.run().clone();
        bench.sweep().await;
        bench.sweep().await;
        assert_eq!(run.gone().await.cause, ExitCause::VmmFailed);
        assert!(!record.socket.exists());
        let found = bench.backend.adopt(bench.adoption(Some(record))).await.unwrap();
        assert!(matches!(found, Adoption::Gone { .. }), "{found:?}");
    }
}

#[tokio::test]
async fn a_qcow2_that_opens_other_files_is_refused() {
    let test = "a_qcow2_that_opens_other_files_is_refused";
    for mut bench in benches(test, TinyGuest::Idle, NEVER).await {
        let (base, top) = (bench.dir().join("base"), bench.dir().join("top"));
        qemu_support::make_image(&base, "raw", 1 << 20);
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&base, &top])
            .status();
        if !made.is_ok_and(|status| status.success()) {
            return qemu_support::skipped(test, "qemu-img is not installed (Debian: qemu-utils)");
        }
        bench.add_disk(StorageDevice {
            id: "top".to_owned(),
            path: top.to_str().unwrap().to_owned(),
            options: [("format".to_owned(), "qcow2".to_owned())].into(),
            ..StorageDevice::default()
        });
        let error = bench.try_launch().await.err().unwrap();
        assert!(error.message.contains("backing_files"), "{}", error.message);
        bench.config.storage[0].options.insert("backing_files".to_owned(), "true".to_owned());
        let run = bench.launch().await;
        run.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn every_device_slot_of_the_machine_exists() {
    for mut bench in benches("every_device_slot_of_the_machine_exists", TinyGuest::Idle, NEVER).await {
        let count = if QemuMachine::of(&bench.spec()) == Some(QemuMachine::Q35) { 64 } else { 23 };
        let path = bench.dir().join("disk");
        qemu_support::make_image(&path, "raw", 1 << 20);
        for index in 0..count {
            bench.add_disk(StorageDevice {
                id: format!("d{index}"),
                path: path.to_str().unwrap().to_owned(),
                read_only: true,
                ..StorageDevice::default()
            });
        }
        let run = bench.launch().await;
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        assert_eq!(run.vmm.sample().await.missing, [""; 0]);
        run.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn kvm_is_used_if_it_is_requested() {
    let test = "kvm_is_used_if_it_is_requested";
    if qemu(test).await.is_none() {
        return;
    }
    let backend = QemuBackend::new(QemuOptions { kvm: KvmMode::On, ..QemuOptions::default() });
    if let Err(why) = backend.ping().await.version {
        assert!(why.contains("UNKEY_VMCP_QEMU_KVM"), "{why}");
        return qemu_support::skipped(test, &why);
    }
    for machine in MACHINES {
        let backend = QemuBackend::new(QemuOptions { kvm: KvmMode::On, ..QemuOptions::default() });
        let bench = Bench::new(backend, machine, TinyGuest::Idle, GUEST_REBOOT);
        let run = bench.launch().await;
        assert_eq!(run.vmm.run().accelerator, "kvm");
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        run.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn the_log_of_a_silent_vmm_is_trimmed_by_the_backend() {
    for bench in benches("the_log_of_a_silent_vmm_is_trimmed_by_the_backend", TinyGuest::Idle, NEVER).await {
        let run = bench.launch().await;
        a_silent_vmm_is_trimmed(&*run.vmm, &bench.dir().join("qemu.log")).await;
        run.vmm.kill().await.unwrap();
    }
}
