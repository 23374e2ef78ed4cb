//! Applies one commit inside a transaction: the change of the record, then its event.

use rusqlite::{Connection, OptionalExtension, params};
use vmm_core::backend::Effect;
use vmm_core::event::EventSeq;
use vmm_core::store::{StoreError, StoreErrorKind};

use crate::answers::{self, EncodedKeyChange};
use crate::codec::{EncodedChange, EncodedCommit, EncodedEvent, EncodedRecord, FORMAT};
use crate::error::store_error;
use crate::labels;

/// The reason why a commit was not applied.
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// The commit is not legal. Its neighbours in the group are not concerned.
    Refused(StoreError),
    /// The database failed, so the whole transaction has.
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for ApplyError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// Applies `commit` and returns the position of its event. On an error the commit may be half
/// applied, and the caller undoes it by its savepoint.
pub(crate) fn apply(conn: &Connection, commit: &EncodedCommit) -> Result<Option<EventSeq>, ApplyError> {
    // The answers come first, because the removal of a VM that is gone already ends the function.
    if let Some(key) = &commit.key {
        answers::apply(conn, key)?;
    }
    match &commit.change {
        EncodedChange::Nothing => {}
        EncodedChange::Insert(record) => insert(conn, record)?,
        EncodedChange::Update(record) => update(conn, record)?,
        EncodedChange::Remove { uid } => {
            // The VM was removed before, or never recorded. A repeated removal succeeds without a
            // second event, because a caller repeats it when it does not know the outcome of the
            // first.
            if !remove(conn, uid)? {
                return Ok(None);
            }
        }
        EncodedChange::Bury { uid, tombstone } => {
            // A repeated burial keeps the first tombstone. A VM that never existed gets none.
            if !remove(conn, uid)? {
                return Ok(None);
            }
            conn.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)")?
                .execute(params![tombstone_key(uid), tombstone])?;
        }
        // A tombstone that is gone already is no error, because the change may be repeated.
        EncodedChange::Unbury { uid } => {
            conn.prepare_cached("DELETE FROM meta WHERE key = ?1")?.execute([tombstone_key(uid)])?;
        }
    }
    // The event follows the change of the record, so a refused change leaves no event in the log.
    let seq = commit.event.as_ref().map(|event| append(conn, event)).transpose()?;
    // The labels are noted under the position of the event, because they are in force from that
    // event on.
    if let (Some(labels), Some(seq)) = (&commit.labels, seq) {
        labels::note(conn, labels, seq)?;
    }
    // The row that ends the labels comes after the last event, because that event still bears them.
    if let EncodedChange::Remove { uid } | EncodedChange::Bury { uid, .. } = &commit.change {
        labels::record_end(conn, uid)?;
    }
    Ok(seq)
}

/// The prefix of the keys of tombstones in `meta`. Tombstones have no table of their own, because a
/// new table would be a new version of the schema, which an older program refuses. An older program
/// leaves an unknown key alone.
pub(crate) const TOMBSTONES: &str = "tombstone:";

fn tombstone_key(uid: &str) -> String {
    format!("{TOMBSTONES}{uid}")
}

/// Removes a VM. Returns true if the VM was recorded.
fn remove(conn: &Connection, uid: &str) -> rusqlite::Result<bool> {
    Ok(conn.prepare_cached("DELETE FROM vms WHERE uid = ?1")?.execute([uid])? > 0)
}

