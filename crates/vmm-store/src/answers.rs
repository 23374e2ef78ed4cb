//! The answers that are kept for calls with an idempotency key.
//!
//! ```text
//!   meta:   answer:ID = 01700000000000 {"id":"ID","request":…,"time_ms":1700000000000,"answer":…}
//! ```
//!
//! The rows are keys of `meta`, because an older program leaves an unknown key alone and refuses an
//! unknown table. The time stands before the JSON, so that an expiry parses no JSON.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use vmm_core::backend::Effect;
use vmm_core::idempotency::{KeptAnswer, KeyChange};
use vmm_core::store::{StoreError, StoreErrorKind};

use crate::error::{CausedBy, store_error};

/// The prefix of the keys of answers in `meta`.
const ANSWERS: &str = "answer:";
/// The end of the range of keys with that prefix, because `;` follows `:`.
const AFTER_ANSWERS: &str = "answer;";
/// The digits of the time before the JSON.
const TIME_DIGITS: usize = 14;
/// The limit on the bytes of all answers together: some 600,000 answers of 400 bytes.
const MAX_ANSWER_BYTES: u64 = 256 << 20;
/// The number of answers that one step of an expiry looks at. Commits run between the steps.
const EXPIRY_STEP: i64 = 2_000;

/// A [`KeyChange`] as a row of `meta`. Without a value the row is removed.
#[derive(Debug)]
pub(crate) struct EncodedKeyChange {
    key: String,
    value: Option<String>,
}

/// Converts `change` to a row.
///
/// # Errors
///
/// [`StoreErrorKind::Io`] if JSON cannot hold the answer.
pub(crate) fn encode(change: KeyChange) -> Result<EncodedKeyChange, StoreError> {
    match change {
        KeyChange::Forget(id) => Ok(EncodedKeyChange { key: key(&id), value: None }),
        KeyChange::Keep(kept) => {
            let json = serde_json::to_string(&kept).map_err(|error| {
                let message = "the answer to a call with an idempotency key cannot be stored";
                store_error(StoreErrorKind::Io, Effect::NotApplied, message).caused_by(error)
            })?;
            let time_ms = kept.time_ms.max(0);
            let value = Some(format!("{time_ms:0TIME_DIGITS$} {json}"));
            Ok(EncodedKeyChange { key: key(&kept.call.id), value })
        }
    }
}

fn key(id: &str) -> String {
    format!("{ANSWERS}{id}")
}

impl EncodedKeyChange {
    /// Returns the bytes that the row takes.
    fn bytes(&self) -> u64 {
        self.value.as_ref().map_or(0, |value| (self.key.len() + value.len()) as u64)
    }

    /// Returns true if the row is as this change leaves it.
    pub(crate) fn holds(&self, conn: &Connection) -> rusqlite::Result<bool> {
        Ok(value_of(conn, &self.key)? == self.value)
    }

    /// Returns a copy that can prove the change later.
    pub(crate) fn proof(&self) -> Self {
        Self { key: self.key.clone(), value: self.value.clone() }
    }
}

/// Applies `change`.
pub(crate) fn apply(conn: &Connection, change: &EncodedKeyChange) -> rusqlite::Result<()> {
    match &change.value {
        Some(value) => conn
            .prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)")?
            .execute(params![change.key, value])?,
        None => conn.prepare_cached("DELETE FROM meta WHERE key = ?1")?.execute([&change.key])?,
    };
    Ok(())
}

fn value_of(conn: &Connection, key: &str) -> rusqlite::Result<Option<String>> {
    conn.prepare_cached("SELECT value FROM meta WHERE key = ?1")?
        .query_row([key], |row| row.get(0))
        .optional()
}

/// Finds the answer for `id`. The second error is the reason why a row cannot be read.
pub(crate) fn find(conn: &Connection, id: &str) -> rusqlite::Result<Option<Result<KeptAnswer, String>>> {
    let value = value_of(conn, &key(id))?;
    Ok(value.map(|value| {
        let json = value.get(TIME_DIGITS + 1..).unwrap_or_default();
        serde_json::from_str(json).map_err(|error| error.to_string())
    }))
}

/// The size of all answers, which the writer changes and the reader sees.
#[derive(Clone, Debug)]
pub(crate) struct AnswerRoom {
    bytes: Arc<AtomicU64>,
    max_bytes: u64,
}

impl AnswerRoom {
    /// Reads the size from the database. The query reads the key and the length of every answer.
    pub(crate) fn of(conn: &Connection) -> rusqlite::Result<Self> {
        let bytes: i64 = conn.query_row(
            "SELECT coalesce(sum(octet_length(key) + octet_length(value)), 0) FROM meta WHERE key >= ?1 AND key < ?2",
            [ANSWERS, AFTER_ANSWERS],
            |row| row.get(0),
        )?;
        let bytes = Arc::new(AtomicU64::new(bytes.unsigned_abs()));
        Ok(Self { bytes, max_bytes: MAX_ANSWER_BYTES })
    }

