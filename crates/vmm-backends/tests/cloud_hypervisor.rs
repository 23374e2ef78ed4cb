//! The Cloud Hypervisor backend against a real Cloud Hypervisor.

mod rest_support;

use std::time::{Duration, Instant};

use rest_support::{Bench, FORCE, GUEST_REBOOT, NEVER, Run, Tap, UNSET, WAIT_TIMEOUT, ask_for, usable};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vmm_backends::cloud_hypervisor::CloudHypervisorBackend;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendErrorKind, Effect, ExitCause, GuestState, ResetOutcome, VmmEvent,
};
use vmm_core::state::EndedBy;
use vmm_host::process::Signal;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::logs::a_silent_vmm_is_trimmed;

/// A bench for a guest, or the end of a test that is skipped.
macro_rules! bench {
    ($test:literal, $guest:expr, $restart:expr) => {
        match usable($test, CloudHypervisorBackend::new("cloud-hypervisor")).await {
            Some(backend) => Bench::new(backend, $guest, $restart),
            None => return,
        }
    };
}

#[tokio::test]
async fn no_guest_is_configured_before_the_run_permit() {
    let bench = bench!("no_guest_is_configured_before_the_run_permit", TinyGuest::Idle, UNSET);
    bench.keeps_the_gate(true).await;
}

#[tokio::test]
async fn a_guest_is_started_paused_resumed_and_killed() {
    let bench = bench!("a_guest_is_started_paused_resumed_and_killed", TinyGuest::Idle, UNSET);
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
    assert!(run.vmm.run().version.starts_with(|c: char| c.is_ascii_digit()), "{}", run.vmm.run().version);
    run.no_event();
    run.vmm.kill().await.unwrap();
    run.vmm.kill().await.unwrap();
    assert_eq!(run.gone().await.cause, ExitCause::Requested, "and no word of what was ordered");
    assert_eq!(bench.processes(), 0);
    assert_eq!(run.vmm.pause().await.unwrap_err().kind, BackendErrorKind::Gone);
    assert_eq!(run.vmm.probe().await.unwrap_err().kind, BackendErrorKind::Gone);
    assert_eq!(run.vmm.shutdown(FORCE).await.unwrap(), EndedBy::Guest, "it had ended before");
}

#[tokio::test]
async fn a_power_off_ends_the_run_and_the_next_run_appends_to_the_console() {
    let bench = bench!(
        "a_power_off_ends_the_run_and_the_next_run_appends_to_the_console",
        TinyGuest::PowerOff,
        UNSET
    );
    for times in 1..=2 {
        let mut run = bench.launch().await;
        assert_eq!(run.gone().await.cause, ExitCause::GuestPowerOff);
        bench.console_shows(&TinyGuest::PowerOff.banner(), times).await;
        let adoption = bench.backend.adopt(bench.adoption(Some(run.vmm.run().clone()))).await.unwrap();
        assert!(matches!(adoption, Adoption::Gone { .. }));
    }
}

#[tokio::test]
async fn an_unobserved_power_off_is_read_from_the_event_file() {
    let bench = bench!("an_unobserved_power_off_is_read_from_the_event_file", TinyGuest::PowerOff, UNSET);
    let mut run = bench.launch().await;
    let record = run.vmm.run().clone();
    run.gone().await;
    // As a daemon that ended would leave them: unread.
    let events = bench.dir().join("events");
    std::fs::write(&events, "{\n  \"source\": \"vm\",\n  \"event\": \"shutdown\"\n}\n\n").unwrap();
    let adoption = bench.backend.adopt(bench.adoption(Some(record))).await.unwrap();
    assert!(
        matches!(&adoption, Adoption::Gone { exit } if exit.cause == ExitCause::GuestPowerOff),
        "{adoption:?}"
    );
}

