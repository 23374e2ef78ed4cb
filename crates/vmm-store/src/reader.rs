//! The thread that reads. It has its own connection, because a read must not wait for a write. In
//! write-ahead mode the connection sees every commit that was answered before the read began.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row};
use tokio::sync::{mpsc, oneshot};
use vmm_core::backend::Effect;
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::InstanceId;
use vmm_core::idempotency::AnswerLookup;
use vmm_core::store::{EventQuery, Snapshot, StoreError, StoreErrorKind, Tombstone};

use crate::answers::{self, AnswerRoom};
use crate::apply::TOMBSTONES;
use crate::codec::{EncodedEvent, EncodedRecord, decode_event, decode_record, decode_tombstone};
use crate::error::{CausedBy, corrupt, from_sqlite, store_error};
use crate::foreign::ForeignFields;
use crate::labels;

/// The largest number of events in one answer, whatever limit the query has.
pub const MAX_EVENTS: usize = 10_000;

/// A request to the reader.
#[derive(Debug)]
pub(crate) enum ReadJob {
    Load { reply: oneshot::Sender<Result<Snapshot, StoreError>> },
    Events { query: EventQuery, reply: oneshot::Sender<Result<Vec<VmEvent>, StoreError>> },
    Answer { id: String, reply: oneshot::Sender<Result<AnswerLookup, StoreError>> },
}

/// The state of the reading thread.
#[derive(Debug)]
pub(crate) struct Reader {
    conn: Connection,
    path: PathBuf,
    instance: InstanceId,
    foreign: Arc<ForeignFields>,
    room: AnswerRoom,
}

impl Reader {
    pub(crate) fn new(
        conn: Connection,
        path: PathBuf,
        instance: InstanceId,
        foreign: Arc<ForeignFields>,
        room: AnswerRoom,
    ) -> Self {
        Self { conn, path, instance, foreign, room }
    }

    /// Answers requests until the queue is closed.
    pub(crate) fn run(mut self, mut jobs: mpsc::Receiver<ReadJob>) {
        // A failed send means that the caller has gone away, so the answer is dropped.
        while let Some(job) = jobs.blocking_recv() {
            match job {
                ReadJob::Load { reply } => {
                    let loaded = load(&mut self.conn, &self.path, self.instance, &self.foreign);
                    drop(reply.send(loaded));
                }
                ReadJob::Events { query, reply } if !reply.is_closed() => {
                    let events = events(&mut self.conn, &self.path, &query);
                    drop(reply.send(events));
                }
                // The caller has gone away while the request was queued.
                ReadJob::Events { .. } => {}
                ReadJob::Answer { id, reply } => {
                    drop(reply.send(kept_answer(&self.conn, &self.path, &id, &self.room)));
                }
            }
        }
    }
}

fn kept_answer(
    conn: &Connection,
    path: &Path,
    id: &str,
    room: &AnswerRoom,
) -> Result<AnswerLookup, StoreError> {
    let found = answers::find(conn, id)
        .map_err(|error| from_sqlite(path, "reading", Effect::NotApplied, error))?
        .transpose()
        .map_err(|why| {
            let text = "the answer that is kept for this idempotency key cannot be read: it is damaged, or a \
                        newer program wrote it. Look at the VM, and send another key";
            store_error(StoreErrorKind::Newer, Effect::NotApplied, text).caused_by(why)
        })?;
    Ok(AnswerLookup { kept: found, has_room: room.is_left() })
}

fn events(conn: &mut Connection, path: &Path, query: &EventQuery) -> Result<Vec<VmEvent>, StoreError> {
    let failed = |error| from_sqlite(path, "reading", Effect::NotApplied, error);
    // One transaction, because the events and their labels must belong to the same moment.
    let transaction = conn.transaction().map_err(failed)?;
    let rows = event_rows(&transaction, query).map_err(failed)?;
    let events = rows.iter().map(|(seq, row, format)| {
        let mut event = decode_event(path, *seq, row, *format)?;
        labels::fill_in(&transaction, &mut event).map_err(failed)?;
        Ok(event)
    });
    events.collect()
}

