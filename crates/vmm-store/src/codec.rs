//! Converts records and events to rows and back.
//!
//! Encoding runs in the caller's task, because the writer's thread is to do nothing but write.
//! Decoding trusts no row. A row that cannot be read, or whose JSON contradicts its columns,
//! concerns one VM or one event and does not hide any other: see [`crate::salvage`].

use std::path::Path;

use vmm_core::backend::Effect;
use vmm_core::event::{EventSeq, NewEvent, VmEvent};
use vmm_core::idempotency::KeyChange;
use vmm_core::store::{Commit, RecordChange, StoreError, StoreErrorKind, Tombstone, Unreadable, VmRecord};

use crate::answers::{self, EncodedKeyChange};
use crate::error::{CausedBy, corrupt, store_error};
use crate::foreign::ForeignFields;
use crate::labels::EncodedLabels;
use crate::salvage;

/// The version of the JSON that this program writes. The version is separate from the schema's,
/// because records change more often than tables.
pub(crate) const FORMAT: i64 = 1;

/// A [`Commit`] as rows.
#[derive(Debug)]
pub(crate) struct EncodedCommit {
    pub(crate) change: EncodedChange,
    pub(crate) event: Option<EncodedEvent>,
    /// The labels of the event.
    pub(crate) labels: Option<EncodedLabels>,
    /// The change of the kept answers.
    pub(crate) key: Option<Box<EncodedKeyChange>>,
}

/// A [`RecordChange`] as a row.
#[derive(Debug)]
pub(crate) enum EncodedChange {
    /// No record changes.
    Nothing,
    Insert(EncodedRecord),
    Update(EncodedRecord),
    Remove {
        uid: String,
    },
    /// `tombstone` is the JSON of a [`Tombstone`].
    Bury {
        uid: String,
        tombstone: String,
    },
    Unbury {
        uid: String,
    },
}

/// A [`VmRecord`] as a row.
#[derive(Debug)]
pub(crate) struct EncodedRecord {
    pub(crate) uid: String,
    pub(crate) vm_id: String,
    pub(crate) generation: i64,
    pub(crate) format: i64,
    pub(crate) json: String,
}

/// A [`NewEvent`] as a row.
#[derive(Debug)]
pub(crate) struct EncodedEvent {
    pub(crate) time_ms: i64,
    pub(crate) vm_id: String,
    pub(crate) json: String,
}

/// Converts `commit` to rows. Puts the foreign fields of an updated record back.
///
/// # Errors
///
/// [`StoreErrorKind::Io`] if the commit holds a value that JSON cannot hold, which is a path that
/// is not UTF-8.
pub(crate) fn encode(commit: Commit, foreign: &ForeignFields) -> Result<EncodedCommit, StoreError> {
    let change = match commit.change {
        RecordChange::Insert(record) => EncodedChange::Insert(encode_record(&record)?),
        RecordChange::Update(record) => {
            let mut encoded = encode_record(&record)?;
            foreign.put_back(&record, &mut encoded);
            EncodedChange::Update(encoded)
        }
        RecordChange::Remove(uid) => EncodedChange::Remove { uid: uid.to_string() },
        RecordChange::Bury(tombstone) => EncodedChange::Bury {
            uid: tombstone.vm.uid.to_string(),
            tombstone: encode_tombstone(&tombstone)?,
        },
        RecordChange::Unbury(uid) => EncodedChange::Unbury { uid: uid.to_string() },
    };
    let (event, labels) = commit.event.map(encode_event).transpose()?.unzip();
    Ok(EncodedCommit { change, event, labels, key: None })
}

/// Converts a change of the kept answers to rows, with the `commit` that it belongs to.
///
/// # Errors
///
/// The errors of [`encode`] and [`answers::encode`].
pub(crate) fn encode_keyed(
    commit: Option<Commit>,
    key: KeyChange,
    foreign: &ForeignFields,
) -> Result<EncodedCommit, StoreError> {
    let key = Some(Box::new(answers::encode(key)?));
    match commit {
        Some(commit) => Ok(EncodedCommit { key, ..encode(commit, foreign)? }),
        None => Ok(EncodedCommit { change: EncodedChange::Nothing, event: None, labels: None, key }),
    }
}

fn encode_tombstone(tombstone: &Tombstone) -> Result<String, StoreError> {
    serde_json::to_string(tombstone).map_err(|error| {
        let message =
            format!("the tombstone of VM {} cannot be stored: use paths in UTF-8 only", tombstone.vm.vm_id);
        store_error(StoreErrorKind::Io, Effect::NotApplied, message).caused_by(error)
    })
}

