//! A daemon that ends and comes back: in every state, in the middle of every operation, on a host that was restarted or not.

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause, GuestState};
use vmm_core::state::{Phase, Request, Status, VmState};
use vmm_core::store::{Intent, VmRecord};
use vmm_testkit::fake::{Act, Method};

use crate::common::*;

/// Leaves the store as a daemon does that dies right after it has recorded what it is about to do.
fn interrupt(bed: &Bed, request: Request, phase: Phase) {
    let before = bed.stored("a");
    bed.store.put(VmRecord {
        intent: Some(Intent { request, actor: ME.into(), since_ms: 1, patience_ms: None }),
        status: Status::plain(phase, 1),
        generation: before.generation + 1,
        ..before
    });
}

/// VM `a` in `state`, left by a daemon that ended between two operations.
fn left_in(bed: &Bed, state: VmState) {
    bed.life(async |vms| vms.bring_to("a", bed.with_disk("d"), state).await);
}

#[test]
fn every_state_is_found_again_and_goes_on() {
    for state in VmState::ALL {
        let bed = Bed::new();
        left_in(&bed, state);
        let before = bed.stored("a");
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.phase), (state, Phase::at_rest(state)));
            assert_eq!((record.uid, &record.run), (before.uid, &before.run));
            assert_eq!(vms.world.living(), usize::from(state.is_live()));
            assert_eq!(
                record.generation > before.generation,
                state.is_live(),
                "nothing is written for nothing"
            );
            match state {
                VmState::Created | VmState::Shutdown => drop(vms.boot("a").await.unwrap()),
                VmState::Running => drop(vms.pause("a").await.unwrap()),
                VmState::Paused => drop(vms.resume("a").await.unwrap()),
            }
            vms.force_delete("a").await.unwrap();
            assert_eq!(vms.world.living(), 0);
        });
    }
}

#[test]
fn an_adopted_vm_is_watched() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    bed.life(async |vms| {
        vms.machine("a").reset();
        vms.until("a", |record| record.status.restarts == 1).await;
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        assert!(vms.service.get("a").unwrap().metrics.is_some());
        vms.machine("a").power_off();
        vms.until("a", |record| record.state == VmState::Shutdown).await;
    });
}

#[test]
fn what_happened_meanwhile_is_followed() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    bed.world.machine("a").unwrap().pause();
    bed.life(async |vms| assert_eq!(vms.state("a"), VmState::Paused));
    bed.world.machine("a").unwrap().resume();
    bed.life(async |vms| assert_eq!(vms.state("a"), VmState::Running));
    bed.world.machine("a").unwrap().set_guest(GuestState::Ended);
    bed.life(async |vms| {
        assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0));
    });
}

#[test]
fn a_vm_that_ended_meanwhile_is_down_with_its_reason() {
    for (cause, phase) in [
        (ExitCause::GuestPowerOff, Phase::Stopped),
        (ExitCause::VmmFailed, Phase::Failed),
        (ExitCause::Unknown, Phase::Failed),
    ] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        bed.world.machine("a").unwrap().end(cause);
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.phase), (VmState::Shutdown, phase));
            assert_eq!((record.status.reason.as_str(), &record.run), (cause.reason(), &None));
            assert_eq!(bed.stored("a"), *record);
            vms.boot("a").await.expect("its disk is free");
        });
    }
}

#[test]
fn a_policy_undoes_what_happened_meanwhile() {
    let bed = Bed::new();
    bed.life(async |vms| drop(vms.run("a", bed.with_policy(ON_FAILURE, 0)).await));
    bed.world.machine("a").unwrap().end(ExitCause::VmmFailed);
    bed.life(async |vms| {
        assert_eq!(vms.phase("a"), Phase::Restarting);
        vms.until_phase("a", Phase::Running).await;
    });
}

/// The host was restarted: no process is left, and the boot id on record is that of another boot.
fn host_restarts(bed: &Bed) {
    bed.world.host_dies();
    for mut record in bed.store.vms() {
        if let Some(run) = &mut record.run {
            run.process.boot_id = "00000000-0000-0000-0000-000000000000".to_owned();
        }
        bed.store.put(record);
    }
}

