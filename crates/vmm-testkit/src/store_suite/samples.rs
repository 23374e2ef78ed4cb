//! Records, commits and queries from which the cases of the suite are made.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmm_core::backend::Effect;
use vmm_core::caller::Caller;
use vmm_core::cause::Cause;
use vmm_core::config::{BootConfig, CpuConfig, MemoryConfig, StorageDevice, VmConfig};
use vmm_core::event::{EventKind, EventSeq, NewEvent, VmEvent, VmSummary};
use vmm_core::id::{BackendName, VmId, VmUid};
use vmm_core::idempotency::{CallAnswer, KeptAnswer, KeyedCall, VmAnswer};
use vmm_core::kind::VmKind;
use vmm_core::state::{EndedBy, Phase, Status, VmState};
use vmm_core::store::{
    Commit, DiskKey, EventQuery, HostClaim, Intent, IntentKind, Namespaces, PackedVmRequest, PendingProcess,
    PendingWork, ProcessIdentity, ProcessScope, RecordChange, RunRecord, Snapshot, Store, StoreError,
    StoreErrorKind, VmRecord, VmRequest,
};

/// Returns the record of a new VM called `name`, with a value in every field.
pub fn record(name: &str) -> VmRecord {
    let uid = VmUid::new(Uuid::now_v7());
    let config = VmConfig {
        cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
        memory: Some(MemoryConfig { size_bytes: 512 << 20, ..MemoryConfig::default() }),
        boot: Some(BootConfig {
            kernel_path: "/boot/vmlinux".to_owned(),
            kernel_args: "console=ttyS0 note=\"ü\\\"".to_owned(),
            ..BootConfig::default()
        }),
        storage: vec![StorageDevice { id: "disk0".to_owned(), ..StorageDevice::default() }],
        metadata: [("team".to_owned(), "a'b\n\u{0}".to_owned())].into(),
        ..VmConfig::default()
    };
    VmRecord {
        uid,
        vm_id: id(name),
        backend: BackendName::new("fake"),
        requested: PackedVmRequest::pack(&VmRequest { backend: String::new(), config: config.clone() }),
        config,
        state: VmState::Created,
        status: Status::plain(Phase::Created, 1),
        generation: 1,
        created_ms: 1_700_000_000_000,
        modified_ms: 1_700_000_000_000,
        intent: Some(Intent {
            kind: IntentKind::Reboot {
                guest_timeout: Some(Duration::from_millis(1)),
                claims: vec![HostClaim::Tap { name: "tap1".to_owned() }],
            },
            caller: Caller::anonymous(Some("10.0.0.1".to_owned())),
            since_ms: -1,
            scope: Some(ProcessScope {
                boot_id: "boot".to_owned(),
                namespaces: Namespaces { pid: u64::MAX, time: 0 },
            }),
        }),
        run: Some(RunRecord {
            process: ProcessIdentity {
                pid: 4711,
                start_ticks: u64::MAX,
                boot_id: "b-1".to_owned(),
                namespaces: Some(Namespaces { pid: 4, time: 5 }),
            },
            socket: "/run/x.sock".into(),
            version: "1.2.3".to_owned(),
            accelerator: "kvm".to_owned(),
            machine: "q35".to_owned(),
            started_ms: 3,
            taps: vec!["vnet0".to_owned()],
            claims: vec![
                HostClaim::Disk {
                    device: 1,
                    inode: 2,
                    writable: true,
                    path: "/d".into(),
                    lies_on: vec![DiskKey { device: 3, inode: 4 }],
                },
                HostClaim::Tap { name: "tap0".to_owned() },
            ],
        }),
        owns_console_output: true,
        ended_by: Some(EndedBy::CtrlAltDel),
        kind: VmKind::attached("/run/ch.sock"),
        imported: true,
        unrepresented: vec!["a vsock device".to_owned()],
        pending: Some(PendingWork { restart: true, process: PendingProcess::OutOfReach }),
        keyed: Some(Box::new(keyed_call("sample"))),
    }
}

