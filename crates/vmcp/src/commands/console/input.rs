//! The way of typed keys to the guest.

use connectrpc::{ConnectError, ErrorCode};
use tokio::sync::mpsc;
use vmm_proto::v1 as pb;

use super::keys::{KeyCommand, Keys};
use super::terminal::keyboard;
use crate::cli::EscapeKey;
use crate::connect::{Client, reason};
use crate::output::escape;

/// The notes that may wait for the screen.
const NOTES_WAITING: usize = 16;
/// The bytes of one call at most. The server takes more.
const BYTES_AT_ONCE: usize = 16 << 10;

/// A note of the input for the screen.
#[derive(Debug)]
pub(super) enum InputNote {
    /// A command of the person.
    Command(KeyCommand),
    /// A remark for the person.
    Remark(String),
}

/// Starts to read keys and to send them. Ends when the receiver of the notes is dropped.
pub(super) fn start(client: Client, vm_id: String, escape: EscapeKey) -> mpsc::Receiver<InputNote> {
    let (tell, notes) = mpsc::channel(NOTES_WAITING);
    tokio::spawn(async move {
        let mut sender = KeySender { client, vm_id, keys: Keys::new(escape.0), refused: None };
        // The only error is a screen that has gone.
        let _gone = sender.run(&tell).await;
    });
    notes
}

/// Sends keys, one call after the other, so that their order is kept.
struct KeySender {
    client: Client,
    vm_id: String,
    keys: Keys,
    /// The error of the last call. A row of equal errors is one remark.
    refused: Option<ErrorCode>,
}

impl KeySender {
    async fn run(&mut self, tell: &mpsc::Sender<InputNote>) -> Result<(), mpsc::error::SendError<InputNote>> {
        let mut typed = keyboard();
        while let Some(mut bytes) = typed.recv().await {
            // Keys that were typed during the last call go into one.
            while bytes.len() < BYTES_AT_ONCE
                && let Ok(more) = typed.try_recv()
            {
                bytes.extend(more);
            }
            let (for_guest, command) = self.keys.feed(&bytes);
            if !for_guest.is_empty()
                && let Some(text) = self.send(for_guest).await
            {
                tell.send(InputNote::Remark(text)).await?;
            }
            if let Some(command) = command {
                tell.send(InputNote::Command(command)).await?;
            }
        }
        Ok(())
    }

    /// Sends bytes to the guest. Returns a remark if they were not taken and the person does not
    /// know the reason yet. Lost bytes are not sent again, because a command that was typed long
    /// ago may do harm now.
    async fn send(&mut self, data: Vec<u8>) -> Option<String> {
        let request =
            pb::WriteConsoleRequest { vm_id: self.vm_id.clone(), data: data.into(), ..Default::default() };
        match self.client.write_console(request).await {
            Ok(_) => {
                self.refused = None;
                None
            }
            Err(error) => self.note(&error),
        }
    }

    fn note(&mut self, error: &ConnectError) -> Option<String> {
        let is_new = self.refused != Some(error.code);
        self.refused = Some(error.code);
        is_new.then(|| format!("vmcp: your keys do not reach the guest: {}", escape::line(&reason(error))))
    }
}