#[test]
fn after_a_restart_of_the_host_all_that_ran_is_down() {
    for state in VmState::ALL {
        let bed = Bed::new();
        left_in(&bed, state);
        host_restarts(&bed);
        bed.life(async |vms| {
            let record = vms.record("a");
            let expected = if state.is_live() { VmState::Shutdown } else { state };
            assert_eq!(record.state, expected);
            if state.is_live() {
                assert_eq!(record.status.reason, "host-reboot");
                assert_eq!(vms.world.calls(Method::Adopt), 0, "no pid of another boot means anything");
            }
            assert_eq!(bed.stored("a"), *record, "the reason is on record too");
        });
        bed.life(async |vms| {
            if state.is_live() {
                assert_eq!(vms.reason("a"), "host-reboot", "and stays");
            }
            vms.boot("a").await.unwrap();
        });
    }
}

#[test]
fn a_restart_of_the_host_counts_as_a_failure() {
    for (mode, expected) in
        [(NEVER, VmState::Shutdown), (GUEST_REBOOT, VmState::Shutdown), (ON_FAILURE, VmState::Running)]
    {
        let bed = Bed::new();
        bed.life(async |vms| drop(vms.run("a", bed.with_policy(mode, 0)).await));
        host_restarts(&bed);
        bed.life(async |vms| {
            tokio::time::sleep(std::time::Duration::from_secs(5)).await;
            assert_eq!(vms.state("a"), expected, "mode {mode}");
        });
    }
}

#[test]
fn an_interrupted_boot_that_started_nothing_is_taken_back() {
    for state in [VmState::Created, VmState::Shutdown] {
        let bed = Bed::new();
        left_in(&bed, state);
        interrupt(&bed, Request::Boot, Phase::Starting);
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.reason.as_str()), (state, "boot-interrupted"));
            assert_eq!((&record.intent, vms.world.living()), (&None, 0));
            vms.boot("a").await.unwrap();
        });
    }
}

/// A boot whose daemon died after the launch and before the outcome was recorded.
fn boot_dies_after_launch(bed: &Bed) {
    bed.life(async |vms| {
        vms.create("a", bed.with_disk("d")).await;
        vms.create("b", bed.with_disk("d")).await;
        vms.world.next(Method::Launch, Act::do_then_hang());
        let task = vms
            .begin({
                let vms = vms.clone();
                async move { vms.boot("a").await }
            })
            .await;
        eventually("the launch", || vms.world.living() == 1).await;
        assert!(!task.is_finished());
    });
    assert_eq!(bed.stored("a").intent.unwrap().request, Request::Boot);
}

#[test]
fn an_interrupted_boot_whose_guest_runs_stands() {
    let bed = Bed::new();
    boot_dies_after_launch(&bed);
    bed.life(async |vms| {
        let record = vms.record("a");
        assert_eq!(
            (record.state, record.status.reason.as_str()),
            (VmState::Running, "operation-interrupted")
        );
        assert_eq!(record.run.as_ref().unwrap().process.pid, vms.machine("a").pid());
        let text = refused(vms.boot("b").await, "precondition");
        assert!(text.contains("VM \"a\""), "it holds its disk: {text}");
        vms.shutdown("a").await.unwrap();
        vms.boot("b").await.unwrap();
    });
}

#[test]
fn an_interrupted_boot_whose_guest_does_not_run_is_taken_back() {
    for guest in [GuestState::Paused, GuestState::Ended] {
        let bed = Bed::new();
        boot_dies_after_launch(&bed);
        bed.world.machine("a").unwrap().set_guest(guest);
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.reason.as_str()), (VmState::Created, "boot-interrupted"));
            assert_eq!(vms.world.living(), 0);
            vms.boot("b").await.expect("nothing is held");
        });
    }
}

