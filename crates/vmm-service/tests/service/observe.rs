//! What VMs do by themselves, and what is shown of it.

use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause, GuestState};
use vmm_core::event::EventKind;
use vmm_core::state::{EndedBy, Phase, VmState};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

use crate::common::*;

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_off_ends_its_run() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await.power_off();
    let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!((record.status.phase, record.status.reason.as_str()), (Phase::Stopped, "guest-power-off"));
    assert_eq!(record.status.message, "the guest powered itself off");
    assert_eq!((record.ended_by, &record.run), (Some(EndedBy::Guest), &None));
    assert_eq!(bed.stored("a"), *record);
    assert!(vms.service.get("a").unwrap().metrics.is_none());
    let last = bed.store.log().pop().unwrap().event;
    assert_eq!((last.kind, last.ended_by), (EventKind::VmmExited, Some(EndedBy::Guest)));
    vms.boot("a").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reset_in_place_is_counted_and_the_vm_runs_on() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    for count in 1..=3 {
        machine.reset();
        let record = vms.until("a", |record| record.status.restarts == count).await;
        assert_eq!((record.state, record.status.reason.as_str()), (VmState::Running, "guest-reset"));
    }
    tokio::time::sleep(Duration::from_secs(61)).await;
    machine.reset();
    vms.until("a", |record| record.status.restarts == 1).await;
    assert!(machine.lives(), "a quiet minute begins the count anew");
}

#[tokio::test(start_paused = true)]
async fn a_reset_of_a_paused_guest_leaves_it_paused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    vms.pause("a").await.unwrap();
    machine.reset();
    let record = vms.until("a", |record| record.status.restarts == 1).await;
    assert_eq!((record.state, record.status.phase), (VmState::Paused, Phase::Paused));
}

#[tokio::test(start_paused = true)]
async fn endless_guest_resets_are_ended() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.with_policy(GUEST_REBOOT, 2)).await;
    for _ in 0..3 {
        machine.reset();
    }
    let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!((record.status.phase, record.status.reason.as_str()), (Phase::Failed, "restart-loop"));
    assert!(!machine.lives());
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(vms.state("a"), VmState::Shutdown);
    vms.boot("a").await.expect("a client may start it again");
    assert_eq!(vms.record("a").status.restarts, 0);
}

#[tokio::test(start_paused = true)]
async fn a_reset_ends_the_run_where_the_policy_says_never() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.with_policy(NEVER, 0)).await;
    machine.reset();
    let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!((record.status.phase, record.status.reason.as_str()), (Phase::Stopped, "guest-reset"));
    assert!(!machine.lives());
}

#[tokio::test(start_paused = true)]
async fn changes_by_other_clients_are_followed() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    machine.pause();
    let record = vms.until("a", |record| record.state == VmState::Paused).await;
    assert_eq!(record.status.reason.as_str(), "paused-from-outside");
    machine.resume();
    vms.until("a", |record| record.state == VmState::Running).await;
    let generation = vms.record("a").generation;
    machine.resume();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(vms.record("a").generation, generation, "what is known already is no change");
}

#[tokio::test(start_paused = true)]
async fn a_reset_from_outside_is_reported_and_ignored_by_the_policy() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for (vm_id, policy) in [("never", NEVER), ("once", GUEST_REBOOT)] {
        let machine = vms.run(vm_id, bed.with_policy(policy, 1)).await;
        for paused in [false, false, true] {
            if paused {
                machine.pause();
                vms.until(vm_id, |record| record.state == VmState::Paused).await;
            }
            let before = vms.record(vm_id);
            machine.reset_from_outside();
            let after = vms.until(vm_id, |record| record.generation > before.generation).await;
            assert_eq!((after.state, after.status.reason.as_str()), (before.state, "reset-from-outside"));
            assert_eq!(after.status.restarts, 0);
            assert!(machine.lives());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_crashed_guest_is_ended() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    machine.fail_guest("internal error");
    let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!((record.status.phase, record.status.reason.as_str()), (Phase::Failed, "guest-crash"));
    assert!(record.status.message.contains("internal error"));
    assert!(!machine.lives());
}

#[tokio::test(start_paused = true)]
async fn a_crashed_guest_with_a_vmm_that_does_not_end_is_unreachable() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    machine.set_unkillable(true);
    machine.fail_guest("internal error");
    let record = vms.until_phase("a", Phase::Unreachable).await;
    assert_eq!((record.state, record.status.reason.as_str()), (VmState::Running, "vmm-does-not-end"));
    machine.set_unkillable(false);
    vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert!(!machine.lives(), "it is tried again");
}

