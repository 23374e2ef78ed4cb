//! Bounds the kept console of one run.
//!
//! ```text
//!   quiet ── the file grows ──► busy: a look after each interval, 20 ms to 1 s,
//!     ▲                           │   in which half of the kept bytes may be written
//!     └── no growth for 3 looks ──┘
//! ```
//!
//! A quiet console costs a watch and no wake-up. The watch ends at the first growth, because a
//! guest that floods its console would wake the daemon at each write. From then on the looks follow
//! the speed of the guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use tracing::Instrument as _;
use vmm_core::spec::VmSpec;
use vmm_core::store::VmRecord;
use vmm_host::file_watch::FileWatcher;
use vmm_host::tail;

use super::ConsoleFile;
use crate::shared::Shared;

/// The shortest interval between two looks at a file that grows.
const MIN_INTERVAL: Duration = Duration::from_millis(20);
/// The longest such interval.
const MAX_INTERVAL: Duration = Duration::from_secs(1);
/// The number of looks without growth after which a console is quiet.
const QUIET_LOOKS: u32 = 3;
/// The interval between two looks for a file that is missing.
const MISSING_INTERVAL: Duration = Duration::from_secs(10);

/// Bounds one kept console until it is dropped.
pub(crate) struct ConsoleTrimmer(AbortHandle);

impl Drop for ConsoleTrimmer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ConsoleTrimmer {
    /// Starts to bound the console of a VM whose VMM is held. Returns `None` if this program does
    /// not keep the console: a file that the client named belongs to the client.
    pub(crate) fn start_for(shared: &Shared, record: &VmRecord, spec: &VmSpec) -> Option<Self> {
        let file = ConsoleFile::of(spec, &record.uid.run_dir(&shared.settings.runtime_dir))?;
        if file.is_named {
            return None;
        }
        Some(Self::start(file.path, shared.settings.console_history, shared.consoles.watcher.clone()))
    }

    fn start(path: PathBuf, kept: u64, watcher: FileWatcher) -> Self {
        let span = tracing::debug_span!(parent: None, "console trimmer", path = %path.display());
        Self(tokio::spawn(bound(path, kept, watcher).instrument(span)).abort_handle())
    }
}

async fn bound(path: PathBuf, kept: u64, watcher: FileWatcher) {
    loop {
        // The watch begins before the look, so that growth between the two is noticed.
        let watch = match tokio::fs::symlink_metadata(&path).await {
            Ok(_) => watcher.watch(&path),
            Err(_) => {
                sleep(MISSING_INTERVAL).await;
                continue;
            }
        };
        let Some(mut length) = look(&path, kept).await else { return };
        watch.grown().await;
        if watch.is_kept() {
            drop(watch);
        }
        let (mut interval, mut quiet) = (MIN_INTERVAL, 0);
        while quiet < QUIET_LOOKS {
            let begun = Instant::now();
            sleep(interval).await;
            let Some(now) = look(&path, kept).await else { return };
            let growth = now.saturating_sub(length);
            quiet = if growth == 0 { quiet + 1 } else { 0 };
            interval = next_interval(growth, begun.elapsed(), kept);
            length = now;
        }
    }
}

/// Returns the time in which half of the `kept` bytes are written, if the file goes on to grow by
/// `growth` bytes in `elapsed`.
fn next_interval(growth: u64, elapsed: Duration, kept: u64) -> Duration {
    if growth == 0 {
        return MAX_INTERVAL;
    }
    let looks = kept as f64 / 2.0 / growth as f64;
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * looks)
        .unwrap_or(MAX_INTERVAL)
        .clamp(MIN_INTERVAL, MAX_INTERVAL)
}

/// Trims the file and returns its length, or `None` if that is not possible.
async fn look(path: &Path, kept: u64) -> Option<u64> {
    let owned = path.to_path_buf();
    match tokio::task::spawn_blocking(move || tail::trim(&owned, kept)).await {
        Ok(Ok(length)) => Some(length),
        Ok(Err(error)) => {
            tracing::warn!(
                path = %path.display(), %error,
                "the console cannot be trimmed and grows without a bound; use a file system that supports holes for \
                 UNKEY_VMCP_RUNTIME_DIR"
            );
            None
        }
        // The runtime is shutting down.
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    const KEPT: u64 = 64 << 10;

    #[test]
    fn the_interval_follows_the_speed_of_the_guest() {
        let second = Duration::from_secs(1);
        assert_eq!(next_interval(0, MIN_INTERVAL, 1 << 20), MAX_INTERVAL);
        assert_eq!(next_interval(100, second, 1 << 20), MAX_INTERVAL);
        assert_eq!(next_interval(1 << 20, second, 1 << 20), second / 2);
        assert_eq!(next_interval(100 << 20, second, 1 << 20), MIN_INTERVAL);
        assert_eq!(next_interval(u64::MAX, Duration::ZERO, 0), MIN_INTERVAL);
    }

    #[tokio::test]
    async fn a_console_that_is_flooded_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&path).unwrap();
        let _trimmer = ConsoleTrimmer::start(path.clone(), KEPT, FileWatcher::default());
        // The guest writes, falls silent until the console is quiet again, and writes once more.
        for round in 1..=3 {
            for _ in 0..64 {
                file.write_all(&[b'x'; 16 << 10]).unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let taken = || std::fs::metadata(&path).unwrap().blocks() * 512;
            let deadline = Instant::now() + Duration::from_secs(60);
            while taken() > 2 * KEPT + 4096 {
                assert!(Instant::now() < deadline, "the file takes {} bytes", taken());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(std::fs::metadata(&path).unwrap().len(), round * (1 << 20));
            assert!(taken() >= KEPT, "the history is kept: {}", taken());
        }
    }
}
