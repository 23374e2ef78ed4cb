//! Searches among the host's processes from asynchronous code, a few at a time.
//!
//! A read of `/proc/PID/cmdline` waits as long as the memory of that process is locked, and nothing
//! can cancel it. A caller that gives up leaves the thread of its walk behind. Every walk meets the
//! same process, so a caller that tries again and again would use up all threads for blocking work.

use std::io;
use std::path::PathBuf;

use tokio::sync::Semaphore;

use super::find::{ProcessMatch, find_by_argument, find_by_option};

/// The most walks over `/proc` at a time. A hung walk keeps its permit until it ends, so this is
/// also the most threads that hung walks hold.
const WALKS: usize = 4;

static PERMITS: Semaphore = Semaphore::const_new(WALKS);

/// Finds processes as [`find_by_argument`] does. A caller that stops waiting leaves at most one
/// thread behind, and none if the walk has not begun.
///
/// # Errors
/// Fails as [`find_by_argument`] does.
pub async fn search_by_argument(needle: PathBuf) -> io::Result<Vec<ProcessMatch>> {
    walk(&PERMITS, move || find_by_argument(&needle)).await
}

/// Finds processes as [`find_by_option`] does, under the terms of [`search_by_argument`].
///
/// # Errors
/// Fails as [`find_by_option`] does.
pub async fn search_by_option(option: &'static str, value: String) -> io::Result<Vec<ProcessMatch>> {
    walk(&PERMITS, move || find_by_option(option, &value)).await
}

async fn walk<T: Send + 'static>(
    permits: &'static Semaphore,
    search: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let permit = permits.acquire().await.map_err(io::Error::other)?;
    let walking = tokio::task::spawn_blocking(move || {
        // The permit belongs to the thread and not to the caller, which may give up earlier.
        let _permit = permit;
        search()
    });
    walking.await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn hanging_searches_hold_a_bounded_number_of_threads() {
        static FEW: Semaphore = Semaphore::const_new(2);
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        let (release, hangs) = channel::<()>();
        let hangs = std::sync::Arc::new(std::sync::Mutex::new(hangs));
        for _ in 0..20 {
            let hangs = std::sync::Arc::clone(&hangs);
            let hung = walk(&FEW, move || {
                BEGUN.fetch_add(1, Ordering::SeqCst);
                // Ends when the sender is dropped.
                let _ = hangs.lock().map(|hangs| hangs.recv());
                Ok(())
            });
            assert!(tokio::time::timeout(Duration::from_millis(20), hung).await.is_err());
        }
        assert!(BEGUN.load(Ordering::SeqCst) <= 2, "the others wait without a thread");
        drop(release);
        walk(&FEW, || Ok(())).await.expect("a walk that ends makes room");
    }
}
