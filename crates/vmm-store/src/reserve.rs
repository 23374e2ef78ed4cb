//! Room that is kept, so that what a client forces can be recorded on a full disk.
//!
//! ```text
//!   forced commit ── no room ──► a piece of the file goes ──► once more ──► recorded
//!                                                                 checkpointer: there is room again ──► the file is made whole
//! ```
//!
//! A file beside the database takes up some room and holds nothing. An ordinary commit never gets that room: who fills the disk
//! with new VMs could otherwise not be rid of them. The last of it is for opening: SQLite needs a little, and a daemon that
//! cannot start on a full disk could end nothing there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, OFlags, fallocate, statvfs};
use rustix::io::Errno;

use crate::open::with_suffix;

/// What is kept: a forced deletion needs some 40 KiB until the next checkpoint, so this is enough for a hundred in one moment,
/// and for thousands over time.
const BYTES: u64 = 4 << 20;
/// What is given up at once. Whoever fills the disk may be quicker to take it, so it is not all.
const PIECE: u64 = 512 << 10;
/// The part of it that only opening may have: the index of the log takes 32 KiB.
const FOR_OPENING: u64 = 256 << 10;

/// The file. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Reserve {
    /// Locked while the file is made and while its room is being used, so that neither disturbs the other.
    path: Arc<Mutex<PathBuf>>,
}

impl Reserve {
    /// The reserve of the database at `path`. Makes nothing.
    pub(crate) fn of(path: &Path) -> Self {
        Self { path: Arc::new(Mutex::new(with_suffix(path, "-reserve"))) }
    }

    /// Makes the file if it is not there, and if that leaves as much room to others.
    pub(crate) fn keep(&self) {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        let now = fs::metadata(&*path).map_or(0, |file| file.len());
        if now == BYTES || free_beside(&path) + now < 2 * BYTES {
            return;
        }
        if let Err(error) = make(&path) {
            shrink(&path, BYTES, FOR_OPENING);
            tracing::warn!(%error, reserve = %path.display(), "no room could be kept for a full disk; force may fail on one");
        }
    }

    /// Gives up some room and does `work` again, which found none. `None` means that there is nothing left to give up.
    pub(crate) fn spend<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        self.give_up(PIECE, FOR_OPENING, work)
    }

    /// The same for opening, which may have all of it.
    pub(crate) fn spend_on_opening<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        self.give_up(BYTES, 0, work)
    }

    fn give_up<T>(&self, piece: u64, last: u64, work: impl FnOnce() -> T) -> Option<T> {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        shrink(&path, piece, last).then(|| {
            tracing::warn!(
                "the disk of the state directory is full, and room that was kept is used. Free some: only forced \
                 operations can be recorded now"
            );
            work()
        })
    }

    /// Says whether so little room is left that a failure may be due to it, and there is something to give up.
    pub(crate) fn may_help(&self) -> bool {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        fs::metadata(&*path).is_ok_and(|file| file.len() > 0) && free_beside(&path) < BYTES
    }
}

/// Makes the file smaller by `piece`, down to `last` bytes, and says whether it was larger.
fn shrink(path: &Path, piece: u64, last: u64) -> bool {
    let Ok(file) = opening().open(path) else { return false };
    let Ok(now) = file.metadata().map(|now| now.len()) else { return false };
    now > last && file.set_len(now.saturating_sub(piece).max(last)).is_ok()
}

/// The room on the file system of `path` that this user may take, in bytes.
fn free_beside(path: &Path) -> u64 {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    statvfs(dir).map_or(0, |room| room.f_bavail.saturating_mul(room.f_frsize))
}

/// A link in the place of the file would lead to another one, which must not be cut.
fn opening() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
    options
}

fn make(path: &Path) -> io::Result<()> {
    let mut file = opening().create(true).truncate(false).mode(0o600).open(path)?;
    match fallocate(&file, FallocateFlags::empty(), 0, BYTES) {
        // Where room cannot be asked for it is taken, with bytes that no file system can make smaller.
        Err(Errno::OPNOTSUPP) => io::copy(&mut File::open("/dev/urandom")?.take(BYTES), &mut file).map(drop),
        made => made.map_err(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_link_in_its_place_is_left_alone() {
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
    fn it_takes_up_room_until_it_is_spent_and_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(&dir.path().join("x.db"));
        let path = dir.path().join("x.db-reserve");
        for _ in 0..2 {
            reserve.keep();
            let file = fs::metadata(&path).unwrap();
            assert_eq!(file.len(), BYTES);
            assert!(file.blocks() * 512 >= BYTES, "the room is really taken");
            let mut sizes = Vec::new();
            while let Some(size) = reserve.spend(|| fs::metadata(&path).unwrap().len()) {
                sizes.push(size);
            }
            assert_eq!((sizes[0], sizes.len(), sizes[7]), (BYTES - PIECE, 8, FOR_OPENING));
            assert_eq!(reserve.spend_on_opening(|| fs::metadata(&path).unwrap().len()), Some(0));
            assert_eq!(reserve.spend_on_opening(|| ()), None);
        }
        // A making that broke off is not taken for whole.
        fs::write(&path, "half").unwrap();
        reserve.keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), BYTES);
    }
}
