//! How a record or an event becomes a row, and a row becomes one again.
//!
//! Encoding is done by the caller's task, so the writer's thread only writes. Decoding trusts nothing: a row that cannot be
//! read, or whose JSON contradicts its columns, is damage, and the error names the VM.

use std::path::Path;

use vmm_core::backend::Effect;
use vmm_core::event::{EventSeq, NewEvent, VmEvent};
use vmm_core::store::{Change, Commit, StoreError, StoreErrorKind, VmRecord};

use crate::error::{CausedBy, corrupt, store_error};

/// The form of the JSON that this program writes. Numbered by itself, because records change more often than tables.
pub(crate) const FORMAT: i64 = 1;

/// A [`Commit`] in the form of rows.
#[derive(Debug)]
pub(crate) struct EncodedCommit {
    pub(crate) change: EncodedChange,
    pub(crate) event: Option<EncodedEvent>,
}

/// A [`Change`] in the form of a row.
#[derive(Debug)]
pub(crate) enum EncodedChange {
    Insert(EncodedRecord),
    Update(EncodedRecord),
    Remove { uid: String },
}

/// A [`VmRecord`] in the form of a row.
#[derive(Debug)]
pub(crate) struct EncodedRecord {
    pub(crate) uid: String,
    pub(crate) vm_id: String,
    pub(crate) generation: i64,
    pub(crate) json: String,
}

/// A [`NewEvent`] in the form of a row.
#[derive(Debug)]
pub(crate) struct EncodedEvent {
    pub(crate) time_ms: i64,
    pub(crate) vm_id: String,
    pub(crate) json: String,
}

/// Turns `commit` into rows.
///
/// # Errors
///
/// [`StoreErrorKind::Io`] if it holds what JSON cannot: a path that is not UTF-8.
pub(crate) fn encode(commit: Commit) -> Result<EncodedCommit, StoreError> {
    let change = match commit.change {
        Change::Insert(record) => EncodedChange::Insert(encode_record(&record)?),
        Change::Update(record) => EncodedChange::Update(encode_record(&record)?),
        Change::Remove(uid) => EncodedChange::Remove { uid: uid.to_string() },
    };
    Ok(EncodedCommit { change, event: commit.event.as_ref().map(encode_event).transpose()? })
}

/// Turns a record into a row.
pub(crate) fn encode_record(record: &VmRecord) -> Result<EncodedRecord, StoreError> {
    let unfit = || {
        store_error(
            StoreErrorKind::Io,
            Effect::NotApplied,
            format!("the record of VM {} cannot be stored: use paths in UTF-8 only", record.vm_id),
        )
    };
    Ok(EncodedRecord {
        uid: record.uid.to_string(),
        vm_id: record.vm_id.to_string(),
        generation: i64::try_from(record.generation).map_err(|error| unfit().caused_by(error))?,
        json: serde_json::to_string(record).map_err(|error| unfit().caused_by(error))?,
    })
}

fn encode_event(event: &NewEvent) -> Result<EncodedEvent, StoreError> {
    let json = serde_json::to_string(event).map_err(|error| {
        let message = format!("an event of VM {} cannot be stored", event.vm_id);
        store_error(StoreErrorKind::Io, Effect::NotApplied, message).caused_by(error)
    })?;
    Ok(EncodedEvent { time_ms: event.time_ms, vm_id: event.vm_id.to_string(), json })
}

/// Turns a row of `vms` back into a record.
///
/// # Errors
///
/// [`StoreErrorKind::Corrupt`] if it makes no sense, [`StoreErrorKind::Newer`] if its format is a later one.
pub(crate) fn decode_record(path: &Path, row: &EncodedRecord, format: i64) -> Result<VmRecord, StoreError> {
    let whose = || format!("the record of VM {} (uid {})", row.vm_id, row.uid);
    refuse_other_format(path, &whose(), format)?;
    let record: VmRecord = serde_json::from_str(&row.json)
        .map_err(|error| corrupt(path, format_args!("{} cannot be read", whose())).caused_by(error))?;
    let agrees = record.uid.to_string() == row.uid
        && record.vm_id.as_str() == row.vm_id
        && i64::try_from(record.generation) == Ok(row.generation);
    if agrees { Ok(record) } else { Err(corrupt(path, format_args!("{} contradicts its key", whose()))) }
}

/// Turns a row of `events` back into an event.
///
/// # Errors
///
/// Like [`decode_record`].
pub(crate) fn decode_event(
    path: &Path,
    seq: i64,
    row: &EncodedEvent,
    format: i64,
) -> Result<VmEvent, StoreError> {
    let whose = || format!("event {seq} of VM {}", row.vm_id);
    refuse_other_format(path, &whose(), format)?;
    let event: NewEvent = serde_json::from_str(&row.json)
        .map_err(|error| corrupt(path, format_args!("{} cannot be read", whose())).caused_by(error))?;
    if event.vm_id.as_str() != row.vm_id || event.time_ms != row.time_ms {
        return Err(corrupt(path, format_args!("{} contradicts its key", whose())));
    }
    let seq = u64::try_from(seq)
        .map_err(|error| corrupt(path, format_args!("{} has no legal place", whose())).caused_by(error))?;
    Ok(VmEvent { seq: EventSeq(seq), event })
}

fn refuse_other_format(path: &Path, whose: &str, format: i64) -> Result<(), StoreError> {
    if format == FORMAT {
        return Ok(());
    }
    if format < FORMAT {
        return Err(corrupt(path, format_args!("{whose} has the unknown format {format}")));
    }
    Err(store_error(
        StoreErrorKind::Newer,
        Effect::NotApplied,
        format!(
            "{whose} in the database {} has format {format}, and this program knows formats up to {FORMAT}: a newer program \
             wrote it. Nothing was changed. Start that program again",
            path.display()
        ),
    ))
}
