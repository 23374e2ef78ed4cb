//! CreateVm: check, record, reserve. Nothing is started.

use std::sync::Arc;

use uuid::Uuid;
use vmm_core::backend::{Backend, Effect};
use vmm_core::caller::Caller;
use vmm_core::config::{BootConfig, VmConfig};
use vmm_core::event::{EventKind, NewEvent};
use vmm_core::id::{VmId, VmUid};
use vmm_core::report::{FieldReport, Report};
use vmm_core::spec::{MacAddr, VmSpec};
use vmm_core::state::{Phase, Status, VmState};
use vmm_core::store::{Change, Commit, Intent, Requested, VmRecord};
use vmm_host::fault::{FaultPoint, point};

use crate::actor::{Beginning, NewActor};
use crate::check;
use crate::clock::now_ms;
use crate::error::ServiceError;
use crate::places;
use crate::service::DefaultBoot;
use crate::shared::Shared;
use crate::spares::{self, Promise};

/// What CreateVm is asked for.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// The name; empty asks for a generated one.
    pub vm_id: String,
    /// What to create.
    pub requested: Requested,
    /// Who asks.
    pub caller: Caller,
}

/// What CreateVm answers.
#[derive(Clone, Debug)]
pub struct Created {
    /// The VM, new or as it is.
    pub record: Arc<VmRecord>,
    /// What its backend ignores or emulates.
    pub warnings: Vec<FieldReport>,
}

/// Creates a VM, or finds the one that the same call created before.
pub(crate) async fn create(shared: &Arc<Shared>, request: CreateRequest) -> Result<Created, ServiceError> {
    let fresh = VmUid::new(Uuid::now_v7());
    let vm_id = match request.vm_id.as_str() {
        "" => Ok(VmId::generated(fresh)),
        text => text.parse::<VmId>(),
    };
    let vm_id = match vm_id {
        Ok(vm_id) => vm_id,
        Err(invalid) => {
            let mut report = Report::default();
            report.reject("vm_id", invalid.to_string());
            report.merge(check_config(shared, fresh, &request.requested).await.report);
            return Err(ServiceError::Invalid(report.violations));
        }
    };
    let lock = shared.names.of(&vm_id);
    let _creating = lock.lock().await;
    if let Some(existing) = shared.index.get(&vm_id) {
        return repeat(shared, existing.record, &request.requested);
    }
    let mut spare = None;
    if let Ok(backend) = shared.backends.get(&request.requested.backend) {
        // Where none can be created, what else is wrong does not matter.
        places::refuse_import_only(&*backend)?;
        spare = spares::promise(shared, &backend);
    }
    let uid = spare.as_ref().and_then(Promise::uid).unwrap_or(fresh);
    let checked = check_config(shared, uid, &request.requested).await;
    let Some((spec, backend)) = checked.accepted.filter(|_| checked.report.is_ok()) else {
        return Err(refusal(checked.report));
    };
    let claim = places::claim(shared, &*backend).await?;
    let now = now_ms();
    let record = VmRecord {
        uid,
        vm_id,
        backend: backend.capabilities().name.clone(),
        requested: request.requested,
        config: checked.config,
        state: VmState::Created,
        status: Status::plain(Phase::Created, now),
        generation: 1,
        created_ms: shared.index.creation_time(now),
        modified_ms: now,
        intent: None,
        run: None,
        owns_console_output: false,
        ended_by: None,
        kind: claim.as_ref().map_or_else(|| backend.kind_of_new(uid), |claim| claim.place.clone()),
        imported: false,
        untold: Vec::new(),
    };
    let event = NewEvent {
        time_ms: now,
        vm_id: record.vm_id.clone(),
        uid,
        kind: EventKind::Created,
        state: record.state,
        status: record.status.clone(),
        cause: "CreateVm".to_owned(),
        caller: request.caller,
        ended_by: None,
        metadata: record.config.metadata.clone(),
    };
    point(FaultPoint::CreateChecked);
    let insert = Commit { change: Change::Insert(Box::new(record.clone())), event: Some(event.clone()) };
    let committed = match shared.events.commit(insert).await {
        Ok(committed) => committed,
        Err(error) => {
            if error.effect != Effect::NotApplied {
                if let Some(spare) = spare {
                    spare.discard().await;
                }
                take_back(shared, &record, event).await;
            }
            return Err(error.into());
        }
    };
    point(FaultPoint::CreateCommitted);
    if let Some(spare) = spare {
        spare.redeem();
    }
    let shown = Arc::new(record);
    let (record, seq) = (Arc::clone(&shown), committed.seq);
    let beginning = Beginning::Created;
    NewActor { shared: Arc::clone(shared), record, spec, backend, committed: seq, beginning }.start();
    drop(committed);
    point(FaultPoint::CreateShown);
    tracing::info!(vm_id = %shown.vm_id, uid = %shown.uid, backend = %shown.backend, "VM created");
    Ok(Created { record: shown, warnings: checked.report.warnings })
}

