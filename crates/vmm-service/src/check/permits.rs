//! The threads that check files, and the permits that limit them.
//!
//! ```text
//!   file check ─► a quick permit (32) ─► thread ── done within 250 ms ────────────────► answer
//!                                         │
//!                                         └── slow: the quick permit is free again, and the thread
//!                                             has a slow permit (160, at most 16 of one mount)
//!                                             ─► answer, or silence after 3 s
//! ```
//!
//! A file may lie on a server that does not answer, and then the thread that checks it hangs for as
//! long as the server is silent. Nothing can end such a thread. The quick permits limit the file
//! checks that use processor time, and the slow permits limit the threads that wait. A mount that
//! hangs holds a quick permit only for a moment, and at most its part of the slow ones. A file
//! check that leads into a mount with no slow permit left touches nothing there, and waits without
//! a thread.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::FilesTimedOut;

/// The numbers of permits, and the time after which a file check is slow.
#[derive(Clone, Copy, Debug)]
pub(super) struct PermitLimits {
    pub(super) quick: usize,
    pub(super) slow: usize,
    pub(super) slow_of_a_mount: usize,
    pub(super) quick_limit: Duration,
}

/// The permits of file checks for one purpose.
pub(super) struct FileCheckPermits {
    limits: PermitLimits,
    mount_of: fn(&Path) -> Option<PathBuf>,
    quick: Arc<Semaphore>,
    slow: Mutex<SlowPermits>,
    /// Notified when a slow permit becomes free.
    freed: Notify,
}

#[derive(Default)]
struct SlowPermits {
    taken: usize,
    by_mount: HashMap<PathBuf, usize>,
}

/// The error of a file check that led into a mount whose slow permits are all taken.
struct MountCrowded;

impl FileCheckPermits {
    /// Creates the permits. `mount_of` returns the mount of foreign files into which a path leads,
    /// and touches nothing there.
    pub(super) fn new(limits: PermitLimits, mount_of: fn(&Path) -> Option<PathBuf>) -> Self {
        let quick = Arc::new(Semaphore::new(limits.quick));
        Self { limits, mount_of, quick, slow: Mutex::default(), freed: Notify::new() }
    }

    /// Runs `work` on a thread of its own, and returns within `timeout`. `work` asks its
    /// [`FileCheck`] about each path before it touches the path.
    ///
    /// An attempt that finds a crowded mount has touched nothing on it. It is made again when a
    /// slow permit becomes free, until the deadline.
    ///
    /// # Errors
    ///
    /// Returns [`FilesTimedOut`] if there is no answer within `timeout`.
    pub(super) async fn run_within<T: Send + 'static>(
        self: &Arc<Self>,
        timeout: Duration,
        work: impl Fn(&FileCheck) -> T + Send + Clone + 'static,
    ) -> Result<T, FilesTimedOut> {
        let until = Instant::now() + timeout;
        loop {
            // The future is made before the attempt, so that a permit that becomes free during the
            // attempt is not missed. `notify_waiters` wakes every future that exists at that
            // moment, polled or not.
            let freed = self.freed.notified();
            // A quick permit limits the file checks that run at once. The wait for it counts
            // against the deadline, because many slow file checks may stand in front for up to
            // `limits.quick_limit` each.
            let permit = tokio::time::timeout_at(until, Arc::clone(&self.quick).acquire_owned()).await;
            let Ok(Ok(permit)) = permit else { return Err(FilesTimedOut) };
            // The attempt is a task of its own, because the permit must change hands even if the
            // caller has stopped waiting. At the deadline the caller leaves, and the task and its
            // thread go on until the file answers.
            let attempt = tokio::spawn(attempt(FileCheck::new(self, permit), work.clone()));
            match tokio::time::timeout_at(until, attempt).await {
                // Three results are possible. The work is done. The mount is crowded: the loop
                // repeats if a slow permit becomes free in time. The deadline passed, or the task
                // failed: the files count as silent.
                Ok(Ok(Ok(done))) => return Ok(done),
                Ok(Ok(Err(MountCrowded))) if tokio::time::timeout_at(until, freed).await.is_ok() => {}
                Ok(Ok(Err(MountCrowded)) | Err(_)) | Err(_) => return Err(FilesTimedOut),
            }
        }
    }

    fn slow(&self) -> MutexGuard<'_, SlowPermits> {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `work` on a blocking thread, and exchanges the quick permit for a slow one if the work
