//! Keeps a helper running: starts it, reads its messages, and starts another one when it ends.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};
use vmm_core::backend::BackendErrorKind;
use vmm_libvirt_wire::{MAX_LINE, Message};

use super::helper;
use super::link::{Down, Event, Inner, State, Stray};
use crate::sanitize;

/// The first and the longest pause between two helpers.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// The time in which the helper must end once its output has ended.
const ENDING: Duration = Duration::from_secs(1);
/// The most requests that wait to be written.
const OUTGOING: usize = 256;
/// The most bytes of the last line of the helper's stderr.
const LAST_WORDS: usize = 2048;

/// Keeps a helper running for as long as the link exists.
pub(super) async fn keep(inner: Arc<Inner>) {
    let mut pause = PAUSES.0;
    for attempt in 1.. {
        inner.state.send_replace(State::Starting);
        let (was_up, down) = run_once(&inner).await;
        inner.disconnected();
        if was_up {
            warn!(detail = down.message, "the connection to libvirt was lost; the daemon connects again");
            pause = PAUSES.0;
        } else {
            debug!(detail = down.message, "libvirt cannot be used");
        }
        inner.state.send_replace(State::Down(attempt, down));
        inner.stray(Stray::Lost);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = inner.retry.notified() => {}
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Runs one helper to its end. Returns true if it was connected, and the reason for its end.
async fn run_once(inner: &Arc<Inner>) -> (bool, Down) {
    if let Some(down) = helper::impossible(&inner.uri, rustix::process::geteuid().is_root()) {
        return (false, down);
    }
    let program = match helper::find(&inner.program) {
        Ok(program) => program,
        Err(down) => return (false, down),
    };
    let spawned = tokio::process::Command::new(&program)
        .arg(&inner.uri)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A process group of its own keeps Ctrl-C at the daemon's terminal away from the helper,
        // because the daemon ends the helper itself.
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            let message = format!("{} could not be started: {error}", program.display());
            return (false, Down { kind: BackendErrorKind::Host, message });
        }
    };
    let (Some(stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return (false, Down { kind: BackendErrorKind::Host, message: "the helper has no pipes".to_owned() });
    };
    inner.hangs.store(false, Ordering::Relaxed);
    let (sender, outgoing) = mpsc::channel(OUTGOING);
    let mut last_words = tokio::spawn(read_last_words(stderr));
    let ended = tokio::select! {
        ended = listen(inner, stdout, sender) => ended,
        () = write(stdin, outgoing) => None,
        () = inner.hung_up() => {
            let message = format!("libvirt at {} does not answer; the daemon connects again", inner.uri);
            Some(Down { kind: BackendErrorKind::Timeout, message })
        }
    };
    // Read before the end of the helper, because the caller replaces the state afterwards.
    let was_up = matches!(*inner.state.borrow(), State::Up(_));
    let exit = end(&mut child).await;
    let said = tokio::time::timeout(ENDING, &mut last_words).await;
    last_words.abort();
    let said = said.ok().and_then(Result::ok).unwrap_or_default();
    (was_up, ended.unwrap_or_else(|| helper::ended(&exit, &said)))
}

/// Waits for the end of the helper, and kills it after [`ENDING`]. Returns the exit status as text.
async fn end(child: &mut Child) -> String {
    let status = match tokio::time::timeout(ENDING, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            if let Err(error) = child.start_kill() {
                warn!(%error, "the libvirt helper could not be killed");
            }
            child.wait().await
        }
    };
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Writes requests until the helper closes its stdin.
async fn write(mut stdin: ChildStdin, mut outgoing: mpsc::Receiver<Vec<u8>>) {
    while let Some(line) = outgoing.recv().await {
        if let Err(error) = stdin.write_all(&line).await {
            debug!(%error, "the libvirt helper no longer reads its requests");
            return;
        }
    }
    // The sender is dropped together with this task.
    std::future::pending().await
}

/// Handles the helper's messages until one gives the reason for its end. Returns `None` if its
/// output ended without a reason.
async fn listen(
    inner: &Inner,
    stdout: impl AsyncRead + Unpin,
    sender: mpsc::Sender<Vec<u8>>,
) -> Option<Down> {
    let mut stdout = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stdout).take(MAX_LINE as u64).read_until(b'\n', &mut line).await {
            Ok(0) => return None,
            Ok(_) if line.last() == Some(&b'\n') => {}
            Ok(_) => return Some(senseless("a line is cut short or too long")),
            Err(error) => return Some(senseless(&error.to_string())),
        }
        let message = match serde_json::from_slice(&line) {
            Ok(message) => message,
            Err(error) => return Some(senseless(&error.to_string())),
        };
        match message {
            Message::Ready { libvirt, hypervisor } => {
                inner.connected(sanitize::version(&libvirt), sanitize::version(&hypervisor), sender.clone());
            }
            Message::Unreachable { failure } => return Some(helper::unreachable(&inner.uri, &failure)),
            Message::Closed { why } => {
                let message = format!(
                    "the connection to libvirt at {} was lost: {}",
                    inner.uri,
                    sanitize::sentence(&why)
                );
                return Some(Down { kind: BackendErrorKind::Unreachable, message });
            }
            Message::Answer { id, ok, failed } => inner.answered(id, ok, failed),
            Message::Lifecycle { uuid, event } => inner.happened(uuid, Event::Lifecycle(event)),
            Message::Monitor { uuid, event, details } => inner.happened(uuid, Event::Monitor(event, details)),
        }
    }
}

fn senseless(why: &str) -> Down {
    let message = format!(
        "the libvirt helper sent a message that cannot be parsed ({why}); is it as new as the daemon?"
    );
    Down { kind: BackendErrorKind::Protocol, message }
}

async fn read_last_words(stderr: impl AsyncRead + Unpin) -> String {
    let mut lines = BufReader::new(stderr);
    let (mut line, mut last) = (Vec::new(), String::new());
    loop {
        line.clear();
        match (&mut lines).take(LAST_WORDS as u64).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return last,
            Ok(_) => {
                last = sanitize::sentence(String::from_utf8_lossy(&line).trim());
                info!(detail = last, "the libvirt helper wrote to its stderr");
            }
        }
    }
}
