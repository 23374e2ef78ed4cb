//! Files from which a VMM reads its console's input: a FIFO in the run folder, or a terminal.
//!
//! ```text
//!   writer ──► FIFO, by its path ───────────────────────────► VMM: holds it open for both directions
//!
//!   writer ──► terminal's device side, by /proc/PID/fd/3 ───► VMM: stdin is the controlling side,
//!                                                              and descriptor 3 the device side
//! ```
//!
//! The VMM itself holds both ends open, so that it never reads an end of input, and any later
//! daemon opens the file again. A writer holds the file open for one write only.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;
use tokio::time::{Instant, timeout_at};

use crate::async_fd;
use crate::process::Process;

/// The interval at which a full file is tried again, beside the kernel's own notice.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// The most bytes of one write call.
const PIECE: usize = 4096;

/// A write that did not take all bytes.
#[derive(Debug)]
pub struct ShortWrite {
    /// The number of bytes that were taken.
    pub taken: usize,
    /// The kernel's error, or `None` if the reader made no room in time.
    pub cause: Option<io::Error>,
}

/// Makes the FIFO at `path`, or keeps the file that exists. Blocks.
///
/// # Errors
/// Returns the kernel's error.
pub fn make_fifo(path: &Path) -> io::Result<()> {
    match rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens the FIFO at `path` for its reader. The reader never reads an end of file, because it is a
/// writer too. Does not wait for another writer.
///
/// # Errors
/// Returns the kernel's error.
pub fn open_fifo_reader(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens the FIFO at `path` for writing. Does not wait for a reader.
///
/// # Errors
/// Returns the kernel's error: `ENXIO` if no process reads the FIFO, and
/// [`io::ErrorKind::InvalidInput`] for anything but a FIFO.
pub fn open_fifo_writer(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
    let fifo = rustix::fs::open(path, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fifo)?.st_mode) != FileType::Fifo {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a FIFO"));
    }
    Ok(fifo)
}

/// A terminal for the input of a process that reads a terminal only.
#[derive(Debug)]
pub struct InputTerminal {
    /// The controlling side, for the stdin of the process.
    pub stdin: OwnedFd,
    /// The device side, which the process must keep open ([`crate::process::Command::kept`]).
    pub kept: OwnedFd,
}

/// Makes a terminal that passes every byte unchanged. The controlling side is the process's stdin,
/// because the device side can be opened again by a path and the controlling side cannot.
///
/// # Errors
/// Returns the kernel's error, such as that the host allows no more terminals.
pub fn input_terminal() -> io::Result<InputTerminal> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let stdin = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&stdin)?;
    rustix::pty::unlockpt(&stdin)?;
    let kept = rustix::pty::ioctl_tiocgptpeer(&stdin, flags)?;
    let mut settings = rustix::termios::tcgetattr(&kept)?;
    settings.make_raw();
    rustix::termios::tcsetattr(&kept, OptionalActions::Now, &settings)?;
    Ok(InputTerminal { stdin, kept })
}

/// Opens the terminal that `process` keeps for its input ([`InputTerminal::kept`]), for writing.
/// Blocks.
///
/// # Errors
/// Returns the kernel's error: `NotFound` if the process has ended or keeps no descriptor, and
/// [`io::ErrorKind::InvalidInput`] if the descriptor is no terminal.
pub fn open_kept_terminal(process: &Process) -> io::Result<OwnedFd> {
    let path = format!("/proc/{}/fd/{}", process.pid(), crate::process::KEPT_DESCRIPTOR);
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let terminal = rustix::fs::open(path, flags, Mode::empty())?;
    // The pid belonged to the process when the file was opened if the process lives now.
    process.still_the_same()?;
    if !rustix::termios::isatty(&terminal) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a terminal"));
    }
    Ok(terminal)
}

