//! Durable state on SQLite: the [`Store`] that the daemon uses.
//!
//! ```text
//!   commit(), expire_events()                 load(), events()
//!            │ bounded queue                         │ bounded queue
//!            ▼                                       ▼
//!     store-writer ── one transaction for      store-reader
//!            │        all that wait                  │
//!            │ "so many pages in the log"            │ own connection: a read
//!            ▼                                       │ never waits for a write
//!     store-checkpointer ── moves the log into       │
//!            │              the database in quiet    │
//!            ▼              moments                  ▼
//!   vmm-controlplane.db-wal ──────────► vmm-controlplane.db
//! ```
//!
//! A commit is answered after SQLite has forced it to the disk (`synchronous=FULL`). Commits that wait while the disk works
//! share the next transaction (`writer.rs`), each behind a savepoint of its own, so that one that is refused takes nobody
//! along. For what a client forces there is room on a full disk too (`reserve.rs`). What is refused at opening, and why nothing is ever repaired or recreated in silence, is told in `open.rs`; the
//! tables in `schema.rs`; how a record becomes a row in `codec.rs`.

mod apply;
mod backup;
mod checkpoint;
mod codec;
mod error;
mod foreign;
mod labels;
mod mark;
mod open;
mod reader;
mod reserve;
mod salvage;
mod schema;
mod worker;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use vmm_core::backend::Effect;
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::id::InstanceId;
use vmm_core::store::{Commit, EventQuery, Snapshot, Store, StoreError, StoreErrorKind};

use crate::error::{CausedBy, store_error};
use crate::foreign::Foreign;
use crate::worker::Worker;

pub use crate::backup::{Amend, Copied, Restored, backup, peek, restore};
pub use crate::open::DATABASE_FILE;
pub use crate::reader::MAX_EVENTS;

/// Commits that may wait before callers do.
const QUEUED_COMMITS: usize = 1024;
/// Reads that may wait before callers do.
const QUEUED_READS: usize = 64;
/// How long closing waits for what is under way. A disk that hangs must not keep the daemon from ending.
const CLOSE_WITHIN: Duration = Duration::from_secs(10);

/// The [`Store`] in a state directory. One process at a time may have it open.
///
/// Dropping it closes it like [`SqliteStore::close`] and blocks for at most 10 seconds.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    instance: InstanceId,
    doors: Mutex<Option<Doors>>,
    foreign: Arc<Foreign>,
    workers: Arc<Mutex<Vec<Worker>>>,
}

/// The ways into the threads. They end when the last clone is gone and what it sent has been done.
#[derive(Clone, Debug)]
struct Doors {
    writer: mpsc::Sender<writer::Job>,
    reader: mpsc::Sender<reader::Job>,
}

impl SqliteStore {
    /// Opens the store in `state_dir`, making both if they do not exist. Blocks while it checks the database,
    /// the whole of it where the last daemon did not close it.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Newer`] if a newer program wrote it, [`StoreErrorKind::Corrupt`] if it is damaged or not ours,
    /// [`StoreErrorKind::Io`] if it cannot be reached or another process has it open, [`StoreErrorKind::Full`] if there is no
    /// room to make it. Nothing is changed then.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let open::Opened { path, instance, lock, writer, reader, checkpointer, reserve } =
            open::open(state_dir, schema::MIGRATIONS)?;
        let failed = |error: std::io::Error| {
            store_error(
                StoreErrorKind::Io,
                Effect::NotApplied,
                "the threads of the store could not be started; raise the limit on threads of this process",
            )
            .caused_by(error)
        };

