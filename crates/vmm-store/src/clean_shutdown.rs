//! Marks a database that was closed in order, so that the next start need not check every page.
//!
//! The mark is the content of the lock file: the file attributes of the database. The mark is
//! removed before anything is written, because a daemon that dies must leave none. The mark does
//! not match a database that another program has changed or replaced.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::open::with_suffix;

/// Removes the mark. Returns true if the mark matched the database at `path`.
pub(crate) fn remove_mark(lock: &File, path: &Path) -> bool {
    let take = || -> io::Result<bool> {
        let mut file = lock;
        let mut found = String::new();
        file.rewind()?;
        file.take(1024).read_to_string(&mut found)?;
        // The removal is forced to the disk before the first write to the database. Otherwise the
        // mark could come back after a power failure and match a database that was being written.
        if !found.is_empty() {
            lock.set_len(0)?;
            lock.sync_data()?;
        }
        Ok(found == of(path)?)
    };
    // In doubt the database is checked in full, because a needless check only costs time.
    take().unwrap_or(false)
}

/// Writes the mark of the database at `path`. Every connection must be closed. A failure is logged
/// and costs the next start a full check.
pub(crate) fn write_mark(lock: &File, path: &Path) {
    let leave = || -> io::Result<()> {
        let mut file = lock;
        lock.set_len(0)?;
        file.rewind()?;
        file.write_all(of(path)?.as_bytes())?;
        lock.sync_data()
    };
    if let Err(error) = leave() {
        tracing::debug!(%error, "the mark of a clean end could not be written; the next start checks every page");
    }
}

/// Returns the attributes of a database that form its mark.
///
/// # Errors
///
/// An error if the database has a log, because such a database was not closed in order.
fn of(path: &Path) -> io::Result<String> {
    if fs::metadata(with_suffix(path, "-wal")).is_ok_and(|log| log.len() > 0) {
        return Err(io::Error::other("the database has a log"));
    }
    let facts = fs::metadata(path)?;
    Ok(format!(
        "closed: device {} inode {} bytes {} changed {}.{:09}\n",
        facts.dev(),
        facts.ino(),
        facts.len(),
        facts.mtime(),
        facts.mtime_nsec()
    ))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{DATABASE_FILE, SqliteStore, open};

    fn opened_and_closed(dir: &Path) -> PathBuf {
        drop(SqliteStore::open(dir).unwrap());
        dir.join(DATABASE_FILE)
    }

    #[test]
    fn a_closed_database_has_a_mark_until_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = opened_and_closed(dir.path());
        let lock = open::lock(dir.path()).unwrap();
        assert!(remove_mark(&lock, &path), "closed in order");
        assert!(!remove_mark(&lock, &path), "a daemon that dies now has left none");
        write_mark(&lock, &path);
        assert!(remove_mark(&lock, &path));
    }

    #[test]
    fn a_mark_does_not_fit_a_database_changed_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = opened_and_closed(dir.path());
        let whole = fs::read(&path).unwrap();
        let log = with_suffix(&path, "-wal");
        let changes: [&dyn Fn(); 3] = [
            &|| fs::write(&path, &whole).unwrap(),
            &|| {
                fs::remove_file(&path).unwrap();
                fs::write(&path, &whole).unwrap();
            },
            &|| fs::write(&log, "a log").unwrap(),
        ];
        for change in changes {
            let lock = open::lock(dir.path()).unwrap();
            write_mark(&lock, &path);
            change();
            assert!(!remove_mark(&lock, &path));
        }
    }
}
