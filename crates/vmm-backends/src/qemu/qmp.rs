//! The QEMU Machine Protocol: one JSON object a line over a unix socket.
//!
//! ```text
//!   execute() ──► pending[id] ──► queue ──► writer ──►┐
//!      ▲                                              │ unix socket
//!      └── answer by id ◄── pending[id] ◄── reader ◄──┤
//!                               events ◄──────┘       ▼ QEMU
//! ```
//!
//! Commands carry an id, so several may be in progress at once. Input is not trusted, because a VMM
//! hosts the guest: a line has a maximum length, a line that is neither an answer nor an event ends
//! the connection with the reason, and every wait has a deadline. QEMU serves one client at a time.
//! The kernel accepts the connection of a second client, which gets no greeting.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tracing::{Instrument, debug, warn};

use crate::program::Version;
use crate::sanitize;

/// The time limit of a command without its own limit.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest line that is read, in bytes. The longest legitimate line, block statistics of 64
/// disks, has about a third of this.
pub const MAX_LINE: usize = 1 << 20;

/// The most commands that wait to be written. More wait in their callers.
const QUEUE: usize = 16;
/// The bytes that are read ahead. Every running VM holds a buffer of this size, and most of QEMU's
/// lines are shorter.
const READ_AHEAD: usize = 1024;

/// One connection to one QEMU. Dropping it ends the connection.
#[derive(Debug)]
pub struct Qmp {
    version: Version,
    peer_pid: Option<i32>,
    queue: mpsc::Sender<Vec<u8>>,
    shared: Arc<QmpShared>,
    tasks: [AbortHandle; 2],
}

/// A message of QEMU that is not an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// The event's name, such as `SHUTDOWN`.
    pub name: String,
    /// The time of the event by the host's clock, since the Unix epoch.
    pub at: Duration,
    /// The data of the event, or `Null`.
    pub data: Value,
}

/// The failure of a command or of the connection.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be connected to.
    #[error("cannot connect to QEMU's socket")]
    Connect(#[source] io::Error),
    /// No greeting came in time, because QEMU is paused or serves another client.
    #[error("QEMU did not greet within {0:?}: it stands still, or another client holds its QMP socket")]
    NoGreeting(Duration),
    /// The command was not answered in time.
    #[error("QEMU did not answer {command} within {timeout:?}")]
    Timeout {
        /// The command.
        command: &'static str,
        /// The time limit.
        timeout: Duration,
        /// True if QEMU may have read the command.
        sent: bool,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's message.
        desc: String,
    },
    /// The connection has ended.
    #[error("the connection to QEMU has ended: {reason}")]
    Closed {
        /// The reason.
        reason: CloseReason,
        /// True if QEMU may have read the command.
        sent: bool,
    },
    /// The answer has another form than the command's.
    #[error("QEMU's answer to {command} cannot be parsed")]
    Malformed {
        /// The command.
        command: &'static str,
        /// The error of the parser.
        #[source]
        source: serde_json::Error,
    },
}

/// The reason for the end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// QEMU closed the connection.
    #[error("QEMU closed it")]
    Eof,
    /// Reading or writing failed.
    #[error("{0}")]
    Io(String),
    /// A line was longer than [`MAX_LINE`].
    #[error("QEMU sent a line of more than {MAX_LINE} bytes")]
    LineTooLong,
    /// A line was not QMP.
    #[error("QEMU sent a line that is not QMP: {0}")]
    Garbage(String),
}

#[derive(Debug)]
struct QmpShared {
    state: Mutex<QmpState>,
    closed: watch::Sender<bool>,
    /// The number of events that were dropped because the receiver was full.
    dropped: AtomicU64,
}

#[derive(Debug)]
enum QmpState {
    Open { pending: HashMap<u64, oneshot::Sender<QmpAnswer>>, last_id: u64 },
    Closed(CloseReason),
}

#[derive(Debug)]
enum QmpAnswer {
    Return(Value),
    Error(String),
}