#[test]
fn an_interrupted_boot_whose_vmm_is_silent_is_not_forgotten() {
    let bed = Bed::new();
    boot_dies_after_launch(&bed);
    bed.world.machine("a").unwrap().set_unprovable(true);
    for _ in 0..2 {
        bed.life(async |vms| {
            assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Created, Phase::Unreachable));
            refused(vms.boot("a").await, "unavailable");
            assert_eq!(vms.world.living(), 1, "touched by nobody");
        });
    }
    bed.world.machine("a").unwrap().set_unprovable(false);
    bed.life(async |vms| assert_eq!(vms.state("a"), VmState::Running));
}

#[test]
fn force_ends_what_an_interrupted_boot_has_left() {
    for deletes in [false, true] {
        let bed = Bed::new();
        boot_dies_after_launch(&bed);
        bed.world.machine("a").unwrap().set_unprovable(true);
        bed.life(async |vms| {
            if deletes {
                assert!(vms.force_delete("a").await.unwrap().left_behind.is_empty());
            } else {
                // A VM that never ran cannot be shut down; what its start has left is ended all the same.
                refused(vms.force_shutdown("a").await, "illegal-state");
                assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Created, Phase::Created));
                assert_eq!(bed.stored("a"), *vms.record("a"));
            }
            assert_eq!(vms.world.living(), 0);
            vms.boot("b").await.expect("nothing is held");
        });
    }
}

#[test]
fn an_interrupted_operation_leaves_the_vm_as_its_vmm_says() {
    let cases = [
        (VmState::Running, Request::Pause, Phase::Pausing),
        (VmState::Paused, Request::Resume, Phase::Resuming),
    ];
    for (state, request, phase) in cases {
        for guest in [GuestState::Running, GuestState::Paused] {
            let bed = Bed::new();
            left_in(&bed, state);
            bed.world.machine("a").unwrap().set_guest(guest);
            interrupt(&bed, request, phase);
            bed.life(async |vms| {
                let record = vms.record("a");
                let expected = if guest == GuestState::Paused { VmState::Paused } else { VmState::Running };
                assert_eq!((record.state, &record.intent), (expected, &None), "{request:?}");
                assert_eq!(record.status.reason, "operation-interrupted");
                assert!(record.status.message.contains(request.name()));
                vms.force_shutdown("a").await.unwrap();
            });
        }
    }
}

#[test]
fn an_interrupted_shutdown_is_carried_through() {
    for guest in [GuestState::Running, GuestState::Paused] {
        let bed = Bed::new();
        bed.life(async |vms| drop(vms.run("a", bed.with_policy(ALWAYS, 0)).await));
        bed.world.machine("a").unwrap().set_guest(guest);
        interrupt(&bed, Request::Shutdown, Phase::Stopping);
        bed.life(async |vms| {
            let record = vms.until_phase("a", Phase::Stopped).await;
            assert_eq!((record.state, record.status.reason.as_str()), (VmState::Shutdown, "shutdown"));
            assert_eq!((vms.world.living(), &record.intent), (0, &None));
        });
    }
}

#[test]
fn an_interrupted_reboot_is_carried_through() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    interrupt(&bed, Request::Reboot, Phase::Rebooting);
    let before = bed.stored("a").run;
    bed.life(async |vms| {
        let record = vms.until_phase("a", Phase::Running).await;
        assert_eq!((record.state, vms.world.living(), &record.intent), (VmState::Running, 1, &None));
        assert_ne!(record.run, before, "asked to end, and booted again");
    });
}

#[test]
fn an_interrupted_reboot_of_a_vm_that_stands_still_by_now_is_given_up() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    interrupt(&bed, Request::Reboot, Phase::Rebooting);
    bed.world.machine("a").unwrap().set_guest(GuestState::Paused);
    bed.life(async |vms| {
        let record = vms.until_phase("a", Phase::Paused).await;
        assert_eq!((record.status.reason.as_str(), &record.intent), ("operation-failed", &None));
        assert_eq!(bed.stored("a"), *record, "and not tried for ever");
    });
}

