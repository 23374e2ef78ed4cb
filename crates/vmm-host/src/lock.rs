//! The lock that allows one daemon per state directory.
//!
//! The kernel holds the lock while the daemon lives, so a crash leaves nothing to clean up. A child
//! that is being started shares the lock until its exec. If its daemon is killed in that moment,
//! the lock lives on for some milliseconds, and the next daemon waits for its end. The file stays,
//! because its content names the holder.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

/// The name of the lock's file in the state directory.
const FILE_NAME: &str = "lock";
/// The longest wait for the lock of a dead daemon. A child that the daemon was starting may still
/// hold it, or a process that asks for the holder. An exec takes milliseconds, and more on a busy
/// machine.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval between two attempts during that wait.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// The right to be the only daemon of a state directory. The right ends when the value is dropped
/// or the daemon dies. Started processes do not inherit it.
#[derive(Debug)]
pub struct StateLock {
    file: File,
}

/// The reason why a state directory cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon holds the lock.
    #[error(
        "the state directory {} is in use by {}; stop that daemon, or give this one another directory with UNKEY_VMCP_STATE_DIR",
        .state_dir.display(), holder_name(*.pid)
    )]
    Held {
        /// The directory.
        state_dir: PathBuf,
        /// The process id in the lock's file; `None` where none can be read.
        pid: Option<u32>,
    },
    /// Another user could write or replace the directory.
    #[error("the state directory {} {why}", .path.display())]
    Exposed {
        /// The directory.
        path: PathBuf,
        /// The fault and the remedy.
        why: String,
    },
    /// There is something else than a directory at the path.
    #[error("the state directory {} is a file, not a directory; name a directory with UNKEY_VMCP_STATE_DIR", .path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// The directory or its lock file cannot be used.
    #[error("the state directory cannot be locked by {}; check that the daemon's user may write there", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

fn holder_name(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another daemon".to_owned(), |pid| format!("the daemon with process id {pid}"))
}

impl StateLock {
    /// Takes the lock of `state_dir`, and creates a missing directory with mode 0700. Blocks for at
    /// most two seconds, and only where a dead daemon has left the lock to a child.
    ///
    /// # Errors
    /// Returns [`LockError::Held`] where another process holds the lock.
    pub fn acquire(state_dir: &Path) -> Result<Self, LockError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| LockError::Io { path, source }
        };
        if fs::metadata(state_dir).is_ok_and(|facts| !facts.is_dir()) {
            return Err(LockError::NotADirectory { path: state_dir.to_path_buf() });
        }
        make_dir(state_dir, |dir| File::open(dir)?.sync_all()).map_err(failed(state_dir))?;
        check_private(state_dir)?;
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
        // A lock that cannot be taken means one of two things. If the process in the file lives, a
        // daemon serves this directory, and waiting would not help. If it has ended, the lock is
        // only the rest that a child holds until its exec, and a short wait takes it. A file
        // without a readable pid counts as the first case, because its daemon may be about to
        // write.
        let deadline = Instant::now() + HANDOVER_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(LockError::Io { path, source }),
            }
            let pid = read_pid(&mut file);
            if Instant::now() >= deadline || !pid.is_some_and(has_ended) {
                return Err(LockError::Held { state_dir: state_dir.to_path_buf(), pid });
            }
            pause();
        }
        write_pid(&mut file).map_err(failed(&path))?;
        Ok(Self { file })
    }
}

/// Makes the state directory and its missing parents, each with mode 0700. `force` has been called
/// for every directory with a new name in it when the function returns, because a database must not
/// vanish with a directory that the host forgot in a power failure.
fn make_dir(state_dir: &Path, force: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let missing = state_dir.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists());
    let parents = missing.filter_map(Path::parent);
    // The missing directories are listed before they are made, because none is missing afterwards.
    let changed: Vec<&Path> =
        parents.map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir }).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    changed.into_iter().try_for_each(force)
}

