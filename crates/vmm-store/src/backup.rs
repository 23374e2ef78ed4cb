//! Copies of the database: taken while a daemon writes, and put back when none does.
//!
//! ```text
//!   backup ── read-only ──► copy beside FILE ──► whole? ours? readable? ──► on disk, named FILE
//!
//!   restore ── lock ──► copy beside the database ──► whole? ours? known version? same directory?
//!                                                         │ yes to all
//!         the present one gets a second name ◄────────────┘
//!                  └──► the copy takes its name
//! ```
//!
//! SQLite's backup interface reads the source in one transaction. The copy is therefore of one
//! moment, and neither the copy nor the daemon's writer waits for the other. A copy is one file
//! without a log, and gets its name after it has been read back. An error means that nothing has
//! changed.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use tempfile::TempPath;
use vmm_core::backend::Effect;
use vmm_core::id::InstanceId;
use vmm_core::store::{Snapshot, StoreError, StoreErrorKind, Unreadable, VmRecord};

use crate::codec::encode_record;
use crate::error::{CausedBy, REMEDY, corrupt, from_sqlite, store_error};
use crate::foreign::ForeignFields;
use crate::open::{self, CheckDepth, DATABASE_FILE, connect, connect_to_read, io_error, with_suffix};
use crate::reader;
use crate::schema::{self, MIGRATIONS};

/// The number of positions that a restore skips in the event log if nothing shows how many
/// positions were given since the backup.
const UNKNOWN_EVENTS: u64 = 1 << 32;

/// The content of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopySummary {
    /// The identity of the state directory that the copy belongs to.
    pub instance: InstanceId,
    /// The number of recorded VMs.
    pub vms: usize,
    /// The size of the file in bytes.
    pub bytes: u64,
}

/// The result of a restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreSummary {
    /// The content of the database that is in use now.
    pub copied: CopySummary,
    /// The path of the replaced database, if there was one.
    pub replaced: Option<PathBuf>,
}

/// A function that sees each VM of a backup before the restore and may correct its record by the
/// state of the host. It returns true if it changed the record. An error is a message for people
/// and stops the restore.
pub type AmendRecord<'a> = dyn FnMut(&mut VmRecord) -> Result<bool, String> + 'a;

/// Reads the database in `state_dir` without changing it, also beside a daemon that uses it.
/// Returns `None` if there is no database. If no daemon uses the database, SQLite leaves an empty
/// log and an index beside it, which the next opening takes over.
///
/// # Errors
///
/// The errors of [`crate::SqliteStore::open`], and [`StoreErrorKind::Io`] if an older program wrote
/// the database.
pub fn peek(state_dir: &Path) -> Result<Option<Snapshot>, StoreError> {
    let path = state_dir.join(DATABASE_FILE);
    if !is_there(&path)? {
        return Ok(None);
    }
    let mut conn = connect_to_read(&path).map_err(|error| open::unusable(&path, error))?;
    open::check(&conn, &path, MIGRATIONS, CheckDepth::Whole)?;
    let newest = MIGRATIONS.last().map_or(0, |step| step.to);
    if schema::version(&conn, &path)? < newest {
        return Err(store_error(
            StoreErrorKind::Io,
            Effect::NotApplied,
            format!(
                "the database {} was written by an older program; start the daemon once, which upgrades it",
                path.display()
            ),
        ));
    }
    let instance = open::instance(&conn, &path)?;
    reader::load(&mut conn, &path, instance, &ForeignFields::default()).map(Some)
}

/// Returns true if `state_dir` has a database. Reads nothing in it.
///
/// # Errors
///
/// [`StoreErrorKind::Io`] if the directory cannot be looked at.
pub fn has_database(state_dir: &Path) -> Result<bool, StoreError> {
    is_there(&state_dir.join(DATABASE_FILE))
}

