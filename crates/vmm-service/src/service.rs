//! The use cases, one method each.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tracing::Instrument as _;
use uuid::Uuid;
use vmm_core::event::EventSeq;
use vmm_core::id::{VmId, VmUid};
use vmm_core::idempotency::KeyedCall;
use vmm_core::report::CheckReport;
use vmm_core::spec::VmSpec;
use vmm_core::state::VmState;
use vmm_core::store::{Snapshot, Store, VmRecord, VmRequest};
use vmm_host::net::tap::{HostTaps, Taps};

use crate::actor::{self, ActorOrigin, KnownTaps, NewActor, RecoveryOccasion};
use crate::backends::{BackendStatus, Backends};
use crate::check::FileChecks;
use crate::claims::Claims;
use crate::console::{self, ConsoleFiles, ConsoleQuery, ConsoleStream};
use crate::create::{self, CreateRequest, Created};
use crate::error::ServiceError;
use crate::events::{self, Events, EventsPage, EventsQuery, Watch, WatchQuery};
use crate::failure::Failure;
use crate::index::VmView;
use crate::keys::KeysInProgress;
use crate::kinds;
use crate::listing::{self, ListQuery, VmPage};
use crate::names::NameLocks;
use crate::operation_count::OperationCounter;
use crate::operation_log::Beginnings;
use crate::panics::report_panic;
use crate::places;
use crate::run_folders::UsedRunFolders;
use crate::settings::Settings;
use crate::shared::Shared;
use crate::spares::{self, SpareManager};
use crate::tombstones;
use crate::validate;
use crate::wait;

/// The time between two health checks of the backends.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// The number of VMs that are recovered at the same time when the daemon starts. Each recovery has
/// a deadline of a few seconds, which 1,000 recoveries on two cores would miss together.
pub(crate) const RECOVERIES: usize = 64;
/// The number of VMs that their restart policies start at the same time. After a reboot of the host
/// all restarts are due together.
pub(crate) const POLICY_STARTS: usize = 16;

/// The time that the start of the daemon waits for the import of VMs of other programs. Their files
/// may lie on a server that does not answer.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(20);

/// The service. It is cheap to clone.
#[derive(Clone)]
pub struct VmService {
    pub(crate) shared: Arc<Shared>,
}

impl VmService {
    /// Recovers every VM of `store`: finds the VMMs that outlived the last daemon, and determines
    /// the state of each VM. Returns when the states are known. The deadlines of the backends limit
    /// this time.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read.
    pub async fn start(
        store: Arc<dyn Store>,
        backends: Backends,
        settings: Settings,
    ) -> Result<Self, ServiceError> {
        Self::start_with_taps(store, backends, settings, Arc::new(HostTaps)).await
    }

