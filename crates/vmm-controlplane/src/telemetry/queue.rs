//! The queue between the threads that log and the one thread that writes.
//!
//! ```text
//!   any thread ── push ──► lines, at most CAPACITY bytes ── next ──► the writer ──► stderr
//!                   │                                                  │
//!                   └── full: the line is dropped and counted          └── fails: the same
//! ```
//!
//! A write to stderr blocks for as long as its reader likes: a pipe that nobody reads, a terminal
//! that was stopped by Ctrl-S, a journal on a full disk. Only the writer's thread waits for it. A
//! line that finds the queue full is dropped, because the alternative is a call that hangs. The
//! number of dropped lines is logged as soon as a write succeeds and half of the queue is free.
//!
//! `tracing-appender` is not used, because its guard prints to stdout when the queue is full at the
//! end of the program. Where stdout and stderr are one pipe, that print would hang.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// The number of lines that were dropped since the program began, over all queues.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Returns the number of log lines that were dropped since the program began.
pub(crate) fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// The log lines that wait for the writer. Clones share one queue.
#[derive(Clone)]
pub(super) struct LogQueue(Arc<LogQueueShared>);

struct LogQueueShared {
    capacity: usize,
    state: Mutex<LogQueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct LogQueueState {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The number of lines that were dropped and that no report has counted yet.
    dropped: u64,
    /// True while the writer's thread writes a line that it has taken out of `lines`.
    writing: bool,
}

impl LogQueueState {
    fn count_dropped(&mut self) {
        self.dropped += 1;
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

impl LogQueue {
    /// Makes a queue of at most `capacity` bytes.
    pub(super) fn new(capacity: usize) -> Self {
        let state = Mutex::new(LogQueueState::default());
        Self(Arc::new(LogQueueShared { capacity, state, changed: Condvar::new() }))
    }

    /// Starts the thread that writes the lines to `out`.
    ///
    /// `report` is called on that thread with the number of dropped lines, once the queue has room
    /// again.
    ///
    /// # Errors
    ///
    /// The system has no room for a thread.
    pub(super) fn start(
        &self,
        out: impl Write + Send + 'static,
        report: impl Fn(u64) + Send + 'static,
    ) -> io::Result<()> {
        let queue = self.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || queue.write_forever(out, report))?;
        Ok(())
    }

    /// Adds a line, or drops and counts it if the queue is full. Waits for the lock only, which
    /// nobody holds during a write.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.bytes.saturating_add(line.len()) > self.0.capacity {
            state.count_dropped();
            return;
        }
        // `bytes` counts the lines in the queue and not the one that is being written, so the
        // memory is at most the capacity and one line.
        state.bytes += line.len();
        state.lines.push_back(line.to_vec());
        drop(state);
        // All waiters are woken, because the writer and `flush` wait on the same condition
        // variable. Waking only one could wake `flush` and leave the writer asleep.
        self.0.changed.notify_all();
    }

    /// Waits until every line has been written, for at most `timeout`.
    pub(super) fn flush(&self, timeout: Duration) {
        let unwritten = |state: &mut LogQueueState| state.writing || !state.lines.is_empty();
        // The result is ignored, because the caller ends in any case: after the last line, after a
        // timeout and after a poisoned lock.
        let _written = self.0.changed.wait_timeout_while(self.state(), timeout, unwritten);
    }

    fn write_forever(&self, mut out: impl Write, report: impl Fn(u64)) {
        loop {
            // The lock is held in `next` and in `written` but not during the write, so that `push`
            // never waits for stderr. `report` logs, which calls `push` on this same thread. That
            // cannot hang, because no lock is held here and `push` drops a line rather than wait. A
            // write error drops its line; nothing else can be done about it, because stderr is
            // where it would be reported.
            let line = self.next();
            let result = out.write_all(&line).and_then(|()| out.flush());
            if let Some(dropped) = self.written(result.is_ok()) {
                report(dropped);
            }
        }
    }

