//! The activity of one connection: the requests under way, and the time since when there is none.
//!
//! ```text
//!   idle ──first byte of a head──► head ──► request ──last byte of the answer──► idle
//!    │                              │          │
//!    └── idle_timeout               │          └── its own deadlines
//!                                   └── header_timeout
//! ```
//!
//! The HTTP library has one timer for an idle connection and for a slow head, so a keep-alive
//! connection would be closed as early as a slow head. Over HTTP/2 the library does not show when a
//! head begins, and there the idle time bounds a head too.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;

use super::listener::Transport;

/// The timeouts of an idle connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct IdleTimeouts {
    /// The time from the first byte of a request's head to its last one.
    pub(super) header: Duration,
    /// The time from one answer to the next request.
    pub(super) idle: Duration,
    /// True if the connection ends with its first answer.
    pub(super) once: bool,
}

/// The activity of one connection. It is shared between the connection's task, its requests, and
/// the choice of the connection to close.
pub(super) struct ConnectionActivity {
    state: Mutex<ActivityState>,
    changed: Notify,
    evicted: Notify,
}

struct ActivityState {
    requests: usize,
    answered: bool,
    idle_since: Instant,
    head_since: Option<Instant>,
}

impl ConnectionActivity {
    /// Returns the activity of a connection that has just been accepted.
    pub(super) fn new() -> Arc<Self> {
        let state = Mutex::new(ActivityState::new(Instant::now()));
        Arc::new(Self { state, changed: Notify::new(), evicted: Notify::new() })
    }

    /// Counts a request. The request ends, and its `permit` is returned, when the guard is dropped.
    pub(super) fn begin(self: &Arc<Self>, permit: Option<OwnedSemaphorePermit>) -> RequestGuard {
        self.state().begin();
        RequestGuard { activity: Arc::clone(self), _permit: permit }
    }

    /// Returns the time since when there has been no request, if there is none.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.requests == 0).then_some(state.idle_since)
    }

    /// Returns the time at which the connection is to be closed if nothing changes before.
    pub(super) fn deadline(&self, timeouts: IdleTimeouts) -> Option<Instant> {
        self.state().deadline(timeouts)
    }

    /// Waits until the deadline may have changed.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Asks the connection to make room for another one.
    pub(super) fn evict(&self) {
        self.evicted.notify_one();
    }

    /// Waits until the connection is asked to make room for another one.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    fn bytes_came(&self) {
        if self.state().bytes_came(Instant::now()) {
            self.changed.notify_one();
        }
    }

    fn ended(&self) {
        if self.state().ended(Instant::now()) {
            self.changed.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, ActivityState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ActivityState {
    fn new(now: Instant) -> Self {
        Self { requests: 0, answered: false, idle_since: now, head_since: None }
    }

    fn begin(&mut self) {
        // The head is complete once its request begins. The connection's task is not woken, because
        // a request only removes the deadline, and the task computes the deadline anew before it
        // closes the connection.
        self.requests += 1;
        self.head_since = None;
    }

    /// Records bytes of a head. Returns true if they are its first ones.
    fn bytes_came(&mut self, now: Instant) -> bool {
        let begins = self.requests == 0 && self.head_since.is_none();
        if begins {
            self.head_since = Some(now);
        }
        begins
    }

    /// Records the end of a request. Returns true if the connection is idle now.
    fn ended(&mut self, now: Instant) -> bool {
        self.requests -= 1;
        self.answered = true;
        if self.requests == 0 {
            self.idle_since = now;
            self.head_since = None;
        }
        self.requests == 0
    }

    fn deadline(&self, timeouts: IdleTimeouts) -> Option<Instant> {
        // A request has timeouts of its own for its body and its call, so the connection has no
        // deadline while one is under way. A head that has begun must be complete within the header
        // time, and also within the idle time, which runs from the last answer.
        if self.requests > 0 {
            return None;
        }
        if timeouts.once && self.answered {
            return Some(self.idle_since);
        }
        let idle = self.idle_since + timeouts.idle;
        Some(self.head_since.map_or(idle, |since| idle.min(since + timeouts.header)))
    }
}

/// A request under way, with its share of the limit on requests.
pub(super) struct RequestGuard {
    activity: Arc<ConnectionActivity>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.activity.ended();
    }
}

impl RequestGuard {
    /// Keeps the request under way until `body` has been sent.
    pub(super) fn until_sent(self, body: Body) -> Body {
        Body::new(AnswerBody { body, _underway: self })
    }
}

/// The body of an answer. It holds the request that it belongs to.
struct AnswerBody {
    body: Body,
    _underway: RequestGuard,
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that notes when the bytes of an HTTP/1.1 head begin to arrive.
pub(super) struct WatchedStream {
    /// The bytes that were read from the stream before. They are read again first.
    first: Bytes,
    stream: Transport,
    activity: Option<Arc<ConnectionActivity>>,
}

impl WatchedStream {
    /// Wraps `stream`, from which `first` was read. Bytes are reported only if an `activity` is
    /// given.
    pub(super) fn new(first: Bytes, stream: Transport, activity: Option<Arc<ConnectionActivity>>) -> Self {
        Self { first, stream, activity }
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = if self.first.is_empty() {
            Pin::new(&mut self.stream).poll_read(cx, buf)
        } else {
            let count = self.first.len().min(buf.remaining());
            buf.put_slice(&self.first.split_to(count));
            Poll::Ready(Ok(()))
        };
        if let Some(activity) = self.activity.as_ref().filter(|_| buf.filled().len() > before) {
            activity.bytes_came();
        }
        polled
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE_TIMEOUTS: IdleTimeouts =
        IdleTimeouts { header: Duration::from_secs(10), idle: Duration::from_secs(120), once: false };

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn idle_connections_and_slow_heads_have_separate_timeouts() {
        let start = Instant::now();
        let mut state = ActivityState::new(start);
        assert_eq!(state.deadline(IDLE_TIMEOUTS), Some(after(start, 120)));
        assert!(state.bytes_came(after(start, 60)));
        assert!(!state.bytes_came(after(start, 65)), "a trickle gains no time");
        assert_eq!(state.deadline(IDLE_TIMEOUTS), Some(after(start, 70)));
        state.begin();
        assert_eq!(state.deadline(IDLE_TIMEOUTS), None, "a request has deadlines of its own");
        assert!(!state.bytes_came(after(start, 66)), "these are of its body");
        state.begin();
        assert!(!state.ended(after(start, 600)));
        assert!(state.ended(after(start, 660)));
        assert_eq!(state.deadline(IDLE_TIMEOUTS), Some(after(start, 660 + 120)));
    }

    #[test]
    fn a_single_answer_connection_ends_after_its_answer() {
        let start = Instant::now();
        let once = IdleTimeouts { once: true, ..IDLE_TIMEOUTS };
        let mut state = ActivityState::new(start);
        assert_eq!(state.deadline(once), Some(after(start, 120)));
        state.begin();
        assert!(state.ended(after(start, 1)));
        assert_eq!(state.deadline(once), Some(after(start, 1)));
    }
}