/// Removes a VM that may have been recorded though its creation failed, so that its name is free. The log may tell of its
/// creation, so it tells of its end too.
async fn take_back(shared: &Shared, record: &VmRecord, created: NewEvent) {
    let event = NewEvent {
        kind: EventKind::Deleted,
        status: created.status.clone().because("create-failed", "the creation could not be recorded"),
        ..created
    };
    let removal = Commit { change: Change::Remove(record.uid), event: Some(event) };
    if let Err(error) = shared.events.commit(removal).await {
        tracing::error!(uid = %record.uid, %error, "a VM whose creation failed may be on record all the same");
    }
}

/// A feature that no backend serves yet is UNIMPLEMENTED only where nothing else is wrong.
fn refusal(report: Report) -> ServiceError {
    match report.violations.as_slice() {
        [only] if only.field == FIRMWARE => ServiceError::Unsupported(only.to_string()),
        _ => ServiceError::Invalid(report.violations),
    }
}

const FIRMWARE: &str = "config.boot.boot_options[\"firmware\"]";

/// Answers a call for a name that exists.
fn repeat(shared: &Shared, existing: Arc<VmRecord>, requested: &Requested) -> Result<Created, ServiceError> {
    if existing.requested != *requested {
        return Err(ServiceError::AlreadyExists(existing.vm_id.clone()));
    }
    let leaving = existing.intent.as_ref().is_some_and(Intent::is_deletion);
    if leaving {
        return Err(ServiceError::Unavailable(format!(
            "VM \"{}\" is being deleted; try again when it is gone",
            existing.vm_id
        )));
    }
    let warnings = match (VmSpec::parse(&existing.config), shared.backends.get(existing.backend.as_str())) {
        (Ok(spec), Ok(backend)) => backend.check(&spec).warnings,
        _ => Vec::new(),
    };
    Ok(Created { record: existing, warnings })
}

/// What the checks at the door found.
pub(crate) struct Checked {
    /// The configuration in force.
    pub(crate) config: VmConfig,
    /// Everything found.
    pub(crate) report: Report,
    /// The parsed configuration and its backend, where both could be made out.
    pub(crate) accepted: Option<(VmSpec, Arc<dyn Backend>)>,
}

/// Runs every check of CreateVm and collects every finding. Touches nothing.
pub(crate) async fn check_config(shared: &Shared, uid: VmUid, requested: &Requested) -> Checked {
    let config = resolve(&requested.config, uid, &shared.settings.default_boot);
    let mut report = Report::default();
    let backend =
        shared.backends.get(&requested.backend).map_err(|problem| report.reject("backend", problem)).ok();
    let spec = VmSpec::parse(&config).map_err(|violations| report.merge(violations)).ok();
    if config.boot.as_ref().is_some_and(|boot| boot.boot_options.contains_key("firmware")) {
        report.reject(
            FIRMWARE,
            "booting from firmware is not served yet: name a kernel in kernel_path instead",
        );
    }
    let Some((spec, backend)) = spec.zip(backend) else {
        return Checked { config, report, accepted: None };
    };
    if let Err(error) = places::refuse_import_only(&*backend) {
        report.reject("backend", error.to_string());
    }
    report.merge(backend.check(&spec));
    let capabilities = backend.capabilities();
    report.merge(check::look(spec.clone(), capabilities.kernel_formats, false).await.report);
    if let Some(Err(reason)) = shared.backends.status(&capabilities.name).map(|status| status.health.version)
    {
        report.warn(
            "backend",
            format!("{} cannot serve now, and BootVm will fail: {reason}", capabilities.name),
        );
    }
    Checked { config, report, accepted: Some((spec, backend)) }
}