#[tokio::test]
async fn an_ordered_reset_in_place_causes_no_event() {
    let bench = bench!("an_ordered_reset_in_place_causes_no_event", TinyGuest::Idle, NEVER);
    let mut run = bench.launch().await;
    for boots in 2..=4 {
        bench.console_shows(&TinyGuest::Idle.banner(), boots - 1).await;
        assert_eq!(run.vmm.reset().await.unwrap(), ResetOutcome::InPlace);
        bench.console_shows(&TinyGuest::Idle.banner(), boots).await;
    }
    assert_eq!(run.vmm.probe().await.unwrap(), GuestState::Running);
    assert_eq!(run.vmm.shutdown(FORCE).await.unwrap(), EndedBy::Vmm);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

/// Resets the guest at the VMM's own socket, as a daemon does that ends before it reads the event of the reset. The handles of
/// the VMM are dropped, and their monitors get the time to end: one that still ran would read the event.
async fn reset_from_outside(socket: &std::path::Path) {
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut stream = UnixStream::connect(socket).await.expect("the VMM listens");
    let call = b"PUT /api/v1/vm.reboot HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
    stream.write_all(call).await.expect("the VMM reads");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.expect("the VMM answers");
    assert_eq!(&answer, b"HTTP/1.1 204");
}

#[tokio::test]
async fn a_recorded_reset_does_not_end_the_run_after_an_adoption() {
    let bench = bench!("a_recorded_reset_does_not_end_the_run_after_an_adoption", TinyGuest::Idle, NEVER);
    let first = bench.launch().await;
    let record = first.vmm.run().clone();
    bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
    drop(first);
    reset_from_outside(&record.socket).await;
    bench.console_shows(&TinyGuest::Idle.banner(), 2).await;
    let adopt = async |changed_ms| {
        let request = AdoptRequest { changed_ms, ..bench.adoption(Some(record.clone())) };
        match bench.backend.adopt(request).await.unwrap() {
            Adoption::Alive { launched, guest: GuestState::Running } => Run::from(launched),
            other => panic!("{other:?}"),
        }
    };
    // The record was changed after the reset.
    let mut run = adopt(vmm_host::clock::now_ms()).await;
    assert_eq!(run.vmm.reset().await.unwrap(), ResetOutcome::InPlace);
    bench.console_shows(&TinyGuest::Idle.banner(), 3).await;
    run.no_event();
    drop(run);
    // The record was changed before the reset, which ends the run now.
    reset_from_outside(&record.socket).await;
    bench.console_shows(&TinyGuest::Idle.banner(), 4).await;
    let mut run = adopt(0).await;
    assert_eq!(run.gone().await.cause, ExitCause::GuestReset);
    assert_eq!(bench.processes(), 0);
}

#[tokio::test]
async fn extended_l2_entries_are_refused_as_the_capabilities_declare() {
    let mut bench =
        bench!("extended_l2_entries_are_refused_as_the_capabilities_declare", TinyGuest::Idle, UNSET);
    assert!(!bench.backend.capabilities().extended_l2);
    let images = [("extended_l2=on", false), ("compression_type=zstd", true)];
    for (option, opens) in images {
        let path = bench.dir().join("image.qcow2");
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", option, path.to_str().unwrap(), "1M"])
            .status();
        assert!(made.unwrap().success());
        bench.config.storage = vec![vmm_core::config::StorageDevice {
            id: "disk".to_owned(),
            path: path.to_str().unwrap().to_owned(),
            options: [("format".to_owned(), "qcow2".to_owned())].into(),
            ..Default::default()
        }];
        let launched = bench.backend.launch(bench.request()).await;
        assert_eq!(launched.is_ok(), opens, "{option}: {launched:?}");
        if let Ok(launched) = launched {
            launched.vmm.kill().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_guest_that_resets_itself_runs_on() {
    for guest in [TinyGuest::Reset, TinyGuest::TripleFault] {
        let bench = bench!("a_guest_that_resets_itself_runs_on", guest, GUEST_REBOOT);
        let mut run = bench.launch().await;
        for _ in 0..3 {
            assert_eq!(run.event().await, VmmEvent::GuestReset);
        }
        bench.console_shows(&guest.banner(), 3).await;
        run.vmm.kill().await.unwrap();
        assert_eq!(bench.processes(), 0);
    }
}

#[tokio::test]
async fn a_guest_reset_ends_the_run_under_its_policy() {
    for guest in [TinyGuest::Reset, TinyGuest::TripleFault] {
        let bench = bench!("a_guest_reset_ends_the_run_under_its_policy", guest, NEVER);
        let mut run = bench.launch().await;
        assert_eq!(run.gone().await.cause, ExitCause::GuestReset);
        assert_eq!(bench.processes(), 0);
    }
}

#[tokio::test]
async fn a_guest_that_ignores_the_power_button_is_powered_off() {
    let bench = bench!("a_guest_that_ignores_the_power_button_is_powered_off", TinyGuest::Idle, UNSET);
    let mut run = bench.launch().await;
    run.vmm.pause().await.unwrap();
    assert_eq!(run.vmm.shutdown(ask_for(Duration::from_secs(2))).await.unwrap(), EndedBy::Vmm);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn a_paused_guest_is_powered_off() {
    let bench = bench!("a_paused_guest_is_powered_off", TinyGuest::Idle, UNSET);
    let mut run = bench.launch().await;
    run.vmm.pause().await.unwrap();
    assert_eq!(run.vmm.shutdown(FORCE).await.unwrap(), EndedBy::Vmm);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn orders_of_another_client_are_reported() {
    let bench = bench!("orders_of_another_client_are_reported", TinyGuest::Idle, UNSET);
    let mut run = bench.launch().await;
    let socket = run.vmm.run().socket.clone();
    let order = async |name: &str| {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        let request = format!("PUT /api/v1/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(stream.read(&mut [0; 64]).await.unwrap() > 0);
    };
    order("vm.pause").await;
    assert_eq!(run.event().await, VmmEvent::Paused);
    order("vm.resume").await;
    assert_eq!(run.event().await, VmmEvent::Resumed);
    order("vm.reboot").await;
    assert_eq!(run.event().await, VmmEvent::GuestReset);
    order("vmm.shutdown").await;
    assert_eq!(run.gone().await.cause, ExitCause::GuestPowerOff, "which is what it looks like");
}

#[tokio::test]
async fn counters_cover_all_disks() {
    let mut bench = bench!("counters_cover_all_disks", TinyGuest::Idle, UNSET);
    bench.add_disk("root");
    bench.add_disk("data");
    let run = bench.launch().await;
    let sample = run.vmm.sample().await;
    assert!(sample.memory_bytes.unwrap() > 1 << 20);
    assert_eq!(sample.missing, [""; 0]);
    run.vmm.reset().await.unwrap();
    assert_eq!(run.vmm.sample().await.missing, [""; 0]);
    run.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn calls_to_a_stopped_vmm_time_out_and_it_can_be_killed() {
    let bench = bench!("calls_to_a_stopped_vmm_time_out_and_it_can_be_killed", TinyGuest::Idle, UNSET);
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
async fn a_killed_vmm_is_a_failure_and_its_socket_does_not_block_the_next_launch() {
    let bench = bench!(
        "a_killed_vmm_is_a_failure_and_its_socket_does_not_block_the_next_launch",
        TinyGuest::Idle,
        UNSET
    );
    let mut run = bench.launch().await;
    run.signal(Signal::KILL);
    let exit = run.gone().await;
    assert_eq!(exit.cause, ExitCause::VmmFailed);
    assert!(exit.message.contains("SIGKILL"), "{}", exit.message);
    bench.launch().await.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn a_running_vmm_is_adopted() {
    let bench = bench!("a_running_vmm_is_adopted", TinyGuest::Idle, UNSET);
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
    assert!(matches!(&adoption, Adoption::Gone { exit } if exit.cause == ExitCause::Unknown), "{adoption:?}");
}

#[tokio::test]
async fn a_failed_launch_is_explained_and_leaves_nothing() {
    let mut bench = bench!("a_failed_launch_is_explained_and_leaves_nothing", TinyGuest::Idle, UNSET);
    let kernel = bench.dir().join("not-a-kernel");
    std::fs::write(&kernel, "not a kernel").unwrap();
    bench.config.boot.as_mut().unwrap().kernel_path = kernel.to_str().unwrap().to_owned();
    let error = bench.try_launch().await.err().unwrap();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert!(error.message.to_lowercase().contains("kernel"), "{}", error.message);
    assert_eq!(bench.processes(), 0);
    bench.sweep().await;
    bench.sweep().await;
}

#[tokio::test]
async fn a_dropped_launch_is_swept() {
    let bench = bench!("a_dropped_launch_is_swept", TinyGuest::Idle, UNSET);
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
    let bench = Bench::new(CloudHypervisorBackend::new("/nowhere/cloud-hypervisor"), TinyGuest::Idle, UNSET);
    let error = bench.try_launch().await.err().unwrap();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::NotInstalled, Effect::NotApplied));
    assert!(bench.backend.ping().await.version.unwrap_err().contains("/nowhere/cloud-hypervisor"));
}

#[tokio::test]
async fn the_largest_allowed_number_of_devices_works() {
    let mut bench = bench!("the_largest_allowed_number_of_devices_works", TinyGuest::Idle, UNSET);
    for index in 0..bench.backend.capabilities().limits["max-devices"] {
        bench.add_disk(&format!("d{index}"));
    }
    assert!(bench.backend.check(&bench.spec()).is_ok());
    bench.launch().await.vmm.kill().await.unwrap();
    bench.add_disk("more");
    assert!(!bench.backend.check(&bench.spec()).is_ok());
}

#[tokio::test]
async fn memory_hotplug_and_topology_are_accepted() {
    let mut bench = bench!("memory_hotplug_and_topology_are_accepted", TinyGuest::Idle, UNSET);
    let memory = bench.config.memory.as_mut().unwrap();
    memory.size_bytes = 128 << 20;
    memory.hotplug_enabled = true;
    memory.max_size_bytes = 256 << 20;
    memory.backing.insert("shared".to_owned(), "true".to_owned());
    let cpu = bench.config.cpu.as_mut().unwrap();
    cpu.max_vcpu_count = 4;
    cpu.topology =
        Some(vmm_core::config::CpuTopology { sockets: 1, cores_per_socket: 2, threads_per_core: 2 });
    let run = bench.launch().await;
    bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
    run.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn a_network_interface_is_connected_to_its_tap() {
    let mut bench = bench!("a_network_interface_is_connected_to_its_tap", TinyGuest::Idle, UNSET);
    let Some(tap) = Tap::new("a_network_interface_is_connected_to_its_tap", "vmcpch") else { return };
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
    let bench = bench!("the_log_of_a_silent_vmm_is_trimmed_by_the_backend", TinyGuest::Idle, UNSET);
    let run = bench.launch().await;
    a_silent_vmm_is_trimmed(&*run.vmm, &bench.dir().join("vmm.log")).await;
    run.vmm.kill().await.unwrap();
}

#[tokio::test]
async fn no_request_is_sent_to_another_process_on_the_socket() {
    let bench = bench!("no_request_is_sent_to_another_process_on_the_socket", TinyGuest::Idle, UNSET);
    bench.nothing_is_sent_to_another_listener().await;
}

#[tokio::test]
async fn a_run_folder_may_have_any_name() {
    const TEST: &str = "a_run_folder_may_have_any_name";
    for prefix in ["a,b-", "a[b-", "a]b,c=d-"] {
        let Some(backend) = usable(TEST, CloudHypervisorBackend::new("cloud-hypervisor")).await else {
            return;
        };
        let bench = Bench::in_folder(backend, prefix, TinyGuest::Idle, UNSET);
        let run = bench.launch().await;
        bench.console_shows(&TinyGuest::Idle.banner(), 1).await;
        assert_eq!(bench.processes(), 1, "{prefix}: it is found by its run folder");
        run.vmm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn samples_leave_no_connection_open() {
    let bench = bench!("samples_leave_no_connection_open", TinyGuest::Idle, UNSET);
    bench.samples_leave_no_connection().await;
}
