//! Keeps room on the disk, so that a forced operation can be recorded on a full one.
//!
//! ```text
//!   forced commit ── no room ──► the file gives up a piece ──► once more ──► recorded
//!                              checkpointer: there is room again ──► the file is made whole
//! ```
//!
//! A file beside the database occupies the room and holds no data. An ordinary commit never gets
//! the room, because otherwise new VMs could fill it and then could not be deleted. The last part
//! of the file is for opening, because SQLite needs some room to open a database, and a daemon that
//! cannot start on a full disk could end no VM there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, OFlags, fallocate, statvfs};
use rustix::io::Errno;

use crate::open::with_suffix;

/// The size of the file. A forced deletion needs about 40 KiB until the next checkpoint, so 4 MiB
/// are enough for a hundred deletions at once, and for thousands over time.
const BYTES: u64 = 4 << 20;
/// The size of the piece that is given up at once. It is a part of the file, because another
/// program that fills the disk may take the freed room first.
const PIECE: u64 = 512 << 10;
/// The part of the file that only opening may use: the index of the log takes 32 KiB.
const FOR_OPENING: u64 = 256 << 10;

/// The reserve of one database. Clones share the file.
#[derive(Clone, Debug)]
pub(crate) struct Reserve {
    /// Locked while the file is made and while freed room is used. Otherwise the checkpointer could
    /// make the file again between the freeing and the commit that needs the room.
    path: Arc<Mutex<PathBuf>>,
}

impl Reserve {
    /// Returns the reserve of the database at `path`. Makes no file.
    pub(crate) fn of(path: &Path) -> Self {
        Self { path: Arc::new(Mutex::new(with_suffix(path, "-reserve"))) }
    }

    /// Makes the file, or completes it, if as much room again stays free for others. A failure is
    /// logged and tried again with the next call.
    pub(crate) fn keep(&self) {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        let now = fs::metadata(&*path).map_or(0, |file| file.len());
        // The room that is free must be twice the reserve, because a reserve that fills the disk by
        // itself would cause the failure that it is meant for.
        if now == BYTES || free_beside(&path) + now < 2 * BYTES {
            return;
        }
        if let Err(error) = make(&path) {
            // A file that is half made gives its room back, except for the part that opening needs.
            shrink(&path, BYTES, FOR_OPENING);
            tracing::warn!(%error, reserve = %path.display(), "room for forced operations on a full disk could not be reserved; they may fail there");
        }
    }

    /// Gives up a piece of the reserve and calls `work`, which failed before for lack of room.
    /// Returns `None` without a call if only the part for opening is left.
    pub(crate) fn release_for<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        self.give_up(PIECE, FOR_OPENING, work)
    }

    /// Gives up all that is left of the reserve and calls `work`, which opens the database. Returns
    /// `None` without a call if nothing is left.
    pub(crate) fn spend_on_opening<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        self.give_up(BYTES, 0, work)
    }

    fn give_up<T>(&self, piece: u64, last: u64, work: impl FnOnce() -> T) -> Option<T> {
        // The guard lives until `work` returns, because `keep` must not take the freed room back
        // meanwhile.
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        shrink(&path, piece, last).then(|| {
            tracing::warn!(
                "the disk of the state directory is full, and the reserved room is in use. Free some room: only \
                 forced operations can be recorded now"
            );
            work()
        })
    }

    /// Returns true if the file system has so little room that a failure may be due to that, and
    /// the reserve has something to give up.
    pub(crate) fn may_help(&self) -> bool {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        fs::metadata(&*path).is_ok_and(|file| file.len() > 0) && free_beside(&path) < BYTES
    }
}

/// Makes the file smaller by `piece`, but not below `last` bytes. Returns true if the file was
/// larger than `last` and was shortened.
fn shrink(path: &Path, piece: u64, last: u64) -> bool {
    let Ok(file) = opening().open(path) else { return false };
    let Ok(now) = file.metadata().map(|now| now.len()) else { return false };
    now > last && file.set_len(now.saturating_sub(piece).max(last)).is_ok()
}

/// Returns the room on the file system of `path` that this user may take, in bytes.
fn free_beside(path: &Path) -> u64 {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    statvfs(dir).map_or(0, |room| room.f_bavail.saturating_mul(room.f_frsize))
}

/// Returns the options that open the file without following a link, because a link in the place of
/// the file would lead to another file, which must not be shortened.
fn opening() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
    options
}

fn make(path: &Path) -> io::Result<()> {
    let mut file = opening().create(true).truncate(false).mode(0o600).open(path)?;
    match fallocate(&file, FallocateFlags::empty(), 0, BYTES) {
        // The file system cannot allocate room. The file is written with random bytes instead,
        // because a file system that compresses cannot make those smaller.
        Err(Errno::OPNOTSUPP) => io::copy(&mut File::open("/dev/urandom")?.take(BYTES), &mut file).map(drop),
        made => made.map_err(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_symbolic_link_at_the_path_of_the_reserve_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (path, theirs) = (dir.path().join("x.db-reserve"), dir.path().join("theirs"));
        fs::write(&theirs, vec![7; 1 << 20]).unwrap();
        std::os::unix::fs::symlink(&theirs, &path).unwrap();
        let reserve = Reserve::of(&dir.path().join("x.db"));
        reserve.keep();
        assert_eq!(reserve.spend_on_opening(|| ()), None);
        assert_eq!(fs::read(&theirs).unwrap(), vec![7; 1 << 20]);
    }

    #[test]
    fn the_reserve_uses_disk_space_until_it_is_spent_and_is_renewed() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(&dir.path().join("x.db"));
        let path = dir.path().join("x.db-reserve");
        for _ in 0..2 {
            reserve.keep();
            let file = fs::metadata(&path).unwrap();
            assert_eq!(file.len(), BYTES);
            assert!(file.blocks() * 512 >= BYTES, "the room is really taken");
            let mut sizes = Vec::new();
            while let Some(size) = reserve.release_for(|| fs::metadata(&path).unwrap().len()) {
                sizes.push(size);
            }
            assert_eq!((sizes[0], sizes.len(), sizes[7]), (BYTES - PIECE, 8, FOR_OPENING));
            assert_eq!(reserve.spend_on_opening(|| fs::metadata(&path).unwrap().len()), Some(0));
            assert_eq!(reserve.spend_on_opening(|| ()), None);
        }
        // A file that is only partly made is completed.
        fs::write(&path, "half").unwrap();
        reserve.keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), BYTES);
    }
}
