//! Checks a socket that another program made, and proves which process listens on it.
//!
//! ```text
//!   examine ── a link, no socket, replaceable by another user ──► refused
//!      │
//!   connect ──► the listener's pid (SO_PEERCRED) ──► pidfd ──► connect again: same pid ──► proven
//! ```
//!
//! A pid alone may belong to another process by the time of the check. A listening socket ends with
//! its last holder. Therefore, if a second connection after the opening of the pidfd shows the same
//! pid, the pidfd means the listener.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;

use crate::process::{self, Lookup, Process};

/// The longest wait for a connection. A listener whose queue is full does not answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection, and the process that is proven to listen at its other end.
#[derive(Debug)]
pub struct EndpointConnection {
    /// The connection.
    pub stream: UnixStream,
    /// The listener.
    pub process: Process,
}

/// The reason why a socket cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// No process listens: there is no socket, or one that was left behind.
    #[error("no process listens on {0}")]
    Nobody(String),
    /// The socket must not be used. The text has the reason and the remedy.
    #[error("{0}")]
    Refused(String),
    /// The socket cannot be used now. The text has the reason.
    #[error("{0}")]
    Failed(String),
}

/// Examines the file at `path`, and refuses one that another user could have put there or
/// exchanged.
///
/// # Errors
/// Returns [`EndpointError`], as its variants describe.
pub fn examine(path: &Path) -> Result<(), EndpointError> {
    let shown = path.display();
    let facts = match std::fs::symlink_metadata(path) {
        Ok(facts) => facts,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(EndpointError::Nobody(shown.to_string()));
        }
        Err(error) => return Err(EndpointError::Failed(format!("{shown} cannot be examined: {error}"))),
    };
    if facts.file_type().is_symlink() {
        return Err(EndpointError::Refused(format!(
            "{shown} is a symbolic link, which its owner can point at another socket: name the socket itself"
        )));
    }
    if !facts.file_type().is_socket() {
        return Err(EndpointError::Refused(format!(
            "{shown} is not a socket: name the one that the VMM listens on"
        )));
    }
    // The owner of a socket can put another socket in its place at any time.
    if !is_trusted(facts.uid()) {
        return Err(EndpointError::Refused(format!(
            "{shown} belongs to another user (uid {}): have the VMM started by root or by the daemon's user",
            facts.uid()
        )));
    }
    // Everybody may write to this socket, so any user can connect to it and command the VMM. That
    // is the choice of the daemon's own user where the socket is that user's, and a danger
    // otherwise.
    let everybody = facts.mode() & 0o002 != 0;
    if everybody && facts.uid() != rustix::process::geteuid().as_raw() {
        return Err(EndpointError::Refused(format!(
            "{shown} is writable by everybody and belongs to another user (uid {}): take the right away (chmod o-w), or have the \
             VMM started by the daemon's user",
            facts.uid()
        )));
    }
    Ok(())
}

/// Returns true if the user is trusted with a VMM: root, who can do anything, or the daemon's own
/// user.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Connects to the socket at `path` and proves which process listens.
///
/// # Errors
/// Returns [`EndpointError`], as its variants describe.
pub async fn visit(path: &Path) -> Result<EndpointConnection, EndpointError> {
    let owned = path.to_path_buf();
    // The check of the file may block on a slow file system, so it happens on a thread for blocking
    // work.
    let examined = tokio::task::spawn_blocking(move || examine(&owned)).await;
    examined.map_err(|error| EndpointError::Failed(error.to_string()))??;
    // The first connection shows only a pid. Between this answer and the opening of the pidfd the
    // process could end and its pid pass to another one.
    let first = listener(&connect(path).await?, path)?;
    let identified = tokio::task::spawn_blocking(move || process::identify(first)).await;
    let identity = match identified {
        Ok(Ok(identity)) => identity,
        Ok(Err(error)) => return Err(hidden(path, first, &error.to_string())),
        Err(error) => return Err(EndpointError::Failed(error.to_string())),
    };
    let process = match process::adopt(&identity) {
        Lookup::Alive(process) => process,
        Lookup::Gone => return Err(EndpointError::Nobody(path.display().to_string())),
        Lookup::Unprovable(why) => return Err(hidden(path, first, &why)),
    };
    // The pidfd is open now, and `adopt` has proven that it means the identified process. A second
    // connection that shows the same pid was answered by the holder of the pid while that process
    // lived, so the listener is this process. A different pid means that the socket changed hands.
    let stream = connect(path).await?;
    if listener(&stream, path)? != first {
        return Err(EndpointError::Failed(format!(
            "another process has just begun to listen on {}; that process is examined again",
            path.display()
        )));
    }
    Ok(EndpointConnection { stream, process })
}

