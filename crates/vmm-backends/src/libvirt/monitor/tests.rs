use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use uuid::Uuid;
use vmm_host::process::{Command, ExitStatus, ProcessGuard, spawn_guarded};
use vmm_libvirt_wire::{CallResult, Domain};

use super::*;

/// A duration that is too short to delay a test and long enough to order two events.
const SHORT_DELAY: Duration = Duration::from_millis(20);
const UNREACHED_TIMEOUT: Duration = Duration::from_secs(3600);

/// A monitor of a process that runs `script`, with a libvirt that reports the domain in `state`.
struct Scene {
    monitor: DomainMonitor,
    state: Arc<Mutex<DomainState>>,
    /// The number of calls that libvirt received.
    asked: Arc<AtomicUsize>,
    happened: mpsc::Receiver<VmmEvent>,
    qemu: ProcessGuard,
    _handle: oneshot::Sender<()>,
    _dir: tempfile::TempDir,
}

async fn scene(script: &str, state: DomainState, exit_timeouts: Option<ExitTimeouts>) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let qemu = spawn_guarded(Command::new("/bin/sh", ["-c", script], dir.path().join("log"))).await.unwrap();
    let uuid = Uuid::now_v7();
    let domain = Domain { uuid, name: "vm".to_owned(), mark: None, state, persistent: true };
    let (state, asked) = (Arc::new(Mutex::new(state)), Arc::new(AtomicUsize::new(0)));
    let (state_now, count) = (Arc::clone(&state), Arc::clone(&asked));
    let link = Arc::new(LibvirtLink::scripted(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        let state = *state_now.lock().unwrap();
        CallResult::Domains { domains: vec![Domain { state, ..domain.clone() }] }
    }));
    let (events, happened) = mpsc::channel(16);
    let (handle, wanted) = oneshot::channel();
    let monitor = DomainMonitor {
        watched: link.subscribe(uuid),
        process: qemu.process().clone(),
        link,
        guest: Arc::new(GuestOrders::new(true)),
        events,
        reason: None,
        ended: None,
        exit_timeouts,
        end: None,
        handle: wanted,
        throttle: Throttle::new(),
        compare_at: None,
    };
    Scene { monitor, state, asked, happened, qemu, _handle: handle, _dir: dir }
}

