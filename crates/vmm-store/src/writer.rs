//! The one thread that writes, with group commit.
//!
//! ```text
//!   wait for a job ─► take all that wait ─► BEGIN ─► each in a SAVEPOINT ─► COMMIT ─► answer each
//!         ▲                                          │ refused: undone,     │
//!         │                                          │ the others go on     ├─ no room: nothing was applied,
//!         │                                          │                      │  so each once more, alone; what
//!         │                                          │                      │  is forced, in the room kept for it
//!         └── a step of expiry, if asked             └─ failed: each once   └─ the disk failed: settle
//!                                                       more, alone
//! ```
//!
//! **Settling.** When the disk fails during a COMMIT, SQLite rolls back, but the end of the transaction may have reached the
//! log, and whoever reads the log after a crash would take it for committed. So the writer looks whether the changes are there
//! and writes one more transaction, which takes the place of the failed one in the log. If that succeeds, the outcome is
//! certain. If it fails too, the answer is [`Effect::Unknown`], until any later commit succeeds.

use std::collections::VecDeque;
use std::path::PathBuf;

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};
use vmm_core::backend::Effect;
use vmm_core::event::EventSeq;
use vmm_core::store::{StoreError, StoreErrorKind};

use crate::apply::{Failure, Proof, apply};
use crate::checkpoint::{self, Log};
use crate::codec::EncodedCommit;
use crate::error::{from_sqlite, kind_of, proves_not_committed};
use crate::labels;
use crate::reserve::Reserve;

/// The most commits in one transaction.
const MAX_GROUP: usize = 256;
/// Events that one step of an expiry removes; commits go in between.
const EXPIRY_STEP: u64 = 500;
/// The most text that events may have together, in bytes: at some 700 bytes an event, a million and a half of them.
const MAX_EVENT_BYTES: u64 = 1 << 30;
/// Pages of 4 KiB that one step of an expiry gives back to the file system.
const VACUUM_STEP: i64 = 500;
/// Free pages that are kept for new events.
const FREE_PAGES: i64 = 2_500;

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;
type Outcome = Result<Option<EventSeq>, StoreError>;

/// What a writer can be asked.
#[derive(Debug)]
pub(crate) enum Job {
    /// `forced`: may use the room that is kept for it.
    Commit {
        commit: EncodedCommit,
        forced: bool,
        reply: Answer<Option<EventSeq>>,
    },
    Expire {
        before_ms: i64,
        reply: Answer<u64>,
    },
}

/// A commit and who waits for it.
#[derive(Debug)]
struct Waiting {
    commit: EncodedCommit,
    forced: bool,
    reply: Answer<Option<EventSeq>>,
}

/// An expiry under way.
#[derive(Debug)]
struct Expiry {
    until: Until,
    removed: u64,
    /// Nobody waits where the log itself has become too long.
    reply: Option<Answer<u64>>,
}

/// The extent of an expiry, from the oldest event on.
#[derive(Clone, Copy, Debug)]
enum Until {
    /// Up to the first event that is not older, in Unix milliseconds.
    Time(i64),
    /// Until no more than so many bytes of events are left.
    Bytes(u64),
}

/// How a transaction failed.
#[derive(Debug)]
enum Broken {
    /// Nothing of it was applied.
    NotApplied(rusqlite::Error),
    /// Its COMMIT failed half-way.
    InDoubt { error: rusqlite::Error, outcomes: Vec<Outcome>, proof: Option<Proof> },
}

/// The writing thread's own.
#[derive(Debug)]
pub(crate) struct Writer {
    conn: Connection,
    path: PathBuf,
    log: Log,
    reserve: Reserve,
    expiries: VecDeque<Expiry>,
    /// The text of all events, in bytes.
    event_bytes: u64,
    max_event_bytes: u64,
}

impl Writer {
    pub(crate) fn new(
        mut conn: Connection,
        path: PathBuf,
        log: Log,
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
        let bytes: i64 = conn
            .query_row("SELECT coalesce(sum(octet_length(event)), 0) FROM events", [], |row| row.get(0))
            .map_err(|error| from_sqlite(&path, "reading", Effect::NotApplied, error))?;
        Ok(Self {
            conn,
            path,
            log,
            reserve,
            expiries: VecDeque::new(),
            event_bytes: bytes.unsigned_abs(),
            max_event_bytes: MAX_EVENT_BYTES,
        })
    }