async fn connect(path: &Path) -> Result<UnixStream, EndpointError> {
    let shown = path.display();
    match tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                Err(EndpointError::Nobody(shown.to_string()))
            }
            io::ErrorKind::PermissionDenied => Err(EndpointError::Refused(format!(
                "{shown} may not be connected to by the daemon's user: give it the right to write there"
            ))),
            io::ErrorKind::WouldBlock => Err(EndpointError::Failed(format!(
                "{shown} takes no connection: its queue is full, so its VMM is stuck, or has more clients than it serves"
            ))),
            _ => Err(EndpointError::Failed(format!("{shown} cannot be connected to: {error}"))),
        },
        Err(_) => Err(EndpointError::Failed(format!("{shown} was not connected within {CONNECT_TIMEOUT:?}"))),
    }
}

/// Returns the pid of the process that listens at the other end of `stream`.
///
/// # Errors
/// Returns [`EndpointError::Refused`] where the kernel shows no process that could be a VMM.
pub fn listener(stream: &UnixStream, path: &Path) -> Result<u32, EndpointError> {
    let shown = path.display();
    let credentials = stream.peer_cred().map_err(|error| {
        EndpointError::Failed(format!(
            "the kernel does not name the process that listens on {shown}: {error}"
        ))
    })?;
    if !is_trusted(credentials.uid()) {
        return Err(EndpointError::Refused(format!(
            "{shown} is served by another user (uid {}): have the VMM started by root or by the daemon's user",
            credentials.uid()
        )));
    }
    match credentials.pid().and_then(|pid| u32::try_from(pid).ok()) {
        Some(pid) if pid > 1 => Ok(pid),
        Some(1) => Err(EndpointError::Refused(format!(
            "{shown} was opened by process 1, not by a VMM: let the VMM make its socket itself"
        ))),
        Some(_) | None => Err(EndpointError::Refused(format!(
            "the process that listens on {shown} is in another PID namespace, so its identity cannot be proven: run the \
             daemon where it sees the VMM's process"
        ))),
    }
}

fn hidden(path: &Path, pid: u32, why: &str) -> EndpointError {
    EndpointError::Refused(format!(
        "process {pid}, which listens on {}, cannot be identified: {why}; run the daemon as a user that may see it",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use tokio::net::UnixListener;

    use super::*;

    fn refusal(path: &Path) -> String {
        match examine(path) {
            Err(EndpointError::Refused(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn the_process_that_listens_on_a_socket_is_proven() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert_eq!(visit(&path).await.unwrap_err(), EndpointError::Nobody(path.display().to_string()));
        let listening = UnixListener::bind(&path).unwrap();
        let visit_to_it = visit(&path).await.unwrap();
        assert_eq!(visit_to_it.process.pid(), std::process::id());
        drop(listening);
        assert_eq!(visit(&path).await.unwrap_err(), EndpointError::Nobody(path.display().to_string()));
    }

    #[tokio::test]
    async fn a_socket_in_a_folder_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link, file) = (dir.path().join("s"), dir.path().join("l"), dir.path().join("f"));
        let _listening = UnixListener::bind(&path).unwrap();
        symlink(&path, &link).unwrap();
        std::fs::write(&file, "").unwrap();
        assert!(refusal(&link).contains("symbolic link"));
        assert!(refusal(&file).contains("not a socket"));
        // The socket of the daemon's own user may have any mode.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        examine(&path).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
            assert!(refusal(&path).contains("uid 12345"));
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
            assert!(refusal(&path).contains("uid 12345"), "its owner can replace it, whatever its mode");
        }
    }

    /// A listener of another user behind a socket of this user. Ends with the test.
    struct Theirs(std::process::Child);

    impl Drop for Theirs {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn a_socket_that_another_user_serves_is_refused() {
        use std::os::unix::process::CommandExt;
        const TEST: &str = "a_socket_that_another_user_serves_is_refused";
        if !rustix::process::geteuid().is_root() {
            return vmm_testkit::skip::skipped(TEST, "only root can start a process as another user");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let path = dir.path().join("s");
        let script = "import socket,sys,time\ns=socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\ntime.sleep(600)";
        let started = std::process::Command::new("/usr/bin/python3")
            .args(["-c", script])
            .arg(&path)
            .uid(12_345)
            .gid(12_345)
            .spawn();
        let Ok(started) = started else {
            return vmm_testkit::skip::skipped(TEST, "there is no /usr/bin/python3");
        };
        let mut theirs = Theirs(started);
        while UnixStream::connect(&path).await.is_err() {
            assert!(theirs.0.try_wait().unwrap().is_none(), "it listens");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let refused = async || match visit(&path).await {
            Err(EndpointError::Refused(why)) => why,
            other => panic!("{other:?}"),
        };
        assert!(refused().await.contains("belongs to another user (uid 12345)"));
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        let why = refused().await;
        assert!(why.contains("is served by another user (uid 12345)"), "{why}");
    }
}