#[tokio::test(start_paused = true)]
async fn the_log_of_a_silent_vmm_is_trimmed() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.machine("a").stop();
    vms.until_phase("a", Phase::Unreachable).await;
    let (trimmed, sampled) =
        (vms.world.calls(ScriptedMethod::TrimLogs), vms.world.calls(ScriptedMethod::Sample));
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(vms.world.calls(ScriptedMethod::TrimLogs) > trimmed);
    assert_eq!(vms.world.calls(ScriptedMethod::Sample), sampled, "a silent VMM is not asked for counters");
}

#[tokio::test(start_paused = true)]
async fn a_silent_vmm_keeps_its_state_and_allows_only_force() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for state in [VmState::Running, VmState::Paused] {
        let vm_id = state.name();
        vms.bring_to(vm_id, bed.config(), state).await;
        let machine = vms.machine(vm_id);
        machine.stop();
        let record = vms.until_phase(vm_id, Phase::Unreachable).await;
        assert_eq!((record.state, record.status.reason.as_str()), (state, "vmm-does-not-answer"));
        for answer in [
            vms.boot(vm_id).await,
            vms.pause(vm_id).await,
            vms.resume(vm_id).await,
            vms.shutdown(vm_id).await,
            vms.reboot(vm_id).await,
            vms.delete(vm_id).await,
        ] {
            let text = refused(answer, "unavailable");
            assert!(text.contains("unreachable") && text.contains("force"), "{text}");
        }
        assert!(machine.lives());
        machine.go_on();
        let record = vms.until(vm_id, |record| record.status.phase == Phase::at_rest(state)).await;
        assert_eq!((record.state, record.status.reason.as_str()), (state, "reachable-again"));
    }
    let kinds: Vec<_> = bed.store.log().into_iter().map(|event| event.event.kind).collect();
    for kind in [EventKind::Unreachable, EventKind::Reachable] {
        assert_eq!(kinds.iter().filter(|found| **found == kind).count(), 2, "{kind:?} once per VM");
    }
}

#[tokio::test(start_paused = true)]
async fn a_vmm_that_answers_again_is_probed_for_its_guests_state() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for (vm_id, guest, expected) in
        [("paused", GuestState::Paused, VmState::Paused), ("ended", GuestState::Ended, VmState::Shutdown)]
    {
        let machine = vms.run(vm_id, bed.config()).await;
        machine.stop();
        vms.until_phase(vm_id, Phase::Unreachable).await;
        machine.set_guest(guest);
        machine.go_on();
        vms.until(vm_id, |record| record.state == expected).await;
        assert_eq!(machine.lives(), expected.is_live(), "{vm_id}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_with_the_known_state_only_ends_the_unreachable_phase() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    vms.pause("a").await.unwrap();
    machine.stop();
    refused(vms.resume("a").await, "unavailable");
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Paused, Phase::Unreachable));
    machine.go_on();
    machine.pause();
    let record = vms.until_phase("a", Phase::Paused).await;
    assert_eq!(record.status.reason.as_str(), "reachable-again");
}

#[tokio::test(start_paused = true)]
async fn a_silent_vmm_that_ends_is_shut_down() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.config()).await;
    machine.stop();
    vms.until_phase("a", Phase::Unreachable).await;
    machine.end(ExitCause::VmmFailed);
    let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!(record.status.phase, Phase::Failed);
}

#[tokio::test(start_paused = true)]
async fn an_operation_without_an_answer_makes_the_vm_unreachable() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await.stop();
    refused(vms.pause("a").await, "unavailable");
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Unreachable));
}

#[tokio::test(start_paused = true)]
async fn metrics_are_sampled_and_removed_with_the_run() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    let metrics = || vms.service.get("a").unwrap().metrics;
    assert!(metrics().is_none());
    vms.boot("a").await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let first = metrics().expect("the first sample comes soon");
    tokio::time::sleep(METRICS_INTERVAL).await;
    let second = metrics().unwrap();
    assert!(second.network.unwrap().bytes_received > first.network.unwrap().bytes_received);
    assert!((0.0..=100.0).contains(&second.cpu_usage_percent));
    vms.shutdown("a").await.unwrap();
    assert!(metrics().is_none());
    vms.boot("a").await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(metrics().unwrap().network, first.network, "a new run counts from its own beginning");
}

