//! Tests of the monitor's decisions.

use super::*;

#[test]
fn the_record_knows_of_nothing_where_the_clock_was_set_back() {
    let process = vmm_host::process::identify(std::process::id()).unwrap();
    let now = 1_800_000_000_000;
    assert_eq!(known_until(&process, now + 1, now), Duration::ZERO);
    assert_eq!(known_until(&process, 0, now), Duration::ZERO, "the change is older than the process");
    assert!(known_until(&process, now, now) <= vmm_host::process::age(&process).unwrap());
    let elsewhere = ProcessIdentity { boot_id: "another".to_owned(), ..process };
    assert_eq!(known_until(&elsewhere, now, now), Duration::ZERO);
}

#[test]
fn counters_outlive_a_reset() {
    let mut totals = Totals::default();
    assert_eq!(totals.update([10; 8]), [10; 8]);
    assert_eq!(totals.update([15; 8]), [15; 8]);
    assert_eq!(totals.update([2; 8]), [17; 8]);
    assert_eq!(totals.update([u64::MAX; 8]), [u64::MAX; 8]);
}

#[tokio::test]
async fn of_a_flood_of_changes_a_burst_is_told_and_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let text = |event: &str| format!("{{\n\"source\": \"vm\",\n\"event\": \"{event}\"\n}}\n");
    let flood = format!("{}{}", text("resumed"), text("paused")).repeat(1000);
    std::fs::write(dir.path().join(EVENTS), flood + &text("resumed")).unwrap();
    let command = vmm_host::process::Command::new("/bin/sleep", ["600"], dir.path().join("log"));
    let guard = vmm_host::process::spawn_guarded(command).await.unwrap();
    let (sender, mut events) = mpsc::channel(QUEUE);
    let monitor = Monitor {
        process: guard.process().clone(),
        file: EventFile::from_start(dir.path()),
        watched: Watcher::default().watch(&dir.path().join(EVENTS)),
        expected: Arc::default(),
        log: dir.path().join(LOG),
        reset_ends: false,
        seen: Seen::default(),
        throttle: Throttle::new(),
        moved: None,
        sender,
    };
    tokio::spawn(monitor.run());
    let mut told = Vec::new();
    // The last event comes a second after the burst.
    while told.len() < 17 {
        told.push(events.recv().await.unwrap());
    }
    assert_eq!(told.last(), Some(&VmmEvent::Resumed));
    guard.signal(Signal::KILL).unwrap();
    assert!(matches!(events.recv().await, Some(VmmEvent::Gone(_))), "and nothing more");
}

#[test]
fn the_cause_of_an_end() {
    let code = |code| ProcessExit { status: Some(ExitStatus::Code(code)) };
    let killed = ProcessExit { status: Some(ExitStatus::Signal(9)) };
    let off = Seen { shutdown: true, ..Seen::default() };
    let reset = Seen { ending_reset: true, ..Seen::default() };
    let panic = Seen { panic: true, ..Seen::default() };
    let none = Seen::default();
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
