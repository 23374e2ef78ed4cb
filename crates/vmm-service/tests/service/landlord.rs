//! A backend whose VMs have places, and which finds what a test tells it.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::sync::mpsc;
use uuid::Uuid;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, LaunchRequest, LaunchedVmm,
    SweepRequest,
};
use vmm_core::config::VmConfig;
use vmm_core::discovery::{DiscoveredVm, Discoverer, Discovery, DiscoveryEvent, Places};
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::run_permit::RunPermit;
use vmm_core::spec::VmSpec;
use vmm_core::state::VmState;
use vmm_testkit::fake::FakeBackend;

use crate::common::*;

/// The fake hypervisor, whose VMs have places, and which finds what a test tells it.
struct Landlord {
    fake: FakeBackend,
    places: Places,
    present: Mutex<Vec<DiscoveredVm>>,
    later: Mutex<Option<mpsc::Receiver<DiscoveryEvent>>>,
    /// The VM that is found while the next VM is being checked.
    while_checking: Arc<Mutex<Option<DiscoveryEvent>>>,
    /// Called at each question for the capabilities.
    on_capabilities: OnCapabilities,
    tell: mpsc::Sender<DiscoveryEvent>,
}

pub(crate) type OnCapabilities = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

/// Points at which a test intervenes.
#[derive(Default)]
pub(crate) struct Hooks {
    pub(crate) while_checking: Arc<Mutex<Option<DiscoveryEvent>>>,
    pub(crate) on_capabilities: OnCapabilities,
}

#[async_trait]
impl Backend for Landlord {
    fn capabilities(&self) -> &Capabilities {
        if let Some(hook) = &*self.on_capabilities.lock().unwrap() {
            hook();
        }
        self.fake.capabilities()
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        if let Some(finding) = self.while_checking.lock().unwrap().take() {
            self.tell.try_send(finding).unwrap();
        }
        self.fake.check(spec)
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        self.fake.launch(request).await
    }

    /// Adopts the VM itself. Without a run on record and without such a VM, adopts what runs at the
    /// place, as a backend does that finds a VM by its socket.
    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        let adopted = self.fake.adopt(request.clone()).await?;
        let owner = self.fake.world().living_uids().first().copied();
        match (adopted, owner) {
            (Adoption::Gone { .. }, Some(uid)) if request.run.is_none() => {
                self.fake.adopt(AdoptRequest { uid, ..request }).await
            }
            (adopted, _) => Ok(adopted),
        }
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        self.fake.sweep(request).await
    }

    async fn ping(&self) -> BackendHealth {
        self.fake.ping().await
    }

    fn places(&self) -> Places {
        self.places.clone()
    }

    fn discovery(&self) -> Option<&dyn Discoverer> {
        Some(self)
    }
}

#[async_trait]
impl Discoverer for Landlord {
    async fn discover(&self) -> Discovery {
        let later = self.later.lock().unwrap().take().unwrap();
        Discovery { present: std::mem::take(&mut *self.present.lock().unwrap()), later }
    }
}

/// A service whose only backend is a [`Landlord`], and the way to tell it of findings.
pub(crate) async fn start(
    bed: &Bed,
    places: Places,
    present: Vec<DiscoveredVm>,
) -> (Vms, mpsc::Sender<DiscoveryEvent>) {
    start_with(bed, places, present, Hooks::default()).await
}

/// Starts like [`start`], and finds what is put into `while_checking` during the next check of a configuration.
pub(crate) async fn start_finding(
    bed: &Bed,
    places: Places,
    present: Vec<DiscoveredVm>,
    while_checking: Arc<Mutex<Option<DiscoveryEvent>>>,
) -> (Vms, mpsc::Sender<DiscoveryEvent>) {
    start_with(bed, places, present, Hooks { while_checking, ..Hooks::default() }).await
}

pub(crate) async fn start_with(
    bed: &Bed,
    places: Places,
    present: Vec<DiscoveredVm>,
    hooks: Hooks,
) -> (Vms, mpsc::Sender<DiscoveryEvent>) {
    let (tell, later) = mpsc::channel(8);
    let landlord = Landlord {
        fake: FakeBackend::in_world("fake", &bed.world),
        places,
        present: Mutex::new(present),
        later: Mutex::new(Some(later)),
        while_checking: hooks.while_checking,
        on_capabilities: hooks.on_capabilities,
        tell: tell.clone(),
    };
    (bed.start_with(landlord).await, tell)
}

pub(crate) fn fixed(places: &[&str]) -> Places {
    let places = places.iter().map(|place| VmKind::attached(*place)).collect();
    Places::Fixed { places, setting: "UNKEY_VMCP_FAKE_ENDPOINT" }
}

/// A VM that somebody else has made at `place`; it runs, unless it is `CREATED`.
pub(crate) async fn found(bed: &Bed, place: &str, names: &[&str], state: VmState) -> DiscoveredVm {
    let config = bed.config();
    let launched = match state {
        VmState::Created | VmState::Shutdown => None,
        VmState::Running | VmState::Paused => Some(foreign(bed, &config).await),
    };
    DiscoveredVm {
        place: VmKind::attached(place),
        uid: None,
        names: names.iter().map(|name| name.parse().unwrap()).collect(),
        config,
        unrepresented: Vec::new(),
        state,
        launched,
    }
}

pub(crate) async fn foreign(bed: &Bed, config: &VmConfig) -> LaunchedVmm {
    let request = LaunchRequest {
        instance: InstanceId::new(Uuid::nil()),
        uid: VmUid::new(Uuid::now_v7()),
        vm_id: "foreign".parse().unwrap(),
        spec: VmSpec::parse(config).unwrap(),
        dir: bed.path("foreign").into(),
        console: None,
        permit: RunPermit::granted(),
        taps: Vec::new(),
        kind: VmKind::Managed,
        imported: false,
        incomplete: None,
    };
    FakeBackend::in_world("fake", &bed.world).launch(request).await.unwrap()
}
