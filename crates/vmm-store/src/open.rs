//! Opens the database, after everything that must hold before a VM is read.
//!
//! ```text
//!   lock the state directory ──► is the database there?
//!                                 │ no, and no log either          │ yes
//!                                 ▼                                ▼
//!                      make it under another name,      ours? ─► version known? ─► whole?
//!                      whole, then rename it                       │ yes to all
//!                                 └──────────────► WAL, upgrade ◄──┘
//! ```
//!
//! A database gets its name when it is complete. An empty or shortened database was therefore
//! damaged by another program, and is refused, because a silent new beginning would orphan every
//! running VM. Nothing is written before all questions are answered.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension};
use rustix::fs::OFlags;
use uuid::Uuid;
use vmm_core::backend::Effect;
use vmm_core::id::InstanceId;
use vmm_core::store::{StoreError, StoreErrorKind};

use crate::clean_shutdown;
use crate::error::{CausedBy, corrupt, from_sqlite, store_error};
use crate::reserve::Reserve;
use crate::schema::{self, APPLICATION_ID, Migration};

/// The name of the database in the state directory.
pub const DATABASE_FILE: &str = "vmm-controlplane.db";

/// The time that a statement waits for another program that holds the database locked, such as a
/// backup.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The extent of the check of a database before its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckDepth {
    /// The owner and the version only, which is enough for a database that was closed in order and
    /// not touched since.
    Head,
    /// Every page too, which takes as long as reading the file.
    Whole,
}

/// An opened database with its connections.
#[derive(Debug)]
pub(crate) struct OpenDatabase {
    pub(crate) path: PathBuf,
    pub(crate) instance: InstanceId,
    /// The lock of the state directory, held as long as any connection may write.
    pub(crate) lock: File,
    pub(crate) writer: Connection,
    pub(crate) reader: Connection,
    pub(crate) checkpointer: Connection,
    pub(crate) reserve: Reserve,
}

/// Opens the database in `state_dir`, and makes the database if it does not exist. The caller has
/// made the directory when it took the lock of the daemon.
pub(crate) fn open(state_dir: &Path, migrations: &[Migration]) -> Result<OpenDatabase, StoreError> {
    let lock = lock(state_dir)?;
    let path = state_dir.join(DATABASE_FILE);
    let reserve = Reserve::of(&path);
    // The mark is taken away before anything is written. A daemon that dies from here on leaves no
    // mark, so its successor checks every page.
    let depth = if clean_shutdown::remove_mark(&lock, &path) { CheckDepth::Head } else { CheckDepth::Whole };
    let opened = match open_locked(&path, migrations, depth) {
        // SQLite needs room for the index of its log, and a daemon must be able to start on a full
        // disk, because otherwise nothing could end the VMs there. An `Io` error counts as well,
        // because SQLite reports a full file system that way when it maps the index.
        Err(error)
            if matches!(error.kind, StoreErrorKind::Full | StoreErrorKind::Io) && reserve.may_help() =>
        {
            reserve.spend_on_opening(|| open_locked(&path, migrations, depth)).unwrap_or(Err(error))
        }
        opened => opened,
    };
    let (instance, [writer, reader, checkpointer]) = opened?;
    Ok(OpenDatabase { path, instance, lock, writer, reader, checkpointer, reserve })
}

/// Returns the identity of the state directory, and the connections of the writer, the reader and
/// the checkpointer. The caller holds the lock.
fn open_locked(
    path: &Path,
    migrations: &[Migration],
    depth: CheckDepth,
) -> Result<(InstanceId, [Connection; 3]), StoreError> {
    // These questions are asked of the file, because SQLite takes an empty file for a new database
    // and zeros for the missing end of a shortened one.
    match std::fs::metadata(path) {
        Ok(file) if file.len() == 0 => return Err(corrupt(path, "the file is empty")),
        Ok(file) => refuse_cut_short(path, file.len())?,
        Err(error) if error.kind() == ErrorKind::NotFound => create(path, migrations)?,
        Err(error) => return Err(io_error("looking at", path, error)),
    }

    let mut writer = connect(path).map_err(|error| unusable(path, error))?;
    // The order is fixed: `check` only reads, `configure` begins a log, and `migrate` changes
    // tables. A database that is refused is therefore untouched.
    check(&writer, path, migrations, depth)?;
    configure(&writer, path)?;
    schema::migrate(&mut writer, path, migrations)?;
    let instance = instance(&writer, path)?;

    let reader = connect(path).map_err(|error| unusable(path, error))?;
    configure(&reader, path)?;
    // The flag makes a mistake in a query of the reader an error, because only the writer may
    // write.
    reader.pragma_update(None, "query_only", true).map_err(|error| unusable(path, error))?;
    let checkpointer = connect(path).map_err(|error| unusable(path, error))?;
    configure(&checkpointer, path)?;
    Ok((instance, [writer, reader, checkpointer]))
}