/// Refuses a state directory in which another user could put files, because the daemon believes its
/// content and ends the processes that it names.
///
/// # Errors
/// Returns [`LockError::Exposed`], and [`LockError::Io`] where the directory cannot be examined.
pub fn check_private(state_dir: &Path) -> Result<(), LockError> {
    let failed = |source| LockError::Io { path: state_dir.to_path_buf(), source };
    let exposed = |why| Err(LockError::Exposed { path: state_dir.to_path_buf(), why });
    let ours = rustix::process::geteuid().as_raw();
    let link = fs::symlink_metadata(state_dir).map_err(failed)?;
    // A link of root or of the daemon's user is allowed, because administrators move state
    // directories. The target is checked below like any directory.
    if link.is_symlink() && link.uid() != ours && link.uid() != 0 {
        return exposed(format!(
            "is a symbolic link of another user (uid {}): name the directory itself",
            link.uid()
        ));
    }
    let facts = fs::metadata(state_dir).map_err(failed)?;
    if facts.uid() != ours {
        return exposed(format!(
            "belongs to another user (uid {}): name one of the daemon's own with UNKEY_VMCP_STATE_DIR, or change its owner",
            facts.uid()
        ));
    }
    if facts.mode() & 0o022 != 0 {
        return exposed(format!("may be written by other users: run chmod go-w {}", state_dir.display()));
    }
    Ok(())
}

/// Returns the daemon that holds the lock of `state_dir`; `None` where none does. Creates nothing.
///
/// The lock is tried for a moment in shared mode, so concurrent callers do not see each other as
/// holders.
///
/// # Errors
/// Returns the kernel's error, as where this user may not read the lock's file.
pub fn holder(state_dir: &Path) -> io::Result<Option<LockHolder>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(state_dir.join(FILE_NAME));
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match file.try_lock_shared() {
        Ok(()) => file.unlock().map(|()| None),
        Err(TryLockError::WouldBlock) => Ok(Some(LockHolder { pid: read_pid(&mut file) })),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The daemon that holds a state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// The process id; `None` where the daemon has not written it yet.
    pub pid: Option<u32>,
}

impl Drop for StateLock {
    fn drop(&mut self) {
        // Closing the file would not be enough, because a child that is being started shares the
        // open file until its exec.
        if let Err(error) = self.file.unlock() {
            tracing::warn!(%error, "the state directory could not be unlocked before the end of the daemon");
        }
    }
}

