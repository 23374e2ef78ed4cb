//! A daemon that ends and comes back: in every state, on a host that was restarted or not.

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause, GuestState};
use vmm_core::state::{Phase, VmState};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

use crate::common::*;

/// VM `a` in `state`, left by a daemon that ended between two operations.
pub(crate) fn left_in(bed: &Bed, state: VmState) {
    bed.life(async |vms| vms.bring_to("a", bed.with_disk("d"), state).await);
}

#[test]
fn every_state_is_adopted_and_usable() {
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
fn the_end_of_an_adopted_vm_is_observed() {
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
fn changes_without_a_daemon_are_observed_at_its_start() {
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
fn a_vm_that_ended_without_a_daemon_is_shut_down_with_its_reason() {
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
            assert_eq!((record.status.reason.as_str(), &record.run), (cause.reason().as_str(), &None));
            assert_eq!(bed.stored("a"), *record);
            vms.boot("a").await.expect("its disk is free");
        });
    }
}

#[test]
fn a_policy_restarts_a_vm_that_ended_without_a_daemon() {
    let bed = Bed::new();
    bed.life(async |vms| drop(vms.run("a", bed.with_policy(ON_FAILURE, 0)).await));
    bed.world.machine("a").unwrap().end(ExitCause::VmmFailed);
    bed.life(async |vms| {
        assert_eq!(vms.phase("a"), Phase::Restarting);
        vms.until_phase("a", Phase::Running).await;
    });
}

/// The host was restarted: no process is left, and the boot id on record is that of another boot.
pub(crate) fn host_restarts(bed: &Bed) {
    bed.world.host_dies();
    for mut record in bed.store.vms() {
        if let Some(run) = &mut record.run {
            run.process.boot_id = "00000000-0000-0000-0000-000000000000".to_owned();
        }
        bed.store.put(record);
    }
}

#[test]
fn running_vms_are_shut_down_after_a_restart_of_the_host() {
    for state in VmState::ALL {
        let bed = Bed::new();
        left_in(&bed, state);
        host_restarts(&bed);
        bed.life(async |vms| {
            let record = vms.record("a");
            let expected = if state.is_live() { VmState::Shutdown } else { state };
            assert_eq!(record.state, expected);
            if state.is_live() {
                assert_eq!(record.status.reason.as_str(), "host-reboot");
                assert_eq!(
                    vms.world.calls(ScriptedMethod::Adopt),
                    0,
                    "no pid of another boot means anything"
                );
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
fn a_silent_vmm_is_adopted_when_it_answers() {
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
fn the_search_for_an_unproven_vmm_is_repeated() {
    let bed = Bed::new();
    left_in(&bed, VmState::Running);
    let machine = bed.world.machine("a").unwrap();
    machine.set_unprovable(true);
    bed.life(async |vms| {
        assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Running, "identity-unproven"));
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
fn a_lost_vmm_that_ends_is_shut_down() {
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
fn force_ends_an_unreachable_vmm() {
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
fn failed_force_leaves_the_vm_unreachable() {
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
fn a_hanging_or_failed_adoption_delays_no_other_vm() {
    for act in [ScriptedResult::hang(), ScriptedResult::Fail(BackendErrorKind::Protocol, Effect::NotApplied)]
    {
        let bed = Bed::new();
        bed.life(async |vms| {
            vms.run("a", bed.config()).await;
            vms.run("b", bed.config()).await;
        });
        bed.world.next(ScriptedMethod::Adopt, act);
        bed.life(async |vms| {
            assert_eq!((vms.phase("a"), vms.phase("b")), (Phase::Unreachable, Phase::Running));
            assert_eq!(vms.state("a"), VmState::Running);
            vms.until_phase("a", Phase::Running).await;
        });
    }
}

#[test]
fn a_repeated_creation_is_recognised_after_a_restart() {
    let bed = Bed::new();
    left_in(&bed, VmState::Created);
    bed.life(async |vms| {
        let again = vms.create("a", bed.with_disk("d")).await;
        assert_eq!(*again, bed.stored("a"));
        refused(vms.try_create("a", bed.config()).await, "already-exists");
    });
}