    /// Starts the service with other TAPs than the host's, because those require privileges.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read.
    pub async fn start_with_taps(
        store: Arc<dyn Store>,
        backends: Backends,
        settings: Settings,
        taps: Arc<dyn Taps>,
    ) -> Result<Self, ServiceError> {
        let Snapshot { instance, vms, unreadable, last_event, tombstones } = store.load().await?;
        let vms_on_record = vms.len() + unreadable.len();
        let events = Arc::new(Events::new(store, instance, last_event, settings.event_retention));
        tokio::spawn(events::expire_for_ever(Arc::downgrade(&events)));
        // A TAP with the label of a VM that does not own it was made by a start that died.
        let mut known_taps = KnownTaps::default();
        vms.iter().for_each(|vm| known_taps.add(vm));
        unreadable.iter().for_each(|vm| known_taps.add_unknown(vm.record.uid));
        actor::remove_orphans(&*taps, instance, &known_taps).await;
        let spares = SpareManager::new(settings.spare_vmms);
        let shared = Arc::new(Shared {
            events,
            backends,
            settings,
            taps,
            instance,
            index: Arc::default(),
            claims: Claims::default(),
            names: NameLocks::default(),
            file_checks: FileChecks::default(),
            spares,
            places: tokio::sync::Mutex::default(),
            recoveries: Arc::new(Semaphore::new(RECOVERIES)),
            policy_starts: Arc::new(Semaphore::new(POLICY_STARTS)),
            under_way: OperationCounter::default(),
            consoles: ConsoleFiles::default(),
            beginnings: Beginnings::default(),
            keys: KeysInProgress::default(),
        });
        vms.iter().for_each(|vm| shared.keys.note_interrupted(vm));
        // The backends are asked before any VM is recovered, so that the first clients see a known
        // health.
        shared.backends.refresh().await;
        ping_for_ever(shared.backends.clone());
        let on_record = vms.iter().map(|vm| vm.uid).chain(unreadable.iter().map(|vm| vm.record.uid));
        spares::clear(&shared, on_record.collect()).await;
        // The tombstones come before any VM is recovered, so that no VM starts on a resource that a
        // process of a deleted VM may use.
        for tombstone in tombstones {
            tombstones::hold_claims(&shared, tombstone);
        }
        // One walk over the processes of the host serves all recoveries, because a walk for each VM
        // would cost the square of their number.
        let in_use = UsedRunFolders::in_use(&shared.settings.runtime_dir).await;
        // These VMs come before the others, because an operation of the others that is finished
        // must find the disks of these VMs claimed.
        let left_alone = unreadable.into_iter().map(|vm| quarantine_vm(&shared, *vm.record, vm.why));
        futures::future::join_all(left_alone.collect::<Vec<_>>()).await;
        let vms = kinds::record_kinds(&shared, vms).await;
        let recoveries = vms.into_iter().map(|record| restore_vm(&shared, record, &in_use));
        futures::future::join_all(recoveries.collect::<Vec<_>>()).await;
        // The search for VMs of other programs comes last, because a VM that is found belongs to a
        // VM on record if its place does. It goes on in its task after the deadline.
        let discovering = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move { places::discover_all(&shared).await }
        });
        if tokio::time::timeout(DISCOVERY_TIMEOUT, discovering).await.is_err() {
            tracing::warn!(
                "the search for VMs of other programs takes long; it goes on, and each VM appears when it is found"
            );
        }
        shared.beginnings.end(vms_on_record);
        Ok(Self { shared })
    }

    /// Creates a VM. The creation runs to its end even if the caller goes away.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Invalid`] with every violation, [`ServiceError::AlreadyExists`], or
    /// the store's failure.
    pub async fn create(&self, request: CreateRequest) -> Result<Created, ServiceError> {
        self.create_once(request, None).await
    }

    /// Creates a VM, and keeps the answer for the call `key`.
    pub(crate) async fn create_once(
        &self,
        request: CreateRequest,
        key: Option<KeyedCall>,
    ) -> Result<Created, ServiceError> {
        let shared = Arc::clone(&self.shared);
        let counted = shared.under_way.begin();
        let (reply, answer) = oneshot::channel();
        let creating = async move {
            let _counted = counted;
            let created = create::create(&shared, request, key).await;
            // The server logs the failure of a call whose client waits. Nobody reads this one.
            if let Err(Err(error)) = reply.send(created) {
                create::log_unread_failure(&error);
            }
        };
        tokio::spawn(creating.in_current_span());
        // The sender is dropped without an answer only by a panic.
        answer.await.map_err(|_| Failure::CreationEndedAbnormally)?
    }

    /// Runs CreateVm's checks and touches nothing.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Unavailable`] if there is no other violation and the host's files do
    /// not answer.
    pub async fn validate(&self, requested: &VmRequest) -> Result<CheckReport, ServiceError> {
        let checked = validate::check_config(&self.shared, VmUid::new(Uuid::now_v7()), requested).await?;
        Ok(checked.report)
    }

    /// Finds a VM. Never waits for a VMM.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::NotFound`] if no VM has the name.
    pub fn get(&self, vm_id: &str) -> Result<VmView, ServiceError> {
        vm_id
            .parse::<VmId>()
            .ok()
            .and_then(|id| self.shared.index.get(&id))
            .ok_or_else(|| ServiceError::not_found(vm_id))
    }

    /// Returns the kernel command line with which the guest of a VM boots, as its hypervisor is
    /// given it. The line is empty if the VM has none, or if this program does not understand the
    /// record. Never waits for a VMM.
    pub fn kernel_args(&self, record: &VmRecord) -> String {
        if record.imported {
            // The VMM itself has told this line.
            return record.config.boot.as_ref().map(|boot| boot.kernel_args.clone()).unwrap_or_default();
        }
        let backend = self.shared.backends.of_kind(record.backend.as_str(), &record.kind);
        match (backend, VmSpec::parse(&record.config)) {
            (Ok(backend), Ok(spec)) => backend.kernel_args(&spec),
            (_, _) => String::new(),
        }
    }

    /// Lists VMs, oldest first. Never waits for a VMM.
    ///
    /// # Errors
    ///
    /// Returns an error if the page token or size is not valid.
    pub fn list(&self, query: &ListQuery) -> Result<VmPage, ServiceError> {
        listing::list(&self.shared.index, query)
    }

    /// Returns the VMs that are RUNNING or PAUSED, oldest first, each with its last sample. Never
    /// waits for a VMM.
    pub fn live(&self) -> Vec<VmView> {
        listing::live(&self.shared.index)
    }

    /// Watches the changes of VMs.
    ///
    /// # Errors
    ///
    /// Returns an error if the token is malformed ([`ServiceError::Invalid`]) or too old
    /// ([`ServiceError::OutOfRange`]), or the store fails.
    pub async fn watch(&self, query: WatchQuery) -> Result<Watch, ServiceError> {
        Watch::start(Arc::clone(&self.shared.events), Arc::clone(&self.shared.index), query).await
    }

    /// Lists the events of VMs, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the page token or size is not valid, or the store fails.
    pub async fn list_events(&self, query: &EventsQuery) -> Result<EventsPage, ServiceError> {
        self.shared.events.list(query).await
    }

    /// Streams the console of a VM. Never waits for a VMM.
    ///
    /// # Errors
    ///
    /// Returns an error if no console is kept, it cannot be read, or the offset is past its end.
    pub async fn stream_console(&self, query: ConsoleQuery) -> Result<ConsoleStream, ServiceError> {
        ConsoleStream::start(Arc::clone(&self.shared), query).await
    }

    /// Writes into the console of a VM, beside the operations on it.
    ///
    /// # Errors
    ///
    /// Returns an error if the VM does not run, takes no input, or its guest does not read.
    pub async fn write_console(&self, vm_id: &str, data: &[u8]) -> Result<(), ServiceError> {
        console::write(&self.shared, vm_id, data).await.map(drop)
    }

    /// Waits until a VM is in one of `states`.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Deadline`] with the VM's state after `timeout`, and
    /// [`ServiceError::NotFound`] also if the VM is deleted meanwhile.
    pub async fn wait(
        &self,
        vm_id: &str,
        states: &[VmState],
        timeout: Duration,
    ) -> Result<Arc<VmRecord>, ServiceError> {
        wait::wait(&self.shared.index, vm_id, states, timeout).await
    }

    /// Returns the backends and their health.
    pub fn backends(&self) -> &Backends {
        &self.shared.backends
    }

    /// Returns the health of the default backend, or `None` if this program has no such backend.
    pub fn default_backend(&self) -> Option<BackendStatus> {
        self.shared.backends.status(self.shared.backends.default_name())
    }

    /// Ends the spare VMMs, and waits until no operation is in progress, for at most `timeout`.
    /// Returns the number of operations that are left.
    pub async fn drain(&self, timeout: Duration) -> usize {
        self.shared.under_way.drain(self.shared.spares.stop(&self.shared), timeout).await
    }
}

