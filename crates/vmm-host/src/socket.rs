//! Waits for a socket that another program is about to make, without polling.

use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use crate::async_fd;

/// Reports that an entry of a folder, or one certain file in it, has appeared.
#[derive(Debug)]
pub struct DirWatch {
    /// `Some` until the watch is dropped.
    fd: Option<AsyncFd<Arc<OwnedFd>>>,
    /// The only file that matters; `None` where every file matters.
    name: Option<OsString>,
}

impl DirWatch {
    /// Begins to watch `dir`. Entries that exist already are not reported, so the caller looks once
    /// after this call.
    ///
    /// # Errors
    /// Returns the kernel's error. The kernel allows a user about 128 watches at once.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let events = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::ATTRIB
            | inotify::WatchFlags::ONLYDIR;
        inotify::add_watch(&fd, dir, events)?;
        Ok(Self { fd: Some(async_fd::readable(Arc::new(fd))?), name: None })
    }

    /// Begins to watch the folder of `path` for the file at `path`. Changes of its neighbours are
    /// ignored.
    ///
    /// # Errors
    /// Fails as [`DirWatch::new`] does.
    pub fn for_file(path: &Path) -> io::Result<Self> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut watch = Self::new(dir)?;
        watch.name = path.file_name().map(OsStr::to_owned);
        Ok(watch)
    }

    /// Waits until an entry has appeared since the last call. May return once too often. Can be
    /// cancelled.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub async fn changed(&self) -> io::Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        loop {
            let mut ready = fd.readable().await?;
            // `try_io` clears the readiness if the read would block, so the next `readable` really
            // waits.
            match ready.try_io(|fd| Ok(self.read(fd.get_ref())?)) {
                Ok(Ok(true)) => return Ok(()),
                Ok(Ok(false)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }

    /// Takes as many waiting events as fit, and returns true if one of them concerns a file that
    /// matters.
    fn read(&self, fd: &OwnedFd) -> Result<bool, Errno> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(fd, &mut buffer);
        let mut matters = false;
        loop {
            match events.next() {
                Ok(event) => {
                    // After an overflow the kernel has dropped events, and one of them may have
                    // been the awaited one.
                    let lost = event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW);
                    let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                    matters |= lost || self.name.as_deref().is_none_or(|wanted| name == Some(wanted));
                }
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error),
            }
            // The reader would read the descriptor again for the next event. One read is enough,
            // because the caller looks into the folder itself.
            if events.is_buffer_empty() {
                return Ok(matters);
            }
        }
    }
}

impl Drop for DirWatch {
    /// Closes the watch on a thread for blocking work, because the kernel takes 10 to 20 ms for the
    /// close and a VM is waiting for its start.
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
    async fn a_new_socket_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let watch = DirWatch::new(dir.path()).unwrap();
        let path = dir.path().join("s");
        let (reported, _listener) =
            tokio::join!(watch.changed(), async { tokio::net::UnixListener::bind(&path).unwrap() });
        reported.unwrap();
    }

    #[tokio::test]
    async fn other_files_are_not_reported_to_a_wait_for_one_file() {
        use futures::FutureExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let watch = DirWatch::for_file(&path).unwrap();
        for number in 0..1_000 {
            std::fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        // The kernel has queued the events before the writes returned.
        for _ in 0..100 {
            assert!(watch.changed().now_or_never().is_none(), "none of these is the socket");
            tokio::task::yield_now().await;
        }
        let (reported, _listener) =
            tokio::join!(watch.changed(), async { tokio::net::UnixListener::bind(&path).unwrap() });
        reported.unwrap();
    }

    #[tokio::test]
    async fn only_a_folder_can_be_watched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(DirWatch::new(file.path()).is_err());
        assert!(DirWatch::new(Path::new("/nowhere/at/all")).is_err());
    }
}
