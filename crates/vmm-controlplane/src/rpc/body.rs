//! Limits on request bodies: the pause between pieces, the whole time, the length, and the memory
//! of all bodies together.
//!
//! Over HTTP/1.1 a server that answers before it has read the whole request closes a socket with
//! unread bytes in it. The kernel then resets the connection, and the client may see the reset
//! instead of the answer. Therefore a body that is too long is read on, up to 64 MiB beyond the
//! limit, before its reader learns that it is too long.
//!
//! ```text
//!   Incoming ── LengthLimitedBody ─ LimitedBody ─► the RPC library
//!               (excess)   (pause, whole time, bytes of all requests)
//!                             └── a fault is recorded in BodyReading; paths.rs answers with it
//! ```

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use connectrpc::ConnectError;
use http::{HeaderMap, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{self, Instant, Sleep};

use super::ServeOptions;

/// The number of bytes beyond the limit that are read and thrown away, so that the client receives
/// the answer.
const DISCARD_LIMIT: usize = 64 << 20;

/// The longest time for which the rest of a refused request is read.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// The number of bytes reserved for the bodies of vital calls.
const VITAL_BYTES: usize = 1 << 20;

/// The limits of all bodies of one server.
pub(super) struct BodyLimits {
    limit: usize,
    pause_limit: Duration,
    body_limit: Duration,
    bytes: Arc<Semaphore>,
    vital_bytes: Arc<Semaphore>,
}

impl BodyLimits {
    pub(super) fn new(options: &ServeOptions) -> Self {
        Self {
            limit: options.max_body_bytes(),
            pause_limit: options.body_idle_timeout,
            body_limit: options.body_timeout,
            bytes: Arc::new(Semaphore::new(options.max_bytes_in_flight)),
            vital_bytes: Arc::new(Semaphore::new(VITAL_BYTES)),
        }
    }

    /// Puts the limits around a request's body. The body's faults and its share of the memory are
    /// in the [`BodyReading`] that is put among the extensions.
    pub(super) fn guard<B>(&self, request: http::Request<B>, is_vital: bool) -> Request
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        // HTTP/2 ends one stream and keeps the connection, so the answer arrives though the rest is
        // unread.
        let discard_limit = if is_http1(request.version()) { DISCARD_LIMIT } else { 0 };
        // Vital calls use the common memory as long as there is some. Their own reserve comes last,
        // so that it is still there when other bodies have taken everything.
        let mut stores = vec![Arc::clone(&self.bytes)];
        if is_vital {
            stores.push(Arc::clone(&self.vital_bytes));
        }
        let reading = BodyReading::new(self.limit);
        let mut request = request.map(|inner| {
            Body::new(LimitedBody {
                inner: LengthLimitedBody::new(inner, Arc::clone(&reading.length_limit), discard_limit),
                pause_limit: self.pause_limit,
                paused: Box::pin(time::sleep(self.pause_limit)),
                body_limit: self.body_limit,
                end: Box::pin(time::sleep(self.body_limit)),
                stores,
                reading: reading.clone(),
            })
        });
        request.extensions_mut().insert(reading);
        request
    }
}

/// Reads the rest of a refused request for at most [`DISCARD_TIMEOUT`], and returns its headers.
pub(super) async fn discard_rest(request: Request) -> HeaderMap {
    let (parts, mut body) = request.into_parts();
    if is_http1(parts.version) {
        // The body's end, an error and the timeout all have the same consequence: the answer is
        // sent now.
        let rest = async { while let Some(Ok(_)) = body.frame().await {} };
        let _ended = time::timeout(DISCARD_TIMEOUT, rest).await;
    }
    parts.headers
}

fn is_http1(version: Version) -> bool {
    version < Version::HTTP_2
}

