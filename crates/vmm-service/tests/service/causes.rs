//! The causes of the events that searches for a VMM record.

use vmm_core::backend::ExitCause;
use vmm_core::cause::Cause;
use vmm_core::event::EventKind;
use vmm_core::state::{Phase, VmState};

use crate::common::*;

/// Returns the kind and the cause of the last event.
pub(crate) fn last_change(bed: &Bed) -> (EventKind, Cause) {
    let event = bed.store.log().pop().unwrap().event;
    (event.kind, event.cause)
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_vmm_after_a_failed_shutdown_is_not_caused_by_a_start_of_the_daemon() {
    // A VMM whose handle is held reports its end. A lost VMM is searched for.
    for lost in [false, true] {
        let bed = Bed::new();
        let vms = bed.start().await;
        let machine = vms.run("a", bed.with_policy(ALWAYS, 0)).await;
        machine.set_unkillable(true);
        if lost {
            machine.set_unprovable(true);
        }
        refused(vms.force_shutdown("a").await, "unavailable");
        machine.set_unkillable(false);
        machine.set_unprovable(false);
        machine.end(ExitCause::Unknown);
        let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
        assert_eq!(record.status.reason.as_str(), "shutdown");
        assert_eq!(last_change(&bed), (EventKind::StateChanged, Cause::VmmExited), "lost: {lost}");
    }
}

#[test]
fn a_silent_vmm_that_is_found_later_is_not_adopted_by_the_start_of_the_daemon() {
    for ends in [false, true] {
        let bed = Bed::new();
        bed.life(async |vms| drop(vms.run("a", bed.config()).await));
        let machine = bed.world.machine("a").unwrap();
        machine.set_unprovable(true);
        bed.life(async |vms| {
            assert_eq!(last_change(&bed), (EventKind::Unreachable, Cause::DaemonStarted));
            machine.set_unprovable(false);
            if ends {
                machine.end(ExitCause::Unknown);
            }
            vms.until("a", |record| record.status.phase != Phase::Unreachable).await;
            let expected = if ends {
                (EventKind::VmmExited, Cause::VmmExited)
            } else {
                (EventKind::Adopted, Cause::ReachableAgain)
            };
            assert_eq!(last_change(&bed), expected);
        });
    }
}
