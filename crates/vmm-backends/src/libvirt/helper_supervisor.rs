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
use vmm_libvirt_wire::{HelperMessage, MAX_LINE};

use super::helper;
use super::link::{DomainEvent, LinkDown, LinkShared, LinkState, UnwatchedEvent};
use crate::sanitize;

/// The first pause between two helpers.
const FIRST_HELPER_DELAY: Duration = Duration::from_millis(100);
/// The longest pause between two helpers.
const MAX_HELPER_DELAY: Duration = Duration::from_secs(5);
/// The time in which the helper must end once its output has ended.
const HELPER_EXIT_TIMEOUT: Duration = Duration::from_secs(1);
/// The most requests that wait to be written.
const OUTGOING: usize = 256;
/// The most bytes of the last line of the helper's stderr.
const LAST_WORDS: usize = 2048;

/// Keeps a helper running for as long as the link exists.
pub(super) async fn supervise(inner: Arc<LinkShared>) {
    let mut pause = FIRST_HELPER_DELAY;
    for attempt in 1.. {
        inner.state.send_replace(LinkState::Starting);
        let (was_up, down) = run_once(&inner).await;
        inner.disconnected();
        if was_up {
            warn!(detail = down.message, "the connection to libvirt was lost; the daemon connects again");
            pause = FIRST_HELPER_DELAY;
        } else {
            debug!(detail = down.message, "libvirt cannot be used");
        }
        inner.state.send_replace(LinkState::Down(attempt, down));
        inner.send_unwatched(UnwatchedEvent::Lost);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = inner.retry.notified() => {}
        }
        pause = (pause * 2).min(MAX_HELPER_DELAY);
    }
}

/// Runs one helper to its end. Returns true if it was connected, and the reason for its end.
async fn run_once(inner: &Arc<LinkShared>) -> (bool, LinkDown) {
    if let Some(down) = helper::missing_libvirtd(&inner.uri, rustix::process::geteuid().is_root()) {
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
            return (false, LinkDown { kind: BackendErrorKind::Host, message });
        }
    };
    let (Some(stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return (
            false,
            LinkDown { kind: BackendErrorKind::Host, message: "the helper has no pipes".to_owned() },
        );
    };
    inner.hangs.store(false, Ordering::Relaxed);
    let (sender, outgoing) = mpsc::channel(OUTGOING);
    let mut last_words = tokio::spawn(read_stderr_tail(stderr));
    let ended = tokio::select! {
        ended = listen(inner, stdout, sender) => ended,
        () = write(stdin, outgoing) => None,
        () = inner.wait_for_hang() => {
            let message = format!("libvirt at {} does not answer; the daemon connects again", inner.uri);
            Some(LinkDown { kind: BackendErrorKind::Timeout, message })
        }
    };
    // Read before the end of the helper, because the caller replaces the state afterwards.
    let was_up = matches!(*inner.state.borrow(), LinkState::Up(_));
    let exit = end(&mut child).await;
    let said = tokio::time::timeout(HELPER_EXIT_TIMEOUT, &mut last_words).await;
    last_words.abort();
    let said = said.ok().and_then(Result::ok).unwrap_or_default();
    (was_up, ended.unwrap_or_else(|| helper::helper_exit_error(&exit, &said)))
}

/// Waits for the end of the helper, and kills it after [`HELPER_EXIT_TIMEOUT`]. Returns the exit
/// status as text.
async fn end(child: &mut Child) -> String {
    let status = match tokio::time::timeout(HELPER_EXIT_TIMEOUT, child.wait()).await {
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
    inner: &LinkShared,
    stdout: impl AsyncRead + Unpin,
    sender: mpsc::Sender<Vec<u8>>,
) -> Option<LinkDown> {
    let mut stdout = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut stdout).take(MAX_LINE as u64).read_until(b'\n', &mut line).await {
            Ok(0) => return None,
            Ok(_) if line.last() == Some(&b'\n') => {}
            Ok(_) => return Some(malformed_message("a line is cut short or too long")),
            Err(error) => return Some(malformed_message(&error.to_string())),
        }
        let message = match serde_json::from_slice(&line) {
            Ok(message) => message,
            Err(error) => return Some(malformed_message(&error.to_string())),
        };
        match message {
            HelperMessage::Ready { libvirt, hypervisor } => {
                inner.connected(sanitize::version(&libvirt), sanitize::version(&hypervisor), sender.clone());
            }
            HelperMessage::Unreachable { failure } => return Some(helper::unreachable(&inner.uri, &failure)),
            HelperMessage::Closed { why } => {
                let message = format!(
                    "the connection to libvirt at {} was lost: {}",
                    inner.uri,
                    sanitize::sentence(&why)
                );
                return Some(LinkDown { kind: BackendErrorKind::Unreachable, message });
            }
            HelperMessage::Answer { id, ok, failed } => inner.answered(id, ok, failed),
            HelperMessage::Lifecycle { uuid, event } => inner.pass_on(uuid, DomainEvent::Lifecycle(event)),
            HelperMessage::Monitor { uuid, event, details } => {
                inner.pass_on(uuid, DomainEvent::Monitor(event, details))
            }
        }
    }
}

fn malformed_message(why: &str) -> LinkDown {
    let message = format!(
        "the libvirt helper sent a message that cannot be parsed ({why}); is it as new as the daemon?"
    );
    LinkDown { kind: BackendErrorKind::Protocol, message }
}

async fn read_stderr_tail(stderr: impl AsyncRead + Unpin) -> String {
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