/// Copies the database in `state_dir`, as it is at one moment, to the new file `target`. Only the
/// owner may read the copy. A daemon may use the database meanwhile.
///
/// # Errors
///
/// [`StoreErrorKind::Conflict`] if `target` exists, [`StoreErrorKind::Corrupt`] if the database is
/// damaged, [`StoreErrorKind::Io`] if there is no database, and the errors of the disk. After an
/// error there is no `target`.
pub fn backup(state_dir: &Path, target: &Path) -> Result<CopySummary, StoreError> {
    let path = state_dir.join(DATABASE_FILE);
    if target.symlink_metadata().is_ok() {
        return Err(taken(target));
    }
    if !is_there(&path)? {
        let message = format!("there is no database in {}; check UNKEY_VMCP_STATE_DIR", state_dir.display());
        return Err(store_error(StoreErrorKind::Io, Effect::NotApplied, message));
    }
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    };
    let draft = unnamed_file_in(folder)?;
    copy(&path, &draft)?;
    let conn = connect(&draft).map_err(|error| open::unusable(&draft, error))?;
    // The copy is checked rather than the source, because the copy is the file that must be sound.
    let (instance, vms) = verify(&conn, &path)?;
    close_copy(conn, &draft)?;
    let bytes = size(&draft)?;
    // The earlier check of `target` only saves work. This call alone guarantees that no file is
    // replaced.
    match draft.persist_noclobber(target) {
        Ok(()) => {}
        Err(refused) if refused.error.kind() == ErrorKind::AlreadyExists => return Err(taken(target)),
        Err(refused) => return Err(io_error("naming", target, refused.error)),
    }
    sync(folder)?;
    Ok(CopySummary { instance, vms, bytes })
}

/// Replaces the database in `state_dir`, which exists, by the backup `file`. No daemon may use the
/// directory. The replaced database stays beside the new one under a name with the date.
///
/// # Errors
///
/// [`StoreErrorKind::Io`] if a daemon holds the state directory, [`StoreErrorKind::Corrupt`] or
/// [`StoreErrorKind::Newer`] if the backup is damaged, another program's or from a newer program,
/// [`StoreErrorKind::Conflict`] if the backup belongs to another state directory or `amend` refuses
/// it. After an error the database is unchanged.
pub fn restore(
    file: &Path,
    state_dir: &Path,
    amend: &mut AmendRecord<'_>,
) -> Result<RestoreSummary, StoreError> {
    let _lock = open::lock(state_dir)?;
    let path = state_dir.join(DATABASE_FILE);
    refuse_itself(file, &path)?;
    let present = ReplacedDatabase::of(&path);

    let draft = unnamed_file_in(state_dir)?;
    copy(file, &draft).map_err(|error| unfit(file, error))?;
    let mut conn = connect(&draft).map_err(|error| open::unusable(&draft, error))?;
    let (instance, _) = verify(&conn, file).map_err(|error| unfit(file, error))?;
    // The identity is compared only if the present database can be read. A damaged database has
    // none to compare, and replacing a damaged database is the purpose of a backup.
    if let ReplacedDatabase::Readable(there) = &present
        && there.instance != instance
    {
        return Err(of_another(file, state_dir));
    }
    // The copy is in write-ahead mode like its source. An upgrade would put a log beside a file
    // that is still to be renamed, and the log would not follow it.
    without_log(&conn, &draft)?;
    schema::migrate(&mut conn, &draft, MIGRATIONS)?;
    let foreign = ForeignFields::default();
    let snapshot = reader::load(&mut conn, file, instance, &foreign).map_err(|error| unfit(file, error))?;
    refuse_unreadable(&snapshot, file)?;
    let vms = snapshot.vms.len();
    skip_places(&conn, &draft, &snapshot, &present)?;
    amend_records(&conn, file, &draft, snapshot, &foreign, amend)?;
    let date = timestamp(&conn, &draft)?;
    close_copy(conn, &draft)?;
    let bytes = size(&draft)?;

    // No later step can refuse the backup. The old database gets its second name
    // before the new one replaces the first name, so at every moment a database has that name.
    let replaced = present.set_aside(&path, &date)?;
    draft.persist(&path).map_err(|refused| io_error("naming", &path, refused.error))?;
    sync(state_dir)?;
    Ok(RestoreSummary { copied: CopySummary { instance, vms, bytes }, replaced })
}