/// Fills in what the client left to the program: the default kernel, device ids and MACs.
fn resolve(sent: &VmConfig, uid: VmUid, defaults: &DefaultBoot) -> VmConfig {
    let mut config = sent.clone();
    let boot = config.boot.get_or_insert_with(BootConfig::default);
    if boot.kernel_path.is_empty()
        && !boot.boot_options.contains_key("firmware")
        && !defaults.kernel.is_empty()
    {
        boot.kernel_path.clone_from(&defaults.kernel);
        boot.initrd_path.clone_from(&defaults.initrd);
        if boot.kernel_args.is_empty() {
            boot.kernel_args.clone_from(&defaults.kernel_args);
        }
    }
    fill_ids(config.storage.iter_mut().map(|disk| &mut disk.id), "disk");
    fill_ids(config.network.iter_mut().map(|nic| &mut nic.id), "net");
    for (index, nic) in config.network.iter_mut().enumerate() {
        if nic.mac_address.is_empty() {
            nic.mac_address = MacAddr(uid.mac(index)).to_string();
        }
    }
    config
}

/// Names devices `disk0`, `disk1` … by their place, passing over names that are taken.
fn fill_ids<'a>(ids: impl Iterator<Item = &'a mut String>, prefix: &str) {
    let mut ids: Vec<&mut String> = ids.collect();
    for place in 0..ids.len() {
        if ids[place].is_empty() {
            let free = (place..)
                .map(|number| format!("{prefix}{number}"))
                .find(|name| ids.iter().all(|id| **id != *name));
            if let Some(name) = free {
                *ids[place] = name;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_core::config::{NetworkInterface, StorageDevice};

    use super::*;

    fn uid() -> VmUid {
        VmUid::new(Uuid::now_v7())
    }

    #[test]
    fn what_is_left_out_is_generated_and_what_is_given_stays() {
        let named = StorageDevice { id: "disk0".to_owned(), ..StorageDevice::default() };
        let sent = VmConfig {
            storage: vec![StorageDevice::default(), named],
            network: vec![NetworkInterface::default(), NetworkInterface::default()],
            ..VmConfig::default()
        };
        let config = resolve(&sent, uid(), &DefaultBoot::default());
        let ids: Vec<_> = config.storage.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk1", "disk0"]);
        assert_ne!(config.network[0].mac_address, config.network[1].mac_address);
        assert_eq!(config.network[1].id, "net1");
    }

    #[test]
    fn the_default_kernel_is_used_only_where_none_is_named() {
        let defaults = DefaultBoot {
            kernel: "/k".to_owned(),
            initrd: "/i".to_owned(),
            kernel_args: "console=ttyS0".to_owned(),
        };
        let filled = resolve(&VmConfig::default(), uid(), &defaults).boot.unwrap();
        assert_eq!((filled.kernel_path.as_str(), filled.initrd_path.as_str()), ("/k", "/i"));
        assert_eq!(filled.kernel_args, "console=ttyS0");
        let own = BootConfig { kernel_path: "/own".to_owned(), ..BootConfig::default() };
        let kept = resolve(&VmConfig { boot: Some(own.clone()), ..VmConfig::default() }, uid(), &defaults);
        assert_eq!(kept.boot, Some(own), "defaults are used together or not at all");
    }
}
