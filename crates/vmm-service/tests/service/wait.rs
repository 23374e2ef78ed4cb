//! WaitVm.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use vmm_core::state::VmState;

use crate::common::*;

#[tokio::test(start_paused = true)]
async fn a_wait_returns_at_the_wanted_state_or_reports_its_timeout() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("vm", bed.config()).await;
    let wait = |vms: Vms, vm_id: &'static str, states: &'static [VmState]| async move {
        vms.service.wait(vm_id, states, Duration::from_secs(60)).await.map(|record| record.state)
    };
    assert_eq!(wait(vms.clone(), "vm", &[VmState::Created]).await.unwrap(), VmState::Created, "at once");
    let waiting = vms.begin(wait(vms.clone(), "vm", &[VmState::Paused, VmState::Running])).await;
    vms.boot("vm").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), VmState::Running);
    let text = refused(wait(vms.clone(), "vm", &[VmState::Shutdown]).await, "deadline");
    assert!(text.contains("RUNNING") && text.contains("SHUTDOWN"), "{text}");
    let waiting = vms.begin(wait(vms.clone(), "vm", &[VmState::Paused])).await;
    vms.force_delete("vm").await.unwrap();
    vms.create("vm", bed.config()).await;
    refused(waiting.await.unwrap(), "not-found");
    refused(wait(vms.clone(), "unknown", &[VmState::Created]).await, "not-found");
    refused(wait(vms.clone(), "not/a name", &[VmState::Created]).await, "not-found");
    assert_eq!(violations(wait(vms.clone(), "vm", &[]).await)[0].0, "states");
    let guest_end = vms.begin(wait(vms.clone(), "vm", &[VmState::Shutdown])).await;
    vms.boot("vm").await.unwrap();
    vms.machine("vm").power_off();
    assert_eq!(guest_end.await.unwrap().unwrap(), VmState::Shutdown, "what nobody asked for is noticed too");
}

/// Counts how often a task is woken.
#[derive(Default)]
struct Wakings(AtomicUsize);

impl Wake for Wakings {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_wakes_only_the_waits_that_it_ends() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("vm", bed.config()).await;
    let wakings = Arc::new(Wakings::default());
    let waker = Waker::from(Arc::clone(&wakings));
    let mut context = Context::from_waker(&waker);
    let day = Duration::from_secs(86_400);
    let mut waiting = pin!(vms.service.wait("vm", &[VmState::Shutdown], day));
    assert!(waiting.as_mut().poll(&mut context).is_pending());
    vms.boot("vm").await.unwrap();
    vms.pause("vm").await.unwrap();
    vms.resume("vm").await.unwrap();
    assert_eq!(wakings.0.load(Ordering::Relaxed), 0, "no change so far was waited for");
    vms.force_shutdown("vm").await.unwrap();
    assert_eq!(wakings.0.load(Ordering::Relaxed), 1);
    let Poll::Ready(reached) = waiting.as_mut().poll(&mut context) else { panic!("the wait is over") };
    assert_eq!(reached.unwrap().state, VmState::Shutdown);
}