    /// Works until nobody can ask any more and everything that was accepted is done.
    pub(crate) fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(group) = self.next_group(&mut jobs) {
            if !group.is_empty() {
                self.commit_group(group);
            }
            if let Some(expiry) = self.expiries.pop_front() {
                self.expire_step(expiry);
            }
            if self.log.must_stop_writing() {
                checkpoint::passive(&self.conn);
            }
        }
    }

    /// Takes all commits that wait, and waits for a job if nothing else is to be done. `None` is the end.
    fn next_group(&mut self, jobs: &mut mpsc::Receiver<Job>) -> Option<Vec<Waiting>> {
        let mut group = Vec::new();
        let mut next =
            if self.expiries.is_empty() { Some(jobs.blocking_recv()?) } else { jobs.try_recv().ok() };
        while let Some(job) = next {
            match job {
                Job::Commit { commit, forced, reply } => group.push(Waiting { commit, forced, reply }),
                Job::Expire { before_ms, reply } => {
                    let until = Until::Time(before_ms);
                    self.expiries.push_back(Expiry { until, removed: 0, reply: Some(reply) });
                }
            }
            next = if group.len() < MAX_GROUP { jobs.try_recv().ok() } else { None };
        }
        Some(group)
    }

    fn commit_group(&mut self, group: Vec<Waiting>) {
        let mut result = self.try_group(&group);
        let reserve = self.reserve.clone();
        while let ([Waiting { forced: true, .. }], Err(Broken::NotApplied(error))) = (&group[..], &result)
            && kind_of(error) == StoreErrorKind::Full
            && let Some(again) = reserve.spend(|| self.try_group(&group))
        {
            result = again;
        }
        match result {
            Ok(outcomes) => {
                self.bound_log(&group, &outcomes);
                answer(group, outcomes);
            }
            // One of them may be the reason (too big for what room is left, say), and the others may fit.
            Err(Broken::NotApplied(_)) if group.len() > 1 => {
                for waiting in group {
                    self.commit_group(vec![waiting]);
                }
            }
            Err(Broken::NotApplied(error)) => {
                let error = from_sqlite(&self.path, "writing to", Effect::NotApplied, error);
                tracing::error!(error = &error as &dyn std::error::Error, "a commit failed");
                answer(group, vec![Err(error)]);
            }
            Err(Broken::InDoubt { error, outcomes, proof }) => {
                let outcomes = self.resolve(&error, outcomes, proof);
                self.bound_log(&group, &outcomes);
                answer(group, outcomes);
            }
        }
    }

    fn try_group(&mut self, group: &[Waiting]) -> Result<Vec<Outcome>, Broken> {
        let mut transaction = self
            .conn
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(Broken::NotApplied)?;
        let mut outcomes = Vec::with_capacity(group.len());
        let mut proof = None;
        for Waiting { commit, .. } in group {
            let savepoint = transaction.savepoint().map_err(Broken::NotApplied)?;
            match apply(&savepoint, commit) {
                Ok(seq) => {
                    savepoint.commit().map_err(Broken::NotApplied)?;
                    proof.get_or_insert_with(|| Proof::of(commit, seq));
                    outcomes.push(Ok(seq));
                }
                Err(Failure::Refused(error)) => {
                    savepoint.finish().map_err(Broken::NotApplied)?;
                    outcomes.push(Err(error));
                }
                // Dropping the transaction rolls it back, if SQLite has not done so by itself.
                Err(Failure::Sqlite(error)) => return Err(Broken::NotApplied(error)),
            }
        }
        match transaction.commit() {
            Ok(()) => Ok(outcomes),
            Err(error) if proves_not_committed(&error) => Err(Broken::NotApplied(error)),
            Err(error) => Err(Broken::InDoubt { error, outcomes, proof }),
        }
    }

    /// Finds out what became of a COMMIT that failed half-way.
    fn resolve(
        &mut self,
        error: &rusqlite::Error,
        outcomes: Vec<Outcome>,
        proof: Option<Proof>,
    ) -> Vec<Outcome> {
        let effect = match self.settle(proof.as_ref()) {
            Ok(true) => return outcomes,
            Ok(false) => Effect::NotApplied,
            Err(_) => Effect::Unknown,
        };
        tracing::error!(%error, ?effect, commits = outcomes.len(), "a transaction failed on its way to the disk");
        let code = error.sqlite_error().copied();
        let failure = |effect| {
            // The cause is shared by all, and SQLite's error is not: each gets one with the same code.
            let cause = code.map_or(rusqlite::Error::InvalidQuery, |code| {
                rusqlite::Error::SqliteFailure(code, Some(error.to_string()))
            });
            from_sqlite(&self.path, "writing to", effect, cause)
        };
        // A refusal may have been due to a neighbour that is gone with the transaction, so it says nothing any more.
        outcomes.into_iter().map(|o| Err(failure(o.map_or(Effect::NotApplied, |_| effect)))).collect()
    }

    /// Says whether the transaction that `proof` is of was applied, and makes the answer final.
    fn settle(&mut self, proof: Option<&Proof>) -> rusqlite::Result<bool> {
        let transaction = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let applied = proof.map_or(Ok(false), |proof| proof.holds(&transaction))?;
        transaction.execute("UPDATE meta SET value = value + 1 WHERE key = 'settled'", [])?;
        transaction.commit()?;
        Ok(applied)
    }

    /// Removes a few events, then answers or lines up again.
    fn expire_step(&mut self, mut expiry: Expiry) {
        match self.remove_events(expiry.until, expiry.removed) {
            Ok(removed) => {
                expiry.removed += removed;
                if removed == EXPIRY_STEP {
                    self.expiries.push_back(expiry);
                } else if let Some(reply) = expiry.reply {
                    let _ = reply.send(Ok(expiry.removed));
                } else {
                    tracing::warn!(
                        removed = expiry.removed,
                        "the event log has become too long; the oldest events were removed"
                    );
                }
            }
            Err(error) => {
                // What earlier steps removed stays removed. Asking again is harmless.
                let error = from_sqlite(&self.path, "removing old events from", Effect::Unknown, error);
                match expiry.reply {
                    Some(reply) => drop(reply.send(Err(error))),
                    None => tracing::warn!(%error, "the event log is too long, and could not be cut"),
                }
            }
        }
    }

    /// Counts the events of a group that was committed, and lines up an expiry where the log has become too long. A tenth is
    /// removed at once, so that this does not come with each commit.
    fn bound_log(&mut self, group: &[Waiting], outcomes: &[Outcome]) {
        for (waiting, outcome) in group.iter().zip(outcomes) {
            if let (Some(event), Ok(Some(_))) = (&waiting.commit.event, outcome) {
                self.event_bytes += event.json.len() as u64;
            }
        }
        let under_way = self.expiries.iter().any(|expiry| matches!(expiry.until, Until::Bytes(_)));
        if self.event_bytes > self.max_event_bytes && !under_way {
            let until = Until::Bytes(self.max_event_bytes / 10 * 9);
            self.expiries.push_back(Expiry { until, removed: 0, reply: None });
        }
    }

    /// Removes a few of the oldest events, of which `before` have gone with earlier steps.
    fn remove_events(&mut self, until: Until, before: u64) -> rusqlite::Result<u64> {
        let excess = match until {
            Until::Time(_) => u64::MAX,
            Until::Bytes(left) => self.event_bytes.saturating_sub(left),
        };
        let transaction = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let (last, bytes) = oldest_to_go(&transaction, until, excess)?;
        let removed = transaction.prepare_cached("DELETE FROM events WHERE seq <= ?1")?.execute([last])?;
        let removed = removed as u64;
        // Once for all steps of an expiry, because this walks over the labels of every VM.
        if removed < EXPIRY_STEP && removed + before > 0 {
            labels::expire(&transaction)?;
        }
        transaction.commit()?;
        self.event_bytes = self.event_bytes.saturating_sub(bytes);
        give_back(&self.conn)?;
        Ok(removed)
    }
}

