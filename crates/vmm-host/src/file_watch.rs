//! Waits for files to grow. One inotify instance serves all files, because the kernel allows a user
//! about 128 instances.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tracing::Instrument;

use crate::async_fd;

/// The interval between two checks of a file that cannot be watched.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The room for events of the kernel, in bytes.
const ROOM: usize = 4096;

/// Watches files. Clones share one inotify instance, which is opened for the first file.
#[derive(Clone, Debug, Default)]
pub struct FileWatcher {
    instance: Arc<Mutex<Option<Arc<InotifyInstance>>>>,
    /// True if a file could not be watched.
    failed: Arc<AtomicBool>,
}

#[derive(Debug)]
struct InotifyInstance {
    fd: AsyncFd<Arc<OwnedFd>>,
    waiting: Mutex<HashMap<i32, Vec<Arc<Notify>>>>,
}

/// The watch on one file. Dropping it ends the watch.
#[derive(Debug)]
pub struct FileWatch {
    kept: Option<(Arc<InotifyInstance>, i32)>,
    grown: Arc<Notify>,
}

impl FileWatcher {
    /// Begins to watch the existing file at `path`. A file that cannot be watched is looked at once
    /// a second instead. Only the first failure is logged.
    pub fn watch(&self, path: &Path) -> FileWatch {
        let grown = Arc::new(Notify::new());
        let kept = match self.begin(path, &grown) {
            Ok(kept) => Some(kept),
            Err(error) => {
                if !self.failed.swap(true, Ordering::Relaxed) {
                    tracing::warn!(path = %path.display(), %error, "the file cannot be watched; it is read once a second");
                }
                None
            }
        };
        FileWatch { kept, grown }
    }

    fn begin(&self, path: &Path, grown: &Arc<Notify>) -> io::Result<(Arc<InotifyInstance>, i32)> {
        let instance = self.instance()?;
        let mut waiting = instance.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // The map stays locked from here on, because `serve` must not read an event of this watch
        // before the file's entry is in the map.
        let id = inotify::add_watch(instance.fd.get_ref(), path, inotify::WatchFlags::MODIFY)?;
        // The kernel has one watch per file and instance, so several callers that watch one file
        // get one id.
        waiting.entry(id).or_default().push(Arc::clone(grown));
        drop(waiting);
        Ok((instance, id))
    }

    fn instance(&self) -> io::Result<Arc<InotifyInstance>> {
        let mut shared = self.instance.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(instance) = &*shared {
            return Ok(Arc::clone(instance));
        }
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let fd = async_fd::readable(Arc::new(fd))?;
        let instance = Arc::new(InotifyInstance { fd, waiting: Mutex::default() });
        let served = Arc::clone(&instance);
        tokio::spawn(
            async move { served.serve().await }.instrument(tracing::info_span!(parent: None, "file-watcher")),
        );
        Ok(Arc::clone(shared.insert(instance)))
    }
}

impl InotifyInstance {
    async fn serve(&self) {
        let mut room = [MaybeUninit::uninit(); ROOM];
        loop {
            let Ok(mut ready) = self.fd.readable().await else { return };
            let mut reader = inotify::Reader::new(self.fd.get_ref(), &mut room);
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                match reader.next() {
                    Ok(event) if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) => {
                        // The kernel has dropped events and does not name their files, so every
                        // file may have grown.
                        waiting.values().flatten().for_each(|grown| grown.notify_one());
                    }
                    Ok(event) => {
                        waiting.get(&event.wd()).into_iter().flatten().for_each(|grown| grown.notify_one());
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        if error != rustix::io::Errno::AGAIN {
                            tracing::warn!(%error, "the file watcher cannot read its events");
                        }
                        ready.clear_ready();
                        break;
                    }
                }
            }
        }
    }
}

impl FileWatch {
    /// Returns false if the file is looked at once a second, because it cannot be watched.
    pub fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// Waits until the file may have grown since the last call. Can be cancelled.
    pub async fn grown(&self) {
        if self.kept.is_some() {
            // `notify_one` stores one permit, so growth between two calls is not lost.
            self.grown.notified().await;
        } else {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

impl Drop for FileWatch {
    fn drop(&mut self) {
        let Some((instance, id)) = self.kept.take() else { return };
        let mut waiting = instance.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(others) = waiting.get_mut(&id) else { return };
        others.retain(|grown| !Arc::ptr_eq(grown, &self.grown));
        if others.is_empty() {
            waiting.remove(&id);
            // The kernel ends the watch of a removed file itself.
            if let Err(error) = inotify::remove_watch(instance.fd.get_ref(), id) {
                tracing::debug!(%error, "the watch had ended already");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_change_of_a_file_reaches_its_own_watch() {
        let dir = tempfile::tempdir().unwrap();
        let watcher = FileWatcher::default();
        let mut files = Vec::new();
        for index in 0..200 {
            let path = dir.path().join(index.to_string());
            let file = std::fs::File::create(&path).unwrap();
            files.push((file, watcher.watch(&path)));
        }
        assert!(
            files.iter().all(|(_, watched)| watched.kept.is_some()),
            "more than there could be instances"
        );
        for (file, watched) in &mut files {
            file.write_all(b"x").unwrap();
            watched.grown().await;
        }
        files.truncate(1);
        let second = watcher.watch(&dir.path().join("0"));
        drop(watcher.watch(&dir.path().join("0")));
        files[0].0.write_all(b"y").unwrap();
        files[0].1.grown().await;
        second.grown().await;
    }
}
