//! The kind of a VM is on record for its life, whatever the configuration says later.

use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, BackendHealth, Capabilities, LaunchRequest, LaunchedVmm,
    SweepRequest,
};
use vmm_core::id::{BackendName, VmUid};
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::state::{Phase, VmState};
use vmm_core::store::{Commit, RecordChange, Store as _, VmRecord};
use vmm_service::{BackendFamily, Backends, DefaultBoot, Settings, VmService};
use vmm_testkit::fake::FakeBackend;

use crate::common::*;

/// The fake hypervisor as libvirt would run it: each VM is a domain at `uri`.
struct Domains {
    fake: FakeBackend,
    uri: &'static str,
    /// The most vCPUs that a configuration may have.
    max_vcpus: u32,
}

impl Domains {
    fn at(bed: &Bed, uri: &'static str) -> Arc<dyn Backend> {
        Arc::new(Self { fake: FakeBackend::in_world("fake", &bed.world), uri, max_vcpus: 8 })
    }
}

#[async_trait]
impl Backend for Domains {
    fn capabilities(&self) -> &Capabilities {
        self.fake.capabilities()
    }

    fn check(&self, spec: &VmSpec) -> CheckReport {
        let mut report = self.fake.check(spec);
        if spec.cpu.count > self.max_vcpus {
            report.reject("config.cpu.vcpu_count", "is too many for a domain");
        }
        report
    }

    async fn launch(&self, request: LaunchRequest) -> Result<LaunchedVmm, BackendError> {
        assert!(self.serves(&request.kind), "a VM of another kind is not launched here: {:?}", request.kind);
        self.fake.launch(request).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Adoption, BackendError> {
        assert!(self.serves(&request.kind), "a VM of another kind is not adopted here: {:?}", request.kind);
        self.fake.adopt(request).await
    }

    async fn sweep(&self, request: SweepRequest) -> Result<(), BackendError> {
        assert!(self.serves(&request.kind), "a VM of another kind is not swept here: {:?}", request.kind);
        self.fake.sweep(request).await
    }

    async fn ping(&self) -> BackendHealth {
        self.fake.ping().await
    }

    fn kind_of_new(&self, uid: VmUid) -> VmKind {
        VmKind::Libvirt { uri: self.uri.to_owned(), domain: *uid.as_uuid() }
    }

    fn serves(&self, kind: &VmKind) -> bool {
        matches!(kind, VmKind::Libvirt { uri, .. } if uri == self.uri)
    }
}

fn managed(bed: &Bed) -> Arc<dyn Backend> {
    Arc::new(FakeBackend::in_world("fake", &bed.world))
}

/// Runs one life of a daemon whose new VMs are `current`'s. It has a backend for every other kind, but for sockets.
fn life<T>(bed: &Bed, current: Arc<dyn Backend>, life: impl AsyncFnOnce(Vms) -> T) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let (own, domains) = (managed(bed), Domains::at(bed, "qemu:///system"));
    let family = BackendFamily::new(current, move |kind| match kind {
        VmKind::Managed => Ok(Arc::clone(&own)),
        VmKind::Libvirt { .. } => Ok(Arc::clone(&domains)),
        other => Err(format!("it lives at {other}, which UNKEY_VMCP_FAKE_ENDPOINT does not name")),
    });
    let settings = Settings {
        runtime_dir: bed.runtime_dir(),
        default_boot: DefaultBoot::default(),
        metrics_interval: METRICS_INTERVAL,
        console_history: 1 << 20,
        event_retention: RETENTION_LIMIT,
        spare_vmms: 0,
    };
    runtime.block_on(async {
        let backends = Backends::new(BackendName::new("fake"), [family]);
        let (store, taps) = (Arc::clone(&bed.store), Arc::new(bed.taps.clone()));
        let service = VmService::start_with_taps(store, backends, settings, taps).await.unwrap();
        life(Vms { service, world: bed.world.clone() }).await
    })
}

fn libvirt(uid: VmUid) -> VmKind {
    VmKind::Libvirt { uri: "qemu:///system".to_owned(), domain: *uid.as_uuid() }
}

