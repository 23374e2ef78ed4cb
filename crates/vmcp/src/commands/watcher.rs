//! A watch that continues after a loss of the server.
//!
//! ```text
//!   no token ──► present…, synced(token) ──► changes(token)…
//!       ▲                                        │ the stream breaks
//!       │ out_of_range: the events are gone      ▼
//!       └──────────────────────────── resume with the last token
//! ```
//!
//! An event before "synced" has no token. A stream that breaks there begins anew, because the
//! client does not know of every VM yet.

use connectrpc::{ConnectError, ErrorCode};
use tokio::sync::mpsc;
use vmm_proto::v1 as pb;

use crate::config::Server;
use crate::connect::retry::{Retry, is_passing};
use crate::connect::{Client, SILENCE_LIMIT, long_call};

/// The items that may wait for the screen. Behind them the stream is not read, and the server
/// waits.
const ITEMS_WAITING: usize = 64;

/// Something that a watch tells.
pub(super) enum WatchItem {
    /// The present state of every VM follows, up to the event "synced".
    Anew,
    /// An event, or a mark of the stream, which has no `vm_id`.
    Event(Box<pb::VmEvent>),
    /// A remark for the person.
    Remark(String),
    /// The error that ended the watch.
    Failed(ConnectError),
}

/// The end of one attempt.
enum StreamEnd {
    ScreenGone,
    Failed(ConnectError),
}

struct Watcher {
    client: Client,
    server: String,
    request: pb::WatchVmsRequest,
    retry: Retry,
    /// True once the server has accepted the watch. An earlier error is final, because only the
    /// user can remove its cause.
    was_taken: bool,
    tell: mpsc::Sender<WatchItem>,
}

/// Starts a watch, which ends when the receiver is dropped or behind [`WatchItem::Failed`].
pub(super) fn start(
    client: &Client,
    server: &Server,
    request: pb::WatchVmsRequest,
) -> mpsc::Receiver<WatchItem> {
    let (tell, items) = mpsc::channel(ITEMS_WAITING);
    let mut watcher = Watcher {
        client: client.clone(),
        server: server.to_string(),
        request,
        retry: Retry::default(),
        was_taken: false,
        tell,
    };
    tokio::spawn(async move {
        if let Err(error) = watcher.run().await {
            let _gone = watcher.tell.send(WatchItem::Failed(error)).await;
        }
    });
    items
}

impl Watcher {
    async fn run(&mut self) -> Result<(), ConnectError> {
        loop {
            match self.follow().await {
                StreamEnd::ScreenGone => return Ok(()),
                StreamEnd::Failed(error) => self.recover(error).await?,
            }
        }
    }

    /// Hands on events until the stream ends.
    async fn follow(&mut self) -> StreamEnd {
        let call = self.client.watch_vms_with_options(self.request.clone(), long_call());
        let mut events = match call.await {
            Ok(events) => events,
            Err(error) => return StreamEnd::Failed(error),
        };
        self.was_taken = true;
        if self.request.resume_token.is_empty() && self.tell.send(WatchItem::Anew).await.is_err() {
            return StreamEnd::ScreenGone;
        }
        loop {
            let event: pb::VmEvent = match tokio::time::timeout(SILENCE_LIMIT, events.message()).await {
                Ok(Ok(Some(event))) => event.to_owned_message(),
                Ok(Ok(None)) => return StreamEnd::Failed(ConnectError::unavailable("the stream ended")),
                Ok(Err(error)) => return StreamEnd::Failed(error),
                Err(_) => return StreamEnd::Failed(ConnectError::unavailable("no sign of life came")),
            };
            if let Some(text) = self.retry.found(&self.server)
                && self.tell.send(WatchItem::Remark(text)).await.is_err()
            {
                return StreamEnd::ScreenGone;
            }
            let token = event.token.clone();
            if self.tell.send(WatchItem::Event(Box::new(event))).await.is_err() {
                return StreamEnd::ScreenGone;
            }
            // The token is kept only after the event was handed on, so that none is left out.
            if !token.is_empty() {
                self.request.resume_token = token;
            }
        }
    }

    /// Prepares the next attempt, and waits until it is time for it.
    ///
    /// # Errors
    ///
    /// The error itself, if another attempt would end like this one.
    async fn recover(&mut self, error: ConnectError) -> Result<(), ConnectError> {
        if !self.was_taken {
            return Err(error);
        }
        match error.code {
            // The deadline of the call has passed, so the server has not failed.
            ErrorCode::DeadlineExceeded => return Ok(()),
            ErrorCode::OutOfRange => {
                let text = "vmcp: events since the last one are no longer kept; the present state follows";
                self.remark(text.to_owned()).await;
                self.request.resume_token.clear();
                return Ok(());
            }
            _ if !is_passing(&error) => return Err(error),
            _ => {}
        }
        let (pause, text) = self.retry.lost(&self.server, &error);
        if let Some(text) = text {
            self.remark(text).await;
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    async fn remark(&self, text: String) {
        // A screen that has gone ends the next attempt.
        let _gone = self.tell.send(WatchItem::Remark(text)).await;
    }
}
