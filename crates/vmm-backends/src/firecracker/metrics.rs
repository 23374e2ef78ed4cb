//! Firecracker's counters, which it writes to a file as differences.
//!
//! ```text
//!   metrics   ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ line │ line │ lin…      one line per flush: ours, one a minute, and one at the end
//!             given back to the host ↑ offset
//!   metrics.sum   { offset, sums of all lines before it }   replaced as a whole
//! ```
//!
//! Each line says what happened since the line before, so the sum of all of them is needed, over restarts of the daemon
//! too: lines that were summed up are recorded with their sum, and their room is given back by punching a hole. The last
//! line, written as Firecracker ends, also tells a reset from a crash to a daemon that is not its parent.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, OFlags};
use serde::{Deserialize, Serialize};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, NetworkCounters, StorageCounters};

/// The file's name in the run folder.
pub(crate) const METRICS: &str = "metrics";
/// The sums' name in the run folder.
const SUMS: &str = "metrics.sum";
/// The longest line, in bytes. One has about 6,000, and some for each device.
const MAX_LINE: usize = 128 << 10;
/// The most that is read at once, in bytes; the rest waits for the next time.
const MAX_READ: u64 = 8 << 20;

/// What one line holds, as far as it is used.
#[derive(Debug, Deserialize)]
struct Line {
    block: Block,
    net: Net,
    #[serde(default)]
    i8042: I8042,
    vcpu: Vcpu,
}

#[derive(Debug, Deserialize)]
struct Block {
    read_bytes: u64,
    write_bytes: u64,
    read_count: u64,
    write_count: u64,
}

#[derive(Debug, Deserialize)]
struct Net {
    rx_bytes_count: u64,
    tx_bytes_count: u64,
    rx_packets_count: u64,
    tx_packets_count: u64,
}

/// The keyboard controller, which x86 alone has.
#[derive(Debug, Default, Deserialize)]
struct I8042 {
    reset_count: u64,
}

#[derive(Debug, Deserialize)]
struct Vcpu {
    failures: u64,
}

/// Sums over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sums {
    /// Where the first line begins that is not in the sums, in bytes.
    offset: u64,
    read_bytes: u64,
    write_bytes: u64,
    read_operations: u64,
    write_operations: u64,
    rx_bytes: u64,
    tx_bytes: u64,
    rx_packets: u64,
    tx_packets: u64,
    resets: u64,
    failures: u64,
}

impl Sums {
    /// Says whether the guest has reset itself.
    pub(crate) fn guest_reset(&self) -> bool {
        self.resets > 0
    }

    /// Says whether a virtual CPU has failed, as it does on a triple fault.
    pub(crate) fn cpu_failed(&self) -> bool {
        self.failures > 0
    }

    /// Network counters, seen from the guest.
    pub(crate) fn network(&self) -> NetworkCounters {
        NetworkCounters {
            bytes_received: self.rx_bytes,
            bytes_transmitted: self.tx_bytes,
            packets_received: self.rx_packets,
            packets_transmitted: self.tx_packets,
        }
    }

    /// Disk counters.
    pub(crate) fn storage(&self) -> StorageCounters {
        StorageCounters {
            bytes_read: self.read_bytes,
            bytes_written: self.write_bytes,
            read_operations: self.read_operations,
            write_operations: self.write_operations,
        }
    }

    fn add(&mut self, line: &Line) {
        let pairs = [
            (&mut self.read_bytes, line.block.read_bytes),
            (&mut self.write_bytes, line.block.write_bytes),
            (&mut self.read_operations, line.block.read_count),
            (&mut self.write_operations, line.block.write_count),
            (&mut self.rx_bytes, line.net.rx_bytes_count),
            (&mut self.tx_bytes, line.net.tx_bytes_count),
            (&mut self.rx_packets, line.net.rx_packets_count),
            (&mut self.tx_packets, line.net.tx_packets_count),
            (&mut self.resets, line.i8042.reset_count),
            (&mut self.failures, line.vcpu.failures),
        ];
        for (sum, more) in pairs {
            *sum = sum.saturating_add(more);
        }
    }
}

/// The counters of one run.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    dir: Arc<Path>,
    /// One reader at a time, or lines would be counted twice.
    turn: Arc<Mutex<()>>,
}

