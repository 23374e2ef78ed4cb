//! Moves the write-ahead log into the database, away from the commits.
//!
//! A passive checkpoint neither waits for the writer nor makes it wait. It runs when no commit has come for a while, or when
//! the log has grown past [`PRESSURE_PAGES`]. Under a load without any pause it may never catch up with the writer; past
//! [`LIMIT_PAGES`] the writer therefore helps itself ([`must_stop_writing`]), which bounds the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use rusqlite::Connection;

use crate::reserve::Reserve;

/// How often the reserve is looked at while no commit comes.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How long no commit may come before the log is moved.
const QUIET: Duration = Duration::from_millis(500);
/// Pages of 4 KiB in the log that are moved without waiting for a pause.
const PRESSURE_PAGES: u32 = 1_000;
/// Pages of 4 KiB in the log at which commits wait for a checkpoint.
const LIMIT_PAGES: u32 = 16_000;

/// The writer's side: how long the log is, and a bell.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    pages: Arc<AtomicU32>,
    bell: SyncSender<()>,
}

/// The checkpointer's side.
#[derive(Debug)]
pub(crate) struct Quiet {
    pages: Arc<AtomicU32>,
    bell: Receiver<()>,
}

/// Makes both sides.
pub(crate) fn channel() -> (Log, Quiet) {
    let pages = Arc::new(AtomicU32::new(0));
    // One ring that was not heard yet says as much as many.
    let (ring, bell) = sync_channel(1);
    (Log { pages: Arc::clone(&pages), bell: ring }, Quiet { pages, bell })
}

impl Log {
    /// Takes note that a commit has left `pages` in the log.
    pub(crate) fn committed(&self, pages: i32) {
        self.pages.store(pages.unsigned_abs(), Ordering::Relaxed);
        // Full: the bell has been rung already. Disconnected: the store is closing.
        let _ = self.bell.try_send(());
    }

    /// Says whether the log is so long that the writer must move it before it goes on.
    pub(crate) fn must_stop_writing(&self) -> bool {
        self.pages.load(Ordering::Relaxed) >= LIMIT_PAGES
    }
}

/// Runs checkpoints, and makes the reserve again where it was used, until the writer has gone.
pub(crate) fn run(conn: &Connection, quiet: &Quiet, reserve: &Reserve) {
    loop {
        match quiet.bell.recv_timeout(LOOK_AGAIN) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => {
                reserve.keep();
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
        while quiet.pages.load(Ordering::Relaxed) < PRESSURE_PAGES {
            match quiet.bell.recv_timeout(QUIET) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        passive(conn);
        reserve.keep();
    }
}

/// Moves the whole log into the database, and says whether that was done.
pub(crate) fn empty(conn: &Connection) -> bool {
    match conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0)) {
        Ok(busy) => busy == 0,
        Err(error) => {
            tracing::warn!(%error, "the log could not be moved into the database; the next start will do it");
            false
        }
    }
}

/// Moves as much of the log as can be moved without waiting for anybody.
pub(crate) fn passive(conn: &Connection) {
    if let Err(error) = conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get::<_, i64>(0)) {
        // Nothing is lost: the log still holds it, and the next checkpoint tries again.
        tracing::warn!(%error, "moving the log into the database failed; check the disk of the state directory");
    }
}