/// The last of the oldest events that may go in one step, and the bytes of all up to it. 0 where none may.
fn oldest_to_go(conn: &Connection, until: Until, excess: u64) -> rusqlite::Result<(i64, u64)> {
    let mut oldest =
        conn.prepare_cached("SELECT seq, time_ms, octet_length(event) FROM events ORDER BY seq LIMIT ?1")?;
    let mut rows = oldest.query([EXPIRY_STEP.cast_signed()])?;
    let (mut last, mut bytes) = (0, 0);
    while let Some(row) = rows.next()? {
        let time_ms: i64 = row.get(1)?;
        if matches!(until, Until::Time(before_ms) if time_ms >= before_ms) || bytes >= excess {
            break;
        }
        last = row.get(0)?;
        bytes += row.get::<_, i64>(2)?.unsigned_abs();
    }
    Ok((last, bytes))
}

/// Makes the file smaller by some of its free pages, where there are many. A database of an earlier release keeps them.
fn give_back(conn: &Connection) -> rusqlite::Result<()> {
    let free: i64 = conn.pragma_query_value(None, "freelist_count", |row| row.get(0))?;
    let pages = (free - FREE_PAGES).min(VACUUM_STEP);
    if pages <= 0 {
        return Ok(());
    }
    let mut statement = conn.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
    let mut rows = statement.query([])?;
    // Each step gives back one page.
    while rows.next()?.is_some() {}
    Ok(())
}