/// Writes `data` into the non-blocking `file`, as the reader makes room, until `until`.
///
/// # Errors
/// Returns [`ShortWrite`] with the number of bytes that were taken.
pub async fn write_until(file: OwnedFd, data: &[u8], until: Instant) -> Result<(), ShortWrite> {
    let mut taken = 0;
    let failed = |taken, error: io::Error| ShortWrite { taken, cause: Some(error) };
    let file = async_fd::writable(Arc::new(file)).map_err(|error| failed(taken, error))?;
    while taken < data.len() {
        let piece = &data[taken..data.len().min(taken + PIECE)];
        match rustix::io::write(file.get_ref().as_fd(), piece) {
            Ok(count) => taken += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let now = Instant::now();
                if now >= until {
                    return Err(ShortWrite { taken, cause: None });
                }
                // The readiness may be of an earlier moment, so it is cleared before the next wait.
                if let Ok(Ok(mut ready)) = timeout_at(until.min(now + RETRY_INTERVAL), file.writable()).await
                {
                    ready.clear_ready();
                }
            }
            Err(error) => return Err(failed(taken, error.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;

    use super::*;
    use crate::process::{Command, Stdin, spawn_guarded};

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_fifo_accepts_bytes_up_to_its_capacity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        make_fifo(&path).unwrap();
        make_fifo(&path).unwrap();
        let nobody = open_fifo_writer(&path).unwrap_err();
        assert_eq!(nobody.raw_os_error(), Some(Errno::NXIO.raw_os_error()));
        let mut reader = File::from(open_fifo_reader(&path).unwrap());
        let data = vec![b'x'; 100_000];
        let soon = || Instant::now() + Duration::from_millis(200);
        let short = write_until(open_fifo_writer(&path).unwrap(), &data, soon()).await.unwrap_err();
        assert!(short.cause.is_none(), "{short:?}");
        assert!((4096..100_000).contains(&short.taken), "{}", short.taken);
        let mut read = vec![0; short.taken];
        reader.read_exact(&mut read).unwrap();
        write_until(open_fifo_writer(&path).unwrap(), b"more", soon()).await.unwrap();
        assert_eq!(reader.read(&mut read).unwrap(), 4, "nothing was taken twice");
    }

    #[tokio::test]
    async fn a_blocked_writer_continues_after_a_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        make_fifo(&path).unwrap();
        let reader = File::from(open_fifo_reader(&path).unwrap());
        let data = vec![b'x'; 300_000];
        let reading = tokio::task::spawn_blocking(move || {
            let (mut left, mut reader, mut room) = (300_000, reader, [0; 5000]);
            while left > 0 {
                match reader.read(&mut room) {
                    Ok(count) => left -= count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
        });
        write_until(open_fifo_writer(&path).unwrap(), &data, Instant::now() + LONG).await.unwrap();
        reading.await.unwrap();
    }

    #[test]
    fn only_a_fifo_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, fifo) = (dir.path().join("file"), dir.path().join("link"), dir.path().join("fifo"));
        std::fs::write(&file, "").unwrap();
        make_fifo(&fifo).unwrap();
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        let _reader = open_fifo_reader(&fifo).unwrap();
        for refused in [&file, &link, &dir.path().join("missing")] {
            open_fifo_writer(refused).unwrap_err();
        }
    }

    /// Starts `script` with a terminal for its input and the log `log`.
    async fn with_terminal(dir: &Path, script: &str) -> crate::process::ProcessGuard {
        let terminal = input_terminal().unwrap();
        let command = Command {
            stdin: Stdin::File(terminal.stdin),
            kept: Some(terminal.kept),
            ..Command::new("/bin/sh", ["-c", script], dir.join("log"))
        };
        spawn_guarded(command).await.unwrap()
    }

    #[tokio::test]
    async fn a_process_keeps_its_terminal_for_every_later_writer() {
        let dir = tempfile::tempdir().unwrap();
        let reader = with_terminal(dir.path(), "test -t 0 && head -c 7 | od -An -c; exec sleep 600").await;
        // Control characters are data, and a writer that leaves ends nothing.
        for piece in [&b"a\x03\x04"[..], b"\n\r\x13z"] {
            let terminal = open_kept_terminal(reader.process()).unwrap();
            write_until(terminal, piece, Instant::now() + LONG).await.unwrap();
        }
        let log = dir.path().join("log");
        let expected = " a 003 004 \\n \\r 023 z".replace(' ', "");
        let read = || std::fs::read_to_string(&log).unwrap().replace([' ', '\n'], "");
        let deadline = Instant::now() + LONG;
        while read() != expected {
            assert!(Instant::now() < deadline, "{:?}", read());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let process = reader.process().clone();
        drop(reader);
        process.wait().await;
        open_kept_terminal(&process).unwrap_err();
    }

    #[tokio::test]
    async fn a_process_without_a_terminal_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let command = Command::new("/bin/sleep", ["600"], dir.path().join("log"));
        let process = spawn_guarded(command).await.unwrap();
        open_kept_terminal(process.process()).unwrap_err();
    }
}
