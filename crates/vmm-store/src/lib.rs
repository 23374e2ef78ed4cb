//! Durable state on SQLite: the [`Store`] that the daemon uses.
//!
//! ```text
//!   commit(), expire_events()                 load(), events()
//!            │ bounded queue                         │ bounded queue
//!            ▼                                       ▼
//!     store-writer ── one transaction for      store-reader
//!            │        all that wait                  │
//!            │ number of pages in the log            │ own connection: a read
//!            ▼                                       │ never waits for a write
//!     store-checkpointer ── moves the log into       │
//!            │              the database in quiet    │
//!            ▼              moments                  ▼
//!   vmm-controlplane.db-wal ──────────► vmm-controlplane.db
//! ```
//!
//! A commit is answered after SQLite has forced the commit to the disk (`synchronous=FULL`).
//! Commits that wait while the disk works share the next transaction (`writer.rs`). Each of them
//! has a savepoint of its own, because a refused commit must not undo its neighbours. A forced
//! commit has room on a full disk too (`reserve.rs`). `open.rs` explains which databases are
//! refused and why none is repaired or recreated silently. `schema.rs` describes the tables,
//! `codec.rs` the conversion of a record to a row.

mod answers;
mod apply;
mod backup;
mod checkpoint;
mod clean_shutdown;
mod codec;
mod error;
mod foreign;
mod labels;
mod open;
mod reader;
mod reserve;
mod salvage;
mod schema;
mod worker;
mod writer;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use vmm_core::backend::Effect;
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::InstanceId;
use vmm_core::idempotency::{AnswerLookup, KeyChange};
use vmm_core::store::{Commit, EventQuery, Snapshot, Store, StoreError, StoreErrorKind};

use crate::error::{CausedBy, store_error};
use crate::foreign::ForeignFields;
use crate::worker::Worker;

pub use crate::backup::{AmendRecord, CopySummary, RestoreSummary, backup, has_database, peek, restore};
pub use crate::open::DATABASE_FILE;
pub use crate::reader::MAX_EVENTS;

/// The number of commits that may wait in the queue before a caller of `commit` blocks.
const QUEUED_COMMITS: usize = 1024;
/// The number of reads that may wait in the queue before a caller of `load` or `events` blocks.
const QUEUED_READS: usize = 64;
/// The time that closing waits for work under way. It is bounded because a disk that hangs must not
/// keep the daemon from ending.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The [`Store`] in a state directory. One process at a time may have the directory open.
///
/// Dropping the store closes it like [`SqliteStore::close`] and blocks for at most 10 seconds.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    instance: InstanceId,
    queues: Mutex<Option<JobQueues>>,
    foreign: Arc<ForeignFields>,
    workers: Arc<Mutex<Vec<Worker>>>,
}

/// The senders of both job queues. A thread ends when the last clone is dropped and every job that
/// was sent has been done.
#[derive(Clone, Debug)]
struct JobQueues {
    writer: mpsc::Sender<writer::WriteJob>,
    reader: mpsc::Sender<reader::ReadJob>,
}

impl SqliteStore {
    /// Opens the store in the directory `state_dir`, and makes the database if it does not exist.
    /// Blocks while it checks the database. The check reads every page unless the last
    /// daemon closed the database in order.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Newer`] if a newer program wrote the database, [`StoreErrorKind::Corrupt`]
    /// if the database is damaged or another program's, [`StoreErrorKind::Io`] if the database
    /// cannot be reached or another process has it open, [`StoreErrorKind::Full`] if there is no
    /// room to make the database. An error means that nothing was changed.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let open::OpenDatabase { path, instance, lock, writer, reader, checkpointer, reserve } =
            open::open(state_dir, schema::MIGRATIONS)?;
        let failed = |error: std::io::Error| {
            store_error(
                StoreErrorKind::Io,
                Effect::NotApplied,
                "the threads of the store could not be started; raise the limit on threads of this process",
            )
            .caused_by(error)
        };