/// Answers each of `group`. Who has gone away gets none: the commit stands all the same.
fn answer(group: Vec<Waiting>, outcomes: Vec<Outcome>) {
    for (waiting, outcome) in group.into_iter().zip(outcomes) {
        let _ = waiting.reply.send(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{codec, open, schema};
    use vmm_testkit::store_suite::{insert, next, record, remove, update};

    fn waiting(commit: vmm_core::store::Commit) -> Waiting {
        let (reply, _) = oneshot::channel();
        Waiting {
            commit: codec::encode(commit, &crate::foreign::Foreign::default()).unwrap(),
            forced: false,
            reply,
        }
    }

    fn writer(dir: &std::path::Path) -> Writer {
        let opened = open::open(dir, schema::MIGRATIONS).unwrap();
        Writer::new(opened.writer, opened.path, checkpoint::channel().0, opened.reserve).unwrap()
    }

    #[test]
    fn one_that_is_refused_takes_nobody_of_its_group_along() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(dir.path());
        let (a, rival, b) = (record("a"), record("a"), record("b"));
        let group = [
            insert(&a),
            insert(&rival),
            insert(&b),
            update(&next(&next(&b))),
            update(&next(&b)),
            remove(&a),
            insert(&rival),
        ];
        let outcomes = writer.try_group(&group.map(waiting)).unwrap();
        let told: Vec<_> =
            outcomes.iter().map(|o| o.as_ref().map(|s| s.unwrap().0).map_err(|e| e.kind)).collect();
        let (taken, conflict) = (Err(StoreErrorKind::NameTaken), Err(StoreErrorKind::Conflict));
        assert_eq!(told, [Ok(1), taken, Ok(2), conflict, Ok(3), Ok(4), Ok(5)]);
    }

    /// Commits changes of one VM with `text` in each event, and does what that brings about.
    fn write_events(writer: &mut Writer, vm: &mut vmm_core::store::VmRecord, count: usize, text: &str) {
        for _ in 0..count {
            *vm = next(vm);
            let mut commit = update(vm);
            commit.event.as_mut().unwrap().cause = text.to_owned();
            writer.commit_group(vec![waiting(commit)]);
            while let Some(expiry) = writer.expiries.pop_front() {
                writer.expire_step(expiry);
            }
        }
    }

    fn number(writer: &Writer, sql: &str) -> u64 {
        writer.conn.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap().unsigned_abs()
    }

    #[test]
    fn the_log_is_bounded_in_bytes_and_loses_its_oldest_events() {
        const BOUND: u64 = 100_000;
        const SUM: &str = "SELECT sum(octet_length(event)) FROM events";
        let dir = tempfile::tempdir().unwrap();
        let mut vm = record("vm");
        {
            let mut writer = writer(dir.path());
            writer.max_event_bytes = BOUND;
            writer.try_group(&[waiting(insert(&vm))]).unwrap();
            write_events(&mut writer, &mut vm, 400, &"x".repeat(1_000));
            let (first, last, count) = (
                number(&writer, "SELECT min(seq) FROM events"),
                number(&writer, "SELECT max(seq) FROM events"),
                number(&writer, "SELECT count(*) FROM events"),
            );
            assert_eq!((last, count), (401, last - first + 1), "a stretch without holes, up to the last");
            assert!(first > 300 && number(&writer, SUM) <= BOUND, "{first}");
        }
        let writer = writer(dir.path());
        assert_eq!(writer.event_bytes, number(&writer, SUM), "the next daemon goes on counting");
    }

    #[test]
    fn the_file_shrinks_when_many_events_have_expired() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(dir.path());
        let mut vm = record("vm");
        writer.try_group(&[waiting(insert(&vm))]).unwrap();
        write_events(&mut writer, &mut vm, 400, &"x".repeat(40_000));
        let pages = |writer: &Writer| number(writer, "SELECT page_count FROM pragma_page_count()");
        let before = pages(&writer);
        for _ in 0..10 {
            writer.remove_events(Until::Time(i64::MAX), 0).unwrap();
        }
        let (after, kept) = (pages(&writer), u64::try_from(FREE_PAGES).unwrap());
        assert!(before > 2 * kept - 1_000 && after < before && after < kept + 100, "{before} → {after}");
    }

    #[test]
    fn settling_tells_what_was_applied_from_what_was_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(dir.path());
        let (vm, other) = (record("vm"), record("other"));
        writer.try_group(&[waiting(insert(&vm))]).unwrap();
        let uid = |vm: &vmm_core::store::VmRecord| vm.uid.to_string();
        let proofs = [
            (Proof::Event(EventSeq(1)), true),
            (Proof::Event(EventSeq(2)), false),
            (Proof::Generation(uid(&vm), 1), true),
            (Proof::Generation(uid(&vm), 2), false),
            (Proof::Gone(uid(&other)), true),
            (Proof::Gone(uid(&vm)), false),
        ];
        for (proof, applied) in &proofs {
            assert_eq!(writer.settle(Some(proof)).unwrap(), *applied, "{proof:?}");
        }
        let settled: String = writer
            .conn
            .query_row("SELECT value FROM meta WHERE key = 'settled'", [], |row| row.get(0))
            .unwrap();
        assert_eq!(settled, proofs.len().to_string());
    }
}
