//! The thread that writes, with group commit.
//!
//! ```text
//!   wait for a job ─► take all that wait ─► BEGIN ─► each in a SAVEPOINT ─► COMMIT ─► answer each
//!         ▲                                             │                    │
//!         └── a step of expiry, if asked                │                    ├─ no room: (1)
//!                   refused: undone, the others go on ──┤                    └─ disk fails: settle
//!                   failed: (1) ────────────────────────┘
//!
//!   (1) nothing was applied: each once more, alone; a forced commit with the reserve
//! ```
//!
//! **Settling.** When the disk fails during a COMMIT, SQLite rolls the transaction back. The end of
//! the transaction may have reached the log all the same, and a process that reads the log after a
//! crash would take the transaction for committed. The writer therefore looks whether the changes
//! are in the database and commits one more transaction, because that transaction overwrites the
//! failed one in the log. The outcome is certain if the second transaction succeeds. If it fails
//! too, the answer is [`Effect::Unknown`], until any later commit succeeds.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};
use vmm_core::backend::Effect;
use vmm_core::event::EventSeq;
use vmm_core::store::{StoreError, StoreErrorKind};

use crate::answers::{AnswerExpiry, AnswerRoom};
use crate::apply::{ApplyError, CommitProof, apply};
use crate::checkpoint::{self, LogPressure};
use crate::codec::EncodedCommit;
use crate::error::{from_sqlite, kind_of, proves_not_committed};
use crate::labels;
use crate::reserve::Reserve;

/// The largest number of commits in one transaction.
const MAX_GROUP: usize = 256;
/// The number of events that one step of an expiry removes. Commits run between the steps.
const EXPIRY_STEP: u64 = 500;
/// The limit on the text of all events together, in bytes: a million and a half events of 700
/// bytes.
const MAX_EVENT_BYTES: u64 = 1 << 30;
/// The number of pages of 4 KiB that one step of an expiry returns to the file system.
const VACUUM_STEP: i64 = 500;
/// The number of free pages that stay in the file for new events.
const FREE_PAGES: i64 = 2_500;

type ReplySender<T> = oneshot::Sender<Result<T, StoreError>>;
type CommitResult = Result<Option<EventSeq>, StoreError>;

/// A request to the writer.
#[derive(Debug)]
pub(crate) enum WriteJob {
    /// A commit to carry out. A `forced` one may use the reserve.
    Commit {
        commit: EncodedCommit,
        forced: bool,
        reply: ReplySender<Option<EventSeq>>,
    },
    Expire {
        before_ms: i64,
        reply: ReplySender<u64>,
    },
    ExpireAnswers {
        kept_ms: Range<i64>,
        reply: ReplySender<u64>,
    },
}

/// A commit, and the channel on which its caller waits.
#[derive(Debug)]
struct WaitingCommit {
    commit: EncodedCommit,
    forced: bool,
    reply: ReplySender<Option<EventSeq>>,
}

/// An expiry under way.
#[derive(Debug)]
struct Expiry {
    until: ExpiryExtent,
    removed: u64,
    /// The caller of the expiry. `None` if the writer itself began the expiry to bound the log.
    reply: Option<ReplySender<u64>>,
}

/// The extent of an expiry, which begins at the oldest event.
#[derive(Clone, Copy, Debug)]
enum ExpiryExtent {
    /// Stops at the first event that is not older than this time, in Unix milliseconds.
    Time(i64),
    /// Stops when at most this many bytes of events are left.
    Bytes(u64),
}

/// The failure of a transaction.
#[derive(Debug)]
enum TransactionError {
    /// Nothing of the transaction was applied.
    NotApplied(rusqlite::Error),
    /// The COMMIT failed half-way. `outcomes` are the answers if the transaction turns out to be
    /// applied.
    InDoubt { error: rusqlite::Error, outcomes: Vec<CommitResult>, proof: Option<CommitProof> },
}

/// The state of the writing thread.
#[derive(Debug)]
pub(crate) struct Writer {
    conn: Connection,
    path: PathBuf,
    log: LogPressure,
    reserve: Reserve,
    expiries: VecDeque<Expiry>,
    /// The size of the text of all events, in bytes.
    event_bytes: u64,
    max_event_bytes: u64,
    room: AnswerRoom,
    answer_expiries: VecDeque<(AnswerExpiry, ReplySender<u64>)>,
}