/// takes longer than `limits.quick_limit`.
///
/// The `FileCheckThread` inside the thread returns the permit when the thread ends, also by a
/// panic. The task outside the thread only watches the time.
async fn attempt<T: Send + 'static>(
    file_check: Arc<FileCheck>,
    work: impl Fn(&FileCheck) -> T + Send + 'static,
) -> Result<T, MountCrowded> {
    let quick_limit = file_check.permits.limits.quick_limit;
    let watched = Arc::clone(&file_check);
    let mut thread = tokio::task::spawn_blocking(move || {
        let visit = FileCheckThread(file_check);
        let done = work(&visit.0);
        if visit.0.state().crowded { Err(MountCrowded) } else { Ok(done) }
    });
    let done = match tokio::time::timeout(quick_limit, &mut thread).await {
        Ok(done) => done,
        Err(_) => {
            watched.take_slow_permit();
            thread.await
        }
    };
    // The work has panicked. The caller treats this as files that are silent.
    done.unwrap_or(Err(MountCrowded))
}

/// One file check, shared by its thread and its task.
pub(super) struct FileCheck {
    permits: Arc<FileCheckPermits>,
    state: Mutex<FileCheckState>,
}

struct FileCheckState {
    permit: FileCheckPermit,
    /// The mount into which the file check has led.
    mount: Option<PathBuf>,
    /// True if the file check led into a mount with no slow permit left, and so touched nothing
    /// there.
    crowded: bool,
}