/// Starts a task that asks each backend for its health at each [`PING_INTERVAL`].
fn ping_for_ever(backends: Backends) {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(PING_INTERVAL).await;
            report_panic("the health of the backends", backends.refresh()).await;
        }
    });
}

/// Puts a stored VM into the index and starts its actor. The future ends when the recovery of the
/// VM has a result.
fn restore_vm(
    shared: &Arc<Shared>,
    record: VmRecord,
    in_use: &UsedRunFolders,
) -> impl Future<Output = ()> + use<> {
    let spec =
        if record.imported { Ok(VmSpec::imported(&record.config)) } else { VmSpec::parse(&record.config) };
    let backend = shared.backends.of_kind(record.backend.as_str(), &record.kind);
    let (known, why) = match (spec, backend) {
        (Ok(_), Ok(backend)) => {
            let in_use = in_use.contains(record.uid);
            return start_actor(NewActor {
                shared: Arc::clone(shared),
                record: Arc::new(record),
                backend,
                committed: EventSeq::default(),
                origin: ActorOrigin::Recovered { in_use, occasion: RecoveryOccasion::DaemonStart },
            });
        }
        (Err(report), Ok(backend)) => {
            let violations = ServiceError::Invalid(report.into_violations());
            (Some(backend), format!("the configuration of the VM is not understood: {violations}"))
        }
        (Ok(_) | Err(_), Err(problem)) => (None, problem),
    };
    tracing::error!(vm_id = %record.vm_id, uid = %record.uid, detail = why, "the configuration or backend of a VM on record is not known to this program; the VM is left as it is");
    start_actor(NewActor::quarantined(Arc::clone(shared), record, known, why))
}

/// Shows a VM whose record cannot be read as a whole. The future ends when that is done.
fn quarantine_vm(shared: &Arc<Shared>, record: VmRecord, why: String) -> impl Future<Output = ()> + use<> {
    tracing::error!(vm_id = %record.vm_id, uid = %record.uid, detail = why, "the record of a VM cannot be read by this program; the VM is left as it is");
    let known = shared.backends.of_kind(record.backend.as_str(), &kinds::kind_of(shared, &record)).ok();
    start_actor(NewActor::quarantined(Arc::clone(shared), record, known, why))
}

/// Starts an actor. The future ends when the recovery of its VM has a result.
fn start_actor(actor: NewActor) -> impl Future<Output = ()> + use<> {
    let known = actor.start();
    async move {
        let _ = known.await;
    }
}