#[test]
fn force_comes_before_what_is_carried_through() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    bed.world.machine("a").unwrap().ignore_shutdown();
    interrupt(&bed, Request::Shutdown, Phase::Stopping);
    bed.life(async |vms| {
        vms.force_delete("a").await.unwrap();
        assert_eq!(vms.world.living(), 0);
    });
}

#[test]
fn an_interrupted_start_by_policy_is_made_again() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("a", bed.with_policy(ON_FAILURE, 0)).await;
        vms.world.next(Method::Launch, Act::hang());
        let before = vms.world.calls(Method::Launch);
        vms.machine("a").end(ExitCause::VmmFailed);
        eventually("the launch", || vms.world.calls(Method::Launch) > before).await;
    });
    bed.life(async |vms| {
        let record = vms.until_phase("a", Phase::Running).await;
        assert_eq!((record.state, record.status.restarts), (VmState::Running, 1), "and it counts");
    });
}

#[test]
fn an_interrupted_shutdown_that_came_about_is_never_undone() {
    for restarted in [false, true] {
        let bed = Bed::new();
        bed.life(async |vms| drop(vms.run("a", bed.with_policy(ALWAYS, 0)).await));
        interrupt(&bed, Request::Shutdown, Phase::Stopping);
        if restarted {
            host_restarts(&bed);
        }
        bed.world.host_dies();
        bed.life(async |vms| {
            let record = vms.record("a");
            assert_eq!((record.state, record.status.phase), (VmState::Shutdown, Phase::Stopped));
            assert_eq!(record.status.reason, "shutdown");
            tokio::time::sleep(std::time::Duration::from_secs(120)).await;
            assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 0));
        });
    }
}

#[test]
fn an_interrupted_reboot_goes_on_where_it_was() {
    // Dead after the first half; or after the second, whose machine is not the one on record.
    for second_half in [false, true] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        bed.life(async |vms| {
            vms.world.next(Method::Launch, if second_half { Act::do_then_hang() } else { Act::hang() });
            let before = vms.world.calls(Method::Launch);
            let _task = vms
                .begin({
                    let vms = vms.clone();
                    async move { vms.reboot("a").await }
                })
                .await;
            eventually("the launch", || vms.world.calls(Method::Launch) > before).await;
        });
        assert_eq!(bed.world.living(), usize::from(second_half));
        let started = bed.world.machine("a").map(|machine| machine.pid());
        bed.life(async |vms| {
            let record = vms.until_phase("a", Phase::Running).await;
            assert_eq!((record.state, vms.world.living(), &record.intent), (VmState::Running, 1, &None));
            assert!(started.is_none_or(|pid| vms.machine("a").pid() == pid), "the second half stands");
            vms.force_shutdown("a").await.unwrap();
            vms.boot("a").await.unwrap();
        });
    }
}

#[test]
fn an_interrupted_deletion_is_finished() {
    for (state, request) in [
        (VmState::Created, Request::Delete),
        (VmState::Shutdown, Request::Delete),
        (VmState::Running, Request::ForceDelete),
        (VmState::Paused, Request::ForceDelete),
    ] {
        let bed = Bed::new();
        left_in(&bed, state);
        let folder = bed.run_dir(&bed.stored("a"));
        interrupt(&bed, request, Phase::Deleting);
        bed.life(async |vms| {
            refused(vms.service.get("a").map(drop), "not-found");
            assert_eq!((vms.world.living(), bed.store.vms().len()), (0, 0), "{state:?}");
            assert!(!folder.exists());
            vms.create("a", bed.config()).await;
        });
    }
}

#[test]
fn a_silent_vmm_is_left_alone_until_it_answers() {
    let bed = Bed::new();
    left_in(&bed, VmState::Paused);
    bed.world.machine("a").unwrap().stop();
    bed.life(async |vms| {
        assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Paused, Phase::Unreachable));
        refused(vms.resume("a").await, "unavailable");
        assert_eq!(vms.world.living(), 1);
        vms.machine("a").go_on();
        vms.until_phase("a", Phase::Paused).await;
        vms.resume("a").await.unwrap();
    });
}

