//! The ways to write into a VMM's console, as [`ConsoleInput`].
//!
//! | VMM | way |
//! |---|---|
//! | Firecracker, QEMU | [`FifoInput`]: a FIFO in the run folder |
//! | Cloud Hypervisor | [`TerminalInput`]: the terminal that the VMM keeps |
//! | QEMU of libvirt | [`SocketInput`]: the console's socket in the run folder |
//!
//! Each write of a client is one turn. A turn waits for the turns before it, within its own time.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use vmm_core::backend::{
    BackendError, BackendErrorKind, ConsoleInput, ConsoleInputError, ConsoleInputFailure, Effect,
};
use vmm_core::spec::Console;
use vmm_host::console_input::{self, ShortWrite};
use vmm_host::process::Process;
use vmm_host::run_dir::KEPT_CONSOLE;

/// The name of the FIFO in the run folder.
pub(crate) const CONSOLE_INPUT: &str = "console.in";

/// The most bytes that a Cloud Hypervisor is given without a sign that its guest reads.
///
/// Cloud Hypervisor (53) queues the input that its guest does not read without a bound. Beyond
/// 128 KiB the queue is moved by a system call that its own filter forbids, and the kernel ends the
/// VMM. Four daemons in a row may each give this many bytes to a guest that never reads.
const UNPROVEN_BYTES: u64 = 32 << 10;
/// The interval between two looks for a sign that a guest reads.
const SIGN_INTERVAL: Duration = Duration::from_millis(5);

/// Input by a FIFO that the VMM holds open.
#[derive(Debug)]
pub(crate) struct FifoInput {
    path: PathBuf,
    turn: Mutex<()>,
}

impl FifoInput {
    /// Returns the input of the VMM with the run folder `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { path: dir.join(CONSOLE_INPUT), turn: Mutex::new(()) }
    }
}

#[async_trait]
impl ConsoleInput for FifoInput {
    async fn write_console(&self, data: &[u8], within: Duration) -> Result<(), ConsoleInputError> {
        let until = Instant::now() + within;
        let _turn = timeout_at(until, self.turn.lock()).await.map_err(|_| unread(0))?;
        let path = self.path.clone();
        let opened = blocking(move || console_input::open_fifo_writer(&path)).await;
        let fifo = opened.map_err(|error| cannot_write(0, &self.path.display().to_string(), error))?;
        console_input::write_until(fifo, data, until).await.map_err(|short| of_short(&self.path, short))
    }
}

/// Input by the terminal that the VMM keeps ([`console_input::InputTerminal`]).
#[derive(Debug)]
pub(crate) struct TerminalInput {
    process: Process,
    /// The file that takes the console's output.
    output: Option<PathBuf>,
    /// The turn, with the bytes whose reading has no sign yet and the length of the output then.
    turn: Mutex<UnprovenInput>,
}

#[derive(Debug, Default)]
struct UnprovenInput {
    bytes: u64,
    output: u64,
}

impl TerminalInput {
    /// Returns the input of `process`, whose `console` is kept in the run folder `dir`, or in the
    /// file that the client named.
    pub(crate) fn new(process: Process, console: &Console, dir: &Path) -> Self {
        let output = match console {
            Console::Off => None,
            Console::Kept => Some(dir.join(KEPT_CONSOLE)),
            Console::File(path) => Some(path.clone()),
        };
        Self { process, output, turn: Mutex::default() }
    }

    /// Returns the length of the console's output, in bytes.
    async fn output_length(&self) -> u64 {
        let Some(path) = self.output.clone() else { return 0 };
        let length = blocking(move || Ok(std::fs::symlink_metadata(path)?.len())).await;
        length.unwrap_or_default()
    }

    /// Waits until the guest has shown that it reads, where it must, and returns the bytes that may
    /// be written now.
    ///
    /// The sign is output: a terminal in the guest sends back what it reads. A byte of output stands
    /// for a byte that was read. A guest that prints without reading can so be given more than
    /// [`UNPROVEN_BYTES`], but no faster than it prints.
    async fn admit(&self, unproven: &mut UnprovenInput, until: Instant) -> Option<u64> {
        loop {
            let output = self.output_length().await;
            unproven.bytes = unproven.bytes.saturating_sub(output.saturating_sub(unproven.output));
            unproven.output = output;
            match UNPROVEN_BYTES.saturating_sub(unproven.bytes) {
                0 if Instant::now() >= until => return None,
                0 => sleep(SIGN_INTERVAL).await,
                room => return Some(room),
            }
        }
    }
}