impl Writer {
    pub(crate) fn new(
        mut conn: Connection,
        path: PathBuf,
        log: LogPressure,
        reserve: Reserve,
    ) -> Result<Self, StoreError> {
        let hook = {
            let log = log.clone();
            move |_: &mut rusqlite::hooks::Wal, pages| {
                log.committed(pages);
                Ok(())
            }
        };
        conn.wal_hook(Some(hook))
            .map_err(|error| from_sqlite(&path, "opening", Effect::NotApplied, error))?;
        // The sum is read at opening only, because the query reads every event.
        let bytes: i64 = conn
            .query_row("SELECT coalesce(sum(octet_length(event)), 0) FROM events", [], |row| row.get(0))
            .map_err(|error| from_sqlite(&path, "reading", Effect::NotApplied, error))?;
        let room = AnswerRoom::of(&conn)
            .map_err(|error| from_sqlite(&path, "reading", Effect::NotApplied, error))?;
        Ok(Self {
            conn,
            path,
            log,
            reserve,
            expiries: VecDeque::new(),
            event_bytes: bytes.unsigned_abs(),
            max_event_bytes: MAX_EVENT_BYTES,
            room,
            answer_expiries: VecDeque::new(),
        })
    }

    /// Returns the room for kept answers, for the reader.
    pub(crate) fn answer_room(&self) -> AnswerRoom {
        self.room.clone()
    }

    /// Works until the queue is closed and every accepted job is done.
    pub(crate) fn run(mut self, mut jobs: mpsc::Receiver<WriteJob>) {
        while let Some(group) = self.next_group(&mut jobs) {
            if !group.is_empty() {
                self.commit_group(group);
            }
            // One step of an expiry runs between two groups, so a long expiry delays a commit by
            // one step at most.
            if let Some(expiry) = self.expiries.pop_front() {
                self.expire_step(expiry);
            }
            if let Some((expiry, reply)) = self.answer_expiries.pop_front() {
                self.expire_answers_step(expiry, reply);
            }
            // The checkpointer has not caught up, because commits come without a pause. The writer
            // moves the log itself and thereby holds back the commits that wait.
            if self.log.must_stop_writing() {
                checkpoint::move_available_log(&self.conn);
            }
        }
    }

    /// Takes all commits that wait. Blocks for a job if no expiry is under way. Returns `None` when
    /// the queue is closed and nothing is left to do.
    fn next_group(&mut self, jobs: &mut mpsc::Receiver<WriteJob>) -> Option<Vec<WaitingCommit>> {
        let mut group = Vec::new();
        // An expiry under way is work, so the writer only looks into the queue then and does not
        // block.
        let idle = self.expiries.is_empty() && self.answer_expiries.is_empty();
        let mut next = if idle { Some(jobs.blocking_recv()?) } else { jobs.try_recv().ok() };
        while let Some(job) = next {
            match job {
                WriteJob::Commit { commit, forced, reply } => {
                    group.push(WaitingCommit { commit, forced, reply })
                }
                WriteJob::Expire { before_ms, reply } => {
                    let until = ExpiryExtent::Time(before_ms);
                    self.expiries.push_back(Expiry { until, removed: 0, reply: Some(reply) });
                }
                WriteJob::ExpireAnswers { kept_ms, reply } => {
                    self.answer_expiries.push_back((AnswerExpiry::new(kept_ms, &self.room), reply));
                }
            }
            next = if group.len() < MAX_GROUP { jobs.try_recv().ok() } else { None };
        }
        Some(group)
    }

