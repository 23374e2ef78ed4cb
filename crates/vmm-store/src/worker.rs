//! A named thread that can be joined with a deadline, because [`std::thread::JoinHandle`] has none.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

/// A thread of the store.
#[derive(Debug)]
pub(crate) struct Worker {
    name: &'static str,
    thread: JoinHandle<()>,
    ended: Receiver<()>,
}

impl Worker {
    /// Starts `body` on a thread called `name`.
    ///
    /// # Errors
    ///
    /// The error of the operating system if no thread can be started.
    pub(crate) fn spawn(name: &'static str, body: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let (alive, ended) = mpsc::channel::<()>();
        let thread = Builder::new().name(name.to_owned()).spawn(move || {
            // Dropped when the thread ends, also by a panic. Nothing is ever sent.
            let _alive = alive;
            tracing::info_span!("store", thread = name).in_scope(body);
        })?;
        Ok(Self { name, thread, ended })
    }

    /// Waits for the thread until `deadline`. Returns true if the thread has ended. A late thread
    /// is left running.
    pub(crate) fn join_until(self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.ended.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) => false,
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                if self.thread.join().is_err() {
                    tracing::error!(
                        thread = self.name,
                        "a thread of the store panicked, which is a defect of this program"
                    );
                }
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_thread_is_not_awaited() {
        let (let_go, held) = mpsc::channel::<()>();
        let worker = Worker::spawn("late", move || assert!(held.recv().is_err())).unwrap();
        assert!(!worker.join_until(Instant::now()));
        drop(let_go);
    }

    #[test]
    fn a_panicked_thread_counts_as_ended() {
        let worker = Worker::spawn("panics", || panic!("on purpose")).unwrap();
        assert!(worker.join_until(Instant::now() + std::time::Duration::from_secs(60)));
    }
}
