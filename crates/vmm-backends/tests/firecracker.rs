//! The Firecracker backend against a real Firecracker.

mod rest_support;

use std::time::{Duration, Instant};

use rest_support::{Bench, FORCE, Tap, UNSET, WAIT_TIMEOUT, ask_for, usable};
use vmm_backends::firecracker::FirecrackerBackend;
use vmm_core::backend::{
    Adoption, Backend, BackendErrorKind, Effect, ExitCause, GuestState, KernelFormat, ResetOutcome,
    SpareRequest, SpareVmms,
};
use vmm_core::state::EndedBy;
use vmm_host::process::Signal;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::logs::a_silent_vmm_is_trimmed;

/// A bench for a guest, or the end of a test that is skipped.
macro_rules! bench {
    ($test:literal, $guest:expr) => {
        match usable($test, FirecrackerBackend::new("firecracker")).await {
            Some(backend) => Bench::new(backend, $guest, UNSET),
            None => return,
        }
    };
}

#[tokio::test]
async fn no_guest_is_configured_before_the_run_permit() {
    let bench = bench!("no_guest_is_configured_before_the_run_permit", TinyGuest::Idle);
    bench.keeps_the_gate(false).await;
}

#[tokio::test]
async fn a_guest_is_started_paused_resumed_and_killed() {
    let bench = bench!("a_guest_is_started_paused_resumed_and_killed", TinyGuest::Idle);
    let mut run = bench.launch().await;
    assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
    bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
    for _ in 0..2 {
        run.vmm.pause().await.unwrap();
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Paused);
    }
    for _ in 0..2 {
        run.vmm.resume().await.unwrap();
        assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
    }
    assert_eq!(
        bench.console(),
        format!("{}\r\n", TinyGuest::Idle.banner()),
        "the guest's words and no others"
    );
    assert_eq!(run.vmm.run().accelerator, "kvm");
    assert!(run.vmm.run().version.starts_with("1."), "{}", run.vmm.run().version);
    assert_eq!(run.vmm.reset().await.unwrap(), ResetOutcome::NeedsRelaunch);
    run.no_event();
    run.vmm.kill().await.unwrap();
    run.vmm.kill().await.unwrap();
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
    assert_eq!(bench.processes(), 0);
    assert_eq!(run.vmm.pause().await.unwrap_err().kind, BackendErrorKind::Gone);
    assert_eq!(run.vmm.probe().await.unwrap_err().kind, BackendErrorKind::Gone);
    assert_eq!(run.vmm.shutdown(FORCE).await.unwrap(), EndedBy::Guest, "it had ended before");
}

#[tokio::test]
async fn a_guest_reset_ends_the_run_and_the_next_run_appends_to_the_console() {
    let bench =
        bench!("a_guest_reset_ends_the_run_and_the_next_run_appends_to_the_console", TinyGuest::Reset);
    for times in 1..=2 {
        let mut run = bench.launch().await;
        assert_eq!(run.gone().await.cause, ExitCause::GuestReset);
        bench.console_shows(&TinyGuest::Reset.banner(), times).await;
    }
}

#[tokio::test]
async fn a_triple_fault_ends_the_run() {
    let bench = bench!("a_triple_fault_ends_the_run", TinyGuest::TripleFault);
    let exit = bench.launch().await.gone().await;
    // A KVM in software makes a reset of some triple faults.
    assert!(matches!(exit.cause, ExitCause::GuestCrash | ExitCause::GuestReset), "{exit:?}");
}