impl QmpShared {
    fn state(&self) -> MutexGuard<'_, QmpState> {
        // The state is valid at every point at which a holder could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, reason: CloseReason) {
        let mut state = self.state();
        if let QmpState::Open { .. } = *state {
            *state = QmpState::Closed(reason);
        }
        drop(state);
        self.closed.send_replace(true);
    }

    fn closed_as(&self, sent: bool) -> QmpError {
        let reason = match &*self.state() {
            QmpState::Closed(reason) => reason.clone(),
            QmpState::Open { .. } => CloseReason::Eof,
        };
        QmpError::Closed { reason, sent }
    }
}

impl Qmp {
    /// Connects to the socket at `path`, waits for the greeting and enters command mode, each
    /// within `timeout`.
    ///
    /// Events go to `events`. An event is dropped with a warning in the log if `events` is full.
    ///
    /// # Errors
    ///
    /// [`QmpError::Connect`], [`QmpError::NoGreeting`], or the error that ended the connection.
    pub async fn connect(
        path: &Path,
        timeout: Duration,
        events: mpsc::Sender<QmpEvent>,
    ) -> Result<Self, QmpError> {
        let connecting = UnixStream::connect(path);
        match tokio::time::timeout(timeout, connecting).await {
            Ok(Ok(stream)) => Self::over(stream, timeout, events).await,
            Ok(Err(error)) => Err(QmpError::Connect(error)),
            Err(_) => Err(QmpError::NoGreeting(timeout)),
        }
    }

    /// Waits for the greeting on a fresh connection and enters command mode, within `timeout`.
    /// Events are handled as in [`Qmp::connect`].
    ///
    /// # Errors
    ///
    /// [`QmpError::NoGreeting`], or the error that ended the connection.
    pub async fn over(
        stream: UnixStream,
        timeout: Duration,
        events: mpsc::Sender<QmpEvent>,
    ) -> Result<Self, QmpError> {
        let entering = async {
            let qmp = Self::greeted(stream, events).await?;
            // The deadline of the outer wait expires first.
            qmp.execute_within("qmp_capabilities", Value::Null, 2 * timeout).await?;
            Ok(qmp)
        };
        tokio::time::timeout(timeout, entering).await.unwrap_or(Err(QmpError::NoGreeting(timeout)))
    }

    async fn greeted(stream: UnixStream, events: mpsc::Sender<QmpEvent>) -> Result<Self, QmpError> {
        let peer_pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let (read, write) = stream.into_split();
        let mut lines = LineReader::new(read);
        let greeting = lines.next().await.map_err(|reason| QmpError::Closed { reason, sent: false })?;
        let version = parse_greeting(&greeting).map_err(|reason| QmpError::Closed { reason, sent: false })?;
        let shared = Arc::new(QmpShared {
            state: Mutex::new(QmpState::Open { pending: HashMap::new(), last_id: 0 }),
            closed: watch::Sender::new(false),
            dropped: AtomicU64::new(0),
        });
        let (queue, queued) = mpsc::channel(QUEUE);
        let span = tracing::debug_span!(parent: None, "qmp", pid = peer_pid);
        let writer = tokio::spawn(write_lines(write, queued, Arc::clone(&shared)).instrument(span.clone()));
        let reader = tokio::spawn(read_lines(lines, events, Arc::clone(&shared)).instrument(span));
        let tasks = [writer.abort_handle(), reader.abort_handle()];
        Ok(Self { version, peer_pid, queue, shared, tasks })
    }

    /// Returns QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the process at the other end, if the kernel reports it.
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// Waits until the connection has ended and every message before its end was delivered.
    pub async fn closed(&self) {
        let mut closed = self.shared.closed.subscribe();
        // The sender lives in `self.shared`, so this wait cannot fail before the value is true.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Executes `command` with `arguments` (`Null` for none) and parses the answer as `T`.
    ///
    /// # Errors
    ///
    /// [`QmpError::Timeout`] after [`COMMAND_TIMEOUT`], [`QmpError::Refused`],
    /// [`QmpError::Closed`] or [`QmpError::Malformed`].
    pub async fn execute<T: DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let answer = self.execute_within(command, arguments, COMMAND_TIMEOUT).await?;
        serde_json::from_value(answer).map_err(|source| QmpError::Malformed { command, source })
    }