/// Returns `record` with its next change.
pub fn next(record: &VmRecord) -> VmRecord {
    VmRecord { generation: record.generation + 1, modified_ms: record.modified_ms + 1, ..record.clone() }
}

/// Returns an event of `record` at `time_ms`.
pub fn event(record: &VmRecord, time_ms: i64) -> NewEvent {
    NewEvent {
        time_ms,
        vm_id: record.vm_id.clone(),
        uid: record.uid,
        kind: EventKind::StateChanged,
        state: record.state,
        status: record.status.clone(),
        cause: Cause::Other(format!("generation-{}", record.generation).into()),
        caller: Caller::named("suite"),
        ended_by: record.ended_by,
        metadata: record.config.metadata.clone(),
        update: None,
        summary: Some(VmSummary::of(record)),
    }
}

/// Returns the commit of a new VM, with an event at time 0.
pub fn insert(record: &VmRecord) -> Commit {
    Commit { change: RecordChange::Insert(Box::new(record.clone())), event: Some(event(record, 0)) }
}

/// Returns the commit of a changed VM, with an event at time 0.
pub fn update(record: &VmRecord) -> Commit {
    Commit { change: RecordChange::Update(Box::new(record.clone())), event: Some(event(record, 0)) }
}

/// Returns the commit of a deleted VM, with an event at time 0.
pub fn remove(record: &VmRecord) -> Commit {
    Commit { change: RecordChange::Remove(record.uid), event: Some(event(record, 0)) }
}

/// Returns all events of `store`, read page by page.
pub async fn all_events(store: &dyn Store) -> Vec<VmEvent> {
    let mut all: Vec<VmEvent> = Vec::new();
    loop {
        let after = all.last().map(|event| event.seq).unwrap_or_default();
        let page = events(store, after, None, 1000).await;
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

pub(super) fn id(name: &str) -> VmId {
    name.parse().expect("a legal name")
}

pub(super) async fn load(store: &dyn Store) -> Snapshot {
    store.load().await.expect("loading works")
}

pub(super) async fn commit(store: &dyn Store, commit: Commit) -> EventSeq {
    store.commit(commit).await.expect("the commit is legal").expect("it has an event")
}

pub(super) async fn events(
    store: &dyn Store,
    after: EventSeq,
    vm_id: Option<VmId>,
    limit: usize,
) -> Vec<VmEvent> {
    store.events(EventQuery { after, vm_id, limit }).await.expect("reading works")
}

pub(super) async fn positions(store: &dyn Store) -> Vec<u64> {
    all_events(store).await.into_iter().map(|event| event.seq.0).collect()
}

pub(super) fn assert_refused(result: Result<Option<EventSeq>, StoreError>, kind: StoreErrorKind) {
    let error = result.expect_err("the commit is refused");
    assert_eq!((error.kind, error.effect), (kind, Effect::NotApplied), "{error}");
}

/// Runs all commits at once and returns their results in the order of `commits`.
pub(super) async fn race(
    store: &Arc<dyn Store>,
    commits: Vec<Commit>,
) -> Vec<Result<Option<EventSeq>, StoreError>> {
    let tasks: Vec<_> = commits
        .into_iter()
        .map(|commit| {
            let store = Arc::clone(store);
            tokio::spawn(async move { store.commit(commit).await })
        })
        .collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.expect("no commit panics"));
    }
    results
}

/// Returns the call of the key `id`.
pub fn keyed_call(id: &str) -> KeyedCall {
    KeyedCall { id: id.to_owned(), request: format!("request of {id}") }
}

/// Returns an answer to the call of the key `id` that was given at `time_ms`.
pub fn kept(id: &str, time_ms: i64) -> KeptAnswer {
    let answer = CallAnswer::Done(Box::new(VmAnswer::of(&record("vm"))));
    KeptAnswer { call: keyed_call(id), time_ms, answer }
}