enum FileCheckPermit {
    Quick(#[expect(dead_code, reason = "held for as long as the permit is")] OwnedSemaphorePermit),
    Slow,
    Left,
}

impl FileCheck {
    fn new(permits: &Arc<FileCheckPermits>, permit: OwnedSemaphorePermit) -> Arc<Self> {
        let state = FileCheckState { permit: FileCheckPermit::Quick(permit), mount: None, crowded: false };
        Arc::new(Self { permits: Arc::clone(permits), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, FileCheckState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if the file check may touch `path`. If it returns false, the file check is made
    /// again later.
    ///
    /// A file check that is quick so far also needs a free slow permit of the mount, because the
    /// next access may hang. The count of a mount may exceed its limit by the quick file checks
    /// that entered it at the same time.
    pub(super) fn may_open(&self, path: &Path) -> bool {
        let mount = (self.permits.mount_of)(path);
        let mut state = self.state();
        // A crowded file check touches nothing more. A path on the same mount as before needs no
        // new check.
        if state.crowded || mount == state.mount {
            return !state.crowded;
        }
        let mut slow = self.permits.slow();
        if slow.of(mount.as_ref()) >= self.permits.limits.slow_of_a_mount {
            state.crowded = true;
            return false;
        }
        // A file check that is slow already takes its permit along to the new mount, because its
        // thread may hang there now.
        if matches!(state.permit, FileCheckPermit::Slow) {
            slow.leave(state.mount.as_ref());
            slow.take(mount.as_ref());
        }
        state.mount = mount;
        true
    }

    /// Exchanges the quick permit for a slow one, if a slow one is left. The limit of one mount is
    /// checked in [`FileCheck::may_open`] before a file check enters the mount.
    fn take_slow_permit(&self) {
        let mut state = self.state();
        let mut slow = self.permits.slow();
        // With no slow permit left the file check keeps its quick one. New file checks then wait
        // for quick permits, which bounds the threads in all. A file check that has ended meanwhile
        // has the permit `RemainingSpares`, and takes none.
        if matches!(state.permit, FileCheckPermit::Quick(_)) && slow.taken < self.permits.limits.slow {
            slow.take(state.mount.as_ref());
            state.permit = FileCheckPermit::Slow;
        }
    }

    fn leave(&self) {
        let mut state = self.state();
        if matches!(std::mem::replace(&mut state.permit, FileCheckPermit::Left), FileCheckPermit::Slow) {
            self.permits.slow().leave(state.mount.as_ref());
            self.permits.freed.notify_waiters();
        }
    }
}

/// The time in which a file check has a thread.
struct FileCheckThread(Arc<FileCheck>);

impl Drop for FileCheckThread {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl SlowPermits {
    /// Returns the number of slow permits in use for one mount. Files outside such mounts are
    /// limited by the number of all slow permits alone.
    fn of(&self, mount: Option<&PathBuf>) -> usize {
        mount.and_then(|mount| self.by_mount.get(mount)).copied().unwrap_or_default()
    }

    fn take(&mut self, mount: Option<&PathBuf>) {
        self.taken += 1;
        if let Some(mount) = mount {
            *self.by_mount.entry(mount.clone()).or_default() += 1;
        }
    }

    fn leave(&mut self, mount: Option<&PathBuf>) {
        self.taken -= 1;
        if let Some(mount) = mount
            && let Some(count) = self.by_mount.get_mut(mount)
        {
            *count -= 1;
            if *count == 0 {
                self.by_mount.remove(mount);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG_TIMEOUT: Duration = Duration::from_secs(60);
    const SHORT_TIMEOUT: Duration = Duration::from_millis(100);
    const LIMITS: PermitLimits =
        PermitLimits { quick: 1, slow: 3, slow_of_a_mount: 2, quick_limit: Duration::from_millis(10) };

    /// Permits where everything below `/hung` lies in a mount.
    fn permits() -> Arc<FileCheckPermits> {
        Arc::new(FileCheckPermits::new(LIMITS, |path| path.starts_with("/hung").then(|| "/hung".into())))
    }

    /// Files that hang until the test releases them.
    #[derive(Clone)]
    struct Hung(Arc<Mutex<mpsc::Receiver<()>>>);

    impl Hung {
        fn new() -> (mpsc::Sender<()>, Self) {
            let (let_go, hang) = mpsc::channel();
            (let_go, Self(Arc::new(Mutex::new(hang))))
        }

        async fn check(
            &self,
            permits: &Arc<FileCheckPermits>,
            path: &'static str,
        ) -> Result<bool, FilesTimedOut> {
            let hung = self.clone();
            let check = move |file_check: &FileCheck| {
                let touched = file_check.may_open(Path::new(path));
                if touched {
                    let _ = hung.0.lock().unwrap().recv();
                }
                touched
            };
            permits.run_within(SHORT_TIMEOUT, check).await
        }
    }

    async fn answers(permits: &Arc<FileCheckPermits>, path: &'static str) {
        let touched =
            permits.run_within(LONG_TIMEOUT, move |file_check| file_check.may_open(Path::new(path))).await;
        assert_eq!(touched, Ok(true), "{path}");
    }

    #[tokio::test]
    async fn hanging_file_checks_leave_the_quick_permit_free() {
        let (permits, (let_go, hung)) = (permits(), Hung::new());
        for _ in 0..LIMITS.slow_of_a_mount {
            assert_eq!(hung.check(&permits, "/hung/a").await, Err(FilesTimedOut));
            answers(&permits, "/fine").await;
        }
        assert_eq!(permits.slow().taken, LIMITS.slow_of_a_mount);
        assert_eq!(hung.check(&permits, "/hung/b").await, Err(FilesTimedOut), "nothing is touched there");
        assert_eq!(permits.slow().taken, LIMITS.slow_of_a_mount, "and no thread hangs for it");
        answers(&permits, "/fine").await;
        drop(let_go);
        answers(&permits, "/hung/c").await;
        while permits.slow().taken > 0 {
            tokio::task::yield_now().await;
        }
        assert!(permits.slow().by_mount.is_empty());
    }

    #[tokio::test]
    async fn a_file_check_waits_for_a_permit_of_its_mount() {
        let (permits, (let_go, hung)) = (permits(), Hung::new());
        for _ in 0..LIMITS.slow_of_a_mount {
            assert_eq!(hung.check(&permits, "/hung/a").await, Err(FilesTimedOut));
        }
        let waits = tokio::spawn({
            let permits = Arc::clone(&permits);
            async move { answers(&permits, "/hung/b").await }
        });
        tokio::time::sleep(SHORT_TIMEOUT).await;
        assert!(!waits.is_finished());
        let_go.send(()).unwrap();
        waits.await.unwrap();
    }

    #[tokio::test]
    async fn an_abandoned_file_check_leaves_its_quick_permit() {
        let (permits, (let_go, hung)) = (permits(), Hung::new());
        let check = tokio::spawn({
            let permits = Arc::clone(&permits);
            async move { hung.check(&permits, "/local").await }
        });
        while permits.quick.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        check.abort();
        answers(&permits, "/fine").await;
        drop(let_go);
    }

    #[tokio::test]
    async fn hanging_threads_are_bounded_over_all_mounts() {
        let (permits, (let_go, hung)) = (permits(), Hung::new());
        for _ in 0..=LIMITS.slow {
            assert_eq!(hung.check(&permits, "/local").await, Err(FilesTimedOut));
        }
        assert_eq!((permits.slow().taken, permits.quick.available_permits()), (LIMITS.slow, 0));
        assert_eq!(hung.check(&permits, "/fine").await, Err(FilesTimedOut), "no more threads");
        drop(let_go);
        answers(&permits, "/fine").await;
    }
}