    async fn execute_within(
        &self,
        command: &'static str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        // The command is registered before it is written, because the answer may come before the
        // write returns.
        let (id, answer) = self.register()?;
        // Removes the pending command if its caller gives up, so that a silent QEMU uses no memory.
        let _forget = PendingCommand { shared: &self.shared, id };
        let mut line = match arguments {
            Value::Null => json!({ "execute": command, "id": id }),
            arguments => json!({ "execute": command, "arguments": arguments, "id": id }),
        }
        .to_string();
        line.push('\n');
        let mut sent = false;
        let round_trip = async {
            self.queue.send(line.into_bytes()).await.map_err(|_| self.shared.closed_as(false))?;
            sent = true;
            match answer.await {
                Ok(QmpAnswer::Return(value)) => Ok(value),
                Ok(QmpAnswer::Error(desc)) => Err(QmpError::Refused { command, desc }),
                Err(_) => Err(self.shared.closed_as(true)),
            }
        };
        let answered = tokio::time::timeout(timeout, round_trip).await;
        answered.unwrap_or(Err(QmpError::Timeout { command, timeout, sent }))
    }

    fn register(&self) -> Result<(u64, oneshot::Receiver<QmpAnswer>), QmpError> {
        match &mut *self.shared.state() {
            QmpState::Open { pending, last_id } => {
                *last_id += 1;
                let (sender, receiver) = oneshot::channel();
                pending.insert(*last_id, sender);
                Ok((*last_id, receiver))
            }
            QmpState::Closed(reason) => Err(QmpError::Closed { reason: reason.clone(), sent: false }),
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

struct PendingCommand<'a> {
    shared: &'a QmpShared,
    id: u64,
}

impl Drop for PendingCommand<'_> {
    fn drop(&mut self) {
        if let QmpState::Open { pending, .. } = &mut *self.shared.state() {
            pending.remove(&self.id);
        }
    }
}

async fn write_lines(
    mut socket: OwnedWriteHalf,
    mut queued: mpsc::Receiver<Vec<u8>>,
    shared: Arc<QmpShared>,
) {
    while let Some(line) = queued.recv().await {
        if let Err(error) = socket.write_all(&line).await {
            // The reader may still find answers and events that QEMU sent before the end, so the
            // reader closes the connection.
            debug!(%error, "writing to QEMU failed");
            break;
        }
    }
    let mut closed = shared.closed.subscribe();
    // This half stays open, because closing it would make QEMU drop its unsent output.
    let _ = closed.wait_for(|closed| *closed).await;
}

async fn read_lines(mut lines: LineReader, events: mpsc::Sender<QmpEvent>, shared: Arc<QmpShared>) {
    let reason = loop {
        let handled = match lines.next().await {
            Ok(line) => handle_line(&line, &events, &shared),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = handled {
            break reason;
        }
    };
    debug!(detail = %reason, "the connection to QEMU has ended");
    shared.close(reason);
}

fn handle_line(line: &[u8], events: &mpsc::Sender<QmpEvent>, shared: &QmpShared) -> Result<(), CloseReason> {
    let Value::Object(mut message) = parse(line)? else { return Err(garbage("not an object")) };
    if message.contains_key("event") {
        let event = parse_event(Value::Object(message))?;
        let name = event.name.clone();
        if let Err(mpsc::error::TrySendError::Full(_)) = events.try_send(event) {
            // A QEMU that floods the connection causes a log line at each doubling only.
            let dropped = shared.dropped.fetch_add(1, Ordering::Relaxed).saturating_add(1);
            if dropped.is_power_of_two() {
                warn!(
                    event = sanitize::version(&name),
                    dropped, "an event of QEMU was dropped, because too many events wait"
                );
            }
        }
        return Ok(());
    }
    let answer = match (message.remove("return"), message.remove("error")) {
        (Some(value), None) => QmpAnswer::Return(value),
        (None, Some(error)) => QmpAnswer::Error(match error.get("desc").and_then(Value::as_str) {
            Some(desc) => sanitize::sentence(desc),
            None => sanitize::quote(error.to_string().as_bytes()),
        }),
        (Some(_), Some(_)) | (None, None) => return Err(garbage("neither an answer nor an event")),
    };
    let Some(id) = message.get("id").and_then(Value::as_u64) else {
        return Err(garbage("an answer without an id"));
    };
    match &mut *shared.state() {
        // An id that was never used is an answer in advance, which only a QEMU that a guest has
        // taken over sends.
        QmpState::Open { last_id, .. } if id == 0 || id > *last_id => Err(garbage("an answer to no request")),
        QmpState::Open { pending, .. } => {
            // No entry means that the caller has given up. A caller that gives up now makes the
            // send fail, which is the same.
            if let Some(waiting) = pending.remove(&id) {
                let _ = waiting.send(answer);
            }
            Ok(())
        }
        QmpState::Closed(reason) => Err(reason.clone()),
    }
}

fn parse_greeting(line: &[u8]) -> Result<Version, CloseReason> {
    let greeting = parse(line)?;
    let version = greeting.pointer("/QMP/version/qemu").cloned().ok_or_else(|| garbage("no greeting"))?;
    serde_json::from_value(version).map_err(|_| garbage("a greeting without a version"))
}

fn parse_event(message: Value) -> Result<QmpEvent, CloseReason> {
    #[derive(serde::Deserialize)]
    struct EventLine {
        event: String,
        timestamp: QmpTimestamp,
        #[serde(default)]
        data: Value,
    }
    #[derive(serde::Deserialize)]
    struct QmpTimestamp {
        seconds: i64,
        microseconds: i64,
    }
    let wire: EventLine = serde_json::from_value(message).map_err(|_| garbage("a malformed event"))?;
    // QEMU writes -1 on a host without a clock.
    let at = Duration::from_secs(u64::try_from(wire.timestamp.seconds).unwrap_or(0))
        .saturating_add(Duration::from_micros(u64::try_from(wire.timestamp.microseconds).unwrap_or(0)));
    Ok(QmpEvent { name: wire.event, at, data: wire.data })
}

fn parse(line: &[u8]) -> Result<Value, CloseReason> {
    serde_json::from_slice(line).map_err(|error| {
        let shown = String::from_utf8_lossy(&line[..line.len().min(80)]);
        CloseReason::Garbage(format!("{error} in {shown:?}"))
    })
}

fn garbage(what: &str) -> CloseReason {
    CloseReason::Garbage(what.to_owned())
}

/// Reads lines of at most [`MAX_LINE`] bytes.
struct LineReader {
    socket: BufReader<OwnedReadHalf>,
}

impl LineReader {
    fn new(socket: OwnedReadHalf) -> Self {
        Self { socket: BufReader::with_capacity(READ_AHEAD, socket) }
    }

    async fn next(&mut self) -> Result<Vec<u8>, CloseReason> {
        let mut line = Vec::new();
        loop {
            let chunk = match self.socket.fill_buf().await {
                Ok([]) => return Err(CloseReason::Eof),
                Ok(chunk) => chunk,
                // The kernel reports a reset if QEMU ended with unread input. This is an ordinary
                // end.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(CloseReason::Eof),
                Err(error) => return Err(CloseReason::Io(error.to_string())),
            };
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(chunk.len(), |end| end + 1);
            // Checked before the bytes are stored, so a line without an end uses no more memory
            // than this limit.
            if line.len() + taken > MAX_LINE {
                return Err(CloseReason::LineTooLong);
            }
            line.extend_from_slice(&chunk[..taken]);
            self.socket.consume(taken);
            if end.is_some() {
                return Ok(line);
            }
        }
    }
}