#[tokio::test(start_paused = true)]
async fn a_vmm_that_hangs_delays_no_reader_and_no_other_vm() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.world.next(ScriptedMethod::Probe, ScriptedResult::hang());
    let record = vms.until_phase("a", Phase::Unreachable).await;
    assert!(record.status.message.contains("did not answer"), "{}", record.status.message);
    vms.until_phase("a", Phase::Running).await;
    vms.world
        .next(ScriptedMethod::Probe, ScriptedResult::Fail(BackendErrorKind::Protocol, Effect::NotApplied));
    vms.until_phase("a", Phase::Unreachable).await;
    vms.until_phase("a", Phase::Running).await;
}

/// Waits until `method` has been called `more` times from now.
async fn until_called(vms: &Vms, method: ScriptedMethod, more: usize) {
    let wanted = vms.world.calls(method) + more;
    while vms.world.calls(method) < wanted {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn unreadable_counters_leave_the_other_metrics() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    for kind in [BackendErrorKind::Host, BackendErrorKind::Protocol, BackendErrorKind::Timeout] {
        vms.world.always(ScriptedMethod::Sample, ScriptedResult::Fail(kind, Effect::NotApplied));
        until_called(&vms, ScriptedMethod::Sample, 3).await;
        assert_eq!(vms.phase("a"), Phase::Running, "{kind:?}");
        assert!(vms.service.get("a").unwrap().metrics.is_none(), "{kind:?}");
    }
    vms.world.always(ScriptedMethod::Sample, ScriptedResult::hang());
    until_called(&vms, ScriptedMethod::Sample, 2).await;
    assert_eq!(vms.phase("a"), Phase::Running);
    vms.pause("a").await.unwrap();
    vms.resume("a").await.unwrap();
    vms.shutdown("a").await.unwrap();
    let silences = bed.store.log().into_iter().filter(|event| event.event.kind == EventKind::Unreachable);
    assert_eq!(silences.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn only_a_silent_vmm_is_out_of_contact() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    for kind in [BackendErrorKind::Host, BackendErrorKind::Rejected, BackendErrorKind::Gone] {
        vms.world.always(ScriptedMethod::Probe, ScriptedResult::Fail(kind, Effect::NotApplied));
        until_called(&vms, ScriptedMethod::Probe, 3).await;
        assert_eq!(vms.phase("a"), Phase::Running, "{kind:?}");
    }
    for kind in [BackendErrorKind::Timeout, BackendErrorKind::Unreachable, BackendErrorKind::Protocol] {
        vms.world.always(ScriptedMethod::Probe, ScriptedResult::Fail(kind, Effect::NotApplied));
        vms.until_phase("a", Phase::Unreachable).await;
        vms.world.behave();
        vms.until_phase("a", Phase::Running).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_silence_ended_by_an_answer_causes_no_event() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The VMM is busy with the pause for longer than a probe waits.
    vms.world.next(ScriptedMethod::Pause, ScriptedResult::Delay(Duration::from_secs(19)));
    vms.world.next(ScriptedMethod::Probe, ScriptedResult::hang());
    vms.pause("a").await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Paused, Phase::Paused));
    vms.resume("a").await.unwrap();
    let silences = bed.store.log().into_iter().filter(|event| event.event.kind == EventKind::Unreachable);
    assert_eq!(silences.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn endless_guest_resets_delay_no_operation_and_log_few_lines() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.with_policy(ALWAYS, 1000)).await;
    // Reset again at each chance: the VMM always has something to tell.
    let storm = tokio::spawn({
        let machine = machine.clone();
        async move {
            for _ in 0..500 {
                machine.reset();
                tokio::task::yield_now().await;
            }
        }
    });
    let pausing = vms
        .begin({
            let vms = vms.clone();
            async move { vms.pause("a").await }
        })
        .await;
    pausing.await.unwrap().expect("an operation has its turn");
    assert!(!storm.is_finished(), "in the middle of it");
    storm.await.unwrap();
    let record = vms.until("a", |record| record.status.restarts == 500).await;
    assert_eq!((record.state, record.status.phase), (VmState::Paused, Phase::Paused));
    let resets = bed.store.log().into_iter().filter(|it| it.event.kind == EventKind::GuestReset).count();
    assert!(resets <= 3, "{resets} events");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_sampler_loses_one_sample_only() {
    for method in [ScriptedMethod::Probe, ScriptedMethod::Sample, ScriptedMethod::TrimLogs] {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.world.next(method, ScriptedResult::Panic);
        let machine = vms.run("a", bed.config()).await;
        tokio::time::sleep(METRICS_INTERVAL * 3).await;
        assert!(vms.service.get("a").unwrap().metrics.is_some(), "{method:?}: it is sampled again");
        machine.stop();
        vms.until_phase("a", Phase::Unreachable).await;
    }
}