#[test]
fn a_vmm_that_cannot_be_proven_ours_is_looked_for_again() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    let machine = bed.world.machine("a").unwrap();
    machine.set_unprovable(true);
    bed.life(async |vms| {
        assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Running, "identity-not-proven"));
        let generation = vms.record("a").generation;
        tokio::time::sleep(std::time::Duration::from_secs(120)).await;
        assert_eq!(vms.record("a").generation, generation, "looking again writes nothing");
        refused(vms.shutdown("a").await, "unavailable");
        machine.set_unprovable(false);
        vms.until_phase("a", Phase::Running).await;
        vms.shutdown("a").await.unwrap();
    });
}

#[test]
fn a_lost_vmm_that_ends_is_down() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    let machine = bed.world.machine("a").unwrap();
    machine.set_unprovable(true);
    bed.life(async |vms| {
        assert_eq!(vms.phase("a"), Phase::Unreachable);
        machine.end(ExitCause::Unknown);
        vms.until("a", |record| record.state == VmState::Shutdown).await;
        vms.boot("a").await.unwrap();
    });
}

#[test]
fn force_ends_what_could_not_be_reached() {
    for deletes in [false, true] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        bed.world.machine("a").unwrap().set_unprovable(true);
        bed.life(async |vms| {
            if deletes {
                vms.force_delete("a").await.unwrap();
            } else {
                assert_eq!(vms.force_shutdown("a").await.unwrap().record.state, VmState::Shutdown);
            }
            assert_eq!(vms.world.living(), 0);
        });
    }
}

#[test]
fn force_that_fails_leaves_it_unreachable() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    let machine = bed.world.machine("a").unwrap();
    machine.set_unprovable(true);
    machine.set_unkillable(true);
    bed.life(async |vms| {
        refused(vms.force_shutdown("a").await, "unavailable");
        assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Unreachable));
        machine.set_unprovable(false);
        vms.until_phase("a", Phase::Running).await;
        assert_eq!(vms.force_delete("a").await.unwrap().left_behind.len(), 1);
    });
}

#[test]
fn force_that_was_cut_short_is_carried_on_though_the_vmm_is_silent() {
    for (patience_ms, ends) in [(Some(0), true), (Some(1000), false)] {
        let bed = Bed::new();
        left_in(&bed, VmState::Running);
        interrupt(&bed, Request::Shutdown, Phase::Stopping);
        let before = bed.stored("a");
        let intent = before.intent.clone().map(|intent| Intent { patience_ms, ..intent });
        bed.store.put(VmRecord { intent, generation: before.generation + 1, ..before });
        bed.world.machine("a").unwrap().stop();
        bed.life(async |vms| {
            if ends {
                vms.until("a", |record| record.state == VmState::Shutdown).await;
                assert_eq!(vms.world.living(), 0);
            } else {
                // Who asks gently does not kill what does not answer.
                assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Unreachable));
                assert_eq!(vms.world.living(), 1);
            }
            assert_eq!(vms.record("a").intent, None);
        });
    }
}

#[test]
fn an_adoption_that_hangs_or_fails_holds_up_nobody_else() {
    for act in [Act::hang(), Act::Fail(BackendErrorKind::Protocol, Effect::NotApplied)] {
        let bed = Bed::new();
        bed.life(async |vms| {
            vms.run("a", bed.config()).await;
            vms.run("b", bed.config()).await;
        });
        bed.world.next(Method::Adopt, act);
        bed.life(async |vms| {
            assert_eq!((vms.phase("a"), vms.phase("b")), (Phase::Unreachable, Phase::Running));
            assert_eq!(vms.state("a"), VmState::Running);
            vms.until_phase("a", Phase::Running).await;
        });
    }
}

#[test]
fn a_name_stays_idempotent_across_restarts() {
    let bed = Bed::new();
    left_in(&bed, VmState::Created);
    bed.life(async |vms| {
        let again = vms.create("a", bed.with_disk("d")).await;
        assert_eq!(*again, bed.stored("a"));
        refused(vms.try_create("a", bed.config()).await, "already-exists");
    });
}