fn event_rows(conn: &Connection, query: &EventQuery) -> rusqlite::Result<Vec<(i64, EncodedEvent, i64)>> {
    let after = i64::try_from(query.after.0).unwrap_or(i64::MAX);
    let limit = i64::try_from(query.limit.min(MAX_EVENTS)).unwrap_or(i64::MAX);
    match &query.vm_id {
        None => conn
            .prepare_cached(
                "SELECT seq, time_ms, vm_id, event, format FROM events WHERE seq > ?1 ORDER BY seq LIMIT ?2",
            )?
            .query_map((after, limit), event_row)?
            .collect(),
        Some(vm_id) => conn
            .prepare_cached(
                "SELECT seq, time_ms, vm_id, event, format FROM events \
                 WHERE vm_id = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3",
            )?
            .query_map((vm_id.as_str(), after, limit), event_row)?
            .collect(),
    }
}

/// Reads every VM and the end of the event log from a database of the present version. Notes in
/// `foreign` the fields that another release wrote and this program does not understand.
pub(crate) fn load(
    conn: &mut Connection,
    path: &Path,
    instance: InstanceId,
    foreign: &ForeignFields,
) -> Result<Snapshot, StoreError> {
    let failed = |error| from_sqlite(path, "reading", Effect::NotApplied, error);
    // One transaction, because the VMs and the end of the log must belong to the same moment.
    let transaction = conn.transaction().map_err(failed)?;
    foreign.clear();
    let (mut vms, mut unreadable) = (Vec::new(), Vec::new());
    {
        let mut statement = transaction
            .prepare_cached("SELECT uid, vm_id, generation, format, record FROM vms ORDER BY uid")
            .map_err(failed)?;
        // The rows are decoded one by one, because a row takes as much memory as its record.
        for row in statement.query_map([], vm_row).map_err(failed)? {
            let row = row.map_err(failed)?;
            match decode_record(path, &row)? {
                Ok(record) => {
                    foreign.note(&row, &record, true);
                    vms.push(record);
                }
                Err(part) => {
                    foreign.note(&row, &part.record, false);
                    unreadable.push(part);
                }
            }
        }
    }
    // SQLite keeps the last position here even when all events have expired.
    let last: Option<i64> = transaction
        .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'events'", [], |row| row.get(0))
        .optional()
        .map_err(failed)?;
    let last_event = u64::try_from(last.unwrap_or(0))
        .map_err(|error| corrupt(path, "the end of the event log is negative").caused_by(error))?;
    let tombstones = tombstones(&transaction, path)?;
    Ok(Snapshot { instance, vms, unreadable, last_event: EventSeq(last_event), tombstones })
}

fn tombstones(conn: &Connection, path: &Path) -> Result<Vec<Tombstone>, StoreError> {
    let rows = || -> rusqlite::Result<Vec<(String, String)>> {
        conn.prepare_cached(
            "SELECT key, value FROM meta WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 ORDER BY key",
        )?
        .query_map((TOMBSTONES,), |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
    };
    let rows = rows().map_err(|error| from_sqlite(path, "reading", Effect::NotApplied, error))?;
    let uid = |key: &str| key.strip_prefix(TOMBSTONES).unwrap_or(key).to_owned();
    Ok(rows.iter().filter_map(|(key, json)| decode_tombstone(&uid(key), json)).collect())
}

fn vm_row(row: &Row<'_>) -> rusqlite::Result<EncodedRecord> {
    Ok(EncodedRecord {
        uid: row.get(0)?,
        vm_id: row.get(1)?,
        generation: row.get(2)?,
        format: row.get(3)?,
        json: row.get(4)?,
    })
}

fn event_row(row: &Row<'_>) -> rusqlite::Result<(i64, EncodedEvent, i64)> {
    let event = EncodedEvent { time_ms: row.get(1)?, vm_id: row.get(2)?, json: row.get(3)? };
    Ok((row.get(0)?, event, row.get(4)?))
}