/// The database that a restore replaces.
enum ReplacedDatabase {
    None,
    Readable(Box<Snapshot>),
    /// The database is damaged or from a newer program. It is kept byte for byte.
    Unreadable,
}

impl ReplacedDatabase {
    fn of(path: &Path) -> Self {
        let there = path.symlink_metadata().is_ok() || with_suffix(path, "-wal").symlink_metadata().is_ok();
        if !there {
            return Self::None;
        }
        match path.parent().map(peek) {
            Some(Ok(Some(snapshot))) => Self::Readable(Box::new(snapshot)),
            Some(Ok(None) | Err(_)) | None => Self::Unreadable,
        }
    }

    /// Gives the database a second name and moves its log out of the way, because SQLite would
    /// replay the log into the new database. The first name stays, because a daemon that finds no
    /// database would begin a new one. Returns the second name.
    fn set_aside(&self, path: &Path, date: &str) -> Result<Option<PathBuf>, StoreError> {
        if matches!(self, Self::None) {
            return Ok(None);
        }
        if matches!(self, Self::Readable(_)) {
            // The log is moved into the database, which is then complete in one file.
            let conn = connect(path).map_err(|error| open::unusable(path, error))?;
            without_log(&conn, path)?;
            conn.close().map_err(|(_, error)| open::unusable(path, error))?;
        }
        let kept = with_suffix(path, &format!(".replaced-{date}"));
        let absent = |error: &std::io::Error| error.kind() == ErrorKind::NotFound;
        match std::fs::hard_link(path, &kept) {
            // A database can be gone and have left its log, so a missing file is no error here.
            Err(error) if !absent(&error) => return Err(io_error("keeping", path, error)),
            Ok(()) | Err(_) => {}
        }
        let log = with_suffix(path, "-wal");
        match std::fs::rename(&log, with_suffix(&kept, "-wal")) {
            Err(error) if !absent(&error) => return Err(io_error("keeping", &log, error)),
            Ok(()) | Err(_) => {}
        }
        // The index of the log holds no data of its own. SQLite makes it again from the log.
        let index = with_suffix(path, "-shm");
        match std::fs::remove_file(&index) {
            Err(error) if !absent(&error) => return Err(io_error("removing", &index, error)),
            Ok(()) | Err(_) => {}
        }
        Ok(Some(kept))
    }
}

/// Returns true if the database exists.
///
/// # Errors
///
/// [`StoreErrorKind::Corrupt`] if the file is empty, or gone while its log is still there.
fn is_there(path: &Path) -> Result<bool, StoreError> {
    match std::fs::metadata(path) {
        Ok(file) if file.len() == 0 => Err(corrupt(path, "the file is empty")),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let left = std::fs::metadata(with_suffix(path, "-wal")).is_ok_and(|log| log.len() > 0);
            if left { Err(corrupt(path, "it is gone, but its log is still there")) } else { Ok(false) }
        }
        Err(error) => Err(io_error("looking at", path, error)),
    }
}

/// Makes an empty file in `folder` that only its owner may read. The file is deleted when it is
/// dropped without a name.
fn unnamed_file_in(folder: &Path) -> Result<TempPath, StoreError> {
    if matches!(folder.try_exists(), Ok(false)) {
        let message = format!("the folder {} does not exist; make it first", folder.display());
        return Err(store_error(StoreErrorKind::Io, Effect::NotApplied, message));
    }
    let draft = tempfile::Builder::new().prefix(".vmm-controlplane-copy-").tempfile_in(folder);
    // The handle is closed before SQLite opens the file, because closing it later would release
    // SQLite's locks on the file.
    draft
        .map(tempfile::NamedTempFile::into_temp_path)
        .map_err(|error| io_error("writing into", folder, error))
}

