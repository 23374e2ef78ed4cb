//! Tests of the monitor's decisions.

use std::path::Path;

use super::*;

#[test]
fn no_event_is_skipped_after_the_clock_was_set_back() {
    let process = vmm_host::process::identify(std::process::id()).unwrap();
    let now = 1_800_000_000_000;
    assert_eq!(known_until(&process, now + 1, now), Duration::ZERO);
    assert_eq!(known_until(&process, 0, now), Duration::ZERO, "the change is older than the process");
    assert!(known_until(&process, now, now) <= vmm_host::process::age(&process).unwrap());
    let elsewhere = ProcessIdentity { boot_id: "another".to_owned(), ..process };
    assert_eq!(known_until(&elsewhere, now, now), Duration::ZERO);
}

#[test]
fn counters_continue_after_a_reset() {
    let mut totals = CounterTotals::default();
    assert_eq!(totals.update([10; 8]), [10; 8]);
    assert_eq!(totals.update([15; 8]), [15; 8]);
    assert_eq!(totals.update([2; 8]), [17; 8]);
    assert_eq!(totals.update([u64::MAX; 8]), [u64::MAX; 8]);
}

/// Returns the monitor of a VMM, which reads the events in `dir` from their start.
fn monitor_of(process: &Process, dir: &Path, sender: mpsc::Sender<VmmEvent>) -> CloudHypervisorMonitor {
    CloudHypervisorMonitor {
        process: process.clone(),
        file: EventFile::from_start(dir),
        watched: FileWatcher::default().watch(&dir.join(EVENTS)),
        expected: Arc::default(),
        log: dir.join(LOG),
        reset_ends: false,
        seen: EndEvents::default(),
        throttle: Throttle::new(),
        moved: None,
        sender,
    }
}

#[tokio::test]
async fn a_flood_of_changes_reports_a_burst_and_the_last_change() {
    let dir = tempfile::tempdir().unwrap();
    let text = |event: &str| format!("{{\n\"source\": \"vm\",\n\"event\": \"{event}\"\n}}\n");
    let flood = format!("{}{}", text("resumed"), text("paused")).repeat(1000);
    std::fs::write(dir.path().join(EVENTS), flood + &text("resumed")).unwrap();
    let command = vmm_host::process::Command::new("/bin/sleep", ["600"], dir.path().join("log"));
    let guard = vmm_host::process::spawn_guarded(command).await.unwrap();
    let (sender, mut events) = mpsc::channel(QUEUE);
    tokio::spawn(monitor_of(guard.process(), dir.path(), sender).run());
    let mut reported = Vec::new();
    // The last event comes a second after the burst.
    while reported.len() < 17 {
        reported.push(events.recv().await.unwrap());
    }
    assert_eq!(reported.last(), Some(&VmmEvent::Resumed));
    guard.signal(Signal::KILL).unwrap();
    assert!(matches!(events.recv().await, Some(VmmEvent::Gone(_))), "and nothing more");
}

#[tokio::test]
async fn a_monitor_whose_handle_was_dropped_ends_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let reboot = "{\n\"source\": \"vm\",\n\"event\": \"rebooting\"\n}\n";
    for dropped in [true, false] {
        // A reader takes what it has read out of the file.
        std::fs::write(dir.path().join(EVENTS), reboot).unwrap();
        let command = vmm_host::process::Command::new("/bin/sleep", ["600"], dir.path().join("log"));
        let guard = vmm_host::process::spawn_guarded(command).await.unwrap();
        let (sender, events) = mpsc::channel(QUEUE);
        let monitor =
            CloudHypervisorMonitor { reset_ends: true, ..monitor_of(guard.process(), dir.path(), sender) };
        let events = (!dropped).then_some(events);
        monitor.run().await;
        // The process ends by the first signal that was sent to it.
        let _ = guard.signal(Signal::TERM);
        let exit = guard.process().wait().await;
        let expected = if dropped { Signal::TERM } else { Signal::KILL };
        assert_eq!(exit.status, Some(ExitStatus::Signal(expected.as_raw())), "dropped: {dropped}");
        drop(events);
    }
}

#[test]
fn the_exit_cause_follows_from_status_order_and_events() {
    let code = |code| ProcessExit { status: Some(ExitStatus::Code(code)) };
    let killed = ProcessExit { status: Some(ExitStatus::Signal(9)) };
    let off = EndEvents { shutdown: true, ..EndEvents::default() };
    let reset = EndEvents { ending_reset: true, ..EndEvents::default() };
    let panic = EndEvents { panic: true, ..EndEvents::default() };
    let none = EndEvents::default();
    assert_eq!(cause(code(0), false, off), ExitCause::GuestPowerOff);
    assert_eq!(cause(code(0), false, none), ExitCause::GuestPowerOff);
    assert_eq!(cause(ProcessExit::UNKNOWN, false, off), ExitCause::GuestPowerOff);
    assert_eq!(cause(code(0), true, off), ExitCause::Requested);
    assert_eq!(cause(killed, false, reset), ExitCause::GuestReset);
    assert_eq!(cause(killed, false, panic), ExitCause::GuestCrash);
    assert_eq!(cause(ProcessExit::UNKNOWN, false, panic), ExitCause::GuestCrash);
    assert_eq!(cause(killed, false, none), ExitCause::VmmFailed);
    assert_eq!(cause(code(1), false, off), ExitCause::VmmFailed);
    assert_eq!(cause(ProcessExit::UNKNOWN, false, none), ExitCause::Unknown);
}
