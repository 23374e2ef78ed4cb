//! WaitVm.

use std::time::Duration;

use vmm_core::state::VmState;

use crate::common::*;

#[tokio::test(start_paused = true)]
async fn a_wait_answers_when_the_state_is_reached_and_says_so_when_it_is_not() {
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