#[test]
fn a_managed_vm_stays_managed_when_an_endpoint_is_set() {
    let bed = Bed::new();
    life(&bed, managed(&bed), async |vms| {
        vms.run("runs", bed.config()).await;
        vms.bring_to("stands", bed.config(), VmState::Shutdown).await;
        assert_eq!(vms.record("runs").kind, VmKind::Managed);
    });
    life(&bed, Domains::at(&bed, "qemu:///system"), async |vms| {
        assert_eq!((vms.state("runs"), vms.phase("runs")), (VmState::Running, Phase::Running));
        vms.pause("runs").await.unwrap();
        vms.force_shutdown("runs").await.unwrap();
        vms.boot("runs").await.unwrap();
        vms.boot("stands").await.unwrap();
        assert_eq!(vms.record("stands").kind, VmKind::Managed);
        let new = vms.create("new", bed.config()).await;
        assert_eq!(new.kind, libvirt(new.uid));
        vms.boot("new").await.unwrap();
        for name in ["runs", "stands", "new"] {
            vms.force_delete(name).await.unwrap();
        }
        assert_eq!(bed.world.living(), 0);
    });
}

#[test]
fn a_domain_stays_a_domain_when_the_endpoint_is_unset() {
    let bed = Bed::new();
    life(&bed, Domains::at(&bed, "qemu:///system"), async |vms| {
        vms.run("runs", bed.config()).await;
        vms.bring_to("stands", bed.config(), VmState::Shutdown).await;
    });
    // Unset, and set to another libvirtd.
    for current in [managed(&bed), Domains::at(&bed, "qemu:///session")] {
        life(&bed, current, async |vms| {
            let record = vms.record("runs");
            assert_eq!((record.state, record.status.phase), (VmState::Running, Phase::Running));
            assert_eq!(record.kind, libvirt(record.uid));
            vms.pause("runs").await.unwrap();
            vms.resume("runs").await.unwrap();
            vms.boot("stands").await.unwrap();
            vms.shutdown("stands").await.unwrap();
        });
    }
}

#[test]
fn the_configuration_is_checked_by_its_backend_at_each_boot() {
    let bed = Bed::new();
    let mut config = bed.config();
    config.cpu.as_mut().unwrap().vcpu_count = 9;
    life(&bed, managed(&bed), async |vms| {
        vms.create("many", config).await;
    });
    // The record says that it is a domain, and domains have at most eight.
    let stored = bed.stored("many");
    rewrite(&bed, VmRecord { kind: libvirt(stored.uid), ..stored });
    life(&bed, managed(&bed), async |vms| {
        let why = refused(vms.boot("many").await, "precondition");
        assert!(why.contains("config.cpu.vcpu_count") && why.contains("too many for a domain"), "{why}");
        assert_eq!(vms.state("many"), VmState::Created);
        vms.delete("many").await.unwrap();
    });
}

/// Replaces the record of a VM, as another release would have written it.
fn rewrite(bed: &Bed, record: VmRecord) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let record = VmRecord { generation: record.generation + 1, ..record };
    let commit = Commit { change: RecordChange::Update(Box::new(record)), event: None };
    runtime.block_on(bed.store.commit(commit)).unwrap();
}

fn unrecorded(bed: &Bed, vm_id: &str) {
    rewrite(bed, VmRecord { kind: VmKind::default(), ..bed.stored(vm_id) });
}

#[test]
fn a_record_without_a_kind_is_given_the_kind_of_the_configured_endpoint() {
    let bed = Bed::new();
    life(&bed, Domains::at(&bed, "qemu:///system"), async |vms| {
        vms.create("defined", bed.config()).await;
    });
    unrecorded(&bed, "defined");
    life(&bed, Domains::at(&bed, "qemu:///system"), async |_vms| {});
    let stored = bed.stored("defined");
    assert_eq!(stored.kind, libvirt(stored.uid), "the kind is written before any change");
    life(&bed, managed(&bed), async |vms| {
        vms.boot("defined").await.unwrap();
        assert_eq!(vms.record("defined").kind, libvirt(stored.uid));
    });
}

#[test]
fn an_unserved_kind_names_the_setting() {
    let bed = Bed::new();
    life(&bed, managed(&bed), async |vms| {
        vms.run("runs", bed.config()).await;
    });
    let living = bed.world.living();
    let imported = VmKind::Unrecorded { domain: Some(Uuid::from_u128(5)) };
    rewrite(&bed, VmRecord { kind: imported, imported: true, ..bed.stored("runs") });
    life(&bed, managed(&bed), async |vms| {
        let record = vms.record("runs");
        assert_eq!((record.state, record.status.phase), (VmState::Running, Phase::Unreachable));
        assert_eq!(record.status.reason.as_str(), "endpoint-not-configured");
        assert!(record.status.message.contains("UNKEY_VMCP_FAKE_ENDPOINT"), "{}", record.status.message);
        refused(vms.pause("runs").await, "unavailable");
        let deleted = vms.force_delete("runs").await.unwrap();
        assert!(deleted.left_behind[0].message.contains("UNKEY_VMCP_FAKE_ENDPOINT"));
        assert_eq!(bed.world.living(), living, "nothing was touched");
    });
}