/// Returns true if no process has this id, or only a zombie.
fn has_ended(pid: u32) -> bool {
    match std::fs::read(format!("/proc/{pid}/cmdline")) {
        // A zombie has no arguments.
        Ok(arguments) => arguments.is_empty(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the daemon serves no client yet, and a subcommand does one thing"
)]
fn pause() {
    std::thread::sleep(RETRY_INTERVAL);
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// Reads the process id from the lock's file. `None` is normal while the holder is about to write.
fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A child that ends with the test.
    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_second_daemon_is_refused_with_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("state");
        let lock = StateLock::acquire(&state_dir).unwrap();
        assert_eq!(std::fs::metadata(&state_dir).unwrap().mode() & 0o777, 0o700);
        let text = StateLock::acquire(&state_dir).unwrap_err().to_string();
        assert!(text.contains(&format!("process id {}", std::process::id())), "{text}");
        assert!(text.contains("UNKEY_VMCP_STATE_DIR"), "{text}");
        assert_eq!(holder(&state_dir).unwrap(), Some(LockHolder { pid: Some(std::process::id()) }));
        drop(lock);
        assert_eq!(holder(&state_dir).unwrap(), None);
        assert_eq!(holder(&dir.path().join("none")).unwrap(), None);
        assert!(!dir.path().join("none").exists());
        StateLock::acquire(&state_dir).unwrap();
    }

    #[test]
    fn every_directory_with_a_new_name_in_it_is_forced_to_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("a/b/c");
        let forced = |state_dir: &Path| {
            let mut forced = Vec::new();
            let record = |dir: &Path| {
                forced.push(dir.to_path_buf());
                Ok(())
            };
            make_dir(state_dir, record).unwrap();
            forced
        };
        assert_eq!(forced(&state_dir), ["a/b", "a", ""].map(|name| dir.path().join(name)));
        assert_eq!(std::fs::metadata(&state_dir).unwrap().mode() & 0o777, 0o700);
        assert_eq!(forced(&state_dir), Vec::<PathBuf>::new(), "no name is new any more");
    }

    #[test]
    fn a_state_directory_that_cannot_be_forced_to_the_disk_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let refuse = |_: &Path| Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()));
        assert!(make_dir(&dir.path().join("a"), refuse).is_err());
    }

    #[test]
    fn the_lock_excludes_another_process_in_both_directions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let lock = StateLock::acquire(dir.path()).unwrap();
        let tried = Command::new("flock").arg("-n").arg(&path).arg("true").status().unwrap();
        assert_eq!(tried.code(), Some(1), "held by this process");
        drop(lock);

        std::fs::write(&path, "4242\n").unwrap();
        let holder = Command::new("flock")
            .arg("--no-fork")
            .arg(&path)
            .args(["sh", "-c", "echo held; exec sleep 600"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut holder = Killed(holder);
        let mut held = [0; 5];
        holder.0.stdout.take().unwrap().read_exact(&mut held).unwrap();
        let refused = StateLock::acquire(dir.path()).unwrap_err();
        assert!(matches!(refused, LockError::Held { pid: Some(4242), .. }), "{refused}");
        drop(holder);
        StateLock::acquire(dir.path()).unwrap();
    }

    /// A daemon that is killed while it starts a VMM leaves its lock to the child for a moment.
    #[test]
    fn a_start_waits_for_the_lock_of_a_dead_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let lock = StateLock::acquire(dir.path()).unwrap();
        let mut dead = Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), format!("{}\n", dead.id())).unwrap();
        let asked = std::thread::scope(|scope| {
            let next = scope.spawn(|| StateLock::acquire(dir.path()).map(drop));
            pause();
            drop(lock);
            next.join().unwrap()
        });
        asked.unwrap();
    }

    #[test]
    fn child_processes_do_not_inherit_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let lock = StateLock::acquire(dir.path()).unwrap();
        let flags = rustix::io::fcntl_getfd(&lock.file).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::{PermissionsExt, chown, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (state, link) = (dir.path().join("state"), dir.path().join("link"));
        StateLock::acquire(&state).unwrap();
        symlink(&state, &link).unwrap();
        StateLock::acquire(&link).expect("an administrator may move it elsewhere");
        let refusal = |path: &Path| match StateLock::acquire(path).unwrap_err() {
            error @ LockError::Exposed { .. } => error.to_string(),
            other => panic!("{other}"),
        };
        for mode in [0o770, 0o707, 0o777] {
            fs::set_permissions(&state, fs::Permissions::from_mode(mode)).unwrap();
            assert!(refusal(&state).contains("chmod go-w"), "{mode:o}");
        }
        fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
        StateLock::acquire(&state).expect("others may look");
        if !rustix::process::geteuid().is_root() {
            return vmm_testkit::skip::skipped(
                "a_directory_that_others_can_write_is_refused",
                "chown needs root",
            );
        }
        std::os::unix::fs::lchown(&link, Some(12_345), None).unwrap();
        assert!(refusal(&link).contains("symbolic link of another user"));
        chown(&state, Some(12_345), None).unwrap();
        let before = fs::read_dir(&state).unwrap().count();
        assert!(refusal(&state).contains("uid 12345"));
        assert_eq!(fs::read_dir(&state).unwrap().count(), before);
    }

    #[test]
    fn an_unusable_state_directory_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = StateLock::acquire(file.path()).unwrap_err().to_string();
        assert!(text.contains(&format!("{} is a file, not a directory", file.path().display())), "{text}");
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/nowhere/else", dir.path().join(FILE_NAME)).unwrap();
        assert!(matches!(StateLock::acquire(dir.path()), Err(LockError::Io { .. })));
    }
}