    fn commit_group(&mut self, group: Vec<WaitingCommit>) {
        // Four outcomes are possible. (1) All of it is committed. (2) Nothing was applied and the
        // group has several members: each is tried alone. (3) Nothing was applied and the group is
        // one commit: this commit fails. (4) The COMMIT failed half-way, and `resolve` finds out
        // whether it counts.
        let mut result = self.try_group(&group);
        let reserve = self.reserve.clone();
        // Only a commit that is forced and alone may use the reserve, because a group could hold
        // ordinary commits that fill the reserve up. The loop gives up one piece at a time, because
        // another program may take the freed room first, and ends when the reserve has nothing left
        // or the error changes.
        while let ([WaitingCommit { forced: true, .. }], Err(TransactionError::NotApplied(error))) =
            (&group[..], &result)
            && kind_of(error) == StoreErrorKind::Full
            && let Some(again) = reserve.release_for(|| self.try_group(&group))
        {
            result = again;
        }
        match result {
            Ok(outcomes) => {
                self.bound_log(&group, &outcomes);
                answer(group, outcomes);
            }
            // One member may be the reason, for example because it is too big for the room that is
            // left, and the others may fit. The recursion is one level deep, because each new group
            // has one member.
            Err(TransactionError::NotApplied(_)) if group.len() > 1 => {
                for waiting in group {
                    self.commit_group(vec![waiting]);
                }
            }
            Err(TransactionError::NotApplied(error)) => {
                let error = from_sqlite(&self.path, "writing to", Effect::NotApplied, error);
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the store could not write a change"
                );
                answer(group, vec![Err(error)]);
            }
            Err(TransactionError::InDoubt { error, outcomes, proof }) => {
                let outcomes = self.resolve(&error, outcomes, proof);
                self.bound_log(&group, &outcomes);
                answer(group, outcomes);
            }
        }
    }

    fn try_group(&mut self, group: &[WaitingCommit]) -> Result<Vec<CommitResult>, TransactionError> {
        // Immediate, because the transaction is known to write: a deferred one would take the write
        // lock at its first change and could fail there as busy.
        let mut transaction = self
            .conn
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(TransactionError::NotApplied)?;
        let mut outcomes = Vec::with_capacity(group.len());
        let mut proof = None;
        for WaitingCommit { commit, .. } in group {
            let savepoint = transaction.savepoint().map_err(TransactionError::NotApplied)?;
            match apply(&savepoint, commit) {
                // One proof is enough for the group, because the members of a transaction are
                // applied together or not at all.
                Ok(seq) => {
                    savepoint.commit().map_err(TransactionError::NotApplied)?;
                    proof.get_or_insert_with(|| CommitProof::of(commit, seq));
                    outcomes.push(Ok(seq));
                }
                // The commit is not legal. Finishing the savepoint undoes this commit only.
                Err(ApplyError::Refused(error)) => {
                    savepoint.finish().map_err(TransactionError::NotApplied)?;
                    outcomes.push(Err(error));
                }
                // The whole group fails. Dropping the transaction rolls it back, if SQLite has not
                // done so already.
                Err(ApplyError::Sqlite(error)) => return Err(TransactionError::NotApplied(error)),
            }
        }
        match transaction.commit() {
            Ok(()) => Ok(outcomes),
            Err(error) if proves_not_committed(&error) => Err(TransactionError::NotApplied(error)),
            Err(error) => Err(TransactionError::InDoubt { error, outcomes, proof }),
        }
    }

    /// Finds out the effect of a COMMIT that failed half-way, and returns the answer of each
    /// member.
    fn resolve(
        &mut self,
        error: &rusqlite::Error,
        outcomes: Vec<CommitResult>,
        proof: Option<CommitProof>,
    ) -> Vec<CommitResult> {
        let effect = match self.determine_outcome(proof.as_ref()) {
            Ok(true) => return outcomes,
            Ok(false) => Effect::NotApplied,
            Err(_) => Effect::Unknown,
        };
        tracing::error!(%error, ?effect, commits = outcomes.len(), "a transaction failed on the way to the disk");
        let code = error.sqlite_error().copied();
        let failure = |effect| {
            // All members share the cause, but SQLite's error cannot be cloned. Each member gets an
            // error with the same code.
            let cause = code.map_or(rusqlite::Error::InvalidQuery, |code| {
                rusqlite::Error::SqliteFailure(code, Some(error.to_string()))
            });
            from_sqlite(&self.path, "writing to", effect, cause)
        };
        // A refused member gets the failure too, because a neighbour that is gone with the
        // transaction may have been the reason of the refusal. Such a member was certainly not
        // applied.
        outcomes.into_iter().map(|o| Err(failure(o.map_or(Effect::NotApplied, |_| effect)))).collect()
    }

    /// Returns true if the transaction that `proof` belongs to was applied, and makes the answer
    /// final.
    fn determine_outcome(&mut self, proof: Option<&CommitProof>) -> rusqlite::Result<bool> {
        let transaction = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let applied = proof.map_or(Ok(false), |proof| proof.holds(&transaction))?;
        // The change itself means nothing. It gives the transaction a page to write, and the commit
        // of that page overwrites the end of the failed transaction in the log.
        transaction.execute("UPDATE meta SET value = value + 1 WHERE key = 'settled'", [])?;
        transaction.commit()?;
        Ok(applied)
    }

    /// Removes the events of one step. Answers the caller if that was the last step, and queues the
    /// expiry again otherwise.
    fn expire_step(&mut self, mut expiry: Expiry) {
        match self.remove_events(expiry.until, expiry.removed) {
            Ok(removed) => {
                expiry.removed += removed;
                // A full step means that more events may be old enough. A shorter step reached the
                // end.
                if removed == EXPIRY_STEP {
                    self.expiries.push_back(expiry);
                } else if let Some(reply) = expiry.reply {
                    let _ = reply.send(Ok(expiry.removed));
                } else {
                    tracing::warn!(
                        removed = expiry.removed,
                        "the event log reached its limit; the oldest events were removed"
                    );
                }
            }
            Err(error) => {
                // Events that earlier steps removed stay removed, hence `Unknown`. A repeated call
                // is harmless.
                let error = from_sqlite(&self.path, "removing old events from", Effect::Unknown, error);
                match expiry.reply {
                    Some(reply) => drop(reply.send(Err(error))),
                    None => {
                        tracing::warn!(%error, "the event log is over its limit, and removing its oldest events failed")
                    }
                }
            }
        }
    }

    /// Takes one step of an expiry of answers. Answers the caller if that was the last step, and
    /// queues the expiry again otherwise.
    fn expire_answers_step(&mut self, mut expiry: AnswerExpiry, reply: ReplySender<u64>) {
        match expiry.step(&mut self.conn, &self.room) {
            Ok(false) => self.answer_expiries.push_back((expiry, reply)),
            Ok(true) => drop(reply.send(Ok(expiry.removed))),
            Err(error) => {
                let error = from_sqlite(&self.path, "removing old answers from", Effect::Unknown, error);
                drop(reply.send(Err(error)));
            }
        }
    }

    /// Counts the answers and the events of a committed group, and begins an expiry if the log has become too long.
    /// The expiry removes a tenth of the log, because otherwise each later commit would begin one
    /// of its own.
    fn bound_log(&mut self, group: &[WaitingCommit], outcomes: &[CommitResult]) {
        for (waiting, outcome) in group.iter().zip(outcomes) {
            if let (Some(key), Ok(_)) = (&waiting.commit.key, outcome) {
                self.room.count(key);
            }
            if let (Some(event), Ok(Some(_))) = (&waiting.commit.event, outcome) {
                self.event_bytes += event.json.len() as u64;
            }
        }
        let under_way = self.expiries.iter().any(|expiry| matches!(expiry.until, ExpiryExtent::Bytes(_)));
        if self.event_bytes > self.max_event_bytes && !under_way {
            let until = ExpiryExtent::Bytes(self.max_event_bytes / 10 * 9);
            self.expiries.push_back(Expiry { until, removed: 0, reply: None });
        }
    }

    /// Removes the events of one step, oldest first, and returns their number. Earlier steps of the
    /// same expiry have removed `before` events.
    fn remove_events(&mut self, until: ExpiryExtent, before: u64) -> rusqlite::Result<u64> {
        let excess = match until {
            ExpiryExtent::Time(_) => u64::MAX,
            ExpiryExtent::Bytes(left) => self.event_bytes.saturating_sub(left),
        };
        let transaction = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let (last, bytes) = oldest_to_go(&transaction, until, excess)?;
        let removed = transaction.prepare_cached("DELETE FROM events WHERE seq <= ?1")?.execute([last])?;
        let removed = removed as u64;
        // Labels expire in the last step of an expiry only, because the query walks over the labels
        // of every VM.
        if removed < EXPIRY_STEP && removed + before > 0 {
            labels::expire(&transaction)?;
        }
        transaction.commit()?;
        self.event_bytes = self.event_bytes.saturating_sub(bytes);
        // The vacuum is a transaction of its own, because the events are gone whether or not it
        // succeeds.
        return_free_pages(&self.conn)?;
        Ok(removed)
    }
}

