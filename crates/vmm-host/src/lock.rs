//! One daemon per state directory.
//!
//! The kernel holds the lock for as long as the daemon lives and no longer, so there is nothing to clean up after a crash.
//! The file stays: its content only tells people who holds it.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// The lock's file in the state directory.
const FILE_NAME: &str = "lock";

/// The right to be the only daemon of a state directory. Ends when it is dropped or the daemon dies; children don't get it.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

/// Why a state directory could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon has it.
    #[error(
        "the state directory {} is in use by {}; stop that daemon, or give this one another directory with UNKEY_VMCP_STATE_DIR",
        .state_dir.display(), holder(*.pid)
    )]
    Held {
        /// The directory.
        state_dir: PathBuf,
        /// The process that says it holds the lock.
        pid: Option<u32>,
    },
    /// The directory or the file in it cannot be used.
    #[error("the state directory cannot be locked by {}: {source}; check that the daemon's user may write there", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another daemon".to_owned(), |pid| format!("the daemon with process id {pid}"))
}

impl StateLock {
    /// Takes the lock of `state_dir`, which is made with mode 0700 if it is missing. Never waits.
    ///
    /// # Errors
    /// [`LockError::Held`] where another process has it.
    pub fn acquire(state_dir: &Path) -> Result<Self, LockError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| LockError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(failed(state_dir))?;
        let path = state_dir.join(FILE_NAME);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(&path)
            .map_err(failed(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held { state_dir: state_dir.to_path_buf(), pid: read_pid(&mut file) });
            }
            Err(TryLockError::Error(source)) => return Err(LockError::Io { path, source }),
        }
        write_pid(&mut file).map_err(failed(&path))?;
        Ok(Self { _file: file })
    }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// What the holder wrote. It may be about to write, so nothing is no surprise.
fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