impl Metrics {
    /// The counters of the run in `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), turn: Arc::default() }
    }

    /// Makes room for a new run: removes what the one before left. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn begin(dir: &Path) -> io::Result<()> {
        for name in [METRICS, SUMS] {
            match std::fs::remove_file(dir.join(name)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds what was written since the last time, and answers with the sums.
    ///
    /// # Errors
    /// [`BackendErrorKind::Protocol`] where the file makes no sense, [`BackendErrorKind::Host`] where it cannot be read.
    pub(crate) async fn sums(&self) -> Result<Sums, BackendError> {
        let metrics = self.clone();
        let summed = tokio::task::spawn_blocking(move || {
            let _turn = metrics.turn.lock().unwrap_or_else(PoisonError::into_inner);
            fold(&metrics.dir)
        });
        let error = match summed.await {
            Ok(Ok(sums)) => return Ok(sums),
            Ok(Err(error)) => error,
            Err(error) => io::Error::other(error),
        };
        let kind = match error.kind() {
            io::ErrorKind::InvalidData => BackendErrorKind::Protocol,
            _ => BackendErrorKind::Host,
        };
        let message = format!("Firecracker's counters in {} cannot be read: {error}", self.dir.display());
        Err(BackendError::new(kind, Effect::NotApplied, message).caused_by(error))
    }
}

pub(crate) fn fold(dir: &Path) -> io::Result<Sums> {
    let path = dir.join(METRICS);
    let mut sums = load(&dir.join(SUMS))?;
    let file = open(&path)?;
    let end = file.metadata()?.len().min(sums.offset.saturating_add(MAX_READ));
    let begin = sums.offset;
    let mut buffer = vec![0; MAX_LINE];
    while sums.offset < end {
        let read = file.read_at(&mut buffer, sums.offset)?;
        let Some(whole) = buffer[..read].iter().rposition(|byte| *byte == b'\n') else {
            if read == MAX_LINE {
                return Err(invalid(format!("a line is longer than {MAX_LINE} bytes")));
            }
            // The rest of this line is still being written.
            break;
        };
        for line in buffer[..whole].split(|byte| *byte == b'\n') {
            sums.add(&serde_json::from_slice(line).map_err(|error| invalid(error.to_string()))?);
        }
        sums.offset += whole as u64 + 1;
    }
    if sums.offset > begin {
        save(dir, &sums)?;
        // Only now: a crash in between counts nothing twice, and loses nothing.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = rustix::fs::fallocate(&file, punch, 0, sums.offset) {
            tracing::debug!(path = %path.display(), %error, "the file system takes no holes; the counters' file grows");
        }
    }
    Ok(sums)
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    // Punching a hole needs the right to write.
    OpenOptions::new().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path)
}

fn load(path: &Path) -> io::Result<Sums> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| invalid(error.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Sums::default()),
        Err(error) => Err(error),
    }
}

fn save(dir: &Path, sums: &Sums) -> io::Result<()> {
    let fresh: PathBuf = dir.join("metrics.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(sums)?)?;
    std::fs::rename(fresh, dir.join(SUMS))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn line(bytes: u64) -> String {
        format!(
            r#"{{"block":{{"read_bytes":{bytes},"write_bytes":2,"read_count":3,"write_count":4}},"net":{{"rx_bytes_count":5,"tx_bytes_count":6,"rx_packets_count":7,"tx_packets_count":8}},"i8042":{{"reset_count":0}},"vcpu":{{"failures":0}},"pad":"{}"}}"#,
            "x".repeat(5000)
        )
    }

    #[tokio::test]
    async fn lines_are_summed_once_over_restarts_and_their_room_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        Metrics::begin(dir.path()).unwrap();
        std::fs::write(&path, format!("{}\n{}\n{}", line(10), line(20), &line(40)[..100])).unwrap();
        let sums = Metrics::new(dir.path()).sums().await.unwrap();
        assert_eq!(sums.storage().bytes_read, 30);
        assert_eq!(sums.network().packets_transmitted, 16);
        assert_eq!(Metrics::new(dir.path()).sums().await.unwrap(), sums, "nothing new");

        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(format!("{}\n", &line(40)[100..]).as_bytes()).unwrap();
        let sums = Metrics::new(dir.path()).sums().await.unwrap();
        assert_eq!(sums.storage().bytes_read, 70);
        let facts = std::fs::metadata(&path).unwrap();
        assert!(facts.blocks() * 512 < facts.len(), "{} blocks, {} bytes", facts.blocks(), facts.len());
        Metrics::begin(dir.path()).unwrap();
        assert!(Metrics::new(dir.path()).sums().await.is_err(), "no file, so nothing to sum up");
    }

    #[tokio::test]
    async fn nonsense_and_endless_lines_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["garbage\n".to_owned(), "{}\n".to_owned(), "x".repeat(MAX_LINE + 1)] {
            std::fs::write(dir.path().join(METRICS), text).unwrap();
            let error = Metrics::new(dir.path()).sums().await.unwrap_err();
            assert_eq!(error.kind, BackendErrorKind::Protocol);
        }
    }
}