    /// Returns true if a further answer may be kept.
    pub(crate) fn is_left(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) < self.max_bytes
    }

    /// Counts a row that was written. A row in whose place it was written stays counted until the
    /// next expiry has counted anew.
    pub(crate) fn count(&self, change: &EncodedKeyChange) {
        self.bytes.fetch_add(change.bytes(), Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn limited_to(self, max_bytes: u64) -> Self {
        Self { max_bytes, ..self }
    }
}

/// An expiry under way, which walks over all answers in the order of their keys.
#[derive(Debug)]
pub(crate) struct AnswerExpiry {
    kept_ms: Range<i64>,
    /// The key up to which the walk has come.
    at: String,
    /// The bytes of the answers that the walk has left.
    left: u64,
    /// The bytes of all answers when the walk began.
    before: u64,
    /// The number of the removed answers.
    pub(crate) removed: u64,
}

impl AnswerExpiry {
    /// Begins an expiry of the answers whose time is not in `kept_ms`.
    pub(crate) fn new(kept_ms: Range<i64>, room: &AnswerRoom) -> Self {
        let before = room.bytes.load(Ordering::Relaxed);
        Self { kept_ms, at: ANSWERS.to_owned(), left: 0, before, removed: 0 }
    }

    /// Takes one step. Returns true if the walk has ended.
    pub(crate) fn step(&mut self, conn: &mut Connection, room: &AnswerRoom) -> rusqlite::Result<bool> {
        let transaction = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let rows = rows_after(&transaction, &self.at)?;
        for (key, bytes, time_ms) in &rows {
            if self.kept_ms.contains(time_ms) {
                self.left += bytes;
            } else {
                transaction.prepare_cached("DELETE FROM meta WHERE key = ?1")?.execute([key])?;
                self.removed += 1;
            }
        }
        transaction.commit()?;
        match rows.last() {
            Some((key, ..)) if rows.len() as i64 == EXPIRY_STEP => {
                self.at.clone_from(key);
                Ok(false)
            }
            _ => {
                // The answers that were written during the walk count in addition.
                let now = room.bytes.load(Ordering::Relaxed);
                room.bytes.store(self.left + now.saturating_sub(self.before), Ordering::Relaxed);
                Ok(true)
            }
        }
    }
}

/// Returns the key, the bytes and the time of the next answers behind the key `after`.
fn rows_after(conn: &Connection, after: &str) -> rusqlite::Result<Vec<(String, u64, i64)>> {
    conn.prepare_cached(
        "SELECT key, octet_length(key) + octet_length(value), CAST(substr(value, 1, ?3) AS INTEGER) FROM meta \
         WHERE key > ?1 AND key < ?2 ORDER BY key LIMIT ?4",
    )?
    .query_map(params![after, AFTER_ANSWERS, TIME_DIGITS as i64, EXPIRY_STEP], |row| {
        Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs(), row.get(2)?))
    })?
    .collect()
}

#[cfg(test)]
mod tests {
    use vmm_core::idempotency::{CallAnswer, FailedCall, FailureCode};
    use vmm_testkit::store_suite::keyed_call;

    use super::*;
    use crate::{open, schema};

    fn refusal(id: &str, time_ms: i64) -> KeptAnswer {
        let (code, message) = (FailureCode::NotFound, "there is no VM".to_owned());
        let failed = FailedCall { code, message, violations: Vec::new() };
        KeptAnswer { call: keyed_call(id), time_ms, answer: CallAnswer::Failed(failed) }
    }

    fn database(dir: &std::path::Path) -> Connection {
        open::open(dir, schema::MIGRATIONS).unwrap().writer
    }

    fn keep(conn: &Connection, room: &AnswerRoom, id: &str, time_ms: i64) {
        let change = encode(KeyChange::Keep(Box::new(refusal(id, time_ms)))).unwrap();
        apply(conn, &change).unwrap();
        room.count(&change);
    }

    fn expire(conn: &mut Connection, room: &AnswerRoom, kept_ms: Range<i64>) -> (u64, u32) {
        let mut expiry = AnswerExpiry::new(kept_ms, room);
        let mut steps = 1;
        while !expiry.step(conn, room).unwrap() {
            steps += 1;
        }
        (expiry.removed, steps)
    }

    #[test]
    fn an_expiry_walks_over_all_answers_in_steps() {
        let dir = tempfile::tempdir().unwrap();
        let mut conn = database(dir.path());
        let room = AnswerRoom::of(&conn).unwrap();
        conn.execute_batch("BEGIN").unwrap();
        for number in 0..2 * EXPIRY_STEP + 1 {
            keep(&conn, &room, &format!("{number:04}"), number);
        }
        conn.execute_batch("COMMIT").unwrap();
        assert_eq!(expire(&mut conn, &room, 10..4_000), (11, 3), "too old, and from the future");
        assert_eq!(find(&conn, "0009").unwrap(), None);
        assert_eq!(find(&conn, "0010").unwrap().unwrap().unwrap(), refusal("0010", 10));
        assert_eq!(find(&conn, "4000").unwrap(), None);
        let settled: String =
            conn.query_row("SELECT value FROM meta WHERE key = 'settled'", [], |row| row.get(0)).unwrap();
        assert_eq!(settled, "0", "other keys of the table stay");
    }

    #[test]
    fn no_room_is_left_beyond_the_limit_until_answers_expire() {
        let dir = tempfile::tempdir().unwrap();
        let mut conn = database(dir.path());
        let room = AnswerRoom::of(&conn).unwrap().limited_to(10_000);
        let mut count = 0;
        while room.is_left() {
            keep(&conn, &room, &format!("{count:04}"), count);
            count += 1;
        }
        assert!((10..200).contains(&count), "{count} answers have room");
        let read = AnswerRoom::of(&conn).unwrap().bytes.load(Ordering::Relaxed);
        assert_eq!(read, room.bytes.load(Ordering::Relaxed), "a restart counts as the writer does");
        assert_eq!(expire(&mut conn, &room, 5..i64::MAX).0, 5);
        assert!(room.is_left());
        // An answer in the place of another is counted twice until the next expiry.
        for _ in 0..count {
            keep(&conn, &room, "0009", 9);
        }
        assert!(!room.is_left());
        assert_eq!(expire(&mut conn, &room, 0..i64::MAX).0, 0);
        assert!(room.is_left());
    }
}
