//! Keeps the fields of a record that another release wrote and this program does not understand.
//!
//! ```text
//!   row as stored ──── read ────► record ── changed ──► record to be written
//!        │                           │                        │
//!        └ the difference of these   ▼                        ▼
//!          two is foreign ───────────────────► a field that did not change stays as stored,
//!                                              and so does a foreign one
//! ```

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};
use vmm_core::id::VmUid;
use vmm_core::store::VmRecord;

use crate::codec::{EncodedRecord, FORMAT};

/// The rows with foreign fields. A row that this program understands in full takes no room here.
#[derive(Debug, Default)]
pub(crate) struct ForeignFields {
    rows: Mutex<HashMap<VmUid, ForeignRow>>,
}

/// A row as it was read.
#[derive(Debug)]
struct ForeignRow {
    stored: Map<String, Value>,
    /// The record as this program has read it, in the form in which this program writes it.
    understood: Map<String, Value>,
    /// True if everything but the foreign fields could be read.
    readable: bool,
    format: i64,
}

impl ForeignFields {
    /// Notes the foreign fields of a row that was read as `record`.
    pub(crate) fn note(&self, row: &EncodedRecord, record: &VmRecord, readable: bool) {
        let written = serde_json::to_string(record).unwrap_or_default();
        // The common case: this very release wrote the row.
        if readable && written == row.json {
            return;
        }
        let stored: Map<String, Value> = serde_json::from_str(&row.json).unwrap_or_default();
        let understood: Map<String, Value> = serde_json::from_str(&written).unwrap_or_default();
        if !readable || has_more(&stored, &understood) {
            self.lock().insert(record.uid, ForeignRow { stored, understood, readable, format: row.format });
        }
    }

    /// Forgets all rows, before they are read again.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    /// Puts the foreign fields of a row back into the record that replaces it.
    pub(crate) fn put_back(&self, record: &VmRecord, encoded: &mut EncodedRecord) {
        let rows = self.lock();
        let Some(row) = rows.get(&record.uid) else { return };
        let Ok(new) = serde_json::from_str::<Map<String, Value>>(&encoded.json) else { return };
        // A row of a newer format stays as stored, because this program knows none of its fields.
        // The generation alone is updated, because the key repeats it and the two must agree.
        let merged = if row.format > FORMAT {
            let mut stored = row.stored.clone();
            stored.extend(new.get("generation").map(|it| ("generation".to_owned(), it.clone())));
            stored
        } else {
            merge(row, new)
        };
        let Ok(json) = serde_json::to_string(&merged) else { return };
        // A field under its old name must not stand beside the field under its present name. The
        // result is therefore read back, and the record is written without foreign fields if the
        // two differ.
        let sound =
            !row.readable || serde_json::from_str::<VmRecord>(&json).is_ok_and(|read| read == *record);
        if sound {
            encoded.json = json;
            encoded.format = row.format.max(FORMAT);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmUid, ForeignRow>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn merge(row: &ForeignRow, new: Map<String, Value>) -> Map<String, Value> {
    let mut merged = row.stored.clone();
    for (key, value) in new {
        // Only a field that this program changed replaces the stored one.
        if row.understood.get(&key) != Some(&value) {
            merged.insert(key, value);
        }
    }
    merged
}

/// Returns true if `stored` has a field, at any depth, that `understood` lacks.
fn has_more(stored: &Map<String, Value>, understood: &Map<String, Value>) -> bool {
    stored.iter().any(|(key, value)| understood.get(key).is_none_or(|known| value_has_more(value, known)))
}

fn value_has_more(stored: &Value, understood: &Value) -> bool {
    match (stored, understood) {
        (Value::Object(stored), Value::Object(understood)) => has_more(stored, understood),
        (Value::Array(stored), Value::Array(understood)) => {
            stored.len() > understood.len()
                || stored.iter().zip(understood).any(|(stored, known)| value_has_more(stored, known))
        }
        _ => false,
    }
}