/// The state of a request's body, shared between the body and the dispatcher.
///
/// The memory granted to the body is returned when the last clone is dropped, which is after the
/// answer is ready.
#[derive(Clone, Default)]
pub(super) struct BodyReading {
    progress: Arc<Mutex<BodyProgress>>,
    /// The longest body in bytes.
    length_limit: Arc<AtomicUsize>,
}

#[derive(Default)]
struct BodyProgress {
    fault: Option<BodyFault>,
    granted: Vec<OwnedSemaphorePermit>,
}

impl BodyReading {
    fn new(length_limit: usize) -> Self {
        Self { progress: Arc::default(), length_limit: Arc::new(AtomicUsize::new(length_limit)) }
    }

    /// Lifts the limit on the length of the body, because the body is a stream of messages. The
    /// library limits each message, and the memory and the whole time of the body stay limited.
    pub(super) fn allow_stream(&self) {
        self.length_limit.store(usize::MAX, Ordering::Relaxed);
    }

    /// Returns the error for the client, if the body was given up.
    pub(super) fn fault(&self) -> Option<ConnectError> {
        self.lock().fault.map(BodyFault::error)
    }

    fn give_up(&self, fault: BodyFault) -> BodyFault {
        self.lock().fault = Some(fault);
        fault
    }

    /// Takes `bytes` bytes of memory from the first of `stores` that has so many left. The body is
    /// given up if none has.
    fn grant(&self, stores: &[Arc<Semaphore>], bytes: usize) -> Result<(), BodyFault> {
        let wanted = u32::try_from(bytes).unwrap_or(u32::MAX);
        let granted = stores.iter().find_map(|store| Arc::clone(store).try_acquire_many_owned(wanted).ok());
        let Some(granted) = granted else { return Err(self.give_up(BodyFault::NoMemory)) };
        self.lock().granted.push(granted);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BodyProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reason for which a body was given up.
#[derive(Clone, Copy, Debug)]
enum BodyFault {
    Stalled(Duration),
    TooSlow(Duration),
    NoMemory,
}

impl BodyFault {
    fn error(self) -> ConnectError {
        match self {
            Self::Stalled(_) | Self::TooSlow(_) => ConnectError::deadline_exceeded(self.to_string()),
            Self::NoMemory => ConnectError::resource_exhausted(self.to_string()),
        }
    }
}

impl fmt::Display for BodyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stalled(pause_limit) => write!(
                f,
                "no more of the request's body came for {} s; send it again, without a pause",
                pause_limit.as_secs_f64()
            ),
            Self::TooSlow(body_limit) => write!(
                f,
                "the request's body did not arrive within {} s; send it again over a faster connection",
                body_limit.as_secs_f64()
            ),
            Self::NoMemory => f.write_str(
                "the daemon has no memory left for the body of this request, because the bodies of other requests \
                 take it; try again",
            ),
        }
    }
}

impl std::error::Error for BodyFault {}

/// A body that ends with a fault if it pauses too long, takes too long as a whole, or needs memory
/// that is not there.
struct LimitedBody<B> {
    inner: LengthLimitedBody<B>,
    pause_limit: Duration,
    paused: Pin<Box<Sleep>>,
    body_limit: Duration,
    end: Pin<Box<Sleep>>,
    stores: Vec<Arc<Semaphore>>,
    reading: BodyReading,
}

