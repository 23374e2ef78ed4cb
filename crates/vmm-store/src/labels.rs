//! The labels of events: a VM's metadata, written once for each change and not once for each event.
//!
//! ```text
//!   meta:   labels:UID:0007 = {"team":"blue"}      in force from event 7 on
//!           labels:UID:0031 = {"team":"red"}       in force from event 31 on
//!           labels:UID:0040 = {}                   the VM was deleted by event 39
//!   events: 7 … 30 without metadata ──► blue       31 … 39 ──► red
//! ```
//!
//! A VM without a row has no labels. The rows are keys of `meta`, because an older program leaves
//! an unknown key alone and refuses an unknown table. An event of an earlier release holds its
//! metadata itself, and keeps it.
//!
//! A row stays longer than the event that it begins with, as long as a kept or later event needs
//! it.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension};
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::VmUid;

/// The labels of an event as a row.
#[derive(Debug)]
pub(crate) struct EncodedLabels {
    pub(crate) uid: String,
    pub(crate) json: String,
}

/// The text of an empty set of labels.
const NONE: &str = "{}";

/// Records that the event `seq` has `labels`. Writes nothing if the previous event of this VM has
/// the same labels.
pub(crate) fn note(conn: &Connection, labels: &EncodedLabels, seq: EventSeq) -> rusqlite::Result<()> {
    let last = last(conn, &labels.uid)?;
    if last.as_deref().unwrap_or(NONE) == labels.json {
        return Ok(());
    }
    put(conn, &labels.uid, seq.0, &labels.json)
}

/// Records that the VM is deleted, so later events do not need its labels.
pub(crate) fn record_end(conn: &Connection, uid: &str) -> rusqlite::Result<()> {
    if last(conn, uid)?.is_none_or(|last| last == NONE) {
        return Ok(());
    }
    put(conn, uid, next_place(conn)?, NONE)
}

/// Fills in the labels of an event that does not hold them itself.
pub(crate) fn fill_in(conn: &Connection, event: &mut VmEvent) -> rusqlite::Result<()> {
    if event.event.metadata.is_empty() {
        event.event.metadata = at(conn, event.event.uid, event.seq)?;
    }
    Ok(())
}

/// Removes the rows that no kept or later event needs.
pub(crate) fn expire(conn: &Connection) -> rusqlite::Result<()> {
    let oldest: Option<i64> = conn.query_row("SELECT min(seq) FROM events", [], |row| row.get(0))?;
    let oldest = match oldest {
        Some(seq) => seq.unsigned_abs(),
        None => next_place(conn)?,
    };
    conn.prepare_cached(
        // A key is `labels:`, a uid of 36 characters, a colon, and a position from character 45 on.
        // A row goes if its position is not after the oldest event and either it ends the labels of
        // a VM, or a later row of the same VM is in force from the oldest event or before.
        "DELETE FROM meta WHERE key > 'labels:' AND key < 'labels;' AND substr(key, 45) <= ?1 AND (value = '{}' OR EXISTS \
         (SELECT 1 FROM meta AS later WHERE later.key > meta.key AND later.key <= substr(meta.key, 1, 44) || ?1))",
    )?
    .execute([position(oldest)])
    .map(drop)
}

fn at(conn: &Connection, uid: VmUid, seq: EventSeq) -> rusqlite::Result<BTreeMap<String, String>> {
    let uid = uid.to_string();
    let json: Option<String> = conn
        .prepare_cached("SELECT value FROM meta WHERE key > ?1 AND key <= ?2 ORDER BY key DESC LIMIT 1")?
        .query_row([key(&uid, ""), key(&uid, &position(seq.0))], |row| row.get(0))
        .optional()?;
    // Unreadable labels count as none, because they are a description and must not hide the event.
    Ok(json.and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default())
}

fn last(conn: &Connection, uid: &str) -> rusqlite::Result<Option<String>> {
    conn.prepare_cached("SELECT value FROM meta WHERE key > ?1 AND key < ?2 ORDER BY key DESC LIMIT 1")?
        .query_row([key(uid, ""), key(uid, "~")], |row| row.get(0))
        .optional()
}

/// Returns the position of the next event.
fn next_place(conn: &Connection) -> rusqlite::Result<u64> {
    let last: Option<i64> = conn
        .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'events'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(last.unwrap_or(0).unsigned_abs() + 1)
}

fn put(conn: &Connection, uid: &str, seq: u64, json: &str) -> rusqlite::Result<()> {
    conn.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)")?
        .execute([key(uid, &position(seq)).as_str(), json])
        .map(drop)
}

fn key(uid: &str, position: &str) -> String {
    format!("labels:{uid}:{position}")
}

/// Returns a position as text of fixed length, so that texts sort like positions.
fn position(seq: u64) -> String {
    format!("{seq:020}")
}