/// Parses the JSON of the tombstone of the VM `uid`, or its readable part. Returns `None` where no
/// process and no claim can be read; the row stays as it is.
pub(crate) fn decode_tombstone(uid: &str, json: &str) -> Option<Tombstone> {
    let why = match serde_json::from_str(json) {
        Ok(tombstone) => return Some(tombstone),
        Err(error) => unreadable(&error),
    };
    let part = salvage::tombstone(uid, json);
    match &part {
        Some(part) => {
            let vm_id = part.vm.vm_id.as_str();
            tracing::warn!(
                uid,
                vm_id,
                detail = why,
                "the record of a deleted VM's process can be read in part only"
            );
        }
        None => tracing::error!(
            uid,
            detail = why,
            "the record of a deleted VM's process cannot be read, so that no disk is held for that process"
        ),
    }
    part
}

/// Converts a record to a row.
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
        format: FORMAT,
        json: serde_json::to_string(record).map_err(|error| unfit().caused_by(error))?,
    })
}

fn encode_event(mut event: NewEvent) -> Result<(EncodedEvent, EncodedLabels), StoreError> {
    let vm_id = event.vm_id.to_string();
    let unfit = |error: serde_json::Error| {
        let message = format!("an event of VM {vm_id} cannot be stored");
        store_error(StoreErrorKind::Io, Effect::NotApplied, message).caused_by(error)
    };
    // The labels have rows of their own, see [`crate::labels`].
    let metadata = std::mem::take(&mut event.metadata);
    let labels =
        EncodedLabels { uid: event.uid.to_string(), json: serde_json::to_string(&metadata).map_err(&unfit)? };
    let json = serde_json::to_string(&event).map_err(&unfit)?;
    Ok((EncodedEvent { time_ms: event.time_ms, vm_id, json }, labels))
}

/// A row of `vms` as this program understands it: the whole record, or its readable part.
pub(crate) type DecodedRecord = Result<VmRecord, Unreadable>;

/// Converts a row of `vms` to a record, or to the readable part of one.
///
/// # Errors
///
/// [`StoreErrorKind::Corrupt`] if the key of the row is not legal.
pub(crate) fn decode_record(path: &Path, row: &EncodedRecord) -> Result<DecodedRecord, StoreError> {
    let why = match read_record(row) {
        Ok(record) => return Ok(Ok(record)),
        Err(why) => why,
    };
    let record = salvage::record(row).ok_or_else(|| {
        corrupt(path, format_args!("the record of VM {} (uid {}) has no legal key", row.vm_id, row.uid))
    })?;
    Ok(Err(Unreadable { record: Box::new(record), why: format!("its record {why}") }))
}

fn read_record(row: &EncodedRecord) -> Result<VmRecord, String> {
    check_format(row.format)?;
    let record: VmRecord = serde_json::from_str(&row.json).map_err(|error| unreadable(&error))?;
    // A row and its JSON are written together, so a difference means damage or a change by hand.
    let agrees = record.uid.to_string() == row.uid
        && record.vm_id.as_str() == row.vm_id
        && i64::try_from(record.generation) == Ok(row.generation);
    if agrees { Ok(record) } else { Err("contradicts its key".to_owned()) }
}

/// Converts a row of `events` to an event, or to the readable part of one.
///
/// # Errors
///
/// [`StoreErrorKind::Corrupt`] if the key of the row is not legal.
pub(crate) fn decode_event(
    path: &Path,
    seq: i64,
    row: &EncodedEvent,
    format: i64,
) -> Result<VmEvent, StoreError> {
    let no_key = || corrupt(path, format_args!("event {seq} of VM {} has no legal key", row.vm_id));
    let event = match read_event(row, format) {
        Ok(event) => event,
        Err(why) => {
            tracing::warn!(
                seq,
                vm_id = row.vm_id,
                detail = why,
                "an event of the event log can be read in part only"
            );
            salvage::event(row, &why).ok_or_else(no_key)?
        }
    };
    let seq = u64::try_from(seq).map_err(|error| no_key().caused_by(error))?;
    Ok(VmEvent { seq: EventSeq(seq), event })
}

fn read_event(row: &EncodedEvent, format: i64) -> Result<NewEvent, String> {
    check_format(format)?;
    let event: NewEvent = serde_json::from_str(&row.json).map_err(|error| unreadable(&error))?;
    let agrees = event.vm_id.as_str() == row.vm_id && event.time_ms == row.time_ms;
    if agrees { Ok(event) } else { Err("contradicts its key".to_owned()) }
}

fn unreadable(error: &serde_json::Error) -> String {
    format!("is damaged or was written by a newer program ({error})")
}

fn check_format(format: i64) -> Result<(), String> {
    match format {
        FORMAT => Ok(()),
        newer if newer > FORMAT => Err(format!(
            "has format {newer}, and this program knows formats up to {FORMAT}: a newer program wrote it"
        )),
        unknown => Err(format!("has the unknown format {unknown}")),
    }
}
