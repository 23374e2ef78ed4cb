//! Moves the write-ahead log into the database, on a thread other than the writer's.
//!
//! A passive checkpoint and the writer do not wait for each other. A checkpoint runs when no commit
//! has come for a while, or when the log has grown past [`PRESSURE_PAGES`]. Under a load without
//! pauses the checkpoints may never catch up with the writer. Past [`LIMIT_PAGES`] the writer
//! therefore moves the log itself ([`LogPressure::must_stop_writing`]), which bounds the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use rusqlite::Connection;

use crate::reserve::Reserve;

/// The interval at which the reserve is checked while no commit comes.
const RESERVE_INTERVAL: Duration = Duration::from_secs(30);
/// The pause between commits after which the log is moved.
const QUIET_INTERVAL: Duration = Duration::from_millis(500);
/// The number of pages of 4 KiB in the log at which the log is moved without waiting for a pause.
const PRESSURE_PAGES: u32 = 1_000;
/// The number of pages of 4 KiB in the log at which commits wait for a checkpoint.
const LIMIT_PAGES: u32 = 16_000;

/// The writer's side: the length of the log, and the channel that wakes the checkpointer.
#[derive(Clone, Debug)]
pub(crate) struct LogPressure {
    pages: Arc<AtomicU32>,
    wake: SyncSender<()>,
}

/// The checkpointer's side.
#[derive(Debug)]
pub(crate) struct Checkpointer {
    pages: Arc<AtomicU32>,
    wake: Receiver<()>,
}

/// Returns the writer's side and the checkpointer's side.
pub(crate) fn channel() -> (LogPressure, Checkpointer) {
    let pages = Arc::new(AtomicU32::new(0));
    // One field is enough, because the message is the same each time.
    let (waker, wake) = sync_channel(1);
    (LogPressure { pages: Arc::clone(&pages), wake: waker }, Checkpointer { pages, wake })
}

impl LogPressure {
    /// Notes that the log has `pages` after a commit, and wakes the checkpointer.
    pub(crate) fn committed(&self, pages: i32) {
        self.pages.store(pages.unsigned_abs(), Ordering::Relaxed);
        // A full channel means that the checkpointer is awake already, a closed one that the store
        // is closing.
        let _ = self.wake.try_send(());
    }

    /// Returns true if the log is so long that the writer must move it before the next commit.
    pub(crate) fn must_stop_writing(&self) -> bool {
        self.pages.load(Ordering::Relaxed) >= LIMIT_PAGES
    }
}

/// Runs checkpoints until the writer has ended, and makes the reserve again if it was used.
pub(crate) fn run(conn: &Connection, quiet: &Checkpointer, reserve: &Reserve) {
    loop {
        match quiet.wake.recv_timeout(RESERVE_INTERVAL) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => {
                reserve.keep();
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
        // Waits for a pause between commits, because a checkpoint competes with them for the disk.
        // A long log is moved at once.
        while quiet.pages.load(Ordering::Relaxed) < PRESSURE_PAGES {
            match quiet.wake.recv_timeout(QUIET_INTERVAL) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        move_available_log(conn);
        reserve.keep();
    }
}

/// Moves the whole log into the database. Returns true if that was done.
pub(crate) fn move_whole_log(conn: &Connection) -> bool {
    match conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0)) {
        Ok(busy) => busy == 0,
        Err(error) => {
            tracing::warn!(%error, "the write-ahead log could not be moved into the database; the next start does that");
            false
        }
    }
}

/// Moves as much of the log as is possible without waiting for a reader or the writer.
pub(crate) fn move_available_log(conn: &Connection) {
    if let Err(error) = conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get::<_, i64>(0)) {
        // Nothing is lost: the log still holds the pages, and the next checkpoint tries again.
        tracing::warn!(%error, "the write-ahead log could not be moved into the database; check the disk of the state directory");
    }
}
