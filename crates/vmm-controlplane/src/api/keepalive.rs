//! Signs of life on streams that have no items to send.

use std::future::Future as _;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures::{Stream, StreamExt as _, stream};
use tokio::time::{Instant, sleep_until};

/// The longest silence of a stream, because proxies cut streams that are silent for a minute.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// Returns `items` with an item made by `sign` whenever none has come for [`KEEPALIVE_INTERVAL`].
pub(super) fn with_signs_of_life<T: Send + 'static>(
    items: impl Stream<Item = T> + Send + 'static,
    sign: impl Fn() -> T + Send + 'static,
) -> Pin<Box<dyn Stream<Item = T> + Send>> {
    let mut items = Box::pin(items);
    let mut silence = Box::pin(sleep_until(Instant::now() + KEEPALIVE_INTERVAL));
    Box::pin(stream::poll_fn(move |cx| {
        let item = match items.poll_next_unpin(cx) {
            Poll::Ready(item) => item,
            Poll::Pending => {
                std::task::ready!(silence.as_mut().poll(cx));
                Some(sign())
            }
        };
        silence.as_mut().reset(Instant::now() + KEEPALIVE_INTERVAL);
        Poll::Ready(item)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_idle_stream_sends_keepalives_and_a_busy_one_sends_none() {
        let busy = stream::unfold(0, |n| async move {
            if n == 3 {
                return None;
            }
            tokio::time::sleep(KEEPALIVE_INTERVAL - Duration::from_secs(1)).await;
            Some((n, n + 1))
        });
        let items: Vec<_> = with_signs_of_life(busy, || -1).collect().await;
        assert_eq!(items, [0, 1, 2]);
        let items: Vec<_> = with_signs_of_life(stream::pending::<i32>(), || -1).take(3).collect().await;
        assert_eq!(items, [-1; 3]);
    }
}
