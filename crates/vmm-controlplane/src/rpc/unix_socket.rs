//! A unix socket at a path. One daemon serves it, and it never shows to others than it may.
//!
//! ```text
//!   PATH.lock ── held by another daemon ──► refused
//!      │ ours
//!   PATH ── something else than a socket, or another user's ──► refused
//!      ├─── a server answers ──► refused
//!      ├─── nobody listens, so its daemon is dead ──► removed
//!      ▼
//!   bind ── group and mode ── listen: the first moment at which a client can connect
//! ```
//!
//! The lock is a file, because two daemons that start at once would otherwise both take the socket
//! of a dead daemon for stale, and the second would remove the socket of the first.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;

/// The connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 1024;

/// The longest wait for the lock of a dead daemon, which a child that was being started may hold
/// until its exec.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval between two attempts during that wait.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// The place of a unix socket and the users who may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocketOptions {
    /// The absolute path, at most 107 bytes long.
    pub path: PathBuf,
    /// The permission bits. Write permission is the permission to connect.
    pub mode: u32,
    /// The id of the socket's group; `None` leaves the group of the daemon.
    pub group: Option<u32>,
}

/// The reason for which a unix socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum UnixSocketError {
    /// Another program serves the socket.
    #[error(
        "another program serves the socket {}; stop that program, or name another path with UNKEY_VMCP_SOCKET", .0.display()
    )]
    InUse(PathBuf),
    /// There is something that this program did not make.
    #[error(
        "{} {what}; remove it if nobody needs it, or name another path with UNKEY_VMCP_SOCKET", .path.display()
    )]
    Foreign {
        /// The path.
        path: PathBuf,
        /// The fact about the file.
        what: &'static str,
    },
    /// The group of the socket cannot be set.
    #[error(
        "the socket {} cannot be given to the group {group}; run the daemon as root or as a member of the group, or unset \
         UNKEY_VMCP_SOCKET_GROUP", .path.display()
    )]
    Group {
        /// The path.
        path: PathBuf,
        /// The group's id.
        group: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error(
        "the socket {} cannot be made; check that its folder exists and that the daemon's user may write there", .path.display()
    )]
    Io {
        /// The socket, or its lock.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

/// A unix socket that listens. Dropping it removes the socket and its lock from the file system.
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// The device and the inode of the socket.
    identity: (u64, u64),
    lock: SocketLock,
}

impl UnixSocket {
    /// Makes the socket and listens. Blocks for at most two seconds, and only where a dead daemon
    /// has left its lock to a child. Must be called in a runtime.
    ///
    /// # Errors
    ///
    /// Another program serves the socket, something else is at the path, or the kernel refuses.
    pub fn bind(options: &UnixSocketOptions) -> Result<Self, UnixSocketError> {
        let path = options.path.as_path();
        let io_error = |source: io::Error| UnixSocketError::Io { path: path.to_owned(), source };
        let lock = SocketLock::acquire(path)?;
        remove_stale(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|error| io_error(error.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|error| io_error(error.into()))?;
        rustix::net::bind(&socket, &address).map_err(|error| io_error(error.into()))?;
        let bound = listen(socket, options);
        let (listener, identity) = bound.inspect_err(|_| {
            // The error that the caller gets says more than an error of this clean-up.
            let _ = std::fs::remove_file(path);
        })?;
        Ok(Self { listener, path: path.to_owned(), identity, lock })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // Another file may be there if somebody removed the socket while the daemon ran.
        if identity_of(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "the unix socket could not be removed");
        }
        self.lock.remove();
    }
}

/// Gives a bound socket its group and mode, and then listens. Nobody can connect before.
fn listen(
    socket: OwnedFd,
    options: &UnixSocketOptions,
) -> Result<(UnixListener, (u64, u64)), UnixSocketError> {
    let path = options.path.as_path();
    let io_error = |source: io::Error| UnixSocketError::Io { path: path.to_owned(), source };
    if let Some(group) = options.group {
        std::os::unix::fs::chown(path, None, Some(group)).map_err(|source| UnixSocketError::Group {
            path: path.to_owned(),
            group,
            source,
        })?;
    }
    std::fs::set_permissions(path, Permissions::from_mode(options.mode)).map_err(io_error)?;
    let identity = identity_of(path).map_err(io_error)?;
    rustix::net::listen(&socket, BACKLOG).map_err(|error| io_error(error.into()))?;
    let listener = UnixListener::from_std(StdUnixListener::from(socket)).map_err(io_error)?;
    Ok((listener, identity))
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes the socket of a daemon that has died. The caller holds the lock.
fn remove_stale(path: &Path) -> Result<(), UnixSocketError> {
    let io_error = |source: io::Error| UnixSocketError::Io { path: path.to_owned(), source };
    let foreign = |what| UnixSocketError::Foreign { path: path.to_owned(), what };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(foreign("exists and is no socket"));
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(foreign("is the socket of another user"));
    }
    // The connect does not wait: a listener whose backlog is full answers EAGAIN at once.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|error| io_error(error.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|error| io_error(error.into()))?;
    match rustix::net::connect(&probe, &address) {
        Ok(()) | Err(Errno::AGAIN) => Err(UnixSocketError::InUse(path.to_owned())),
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(io_error),
        // A socket of another type than a stream.
        Err(Errno::PROTOTYPE) => Err(foreign("is a socket of another kind")),
        Err(error) => Err(io_error(error.into())),
    }
}

/// The right to serve one path. The kernel gives it back when the daemon dies.
struct SocketLock {
    file: File,
    path: PathBuf,
}

impl SocketLock {
    fn acquire(socket: &Path) -> Result<Self, UnixSocketError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let io_error = |source: io::Error| UnixSocketError::Io { path: path.clone(), source };
        let deadline = Instant::now() + HANDOVER_TIMEOUT;
        loop {
            let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(flags)
                .open(&path)
                .map_err(io_error)?;
            match file.try_lock() {
                // The holder before may have removed the file between the open and the lock. A lock
                // on a file that nobody can find any more would exclude nobody.
                Ok(()) if is_at(&file, &path) => return Ok(Self { file, path }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(UnixSocketError::InUse(socket.to_owned()));
                }
                Err(TryLockError::WouldBlock) => pause(),
                Err(TryLockError::Error(error)) => return Err(io_error(error)),
            }
        }
    }

    /// Removes the file while the lock is held, so that it is not another daemon's.
    fn remove(&self) {
        if is_at(&self.file, &self.path) {
            // A file that stays does no harm, because the lock ends with the daemon.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let held = file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    matches!((held, identity_of(path)), (Ok(held), Ok(found)) if held == found)
}

#[expect(clippy::disallowed_methods, reason = "the daemon serves no client yet")]
fn pause() {
    std::thread::sleep(RETRY_INTERVAL);
}