/// Refuses a database that is shorter than its header states, because SQLite itself reads the
/// missing end of the last page as zeros. A database with a log is not refused, because the end of
/// the database may still be in the log of a daemon that died.
fn refuse_cut_short(path: &Path, length: u64) -> Result<(), StoreError> {
    if std::fs::metadata(with_suffix(path, "-wal")).is_ok_and(|log| log.len() > 0) {
        return Ok(());
    }
    let mut head = [0; 32];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut head));
    if read.is_err() || !head.starts_with(b"SQLite format 3\0") {
        // The file is no database at all. SQLite's own error describes that better.
        return Ok(());
    }
    // Bytes 16 and 17 of the header are the size of a page (1 stands for 65,536), bytes 28 to 31
    // the number of pages, both big-endian.
    let page_bytes = match u64::from(u16::from_be_bytes([head[16], head[17]])) {
        1 => 65_536,
        bytes => bytes,
    };
    let pages = u64::from(u32::from_be_bytes([head[28], head[29], head[30], head[31]]));
    match (pages * page_bytes).saturating_sub(length) {
        0 => Ok(()),
        missing => Err(corrupt(path, format_args!("its last {missing} bytes are missing"))),
    }
}

/// Locks the state directory until the file is closed. The lock excludes a second daemon, because
/// two daemons would each manage the same VMs.
///
/// # Errors
///
/// [`StoreErrorKind::Io`] if another process holds the lock or the file cannot be opened.
pub(crate) fn lock(state_dir: &Path) -> Result<File, StoreError> {
    // The lock has a file of its own, because closing any handle of the database would release
    // SQLite's POSIX locks on it.
    let path = state_dir.join(format!("{DATABASE_FILE}.lock"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(&path)
        .map_err(|error| io_error("opening", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(store_error(
            StoreErrorKind::Io,
            Effect::NotApplied,
            format!(
                "the state directory {} is in use by another vmm-controlplane. Stop that one, or give this one a state \
                 directory of its own",
                state_dir.display()
            ),
        )),
        Err(TryLockError::Error(error)) => Err(io_error("locking", &path, error)),
    }
}

/// Makes the database under another name, forces it to the disk, and renames it.
fn create(path: &Path, migrations: &[Migration]) -> Result<(), StoreError> {
    // A log without a database means that the database was removed. A new database beside that log
    // would replay the log of the old one.
    let log = with_suffix(path, "-wal");
    if std::fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
        return Err(corrupt(
            path,
            format_args!(
                "it is gone, but its log {} is still there and holds its last changes",
                log.display()
            ),
        ));
    }
    // Leftovers under the other name belong to a daemon that died while it made the database. They
    // were never in use, so removing them loses nothing.
    let draft = with_suffix(path, ".new");
    for leftover in [draft.clone(), with_suffix(&draft, "-journal")] {
        match std::fs::remove_file(&leftover) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(io_error("removing the unfinished", &leftover, error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .map_err(|error| io_error("making", &draft, error))?;
    fill(&draft, migrations)?;
    std::fs::rename(&draft, path).map_err(|error| io_error("naming", path, error))?;
    // The name of the database, and that of the directory if it is new, must survive a power
    // failure too.
    for dir in path.ancestors().skip(1).take(2).filter(|dir| !dir.as_os_str().is_empty()) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| io_error("writing", dir, error))?;
    }
    tracing::info!(database = %path.display(), "a new database was made");
    Ok(())
}

fn fill(draft: &Path, migrations: &[Migration]) -> Result<(), StoreError> {
    let failed = |error| from_sqlite(draft, "making", Effect::NotApplied, error);
    let mut conn = connect(draft).map_err(failed)?;
    conn.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    // Set before the first table, because later SQLite ignores the setting. The file can then
    // shrink when many events have expired.
    conn.pragma_update(None, "auto_vacuum", "INCREMENTAL").map_err(failed)?;
    conn.pragma_update(None, "application_id", APPLICATION_ID).map_err(failed)?;
    schema::migrate(&mut conn, draft, migrations)?;
    let instance = Uuid::now_v7().to_string();
    conn.execute("INSERT INTO meta (key, value) VALUES ('instance', ?1)", [instance]).map_err(failed)?;
    conn.close().map_err(|(_, error)| failed(error))
}

/// Connects to read and write. Fails if the file does not exist.
pub(crate) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    connect_as(path, OpenFlags::SQLITE_OPEN_READ_WRITE)
}

/// Connects to read only, for commands that look at the database beside a daemon.
pub(crate) fn connect_to_read(path: &Path) -> rusqlite::Result<Connection> {
    connect_as(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
}

fn connect_as(path: &Path, access: OpenFlags) -> rusqlite::Result<Connection> {
    // SQLite's mutexes are off, because each connection stays on one thread.
    let conn = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    conn.busy_timeout(BUSY_TIMEOUT)?;
    // A damaged file is hostile input: SQLite checks its pages, and its schema may call no
    // function.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    conn.pragma_update(None, "cell_size_check", true)?;
    Ok(conn)
}

/// Refuses a database that is another program's, newer, or damaged. Reads only.
///
/// # Errors
///
/// [`StoreErrorKind::Newer`] or [`StoreErrorKind::Corrupt`].
pub(crate) fn check(
    conn: &Connection,
    path: &Path,
    migrations: &[Migration],
    depth: CheckDepth,
) -> Result<(), StoreError> {
    let mark: i32 = conn
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(|error| unusable(path, error))?;
    if mark != APPLICATION_ID {
        return Err(corrupt(path, "it is an SQLite database of another program"));
    }
    schema::refuse_newer(conn, path, migrations)?;
    if depth == CheckDepth::Head {
        return Ok(());
    }
    let finding: String = conn
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(|error| unusable(path, error))?;
    if finding == "ok" { Ok(()) } else { Err(corrupt(path, finding.trim().replace('\n', "; "))) }
}

fn configure(conn: &Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |error| from_sqlite(path, "opening", Effect::NotApplied, error);
    let mode: String =
        conn.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0)).map_err(failed)?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(store_error(
            StoreErrorKind::Io,
            Effect::NotApplied,
            format!(
                "the database {} cannot have a write-ahead log on its file system. Put the state directory on a local file system",
                path.display()
            ),
        ));
    }
    conn.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    conn.pragma_update(None, "foreign_keys", true).map_err(failed)?;
    conn.pragma_update(None, "temp_store", "MEMORY").map_err(failed)?;
    // Automatic checkpoints are off, because they would run inside a commit. The checkpointer has a
    // thread of its own.
    conn.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(())).map_err(failed)
}