impl<B> HttpBody for LimitedBody<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = &mut *self;
        // The whole time is checked before the inner body, because a peer that always has one more
        // piece ready would otherwise never be stopped.
        if this.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(this.reading.give_up(BodyFault::TooSlow(this.body_limit)).into())));
        }
        // Progress is measured by the bytes that `LengthLimitedBody` has seen and not by the frames
        // that it hands out. Beyond the limit `LengthLimitedBody` reads pieces and returns
        // `Pending`, and such a peer is not stalled. Polling `paused` only when nothing came
        // registers the waker for the next pause. Memory is taken for a frame that is handed out,
        // because only such a frame is kept; the pieces that `LengthLimitedBody` throws away need
        // none.
        let before = this.inner.seen;
        let polled = Pin::new(&mut this.inner).poll_frame(cx);
        if this.inner.seen > before {
            this.paused.as_mut().reset(Instant::now() + this.pause_limit);
        }
        match polled {
            Poll::Pending => {
                ready!(this.paused.as_mut().poll(cx));
                Poll::Ready(Some(Err(this.reading.give_up(BodyFault::Stalled(this.pause_limit)).into())))
            }
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                Poll::Ready(Some(this.reading.grant(&this.stores, bytes).map(|()| frame).map_err(Into::into)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A body that holds back the piece which exceeds the limit until the rest has arrived.
struct LengthLimitedBody<B> {
    inner: B,
    seen: usize,
    limit: Arc<AtomicUsize>,
    discard_limit: usize,
    excess: Option<Bytes>,
    ended: bool,
}

impl<B> LengthLimitedBody<B> {
    fn new(inner: B, limit: Arc<AtomicUsize>, discard_limit: usize) -> Self {
        Self { inner, seen: 0, limit, discard_limit, excess: None, ended: false }
    }

    /// Ends the body, with the piece held back as the last one, if there is one.
    fn end<E>(&mut self) -> Option<Result<Frame<Bytes>, E>> {
        self.ended = true;
        self.excess.take().map(|data| Ok(Frame::data(data)))
    }
}

impl<B> HttpBody for LengthLimitedBody<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        // A piece within the limit is passed on at once. The first piece beyond the limit is kept,
        // and the later ones are dropped, so a long body takes no memory. The kept piece is handed
        // out when the peer has nothing more to send, when the connection breaks, or when more than
        // `discard_limit` bytes beyond the limit have come. The reader has the same limit, so that
        // piece makes it refuse the request as too long. The kept piece takes precedence over the
        // error of a broken connection, because the request was too long before the connection
        // broke.
        while !this.ended {
            let frame = match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    let held = this.end();
                    return Poll::Ready(held.or(Some(Err(error))));
                }
                None => return Poll::Ready(this.end()),
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(other) => return Poll::Ready(Some(Ok(other))),
            };
            this.seen = this.seen.saturating_add(data.len());
            let limit = this.limit.load(Ordering::Relaxed);
            if this.seen <= limit {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            this.excess.get_or_insert(data);
            if this.seen - limit > this.discard_limit {
                return Poll::Ready(this.end());
            }
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || (self.excess.is_none() && self.inner.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt as _, stream};
    use http_body_util::{LengthLimitError, Limited, StreamBody};
    use std::convert::Infallible;

    use super::*;

    /// Sends `pieces` of 10 bytes through a limit of 25. Returns the result of the reader and the
    /// number of pieces that were read.
    async fn read(pieces: usize, discard_limit: usize) -> (Result<usize, ()>, usize) {
        let taken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&taken);
        let source = stream::iter(0..pieces).map(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"0123456789")))
        });
        let body =
            LengthLimitedBody::new(StreamBody::new(source), Arc::new(AtomicUsize::new(25)), discard_limit);
        let result = Limited::new(body, 25).collect().await;
        let result = match result {
            Ok(collected) => Ok(collected.to_bytes().len()),
            Err(error) => {
                assert!(error.is::<LengthLimitError>());
                Err(())
            }
        };
        (result, taken.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_body_within_the_limit_is_passed_on() {
        assert_eq!(read(0, 1000).await, (Ok(0), 0));
        assert_eq!(read(2, 1000).await, (Ok(20), 2));
    }

    #[tokio::test]
    async fn an_oversized_body_is_drained_before_the_call_fails() {
        assert_eq!(read(50, 1000).await, (Err(()), 50));
    }

    #[tokio::test]
    async fn the_drain_of_an_oversized_body_is_limited() {
        assert_eq!(read(50, 0).await, (Err(()), 3));
        assert_eq!(read(50, 100).await, (Err(()), 13));
    }
}