    /// Waits for a line and takes it.
    fn next(&self) -> Vec<u8> {
        let mut state = self.state();
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                state.writing = true;
                return line;
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Records how the write of a line ended. Returns the number of dropped lines if it is time to
    /// report them.
    fn written(&self, succeeded: bool) -> Option<u64> {
        let mut state = self.state();
        // A failed write counts as a dropped line. The count is taken out only after a success,
        // because a report written to a stderr that fails would be lost and the count with it. If
        // other threads fill the queue before the report is pushed, the report is dropped and
        // counted as one line.
        state.writing = false;
        let due = if succeeded {
            // Half of the queue must be free, so that the report finds room.
            let has_room = state.bytes <= self.0.capacity / 2;
            (has_room && state.dropped > 0).then(|| std::mem::take(&mut state.dropped))
        } else {
            state.count_dropped();
            None
        };
        drop(state);
        self.0.changed.notify_all();
        due
    }

    fn state(&self) -> MutexGuard<'_, LogQueueState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Queues one event. The formatter passes each event in one piece.
impl Write for LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogQueue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A timeout far longer than anything here takes. Only a test that hangs reaches it.
    const FOREVER: Duration = Duration::from_secs(60);

    /// A writer whose every write waits for the test: `true` lets it succeed, `false` fails it.
    struct Gated {
        gate: Receiver<bool>,
        written: Sender<String>,
    }

    impl Write for Gated {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            match self.gate.recv() {
                Ok(true) => {
                    self.written.send(String::from_utf8_lossy(line).into_owned()).unwrap();
                    Ok(line.len())
                }
                Ok(false) | Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A started queue of 10 bytes, the gate of its writer, and the lines that were written.
    fn gated() -> (LogQueue, Sender<bool>, Receiver<String>) {
        let (open, gate) = channel();
        let (written, lines) = channel();
        let queue = LogQueue::new(10);
        let reporting = queue.clone();
        let report = move |dropped: u64| reporting.push(format!("-{dropped}").as_bytes());
        queue.start(Gated { gate, written }, report).unwrap();
        (queue, open, lines)
    }

    #[test]
    fn a_blocked_writer_blocks_no_caller_and_no_exit() {
        let (queue, open, lines) = gated();
        for _ in 0..1000 {
            queue.push(b"12345");
        }
        queue.flush(Duration::from_millis(10));
        // The writer may hold one line, and two fit into the queue.
        assert!(queue.state().dropped >= 997, "{}", queue.state().dropped);
        assert!(queue.state().bytes <= 10);
        assert!(lines.try_recv().is_err(), "nothing was written");
        drop(open);
    }

    #[test]
    fn the_number_of_dropped_lines_is_logged_after_the_flood() {
        let (queue, open, lines) = gated();
        for _ in 0..100 {
            queue.push(b"12345");
        }
        let dropped = queue.state().dropped;
        let kept = 100 - usize::try_from(dropped).unwrap();
        for _ in 0..=kept {
            open.send(true).unwrap();
        }
        let seen: Vec<String> = (0..=kept).map(|_| lines.recv_timeout(FOREVER).unwrap()).collect();
        assert!(seen.contains(&format!("-{dropped}")), "{seen:?}");
        assert_eq!(seen.iter().filter(|line| *line == "12345").count(), kept);
    }

    #[test]
    fn an_unwritable_line_is_counted_as_dropped() {
        let (queue, open, lines) = gated();
        queue.push(b"lost");
        queue.push(b"seen");
        open.send(false).unwrap();
        open.send(true).unwrap();
        open.send(true).unwrap();
        assert_eq!(lines.recv_timeout(FOREVER).unwrap(), "seen");
        assert_eq!(lines.recv_timeout(FOREVER).unwrap(), "-1");
    }

    #[test]
    fn the_exit_waits_for_writable_lines() {
        let (queue, open, lines) = gated();
        queue.push(b"a");
        queue.push(b"b");
        open.send(true).unwrap();
        open.send(true).unwrap();
        queue.flush(FOREVER);
        assert_eq!(lines.try_iter().collect::<Vec<_>>(), ["a", "b"]);
    }
}
