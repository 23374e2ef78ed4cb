//! The kinds of VMs whose records were written by a release that did not record a kind.

use std::ffi::OsStr;
use std::path::Path;

use vmm_core::kind::VmKind;
use vmm_core::store::{Commit, RecordChange, VmRecord};

use crate::shared::Shared;

/// Determines the kind of every record that has none, from the configuration of this start, and
/// writes it. Later configurations do not change it.
pub(crate) async fn record_kinds(shared: &Shared, vms: Vec<VmRecord>) -> Vec<VmRecord> {
    futures::future::join_all(vms.into_iter().map(|record| record_kind(shared, record))).await
}

async fn record_kind(shared: &Shared, mut record: VmRecord) -> VmRecord {
    let settled = kind_of(shared, &record);
    if settled == record.kind {
        return record;
    }
    record.kind = settled;
    let changed = VmRecord { generation: record.generation + 1, ..record.clone() };
    match shared
        .events
        .commit(Commit { change: RecordChange::Update(Box::new(changed.clone())), event: None })
        .await
    {
        Ok(_) => changed,
        Err(error) => {
            tracing::warn!(vm_id = %record.vm_id, %error, "the VM's kind could not be recorded; its next change records it");
            record
        }
    }
}

/// Returns the kind of a VM: the one on record, or the one that the configuration determines.
pub(crate) fn kind_of(shared: &Shared, record: &VmRecord) -> VmKind {
    let kind = record.kind.clone();
    if !matches!(kind, VmKind::Unrecorded { .. }) {
        return kind;
    }
    let Ok(backend) = shared.backends.get(record.backend.as_str()) else { return kind };
    let runs_in_folder = record.run.as_ref().map(|run| is_in_folder_of(record, &run.socket));
    kind.settled(runs_in_folder, backend.kind_of_new(record.uid))
}

/// Returns true if `socket` lies in the run folder of the VM, whatever folder holds the run
/// folders.
fn is_in_folder_of(record: &VmRecord, socket: &Path) -> bool {
    socket.parent().and_then(Path::file_name) == Some(OsStr::new(&record.uid.to_string()))
}
