//! Waiting for a socket that a program is about to make, without asking again and again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use crate::ready;

/// Tells when something appears in a folder.
#[derive(Debug)]
pub struct DirWatch {
    /// There until the watch is dropped.
    fd: Option<AsyncFd<Arc<OwnedFd>>>,
}

impl DirWatch {
    /// Begins to watch `dir`. What is there already is not told of, so look once after this.
    ///
    /// # Errors
    /// What the kernel says; it allows a user about 128 watches at once.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let events = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::ATTRIB
            | inotify::WatchFlags::ONLYDIR;
        inotify::add_watch(&fd, dir, events)?;
        Ok(Self { fd: Some(ready::readable(Arc::new(fd))?) })
    }

    /// Waits until something has appeared since the last call. May say so once too often. May be cancelled.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn changed(&self) -> io::Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        loop {
            let mut ready = fd.readable().await?;
            // Which file it was does not matter: whoever waits looks for his own.
            let mut events = [0; 4096];
            match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut events)?)) {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

impl Drop for DirWatch {
    /// Closes the watch on a thread of its own: the kernel takes 10 to 20 ms for it, and a VM is waiting to be started.
    fn drop(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        let fd = fd.into_inner();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(fd));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_socket_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let watch = DirWatch::new(dir.path()).unwrap();
        let path = dir.path().join("s");
        let (told, _listener) =
            tokio::join!(watch.changed(), async { tokio::net::UnixListener::bind(&path).unwrap() });
        told.unwrap();
    }

    #[tokio::test]
    async fn only_a_folder_can_be_watched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(DirWatch::new(file.path()).is_err());
        assert!(DirWatch::new(Path::new("/nowhere/at/all")).is_err());
    }
}