/// Copies a whole database as it is at one moment.
fn copy(from: &Path, to: &Path) -> Result<(), StoreError> {
    let reading = |error| from_sqlite(from, "copying", Effect::NotApplied, error);
    let source = connect_to_read(from).map_err(reading)?;
    let mut target = connect(to).map_err(|error| from_sqlite(to, "making", Effect::NotApplied, error))?;
    let copying = Backup::new(&source, &mut target).map_err(reading)?;
    // All pages in one step, because SQLite begins anew if the source changes between two steps.
    match copying.step(-1).map_err(reading)? {
        StepResult::Done => Ok(()),
        _ => Err(store_error(
            StoreErrorKind::Io,
            Effect::NotApplied,
            format!(
                "the database {} stayed locked by another program; end that program or try again",
                from.display()
            ),
        )),
    }
}

/// Checks every page of a copy. Returns the identity of its state directory and the number of its
/// VMs. Errors name the file `shown`.
fn verify(conn: &Connection, shown: &Path) -> Result<(InstanceId, usize), StoreError> {
    open::check(conn, shown, MIGRATIONS, CheckDepth::Whole)?;
    let failed = |error| from_sqlite(shown, "reading", Effect::NotApplied, error);
    let finding: String =
        conn.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if finding != "ok" {
        return Err(corrupt(shown, finding.trim().replace('\n', "; ")));
    }
    let instance = open::instance(conn, shown)?;
    let vms: u32 = conn.query_row("SELECT count(*) FROM vms", [], |row| row.get(0)).map_err(failed)?;
    Ok((instance, usize::try_from(vms).unwrap_or(usize::MAX)))
}

/// Refuses a backup with a record that this program cannot read, because `amend` could not compare
/// its VM with the host.
fn refuse_unreadable(snapshot: &Snapshot, file: &Path) -> Result<(), StoreError> {
    let Some(Unreadable { record, why }) = snapshot.unreadable.first() else { return Ok(()) };
    let finding = format!("VM {} (uid {}): {why}", record.vm_id, record.uid);
    Err(unfit(file, corrupt(file, finding)))
}

/// Moves the end of the event log past every position that was given since the backup, because a
/// token of the event log stands for one event for ever.
fn skip_places(
    conn: &Connection,
    path: &Path,
    copy: &Snapshot,
    present: &ReplacedDatabase,
) -> Result<(), StoreError> {
    let next = match present {
        ReplacedDatabase::Readable(there) => there.last_event.0.max(copy.last_event.0),
        ReplacedDatabase::None | ReplacedDatabase::Unreadable => {
            copy.last_event.0.saturating_add(UNKNOWN_EVENTS)
        }
    };
    let next = i64::try_from(next).unwrap_or(i64::MAX);
    let failed = |error| from_sqlite(path, "writing", Effect::NotApplied, error);
    conn.execute("DELETE FROM sqlite_sequence WHERE name = 'events'", []).map_err(failed)?;
    conn.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('events', ?1)", [next]).map_err(failed)?;
    Ok(())
}