/// Returns the position of the last event that one step may remove, and the bytes of all events up
/// to that position. The position is 0 if no event may be removed.
fn oldest_to_go(conn: &Connection, until: ExpiryExtent, excess: u64) -> rusqlite::Result<(i64, u64)> {
    let mut oldest =
        conn.prepare_cached("SELECT seq, time_ms, octet_length(event) FROM events ORDER BY seq LIMIT ?1")?;
    let mut rows = oldest.query([EXPIRY_STEP.cast_signed()])?;
    let (mut last, mut bytes) = (0, 0);
    while let Some(row) = rows.next()? {
        let time_ms: i64 = row.get(1)?;
        // The loop stops at the first event that stays and looks no further, because the log must
        // not get a hole: a later event can have an earlier time if the host's clock was set back.
        if matches!(until, ExpiryExtent::Time(before_ms) if time_ms >= before_ms) || bytes >= excess {
            break;
        }
        last = row.get(0)?;
        bytes += row.get::<_, i64>(2)?.unsigned_abs();
    }
    Ok((last, bytes))
}

/// Returns some free pages to the file system if the file has many of them. A database of an
/// earlier release keeps its pages, because only a new file can have incremental vacuum.
fn return_free_pages(conn: &Connection) -> rusqlite::Result<()> {
    let free: i64 = conn.pragma_query_value(None, "freelist_count", |row| row.get(0))?;
    let pages = (free - FREE_PAGES).min(VACUUM_STEP);
    if pages <= 0 {
        return Ok(());
    }
    let mut statement = conn.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(())
}

/// Answers each of `group`. A caller that went away gets no answer, and its commit stands all the
/// same.
fn answer(group: Vec<WaitingCommit>, outcomes: Vec<CommitResult>) {
    for (waiting, outcome) in group.into_iter().zip(outcomes) {
        let _ = waiting.reply.send(outcome);
    }
}

#[cfg(test)]
mod tests;
