//! Many VMs at once on a host of two processors: no deadline is lost, because only so many are
//! recovered or started at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, LaunchRequest, LaunchedVmm,
    SweepRequest,
};
use vmm_core::event::EventKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::state::{Phase, VmState};
use vmm_testkit::fake::FakeBackend;

use crate::common::*;
use crate::recover::host_restarts;

/// The processor time of an adoption, and of a start.
const ADOPTION_DELAY: Duration = Duration::from_millis(50);
const START_DELAY: Duration = Duration::from_secs(2);

/// The fake hypervisor on two processors, which adoptions and starts wait for.
struct Narrow {
    fake: FakeBackend,
    processors: Semaphore,
    starting: AtomicUsize,
    most_starting: Arc<AtomicUsize>,
}

impl Narrow {
    async fn work(&self, time: Duration) {
        let _processor = self.processors.acquire().await.unwrap();
        tokio::time::sleep(time).await;
    }
}

#[async_trait]
impl Backend for Narrow {
    fn capabilities(&self) -> &Capabilities {
        self.fake.capabilities()
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        self.fake.check(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        let starting = self.starting.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_starting.fetch_max(starting, Ordering::Relaxed);
        self.work(START_DELAY).await;
        self.starting.fetch_sub(1, Ordering::Relaxed);
        self.fake.launch(request).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        self.work(ADOPTION_DELAY).await;
        self.fake.adopt(request).await
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.fake.sweep(request).await
    }

    async fn ping(&self) -> BackendHealth {
        self.fake.ping().await
    }
}

/// A daemon on two processors, and the most starts that it had under way at once.
async fn start_narrow(bed: &Bed) -> (Vms, Arc<AtomicUsize>) {
    let most_starting = Arc::new(AtomicUsize::new(0));
    let narrow = Narrow {
        fake: FakeBackend::in_world("fake", &bed.world),
        processors: Semaphore::new(2),
        starting: AtomicUsize::new(0),
        most_starting: Arc::clone(&most_starting),
    };
    (bed.start_with(narrow).await, most_starting)
}

#[test]
fn a_thousand_vms_are_adopted_and_none_is_reported_unreachable() {
    const VMS: usize = 1000;
    let bed = Bed::new();
    bed.life(async |vms| {
        for number in 0..VMS {
            vms.run(&format!("vm-{number}"), bed.config()).await;
        }
    });
    let before = bed.store.log().len();
    on_a_paused_clock(async {
        let (vms, _) = start_narrow(&bed).await;
        for vm in bed.store.vms() {
            assert_eq!(vms.phase(vm.vm_id.as_str()), Phase::Running);
        }
    });
    let reported: Vec<_> = bed.store.log().split_off(before);
    assert!(reported.iter().all(|it| it.event.kind == EventKind::Adopted), "every one of them was adopted");
    assert_eq!(reported.len(), VMS);
}

#[test]
fn restart_policies_start_vms_in_groups_after_a_reboot_of_the_host() {
    const VMS: usize = 200;
    let bed = Bed::new();
    bed.life(async |vms| {
        for number in 0..VMS {
            vms.run(&format!("vm-{number}"), bed.with_policy(ALWAYS, 5)).await;
        }
    });
    host_restarts(&bed);
    on_a_paused_clock(async {
        let (vms, most_starting) = start_narrow(&bed).await;
        // One of them waits for its turn; a client's call does not.
        vms.delete("vm-199").await.expect("a VM that awaits its restart can be deleted");
        for number in 0..VMS - 1 {
            let vm = vms.until_phase(&format!("vm-{number}"), Phase::Running).await;
            assert_eq!((vm.state, vm.status.restarts), (VmState::Running, 1), "its first start succeeded");
        }
        let most = most_starting.load(Ordering::Relaxed);
        assert!(most < VMS / 4, "{most} were being started at once");
    });
    let failed =
        bed.store.log().into_iter().filter(|it| it.event.status.reason.as_str() == "boot-failed").count();
    assert_eq!(failed, 0);
}