#[async_trait]
impl ConsoleInput for TerminalInput {
    async fn write_console(&self, data: &[u8], within: Duration) -> Result<(), ConsoleInputError> {
        let until = Instant::now() + within;
        let mut unproven = timeout_at(until, self.turn.lock()).await.map_err(|_| unread(0))?;
        let mut taken = 0;
        while taken < data.len() {
            let Some(room) = self.admit(&mut unproven, until).await else { return Err(unread(taken)) };
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            let piece = &data[taken..data.len().min(taken.saturating_add(room))];
            let process = self.process.clone();
            let opened = blocking(move || console_input::open_kept_terminal(&process)).await;
            let terminal = opened.map_err(|error| cannot_write(taken, "the terminal of the VMM", error))?;
            let written = console_input::write_until(terminal, piece, until).await;
            let count = written.as_ref().map_or_else(|short| short.taken, |()| piece.len());
            unproven.bytes += count as u64;
            taken += count;
            if let Err(short) = written {
                return Err(of_short(Path::new("the terminal of the VMM"), ShortWrite { taken, ..short }));
            }
        }
        Ok(())
    }
}

/// Input by the console's socket, at which a QEMU of libvirt listens.
///
/// QEMU serves one connection, and sends the guest's output to it. The guest stops while that output
/// is not read, so a task reads and drops it. The connection is closed for writing after each turn.
/// QEMU closes it for its part when the guest has taken the last byte.
#[derive(Debug)]
pub(crate) struct SocketInput {
    path: PathBuf,
    /// The turn, with the task that reads until QEMU has closed the connection before.
    turn: Mutex<Option<JoinHandle<()>>>,
}

impl SocketInput {
    /// Returns the input of the QEMU that listens at `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, turn: Mutex::new(None) }
    }
}

#[async_trait]
impl ConsoleInput for SocketInput {
    async fn write_console(&self, data: &[u8], within: Duration) -> Result<(), ConsoleInputError> {
        let until = Instant::now() + within;
        let failed = |taken, error| cannot_write(taken, &self.path.display().to_string(), error);
        let mut before = timeout_at(until, self.turn.lock()).await.map_err(|_| unread(0))?;
        if let Some(task) = before.as_mut() {
            timeout_at(until, task).await.map_err(|_| unread(0))?.ok();
            *before = None;
        }
        let stream = match timeout_at(until, UnixStream::connect(&self.path)).await {
            Ok(connected) => connected.map_err(|error| failed(0, error))?,
            Err(_) => return Err(unread(0)),
        };
        let (mut output, mut input) = stream.into_split();
        let mut drain = tokio::spawn(async move {
            let mut room = vec![0; 4096];
            while output.read(&mut room).await.is_ok_and(|count| count > 0) {}
        });
        let mut taken = 0;
        let written = loop {
            if taken == data.len() {
                break input.shutdown().await.map_err(|error| failed(taken, error));
            }
            match timeout_at(until, input.write(&data[taken..])).await {
                Ok(Ok(count)) => taken += count,
                Ok(Err(error)) => break Err(failed(taken, error)),
                Err(_) => break Err(unread(taken)),
            }
        };
        drop(input);
        // The usual guest reads at once. A guest that is paused reads later, and the task stays.
        if timeout_at(until, &mut drain).await.is_err() {
            *before = Some(drain);
        }
        written
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn unread(taken: usize) -> ConsoleInputError {
    ConsoleInputError { taken, cause: ConsoleInputFailure::Unread }
}

fn of_short(path: &Path, short: ShortWrite) -> ConsoleInputError {
    match short.cause {
        None => unread(short.taken),
        Some(error) => cannot_write(short.taken, &path.display().to_string(), error),
    }
}

/// Returns the error for a console that cannot be written to. A FIFO, terminal or socket without its
/// VMM means that the VMM has ended.
fn cannot_write(taken: usize, what: &str, error: io::Error) -> ConsoleInputError {
    let ended = [Errno::NXIO, Errno::PIPE, Errno::IO, Errno::CONNREFUSED, Errno::CONNRESET];
    let kind = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(errno) if ended.contains(&errno) => BackendErrorKind::Gone,
        _ => BackendErrorKind::Host,
    };
    let advice = "a VMM that an earlier release started takes no input: shut the VM down and boot it again";
    let message = format!("{what}: {error}; {advice}");
    let cause = BackendError::new(kind, Effect::NotApplied, message).caused_by(error);
    ConsoleInputError { taken, cause: ConsoleInputFailure::Failed(cause) }
}