pub(crate) fn instance(conn: &Connection, path: &Path) -> Result<InstanceId, StoreError> {
    let text: Option<String> = conn
        .query_row("SELECT value FROM meta WHERE key = 'instance'", [], |row| row.get(0))
        .optional()
        .map_err(|error| unusable(path, error))?;
    let text = text.ok_or_else(|| corrupt(path, "the identity of the state directory is missing"))?;
    text.parse()
        .map_err(|error| corrupt(path, "the identity of the state directory is unreadable").caused_by(error))
}

pub(crate) fn unusable(path: &Path, error: rusqlite::Error) -> StoreError {
    from_sqlite(path, "opening", Effect::NotApplied, error)
}

pub(crate) fn io_error(doing: &str, path: &Path, error: std::io::Error) -> StoreError {
    let (kind, remedy) = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => (StoreErrorKind::Full, "Free some room there"),
        ErrorKind::ReadOnlyFilesystem => (StoreErrorKind::Full, "It is on a read-only file system"),
        _ => (StoreErrorKind::Io, "Check that this user may write there, or name another state directory"),
    };
    let message = format!("{doing} {} failed. {remedy}", path.display());
    store_error(kind, Effect::NotApplied, message).caused_by(error)
}

/// Returns the path of a file beside `path`, whose name has `suffix` appended.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_forces_its_commits_to_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let opened = open(dir.path(), schema::MIGRATIONS).unwrap();
        for conn in [&opened.writer, &opened.reader, &opened.checkpointer] {
            let number = |name| conn.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).unwrap();
            assert_eq!(number("synchronous"), 2, "FULL");
            assert_eq!(number("foreign_keys"), 1);
            assert_eq!(number("wal_autocheckpoint"), 0);
            assert_eq!(number("busy_timeout"), 5_000);
            assert_eq!(number("application_id"), i64::from(APPLICATION_ID));
            let mode: String = conn.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
            assert_eq!(mode, "wal");
        }
        opened.reader.execute("DELETE FROM events", []).unwrap_err();
    }

    #[test]
    fn a_symbolic_link_at_the_path_of_the_lock_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = dir.path().join("theirs");
        std::os::unix::fs::symlink(&theirs, dir.path().join(format!("{DATABASE_FILE}.lock"))).unwrap();
        assert_eq!(lock(dir.path()).unwrap_err().kind, StoreErrorKind::Io);
        assert!(!theirs.exists());
    }

    #[test]
    fn an_older_database_is_upgraded_when_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let instance = open(dir.path(), schema::MIGRATIONS).unwrap().instance;
        let last = schema::MIGRATIONS.last().unwrap().to;
        let mut steps = schema::MIGRATIONS.to_vec();
        steps.push(Migration { to: last + 1, what: "a test", sql: "CREATE TABLE later (x TEXT) STRICT;" });
        let opened = open(dir.path(), &steps).unwrap();
        assert_eq!(opened.instance, instance);
        opened.writer.execute("INSERT INTO later VALUES ('x')", []).unwrap();
        drop(opened);
        let error = open(dir.path(), schema::MIGRATIONS).unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Newer);
    }
}