/// Passes every VM to `amend` and writes the records that it changed.
fn amend_records(
    conn: &Connection,
    shown: &Path,
    path: &Path,
    snapshot: Snapshot,
    foreign: &ForeignFields,
    amend: &mut AmendRecord<'_>,
) -> Result<(), StoreError> {
    // All refusals are collected, because a person wants to see every VM that is in the way at
    // once.
    let mut refused = Vec::new();
    for mut record in snapshot.vms {
        match amend(&mut record) {
            Ok(false) => {}
            Ok(true) => {
                let mut row = encode_record(&record)?;
                foreign.put_back(&record, &mut row);
                conn.execute(
                    "UPDATE vms SET record = ?1, format = ?2 WHERE uid = ?3",
                    (&row.json, row.format, &row.uid),
                )
                .map_err(|error| from_sqlite(path, "writing", Effect::NotApplied, error))?;
            }
            Err(why) => refused.push(why),
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    let message =
        format!("{} is not put back, and nothing was changed: {}", shown.display(), refused.join("; "));
    Err(store_error(StoreErrorKind::Conflict, Effect::NotApplied, message))
}

/// Closes the copy as one file without a log, and forces it to the disk.
fn close_copy(conn: Connection, path: &Path) -> Result<(), StoreError> {
    without_log(&conn, path)?;
    conn.close().map_err(|(_, error)| from_sqlite(path, "closing", Effect::NotApplied, error))?;
    sync(path)
}

/// Moves the log into the database and leaves write-ahead mode, which deletes the log.
fn without_log(conn: &Connection, path: &Path) -> Result<(), StoreError> {
    conn.pragma_update_and_check(None, "journal_mode", "DELETE", |row| row.get::<_, String>(0))
        .map(|_| ())
        .map_err(|error| from_sqlite(path, "closing the log of", Effect::NotApplied, error))
}

/// Forces a file or a folder to the disk.
fn sync(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| io_error("writing", path, error))
}

fn size(path: &Path) -> Result<u64, StoreError> {
    std::fs::metadata(path).map(|facts| facts.len()).map_err(|error| io_error("looking at", path, error))
}

/// Returns the present time in UTC, to the millisecond, in a form that suits the name of a file.
fn timestamp(conn: &Connection, path: &Path) -> Result<String, StoreError> {
    conn.query_row("SELECT strftime('%Y%m%dT%H%M%fZ', 'now')", [], |row| row.get(0))
        .map_err(|error| from_sqlite(path, "reading", Effect::NotApplied, error))
}

fn taken(target: &Path) -> StoreError {
    let message = format!("{} is there already and was not touched; name a new file", target.display());
    store_error(StoreErrorKind::Conflict, Effect::NotApplied, message)
}

fn of_another(file: &Path, state_dir: &Path) -> StoreError {
    let message = format!(
        "{} is a backup of another state directory than {}, and nothing was changed. Name that directory with \
         UNKEY_VMCP_STATE_DIR; or, to begin here with the backup, move the database and the files that begin with its name \
         elsewhere first",
        file.display(),
        state_dir.display()
    );
    store_error(StoreErrorKind::Conflict, Effect::NotApplied, message)
}

/// Turns an error about a database into one about the backup `file`.
fn unfit(file: &Path, error: StoreError) -> StoreError {
    // The remedy is for a damaged database, and a damaged backup needs another one.
    let why = error.message.trim_end_matches(REMEDY).trim_end();
    let message = format!("{} cannot be put back, and nothing was changed: {why}", file.display());
    let unfit = store_error(error.kind, Effect::NotApplied, message);
    match error.source {
        Some(source) => unfit.caused_by(source),
        None => unfit,
    }
}

/// Refuses a backup that is not a file, or is the database itself.
fn refuse_itself(file: &Path, path: &Path) -> Result<(), StoreError> {
    let facts = std::fs::metadata(file).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            let message = format!("there is no file {}; name a backup", file.display());
            store_error(StoreErrorKind::Io, Effect::NotApplied, message)
        }
        _ => io_error("looking at", file, error),
    })?;
    let same =
        std::fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (facts.dev(), facts.ino()));
    if facts.is_file() && !same {
        return Ok(());
    }
    let what = if same { "is the database itself" } else { "is not a file" };
    let message = format!("{} {what}; name a backup", file.display());
    Err(store_error(StoreErrorKind::Conflict, Effect::NotApplied, message))
}