        let foreign = Arc::new(Foreign::default());
        let (log, quiet) = checkpoint::channel();
        let (writer_door, jobs) = mpsc::channel(QUEUED_COMMITS);
        let (reader_door, reads) = mpsc::channel(QUEUED_READS);
        let (reading, read) = std::sync::mpsc::channel::<()>();
        reserve.keep();
        let database = path.clone();
        let writer = writer::Writer::new(writer, path.clone(), log, reserve.clone())?;
        let reader = reader::Reader::new(reader, path.clone(), instance, Arc::clone(&foreign));
        let workers = vec![
            Worker::spawn("store-reader", move || {
                let _reading = reading;
                reader.run(reads);
            })
            .map_err(failed)?,
            Worker::spawn("store-writer", move || writer.run(jobs)).map_err(failed)?,
            Worker::spawn("store-checkpointer", move || {
                checkpoint::run(&checkpointer, &quiet, &reserve);
                // Nothing is ever sent: the reader's connection is closed when its end of the channel is.
                let _ = read.recv();
                let emptied = checkpoint::empty(&checkpointer);
                // The last connection goes before the lock does: a successor finds an empty log.
                drop(checkpointer);
                if emptied {
                    mark::leave(&lock, &database);
                }
                drop(lock);
            })
            .map_err(failed)?,
        ];
        let doors = Doors { writer: writer_door, reader: reader_door };
        let (doors, workers) = (Mutex::new(Some(doors)), Arc::new(Mutex::new(workers)));
        Ok(Self { path, instance, doors, foreign, workers })
    }

    /// Where the database is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The identity of the state directory.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Does what was accepted, moves the log into the database and closes it. Later calls fail with
    /// [`StoreErrorKind::Closed`]; closing twice is harmless.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Io`] if that takes longer than 10 seconds. What was acknowledged is durable all the same.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.shut_doors();
        let workers = Arc::clone(&self.workers);
        let ended = tokio::task::spawn_blocking(move || join(&workers)).await.unwrap_or(false);
        if ended {
            return Ok(());
        }
        Err(store_error(
            StoreErrorKind::Io,
            Effect::Unknown,
            format!(
                "the database {} was not closed within {} s: its disk may hang. What was acknowledged is safe",
                self.path.display(),
                CLOSE_WITHIN.as_secs()
            ),
        ))
    }

    fn shut_doors(&self) {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn doors(&self) -> Result<Doors, StoreError> {
        let doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        doors.clone().ok_or_else(|| closed(Effect::NotApplied))
    }

    async fn write<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> writer::Job,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.doors()?.writer.send(job(reply)).await.map_err(|_| closed(Effect::NotApplied))?;
        answer.await.unwrap_or_else(|_| Err(closed(Effect::Unknown)))
    }

    async fn read<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> reader::Job,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.doors()?.reader.send(job(reply)).await.map_err(|_| closed(Effect::NotApplied))?;
        answer.await.unwrap_or_else(|_| Err(closed(Effect::NotApplied)))
    }
}

/// A commit that has been accepted into the queue is carried out even if its caller goes away.
#[async_trait]
impl Store for SqliteStore {
    async fn load(&self) -> Result<Snapshot, StoreError> {
        self.read(|reply| reader::Job::Load { reply }).await
    }

    async fn commit(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        let commit = codec::encode(commit, &self.foreign)?;
        self.write(|reply| writer::Job::Commit { commit, forced: false, reply }).await
    }

    async fn commit_forced(&self, commit: Commit) -> Result<Option<EventSeq>, StoreError> {
        let commit = codec::encode(commit, &self.foreign)?;
        self.write(|reply| writer::Job::Commit { commit, forced: true, reply }).await
    }

    async fn events(&self, query: EventQuery) -> Result<Vec<VmEvent>, StoreError> {
        self.read(|reply| reader::Job::Events { query, reply }).await
    }

    async fn expire_events(&self, before_ms: i64) -> Result<u64, StoreError> {
        self.write(|reply| writer::Job::Expire { before_ms, reply }).await
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.shut_doors();
        if !join(&self.workers) {
            tracing::error!(
                database = %self.path.display(),
                "the database was not closed in time; what was acknowledged is safe"
            );
        }
    }
}

/// Waits for all threads within [`CLOSE_WITHIN`], and says whether they have ended.
fn join(workers: &Mutex<Vec<Worker>>) -> bool {
    let deadline = Instant::now() + CLOSE_WITHIN;
    let workers = std::mem::take(&mut *workers.lock().unwrap_or_else(PoisonError::into_inner));
    // All of them, also after one that is late: the others may still have something to say.
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