#[tokio::test]
async fn the_longest_kernel_arguments_that_pass_the_check_start_and_longer_ones_do_not() {
    for disks in [0, 1, 9] {
        let mut bench = bench!(
            "the_longest_kernel_arguments_that_pass_the_check_start_and_longer_ones_do_not",
            TinyGuest::Idle
        );
        (0..disks).for_each(|disk| bench.add_disk(&format!("d{disk}")));
        let mut passes = |length: usize| {
            bench.config.boot.as_mut().unwrap().kernel_args = "x".repeat(length);
            bench.backend.check(&bench.spec()).is_ok()
        };
        let longest = (0..2048).rev().find(|length| passes(*length)).unwrap();
        passes(longest);
        bench.launch().await.vmm.kill().await.unwrap();
        bench.sweep().await;
        bench.config.boot.as_mut().unwrap().kernel_args.push('x');
        let refusal = bench.try_launch().await.map(drop).expect_err("Firecracker counts alike");
        assert_eq!(refusal.kind, BackendErrorKind::Rejected, "{refusal}");
        bench.sweep().await;
    }
}

#[tokio::test]
async fn firecracker_does_not_report_a_power_off() {
    let bench = bench!("firecracker_does_not_report_a_power_off", TinyGuest::PowerOff);
    let mut run = bench.launch().await;
    bench.console_shows(&TinyGuest::PowerOff.banner(), 1).await;
    assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
    run.no_event();
    assert_eq!(run.vmm.shutdown(FORCE).await.unwrap(), EndedBy::Sigterm);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn a_running_or_paused_guest_that_obeys_ends_by_ctrl_alt_del() {
    let bench = bench!("a_running_or_paused_guest_that_obeys_ends_by_ctrl_alt_del", TinyGuest::Obey);
    let mut run = bench.launch().await;
    bench.console_shows(&TinyGuest::Obey.banner(), 1).await;
    run.vmm.pause().await.unwrap();
    assert_eq!(run.vmm.shutdown(ask_for(WAIT_TIMEOUT)).await.unwrap(), EndedBy::CtrlAltDel);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
    assert_eq!(bench.processes(), 0);
}

#[tokio::test]
async fn a_guest_that_ignores_ctrl_alt_del_is_ended() {
    let bench = bench!("a_guest_that_ignores_ctrl_alt_del_is_ended", TinyGuest::Idle);
    let mut run = bench.launch().await;
    assert_eq!(run.vmm.shutdown(ask_for(Duration::from_secs(2))).await.unwrap(), EndedBy::Sigterm);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn the_console_takes_input_from_successive_writers() {
    let bench = bench!("the_console_takes_input_from_successive_writers", TinyGuest::Echo);
    let mut run = bench.launch().await;
    bench.console_shows(&TinyGuest::Echo.banner(), 1).await;
    for word in ["hello", "again"] {
        let input = run.vmm.console_input().unwrap();
        input.write_console(word.as_bytes(), Duration::from_secs(5)).await.unwrap();
        bench.console_shows(word, 1).await;
    }
    run.vmm.kill().await.unwrap();
    run.gone().await;
}

#[tokio::test]
async fn counters_are_sums_and_their_file_stays_small() {
    let mut bench = bench!("counters_are_sums_and_their_file_stays_small", TinyGuest::Idle);
    bench.add_disk("root");
    bench.config.storage[0].is_root_device = true;
    let run = bench.launch().await;
    let mut before = Duration::ZERO;
    for _ in 0..5 {
        let sample = run.vmm.sample().await;
        assert_eq!(sample.missing, [""; 0]);
        assert!(sample.memory_bytes.unwrap() > 1 << 20);
        assert!(sample.cpu_time.unwrap() >= before);
        before = sample.cpu_time.unwrap();
    }
    run.vmm.pause().await.unwrap();
    assert_eq!(run.vmm.sample().await.missing, [""; 0]);
    run.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn calls_to_a_stopped_vmm_time_out_and_it_can_be_killed() {
    let bench = bench!("calls_to_a_stopped_vmm_time_out_and_it_can_be_killed", TinyGuest::Idle);
    let mut run = bench.launch().await;
    run.stop().await;
    let error = run.vmm.pause().await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Timeout, Effect::Unknown));
    let error = run.vmm.probe().await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Timeout, Effect::NotApplied));
    run.no_event();
    assert_eq!(run.vmm.shutdown(FORCE).await.unwrap(), EndedBy::Sigkill);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn a_continued_vmm_answers_again() {
    let bench = bench!("a_continued_vmm_answers_again", TinyGuest::Idle);
    let run = bench.launch().await;
    run.stop().await;
    assert_eq!(run.vmm.probe().await.unwrap_err().kind, BackendErrorKind::Timeout);
    run.signal(Signal::CONT);
    assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
    run.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn a_killed_vmm_is_a_failure() {
    let bench = bench!("a_killed_vmm_is_a_failure", TinyGuest::Idle);
    let mut run = bench.launch().await;
    run.signal(Signal::KILL);
    let exit = run.gone().await;
    assert_eq!(exit.cause, ExitCause::VmmFailed);
    assert!(exit.message.contains("SIGKILL"), "{}", exit.message);
    // The socket that it left is in nobody's way.
    bench.launch().await.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn a_running_vmm_is_adopted() {
    let bench = bench!("a_running_vmm_is_adopted", TinyGuest::Idle);
    let first = bench.launch().await;
    first.vmm.pause().await.unwrap();
    let record = first.vmm.run().clone();
    for run in [Some(record.clone()), None] {
        let adoption = bench.backend.adopt(bench.adoption(run)).await.unwrap();
        let Adoption::Alive { launched, guest } = adoption else { panic!("{adoption:?}") };
        assert_eq!(guest, GuestState::Paused);
        assert_eq!(
            (&launched.vmm.run().process, &launched.vmm.run().version),
            (&record.process, &record.version)
        );
        assert_eq!(launched.vmm.sample().await.missing, [""; 0]);
    }
    first.stop().await;
    let adoption = bench.backend.adopt(bench.adoption(Some(record.clone()))).await.unwrap();
    let Adoption::Unreachable { launched: Some(launched), .. } = adoption else { panic!("{adoption:?}") };
    launched.vmm.kill().await.unwrap();
    let adoption = bench.backend.adopt(bench.adoption(Some(record))).await.unwrap();
    assert!(matches!(adoption, Adoption::Gone { exit } if exit.cause == ExitCause::Unknown));
}

#[tokio::test]
async fn an_unobserved_reset_is_read_from_the_counters() {
    let bench = bench!("an_unobserved_reset_is_read_from_the_counters", TinyGuest::Reset);
    let mut run = bench.launch().await;
    let record = run.vmm.run().clone();
    run.gone().await;
    let adoption = bench.backend.adopt(bench.adoption(Some(record))).await.unwrap();
    assert!(
        matches!(&adoption, Adoption::Gone { exit } if exit.cause == ExitCause::GuestReset),
        "{adoption:?}"
    );
}

#[tokio::test]
async fn a_failed_launch_is_explained_and_leaves_nothing() {
    let mut bench = bench!("a_failed_launch_is_explained_and_leaves_nothing", TinyGuest::Idle);
    let kernel = bench.dir().join("not-a-kernel");
    std::fs::write(&kernel, "not a kernel").unwrap();
    bench.config.boot.as_mut().unwrap().kernel_path = kernel.to_str().unwrap().to_owned();
    let error = bench.try_launch().await.err().unwrap();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert!(error.message.to_lowercase().contains("elf"), "{}", error.message);
    assert_eq!(bench.processes(), 0);
    bench.sweep().await;
    bench.sweep().await;
}

#[tokio::test]
async fn a_refused_device_is_named_in_the_words_of_the_vmm() {
    let mut bench = bench!("a_refused_device_is_named_in_the_words_of_the_vmm", TinyGuest::Idle);
    bench.add_disk("gone");
    std::fs::remove_file(bench.dir().join("gone.raw")).unwrap();
    let error = bench.try_launch().await.err().unwrap();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert!(error.message.contains("PUT /drives/disk0"), "{}", error.message);
    assert!(error.message.contains("No such file"), "{}", error.message);
    assert_eq!((bench.processes(), bench.console().as_str()), (0, ""));
}

#[tokio::test]
async fn a_refused_device_is_named_with_a_spare_vmm_too() {
    let mut bench = bench!("a_refused_device_is_named_with_a_spare_vmm_too", TinyGuest::Idle);
    let request =
        SpareRequest { uid: bench.uid, dir: bench.dir().to_path_buf(), console: bench.console_file() };
    bench.backend.start_spare(request).await.unwrap();
    bench.add_disk("gone");
    std::fs::remove_file(bench.dir().join("gone.raw")).unwrap();
    let error = bench.try_launch().await.err().unwrap();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert!(error.message.contains("PUT /drives/disk0"), "{}", error.message);
    assert_eq!(bench.processes(), 0);
}

#[tokio::test]
async fn a_dropped_launch_is_swept() {
    let bench = bench!("a_dropped_launch_is_swept", TinyGuest::Idle);
    for millis in [0, 1, 3, 10, 30] {
        let _ = tokio::time::timeout(Duration::from_millis(millis), bench.try_launch()).await;
        bench.sweep().await;
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while bench.processes() > 0 {
            assert!(Instant::now() < deadline, "still there after {millis} ms");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn a_missing_program_is_reported_as_not_installed() {
    let bench = Bench::new(FirecrackerBackend::new("/nowhere/firecracker"), TinyGuest::Idle, UNSET);
    let error = bench.try_launch().await.err().unwrap();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::NotInstalled, Effect::NotApplied));
    assert!(bench.backend.ping().await.version.unwrap_err().contains("/nowhere/firecracker"));
    assert!(bench.backend.capabilities().kernel_formats.contains(&KernelFormat::Elf));
}

#[tokio::test]
async fn the_largest_allowed_number_of_devices_works() {
    let mut bench = bench!("the_largest_allowed_number_of_devices_works", TinyGuest::Idle);
    for index in 0..bench.backend.capabilities().limits["max-devices"] {
        bench.add_disk(&format!("d{index}"));
    }
    assert!(bench.backend.check(&bench.spec()).is_ok());
    bench.launch().await.vmm.kill().await.unwrap();
    bench.add_disk("more");
    assert!(!bench.backend.check(&bench.spec()).is_ok());
}

#[tokio::test]
async fn a_network_interface_is_connected_to_its_tap() {
    let mut bench = bench!("a_network_interface_is_connected_to_its_tap", TinyGuest::Idle);
    let Some(tap) = Tap::new("a_network_interface_is_connected_to_its_tap", "vmcpfc") else { return };
    bench.add_nic(&tap);
    bench.add_disk("net");
    for _ in 0..2 {
        let run = bench.launch().await;
        assert_eq!(run.vmm.sample().await.network.unwrap().bytes_transmitted, 0);
        run.vmm.kill().await.unwrap();
    }
    bench.taps = vec!["vmcp-nowhere".to_owned()];
    if let Ok(run) = bench.try_launch().await {
        // Cloud Hypervisor makes the TAP that is missing, as it may where it runs as root.
        run.vmm.kill().await.unwrap();
    }
    assert_eq!(bench.processes(), 0);
}

#[tokio::test]
async fn the_log_of_a_silent_vmm_is_trimmed_by_the_backend() {
    let bench = bench!("the_log_of_a_silent_vmm_is_trimmed_by_the_backend", TinyGuest::Idle);
    let run = bench.launch().await;
    a_silent_vmm_is_trimmed(&*run.vmm, &bench.dir().join("firecracker.log")).await;
    run.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn no_request_is_sent_to_another_process_on_the_socket() {
    let bench = bench!("no_request_is_sent_to_another_process_on_the_socket", TinyGuest::Idle);
    bench.nothing_is_sent_to_another_listener().await;
}

#[tokio::test]
async fn samples_leave_no_connection_open() {
    let bench = bench!("samples_leave_no_connection_open", TinyGuest::Idle);
    bench.samples_leave_no_connection().await;
}
