//! Request bodies that neither stall for ever nor break off the answer.
//!
//! Over HTTP/1.1 a server that answers before it has read the whole request closes a socket with unread bytes in it.
//! The kernel then resets the connection, and the client may see the reset instead of the answer. So a body that
//! is too long is read to its end, within reason, before its reader learns that it is too long.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use http::{HeaderMap, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use tower_http::timeout::TimeoutBody;

/// How many bytes beyond the limit are read and thrown away for the sake of the answer.
const PATIENCE: usize = 64 << 20;

/// Prepares a request's body: it fails when it stalls for `idle`, and reads what exceeds `limit` before it says so.
pub(super) fn guard<B>(request: http::Request<B>, limit: usize, idle: Duration) -> Request
where
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    // HTTP/2 ends one stream without touching the connection.
    let patience = if is_http1(request.version()) { PATIENCE } else { 0 };
    request.map(|inner| Body::new(TimeoutBody::new(idle, Patient::new(inner, limit, patience))))
}

/// Reads the rest of a request that is refused, and gives back its headers.
pub(super) async fn finish(request: Request) -> HeaderMap {
    let (parts, mut body) = request.into_parts();
    if is_http1(parts.version) {
        // An error ends the reading as well as the end does: the answer is the same.
        while let Some(Ok(_)) = body.frame().await {}
    }
    parts.headers
}

fn is_http1(version: Version) -> bool {
    version < Version::HTTP_2
}

/// A body that holds back the piece that exceeds the limit until the rest has arrived.
struct Patient<B> {
    inner: B,
    seen: usize,
    limit: usize,
    patience: usize,
    excess: Option<Bytes>,
    ended: bool,
}

impl<B> Patient<B> {
    fn new(inner: B, limit: usize, patience: usize) -> Self {
        Self { inner, seen: 0, limit, patience, excess: None, ended: false }
    }

    /// Ends the body with the piece held back, if there is one.
    fn end<E>(&mut self) -> Option<Result<Frame<Bytes>, E>> {
        self.ended = true;
        self.excess.take().map(|data| Ok(Frame::data(data)))
    }
}

impl<B> HttpBody for Patient<B>
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
            if this.seen <= this.limit {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            this.excess.get_or_insert(data);
            if this.seen - this.limit > this.patience {
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
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::{StreamExt as _, stream};
    use http_body_util::{LengthLimitError, Limited, StreamBody};

    use super::*;

    /// Sends `pieces` of 10 bytes through a limit of 25; answers what the reader got, and how many pieces were read.
    async fn read(pieces: usize, patience: usize) -> (Result<usize, ()>, usize) {
        let taken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&taken);
        let source = stream::iter(0..pieces).map(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"0123456789")))
        });
        let body = Patient::new(StreamBody::new(source), 25, patience);
        let result = Limited::new(body, 25).collect().await;
        let result = match result {
            Ok(whole) => Ok(whole.to_bytes().len()),
            Err(error) => {
                assert!(error.is::<LengthLimitError>());
                Err(())
            }
        };
        (result, taken.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn passes_on_what_fits() {
        assert_eq!(read(0, 1000).await, (Ok(0), 0));
        assert_eq!(read(2, 1000).await, (Ok(20), 2));
    }

    #[tokio::test]
    async fn reads_an_oversized_body_to_its_end_before_it_fails() {
        assert_eq!(read(50, 1000).await, (Err(()), 50));
    }

    #[tokio::test]
    async fn has_an_end_of_patience() {
        assert_eq!(read(50, 0).await, (Err(()), 3));
        assert_eq!(read(50, 100).await, (Err(()), 13));
    }
}
