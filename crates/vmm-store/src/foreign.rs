//! Keeps the fields of a record that another release wrote and this program does not understand.
//!
//! ```text
//!   row as stored ──── read ────► record ── changed ──► record as it is to be
//!        │                           │                        │
//!        └ what differs between these two is foreign          ▼
//!          and goes into the row again ──────────► a field that did not change stays as stored,
//!                                                  one that this program does not know too
//! ```

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};
use vmm_core::id::VmUid;
use vmm_core::store::VmRecord;

use crate::codec::{EncodedRecord, FORMAT};

/// The rows that hold something foreign. Rows that this program understands whole take no room here.
#[derive(Debug, Default)]
pub(crate) struct Foreign {
    rows: Mutex<HashMap<VmUid, Row>>,
}

/// A row as it was read.
#[derive(Debug)]
struct Row {
    stored: Map<String, Value>,
    /// The record as this program read it, in the form in which it would write it.
    understood: Map<String, Value>,
    /// True if all of it but foreign fields could be read.
    readable: bool,
    format: i64,
}

impl Foreign {
    /// Takes note of a row and of what was read from it.
    pub(crate) fn note(&self, row: &EncodedRecord, record: &VmRecord, readable: bool) {
        let written = serde_json::to_string(record).unwrap_or_default();
        // The usual case by far: this very release wrote it.
        if readable && written == row.json {
            return;
        }
        let stored: Map<String, Value> = serde_json::from_str(&row.json).unwrap_or_default();
        let understood: Map<String, Value> = serde_json::from_str(&written).unwrap_or_default();
        if !readable || has_more(&stored, &understood) {
            self.lock().insert(record.uid, Row { stored, understood, readable, format: row.format });
        }
    }

    /// Forgets everything, before all rows are read anew.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    /// Puts back what is foreign into a record that is to be written.
    pub(crate) fn put_back(&self, record: &VmRecord, encoded: &mut EncodedRecord) {
        let rows = self.lock();
        let Some(row) = rows.get(&record.uid) else { return };
        let Ok(new) = serde_json::from_str::<Map<String, Value>>(&encoded.json) else { return };
        let merged = if row.format > FORMAT {
            // Nothing is known of that format but the generation, which the key repeats.
            let mut stored = row.stored.clone();
            stored.extend(new.get("generation").map(|it| ("generation".to_owned(), it.clone())));
            stored
        } else {
            merge(row, new)
        };
        let Ok(json) = serde_json::to_string(&merged) else { return };
        // A field under an older name must not stand beside the same field under its present one.
        let sound =
            !row.readable || serde_json::from_str::<VmRecord>(&json).is_ok_and(|read| read == *record);
        if sound {
            encoded.json = json;
            encoded.format = row.format.max(FORMAT);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmUid, Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn merge(row: &Row, new: Map<String, Value>) -> Map<String, Value> {
    let mut merged = row.stored.clone();
    for (key, value) in new {
        if row.understood.get(&key) != Some(&value) {
            merged.insert(key, value);
        }
    }
    merged
}

/// Says whether `stored` has a field, at any depth, that `understood` lacks.
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
