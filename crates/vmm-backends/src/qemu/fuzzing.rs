//! Fuzz target for QEMU's side of a QMP connection, from the greeting on. After each command QEMU
//! sends the lines up to the next one that looks like an answer.

use std::time::Duration;

use serde::Deserialize as _;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use vmm_core::backend::BackendError;

use super::client::RebootAction;
use super::monitor::{ResetEvent, shutdown_reason};
use super::qmp::{Qmp, QmpError};
use crate::fuzzing::{check_error, run};

/// The most events that are kept.
const EVENTS: usize = 64;

/// Runs one input.
///
/// # Panics
///
/// If a guarantee is broken, which is the finding.
pub fn qemu(input: &[u8]) {
    let whole = run(conversation(input, usize::MAX));
    let pieces = run(conversation(input, 11));
    assert_eq!(whole, pieces, "it matters how the bytes arrive");
}

/// Returns the outcome of a conversation with a QEMU that sends `input` in pieces of `size` bytes.
async fn conversation(input: &[u8], size: usize) -> Vec<String> {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair can be made");
    let (outcome, ()) = tokio::join!(calls(ours), serve(theirs, input, size));
    outcome
}

async fn serve(stream: UnixStream, input: &[u8], size: usize) {
    let (read, mut write) = stream.into_split();
    let mut commands = BufReader::new(read).lines();
    let mut lines = input.split_inclusive(|byte| *byte == b'\n');
    // QEMU sends the greeting without a command.
    let mut next: Vec<u8> = lines.next().unwrap_or_default().to_vec();
    loop {
        for piece in next.chunks(size.min(next.len().max(1))) {
            // A client that closes the connection makes this write fail, and the next read.
            if write.write_all(piece).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        next.clear();
        for line in lines.by_ref() {
            next.extend_from_slice(line);
            if [b"\"return\"".as_slice(), b"\"error\""]
                .iter()
                .any(|it| line.windows(it.len()).any(|word| word == *it))
            {
                break;
            }
        }
        if next.is_empty() && write.shutdown().await.is_err() {
            return;
        }
        let Ok(Some(_)) = commands.next_line().await else { return };
    }
}

async fn calls(stream: UnixStream) -> Vec<String> {
    let (sender, mut events) = mpsc::channel(EVENTS);
    let qmp = match Qmp::over(stream, Duration::from_secs(2), sender).await {
        Ok(qmp) => qmp,
        Err(error) => return vec![checked_text::<()>(Err(error), true)],
    };
    let mut outcome = vec![
        qmp.version().to_string(),
        checked_text(qmp.query_status().await, true),
        checked_text(qmp.query_version().await, true),
        checked_text(qmp.query_blockstats().await, true),
        checked_text(qmp.set_reboot_action(RebootAction::Shutdown).await, false),
        checked_text(qmp.stop().await, false),
        checked_text(qmp.cont().await, false),
        checked_text(qmp.system_powerdown().await, false),
        checked_text(qmp.system_reset().await, false),
        checked_text(qmp.quit().await, false),
    ];
    drop(qmp);
    while let Ok(event) = events.try_recv() {
        let reset = (event.name == "RESET")
            .then(|| ResetEvent::deserialize(&event.data).map(|reset| reset.guest).ok());
        outcome.push(format!("{event:?} {:?} {reset:?}", shutdown_reason(&event)));
    }
    outcome
}

/// Returns the result as text, and checks the error that a client would get.
fn checked_text<T: std::fmt::Debug>(result: Result<T, QmpError>, asks: bool) -> String {
    let text = format!("{result:?}");
    if let Err(error) = result {
        // A malformed answer may follow a change, so its effect is unknown even for a question.
        let asks = asks && !matches!(error, QmpError::Malformed { .. });
        let unsent =
            matches!(error, QmpError::Timeout { sent: true, .. } | QmpError::Closed { sent: true, .. });
        check_error(&BackendError::from(error), asks && !unsent);
    }
    text
}