fn insert(conn: &Connection, record: &EncodedRecord) -> Result<(), ApplyError> {
    // The index `vms_name` would refuse the name too. The question comes first because the error
    // names the VM that has the name.
    if let Some(holder) = uid_of_name(conn, &record.vm_id)? {
        return Err(name_taken(&record.vm_id, &holder));
    }
    if generation_of(conn, &record.uid)?.is_some() {
        return Err(conflict(format!(
            "VM {} (uid {}) is recorded already. Make a new uid for each creation",
            record.vm_id, record.uid
        )));
    }
    conn.prepare_cached(
        "INSERT INTO vms (uid, vm_id, generation, format, record) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![record.uid, record.vm_id, record.generation, record.format, record.json])?;
    Ok(())
}

fn update(conn: &Connection, record: &EncodedRecord) -> Result<(), ApplyError> {
    // The stored generation must be one less. Any other number means that this record was made from
    // an outdated copy, and writing it would lose the change in between.
    let previous = record.generation.saturating_sub(1);
    match generation_of(conn, &record.uid)? {
        Some(stored) if stored == previous => {}
        Some(stored) => {
            return Err(conflict(format!(
                "VM {} (uid {}) is at generation {stored}, so it cannot become generation {}. Read it again",
                record.vm_id, record.uid, record.generation
            )));
        }
        None => {
            return Err(conflict(format!(
                "VM {} (uid {}) is not recorded: it was removed, or never created",
                record.vm_id, record.uid
            )));
        }
    }
    // An update may rename a VM, so the name is checked here as well.
    if let Some(holder) = uid_of_name(conn, &record.vm_id)?
        && holder != record.uid
    {
        return Err(name_taken(&record.vm_id, &holder));
    }
    conn.prepare_cached(
        "UPDATE vms SET vm_id = ?2, generation = ?3, format = ?4, record = ?5 WHERE uid = ?1",
    )?
    .execute(params![record.uid, record.vm_id, record.generation, record.format, record.json])?;
    Ok(())
}

fn append(conn: &Connection, event: &EncodedEvent) -> rusqlite::Result<EventSeq> {
    conn.prepare_cached("INSERT INTO events (time_ms, vm_id, format, event) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![event.time_ms, event.vm_id, FORMAT, event.json])?;
    // AUTOINCREMENT gives positive numbers only.
    Ok(EventSeq(conn.last_insert_rowid().unsigned_abs()))
}

fn uid_of_name(conn: &Connection, vm_id: &str) -> rusqlite::Result<Option<String>> {
    conn.prepare_cached("SELECT uid FROM vms WHERE vm_id = ?1")?
        .query_row([vm_id], |row| row.get(0))
        .optional()
}

fn generation_of(conn: &Connection, uid: &str) -> rusqlite::Result<Option<i64>> {
    conn.prepare_cached("SELECT generation FROM vms WHERE uid = ?1")?
        .query_row([uid], |row| row.get(0))
        .optional()
}

fn name_taken(vm_id: &str, holder: &str) -> ApplyError {
    let message = format!(
        "the name {vm_id} is taken by the VM with uid {holder}. Delete that VM or choose another name"
    );
    ApplyError::Refused(store_error(StoreErrorKind::NameTaken, Effect::NotApplied, message))
}

fn conflict(message: String) -> ApplyError {
    ApplyError::Refused(store_error(StoreErrorKind::Conflict, Effect::NotApplied, message))
}

/// A fact in the database that distinguishes an applied commit from one that was rolled back.
#[derive(Debug)]
pub(crate) enum CommitProof {
    /// The event at this position is in the log.
    Event(EventSeq),
    /// The VM is recorded with this generation.
    Generation(String, i64),
    /// The VM is not recorded.
    Gone(String),
    /// The row of an answer is as the commit leaves it.
    Answer(Box<EncodedKeyChange>),
    /// The commit changes nothing.
    Nothing,
}

impl CommitProof {
    /// Returns the proof of `commit`, whose event got the position `seq`.
    pub(crate) fn of(commit: &EncodedCommit, seq: Option<EventSeq>) -> Self {
        match (&commit.change, seq) {
            // The event proves the change of the record too, because both are in one transaction.
            (_, Some(seq)) => Self::Event(seq),
            (EncodedChange::Nothing, None) => {
                commit.key.as_ref().map_or(Self::Nothing, |key| Self::Answer(Box::new(key.proof())))
            }
            (EncodedChange::Insert(record) | EncodedChange::Update(record), None) => {
                Self::Generation(record.uid.clone(), record.generation)
            }
            (
                EncodedChange::Remove { uid }
                | EncodedChange::Bury { uid, .. }
                | EncodedChange::Unbury { uid },
                None,
            ) => Self::Gone(uid.clone()),
        }
    }

    /// Returns true if the commit was applied. Only the writer may ask, and only before it writes
    /// again, because a later commit can reuse the position and the generation of one that was
    /// rolled back.
    pub(crate) fn holds(&self, conn: &Connection) -> rusqlite::Result<bool> {
        match self {
            Self::Event(seq) => {
                let seq = i64::try_from(seq.0).unwrap_or(i64::MAX);
                conn.prepare_cached("SELECT 1 FROM events WHERE seq = ?1")?.exists([seq])
            }
            Self::Generation(uid, generation) => Ok(generation_of(conn, uid)? == Some(*generation)),
            Self::Gone(uid) => Ok(generation_of(conn, uid)?.is_none()),
            Self::Answer(key) => key.holds(conn),
            Self::Nothing => Ok(true),
        }
    }
}
