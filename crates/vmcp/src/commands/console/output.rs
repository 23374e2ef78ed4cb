//! The output of a guest, across losses of the server.

use std::sync::Arc;

use connectrpc::{ConnectError, ErrorCode};
use tokio::sync::{Notify, mpsc};
use vmm_proto::v1 as pb;

use super::ConsoleView;
use crate::config::Server;
use crate::connect::retry::{Retry, is_passing};
use crate::connect::{Client, SILENCE_LIMIT, long_call};
use crate::failure::Failure;

/// The messages that may wait for the screen. Behind them the stream is not read, and the server
/// waits.
const MESSAGES_WAITING: usize = 4;

/// Something for the screen.
pub(super) enum ConsoleOutput {
    /// Output of the guest.
    Message(pb::StreamConsoleResponse),
    /// A remark for the person.
    Remark(String),
    /// The reason for which there is no more output.
    Failed(Failure),
}

/// A stream of console output that begins again where it was after a loss of the server.
pub(super) struct ConsoleStream {
    client: Client,
    server: String,
    request: pb::StreamConsoleRequest,
    retry: Retry,
    /// True once the server has taken the stream. Before that the user must mend the error.
    was_taken: bool,
    finish: Arc<Notify>,
}

/// The end of one attempt.
enum StreamEnd {
    /// The server ended the stream: the history is over, or the VM was deleted.
    Done,
    /// The rest of the output is to be read without waiting for more.
    Finishing,
    /// The screen has gone.
    ScreenGone,
    Failed(ConnectError),
}

impl ConsoleStream {
    pub(super) fn new(client: &Client, server: &Server, vm_id: &str, view: ConsoleView) -> Self {
        let request = pb::StreamConsoleRequest {
            vm_id: vm_id.to_owned(),
            tail_bytes: view.tail,
            follow: view.follow,
            ..Default::default()
        };
        Self {
            client: client.clone(),
            server: server.to_string(),
            request,
            retry: Retry::default(),
            was_taken: false,
            finish: Arc::default(),
        }
    }

    /// Returns a client of the same server.
    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Returns the VM.
    pub(super) fn vm_id(&self) -> String {
        self.request.vm_id.clone()
    }

    /// Starts to read. The receiver ends behind the last output. The notification makes the stream
    /// read the output that is there, and end.
    pub(super) fn start(mut self) -> (mpsc::Receiver<ConsoleOutput>, Arc<Notify>) {
        let (tell, output) = mpsc::channel(MESSAGES_WAITING);
        let finish = Arc::clone(&self.finish);
        tokio::spawn(async move {
            if let Err(error) = self.run(&tell).await {
                let _gone = tell.send(ConsoleOutput::Failed(error.into())).await;
            }
        });
        (output, finish)
    }

    async fn run(&mut self, tell: &mpsc::Sender<ConsoleOutput>) -> Result<(), ConnectError> {
        loop {
            match self.follow(tell).await {
                StreamEnd::Done | StreamEnd::ScreenGone => return Ok(()),
                StreamEnd::Finishing => self.request.follow = false,
                StreamEnd::Failed(error) => self.recover(tell, error).await?,
            }
        }
    }

    /// Hands on output until the stream ends.
    async fn follow(&mut self, tell: &mpsc::Sender<ConsoleOutput>) -> StreamEnd {
        let call = self.client.stream_console_with_options(self.request.clone(), long_call());
        let mut stream = match call.await {
            Ok(stream) => stream,
            Err(error) => return StreamEnd::Failed(error),
        };
        let finish = Arc::clone(&self.finish);
        loop {
            let next = tokio::time::timeout(SILENCE_LIMIT, stream.message());
            let message: pb::StreamConsoleResponse = tokio::select! {
                () = finish.notified(), if self.request.follow => return StreamEnd::Finishing,
                next = next => match next {
                    Ok(Ok(Some(message))) => message.to_owned_message(),
                    Ok(Ok(None)) => return StreamEnd::Done,
                    Ok(Err(error)) => return StreamEnd::Failed(error),
                    Err(_) => return StreamEnd::Failed(ConnectError::unavailable("no sign of life came")),
                },
            };
            self.was_taken = true;
            if let Some(text) = self.retry.found(&self.server)
                && tell.send(ConsoleOutput::Remark(text)).await.is_err()
            {
                return StreamEnd::ScreenGone;
            }
            let length = i64::try_from(message.data.len()).unwrap_or(i64::MAX);
            let next_offset = message.offset.saturating_add(length);
            if tell.send(ConsoleOutput::Message(message)).await.is_err() {
                return StreamEnd::ScreenGone;
            }
            // The place is kept only after the bytes were handed on, so that none is left out.
            self.request.offset = Some(next_offset);
        }
    }

    /// Prepares the next attempt, and waits until it is time for it.
    ///
    /// # Errors
    ///
    /// The error itself, if another attempt would end like this one.
    async fn recover(
        &mut self,
        tell: &mpsc::Sender<ConsoleOutput>,
        error: ConnectError,
    ) -> Result<(), ConnectError> {
        // The call's own deadline passed, which is no trouble of the server.
        if self.was_taken && error.code == ErrorCode::DeadlineExceeded {
            return Ok(());
        }
        if self.was_taken && error.code == ErrorCode::OutOfRange {
            // The output began anew, as after a reboot of the host.
            self.request.offset = None;
            let text = "vmcp: the console has begun anew; everything that is kept follows".to_owned();
            let _gone = tell.send(ConsoleOutput::Remark(text)).await;
            return Ok(());
        }
        if !self.was_taken || !is_passing(&error) {
            return Err(error);
        }
        let (pause, text) = self.retry.lost(&self.server, &error);
        if let Some(text) = text {
            // A screen that has gone ends the next attempt.
            let _gone = tell.send(ConsoleOutput::Remark(text)).await;
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}