        let foreign = Arc::new(ForeignFields::default());
        let (log, quiet) = checkpoint::channel();
        let (writer_queue, jobs) = mpsc::channel(QUEUED_COMMITS);
        let (reader_queue, reads) = mpsc::channel(QUEUED_READS);
        let (reading, read) = std::sync::mpsc::channel::<()>();
        reserve.keep();
        let database = path.clone();
        let writer = writer::Writer::new(writer, path.clone(), log, reserve.clone())?;
        let room = writer.answer_room();
        let reader = reader::Reader::new(reader, path.clone(), instance, Arc::clone(&foreign), room);
        let workers = vec![
            // The threads end in this order: reader and writer, each when its queue is closed, then
            // the checkpointer. The order matters because only the last connection to close may
            // empty the log, leave the mark of a clean end and release the lock.
            Worker::spawn("store-reader", move || {
                let _reading = reading;
                reader.run(reads);
            })
            .map_err(failed)?,
            Worker::spawn("store-writer", move || writer.run(jobs)).map_err(failed)?,
            Worker::spawn("store-checkpointer", move || {
                checkpoint::run(&checkpointer, &quiet, &reserve);
                // `run` returns when the writer has dropped its end of the log's channel. The
                // reader is awaited here: nothing is ever sent on this channel, and `recv` returns
                // when the reader's thread has dropped its connection and its sender.
                let _ = read.recv();
                let emptied = checkpoint::move_whole_log(&checkpointer);
                // The last connection closes before the lock is released, because a successor must
                // find an empty log.
                drop(checkpointer);
                // The mark is left only if the log is in the database, because the next daemon
                // trusts the mark and then skips the check of every page.
                if emptied {
                    clean_shutdown::write_mark(&lock, &database);
                }
                drop(lock);
            })
            .map_err(failed)?,
        ];
        let queues = JobQueues { writer: writer_queue, reader: reader_queue };
        let (queues, workers) = (Mutex::new(Some(queues)), Arc::new(Mutex::new(workers)));
        Ok(Self { path, instance, queues, foreign, workers })
    }

    /// Returns the path of the database.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the identity of the state directory.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Finishes every accepted job, moves the log into the database and closes the database. Later
    /// calls fail with [`StoreErrorKind::Closed`]. A second close does nothing.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Io`] if closing takes longer than 10 seconds. Acknowledged commits are
    /// durable all the same.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.close_queues();
        let workers = Arc::clone(&self.workers);
        let ended = tokio::task::spawn_blocking(move || join(&workers)).await.unwrap_or(false);
        if ended {
            return Ok(());
        }
        Err(store_error(
            StoreErrorKind::Io,
            Effect::Unknown,
            format!(
                "the database {} was not closed within {} s: its disk may hang. Acknowledged commits are safe",
                self.path.display(),
                CLOSE_TIMEOUT.as_secs()
            ),
        ))
    }

    fn close_queues(&self) {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn queues(&self) -> Result<JobQueues, StoreError> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.clone().ok_or_else(|| closed(Effect::NotApplied))
    }

    async fn write<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> writer::WriteJob,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.queues()?.writer.send(job(reply)).await.map_err(|_| closed(Effect::NotApplied))?;
        // The job was accepted, but the writer ended without an answer. The commit may be on the
        // disk.
        answer.await.unwrap_or_else(|_| Err(closed(Effect::Unknown)))
    }

    async fn read<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> reader::ReadJob,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.queues()?.reader.send(job(reply)).await.map_err(|_| closed(Effect::NotApplied))?;
        // A read changes nothing, so its effect is certain even if no answer came.
        answer.await.unwrap_or_else(|_| Err(closed(Effect::NotApplied)))
    }
}

/// Carries out every commit that was accepted into the queue, even if its caller goes away.
#[async_trait]
impl Store for SqliteStore {
    async fn load(&self) -> Result<Snapshot, StoreError> {
        self.read(|reply| reader::ReadJob::Load { reply }).await
    }

    async fn commit(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        // Encoding runs in the caller's task, because the writer's thread is shared by all VMs.
        let commit = codec::encode(commit, &self.foreign)?;
        self.write(|reply| writer::WriteJob::Commit { commit, forced: false, reply }).await
    }

    async fn commit_forced(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        let commit = codec::encode(commit, &self.foreign)?;
        self.write(|reply| writer::WriteJob::Commit { commit, forced: true, reply }).await
    }

    async fn commit_keyed(
        &self,
        commit: Option<Commit>,
        key: KeyChange,
        forced: bool,
    ) -> Result<Option<EventSeq>, StoreError> {
        let commit = codec::encode_keyed(commit, key, &self.foreign)?;
        self.write(|reply| writer::WriteJob::Commit { commit, forced, reply }).await
    }

    async fn kept_answer(&self, id: &str) -> Result<AnswerLookup, StoreError> {
        let id = id.to_owned();
        self.read(|reply| reader::ReadJob::Answer { id, reply }).await
    }

    async fn expire_answers(&self, kept_ms: Range<i64>) -> Result<u64, StoreError> {
        self.write(|reply| writer::WriteJob::ExpireAnswers { kept_ms, reply }).await
    }

    async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError> {
        self.read(|reply| reader::ReadJob::Events { query, reply }).await
    }

    async fn expire_events(&self, before_ms: i64) -> Result<u64, StoreError> {
        self.write(|reply| writer::WriteJob::Expire { before_ms, reply }).await
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.close_queues();
        if !join(&self.workers) {
            tracing::error!(
                database = %self.path.display(),
                "the database was not closed in time; acknowledged commits are safe"
            );
        }
    }
}

/// Waits for all threads, at most for [`CLOSE_TIMEOUT`]. Returns true if all of them have ended.
fn join(workers: &Mutex<Vec<Worker>>) -> bool {
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    let workers = std::mem::take(&mut *workers.lock().unwrap_or_else(PoisonError::into_inner));
    // Every thread is joined, also after one that is late, because joining is how a panic gets into
    // the log.
    let late = workers.into_iter().filter_map(|worker| (!worker.join_until(deadline)).then_some(())).count();
    late == 0
}

fn closed(effect: Effect) -> StoreError {
    store_error(
        StoreErrorKind::Closed,
        effect,
        "the store has been closed: the daemon is stopping, so call again once it is back",
    )
}