/// Returns QEMU's event after a reset by a guest that may not reset itself.
fn shut_down() -> DomainEvent {
    DomainEvent::Monitor("SHUTDOWN".to_owned(), r#"{"guest":true,"reason":"guest-reset"}"#.to_owned())
}

/// Returns the signal that ends a QEMU which has announced its end.
async fn ended_by(script: &str, exit_timeouts: ExitTimeouts) -> i32 {
    let Scene { mut monitor, mut happened, qemu, _handle, _dir, .. } =
        scene(script, DomainState::ShuttingDown, Some(exit_timeouts)).await;
    monitor.on_event(shut_down()).await;
    monitor.on_event(DomainEvent::Lifecycle(Lifecycle::Stopped)).await;
    monitor.run().await;
    let reported = happened.recv().await;
    assert!(
        matches!(&reported, Some(VmmEvent::Gone(Exit { cause: ExitCause::GuestReset, .. }))),
        "{reported:?}"
    );
    match qemu.wait().await.status {
        Some(ExitStatus::Signal(signal)) => signal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_qemu_that_hangs_while_it_exits_gets_a_signal() {
    let signal = ended_by(
        "exec sleep 600",
        ExitTimeouts { first: SHORT_DELAY, again: SHORT_DELAY, last: UNREACHED_TIMEOUT },
    )
    .await;
    assert_eq!(signal, Signal::TERM.as_raw());
}

#[tokio::test]
async fn a_qemu_that_ignores_signals_while_it_exits_is_killed() {
    // The earlier signals only wake QEMU, so SIGKILL comes at `last` for any number of them.
    let exit_timeouts = ExitTimeouts { first: SHORT_DELAY, again: SHORT_DELAY, last: 5 * SHORT_DELAY };
    let deaf = "trap '' TERM; exec sleep 600";
    assert_eq!(ended_by(deaf, exit_timeouts).await, Signal::KILL.as_raw());
}

#[tokio::test]
async fn a_qemu_that_runs_again_gets_no_signal() {
    let exit_timeouts =
        Some(ExitTimeouts { first: UNREACHED_TIMEOUT, again: UNREACHED_TIMEOUT, last: UNREACHED_TIMEOUT });
    for state in [DomainState::Running, DomainState::Paused] {
        let mut scene = scene("exec sleep 600", state, exit_timeouts).await;
        scene.monitor.on_event(shut_down()).await;
        assert!(scene.monitor.end.is_some());
        scene.monitor.signal_waited_for_qemu(Signal::KILL).await;
        assert!(scene.monitor.end.is_none(), "libvirt knows better");
        assert!(scene.qemu.wait_for(5 * SHORT_DELAY).await.is_none());
    }
}

#[tokio::test]
async fn a_reset_cancels_the_expected_end() {
    let exit_timeouts =
        Some(ExitTimeouts { first: UNREACHED_TIMEOUT, again: UNREACHED_TIMEOUT, last: UNREACHED_TIMEOUT });
    let mut scene = scene("exec sleep 600", DomainState::Running, exit_timeouts).await;
    scene.monitor.on_event(shut_down()).await;
    scene.monitor.on_event(DomainEvent::Monitor("RESET".to_owned(), r#"{"guest":false}"#.to_owned())).await;
    assert!(scene.monitor.end.is_none() && scene.monitor.reason.is_none());
    assert_eq!(scene.happened.try_recv().unwrap(), VmmEvent::ResetFromOutside);
}

#[tokio::test]
async fn a_panicked_guest_is_not_reported_as_paused() {
    let exit_timeouts =
        Some(ExitTimeouts { first: UNREACHED_TIMEOUT, again: UNREACHED_TIMEOUT, last: UNREACHED_TIMEOUT });
    let panicked = || DomainEvent::Monitor("GUEST_PANICKED".to_owned(), r#"{"action":"pause"}"#.to_owned());
    let mut scene = scene("exec sleep 600", DomainState::Paused, exit_timeouts).await;
    scene.monitor.on_event(panicked()).await;
    scene.monitor.on_event(DomainEvent::Lifecycle(Lifecycle::Suspended)).await;
    assert!(scene.happened.try_recv().is_err(), "its end is told");
    // An imported domain is not ended by this program, so libvirt may keep it paused after a panic.
    scene.monitor.exit_timeouts = None;
    scene.monitor.reason = None;
    scene.monitor.on_event(panicked()).await;
    scene.monitor.on_event(DomainEvent::Lifecycle(Lifecycle::Suspended)).await;
    assert_eq!(scene.happened.try_recv().unwrap(), VmmEvent::Paused);
}

#[tokio::test]
async fn a_missed_shutdown_event_is_found_after_a_reconnect() {
    let exit_timeouts =
        Some(ExitTimeouts { first: UNREACHED_TIMEOUT, again: UNREACHED_TIMEOUT, last: UNREACHED_TIMEOUT });
    let mut scene = scene("exec sleep 600", DomainState::ShuttingDown, exit_timeouts).await;
    scene.monitor.on_event(DomainEvent::Connected).await;
    assert!(scene.monitor.end.is_some());
}

#[tokio::test]
async fn the_exit_of_a_foreign_domain_is_not_forced() {
    let mut scene = scene("exec sleep 600", DomainState::ShuttingDown, None).await;
    scene.monitor.on_event(shut_down()).await;
    scene.monitor.on_event(DomainEvent::Connected).await;
    assert!(scene.monitor.end.is_none());
}

#[tokio::test]
async fn a_thousand_changes_cause_a_burst_of_queries_and_a_last_one() {
    let mut scene = scene("exec sleep 600", DomainState::Running, None).await;
    tokio::time::pause();
    let changes = [(Lifecycle::Suspended, DomainState::Paused), (Lifecycle::Resumed, DomainState::Running)];
    for (event, state) in changes.into_iter().cycle().take(1001) {
        *scene.state.lock().unwrap() = state;
        scene.monitor.on_event(DomainEvent::Lifecycle(event)).await;
    }
    let reported: Vec<_> = std::iter::from_fn(|| scene.happened.try_recv().ok()).collect();
    assert_eq!((scene.asked.load(Ordering::Relaxed), reported.len()), (16, 16));
    assert_eq!(reported.last(), Some(&VmmEvent::Resumed));
    // The guest is paused since the last event, which the throttle delayed.
    let Scene { monitor, asked, mut happened, qemu, _handle, .. } = scene;
    let running = tokio::spawn(monitor.run());
    assert_eq!(happened.recv().await, Some(VmmEvent::Paused));
    assert_eq!(asked.load(Ordering::Relaxed), 17);
    qemu.signal(Signal::KILL).unwrap();
    running.await.unwrap();
}

#[test]
fn qemus_shutdown_reason_decides_unless_libvirt_ended_the_domain() {
    let cause = |reason, ended| exit_cause(reason, ended);
    let signal = Some(ShutdownReason::HostSignal);
    assert_eq!(cause(signal, Some(Lifecycle::Destroyed)), ExitCause::Requested);
    assert_eq!(cause(signal, Some(Lifecycle::Stopped)), ExitCause::VmmFailed);
    assert_eq!(cause(Some(ShutdownReason::GuestReset), Some(Lifecycle::Stopped)), ExitCause::GuestReset);
    assert_eq!(cause(Some(ShutdownReason::GuestShutdown), None), ExitCause::GuestPowerOff);
    assert_eq!(cause(None, Some(Lifecycle::Failed)), ExitCause::VmmFailed);
    assert_eq!(cause(signal, Some(Lifecycle::Crashed)), ExitCause::GuestCrash);
    assert_eq!(cause(Some(ShutdownReason::GuestPanic), Some(Lifecycle::Stopped)), ExitCause::GuestCrash);
    assert_eq!(cause(None, None), ExitCause::Unknown);
}

#[test]
fn only_changes_that_were_not_ordered_are_reported() {
    assert_eq!(difference(DomainState::Running, true), None);
    assert_eq!(difference(DomainState::Paused, false), None);
    assert_eq!(difference(DomainState::Paused, true), Some(VmmEvent::Paused));
    assert_eq!(difference(DomainState::Busy, true), None, "libvirt's own doing passes");
    assert_eq!(difference(DomainState::Running, false), Some(VmmEvent::Resumed));
    assert_eq!(difference(DomainState::ShuttingDown, true), None, "its end follows");
    assert!(matches!(difference(DomainState::IoError, true), Some(VmmEvent::GuestFailed(_))));
    assert_eq!(difference(DomainState::IoError, false), None, "told already");
}
