//! Sums Firecracker's counters, which Firecracker writes to a file as differences.
//!
//! ```text
//!   metrics   ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ line │ line │ lin…   one line per flush: at each sample,
//!             freed by a hole ↑ offset             once a minute, and at the end
//!   metrics.sum   { offset, sums of all lines before it }   replaced as a whole
//! ```
//!
//! Each line counts the time since the line before, so all lines must be summed, also across
//! restarts of the daemon. Lines that were summed are recorded with their sum, and their space is
//! freed by punching a hole. Firecracker writes the last line as it ends. That line also
//! distinguishes a reset from a crash for a daemon that is not its parent.
//!
//! A full file system cuts a line. Firecracker keeps up to 1 KiB of such a line and writes the next
//! object directly behind it. The counts of the cut line are lost, and the complete object at its
//! end is counted.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, NetworkCounters, StorageCounters};
use vmm_host::tail::{Tail, TailLimits, TailUse};

/// The file's name in the run folder.
pub(crate) const METRICS: &str = "metrics";
/// The name of the file of sums in the run folder.
const SUMS: &str = "metrics.sum";
/// The most bytes that are read in one round. A line has about 6,000 bytes, and more for each
/// device.
const LIMITS: TailLimits = TailLimits { record: 128 << 10, round: 8 << 20 };
/// The first bytes of each object that Firecracker writes.
const OBJECT: &[u8] = b"{\"utc_timestamp_ms\"";

/// The used fields of one line.
#[derive(Debug, Deserialize)]
struct MetricsLine {
    block: BlockMetrics,
    net: NetMetrics,
    #[serde(default)]
    i8042: I8042Metrics,
    vcpu: VcpuMetrics,
}

#[derive(Debug, Deserialize)]
struct BlockMetrics {
    read_bytes: u64,
    write_bytes: u64,
    read_count: u64,
    write_count: u64,
}

#[derive(Debug, Deserialize)]
struct NetMetrics {
    rx_bytes_count: u64,
    tx_bytes_count: u64,
    rx_packets_count: u64,
    tx_packets_count: u64,
}

/// The keyboard controller, which only x86 has.
#[derive(Debug, Default, Deserialize)]
struct I8042Metrics {
    reset_count: u64,
}

#[derive(Debug, Deserialize)]
struct VcpuMetrics {
    failures: u64,
}

/// Sums over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MetricsSums {
    /// The position of the first line that is not in the sums, in bytes.
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
    /// The lines, or parts of lines, that could not be parsed.
    #[serde(default)]
    missed: u64,
}

impl MetricsSums {
    /// Returns true if the guest has reset itself.
    pub(crate) fn guest_reset(&self) -> bool {
        self.resets > 0
    }

    /// Returns true if a virtual CPU has failed, as it does after a triple fault.
    pub(crate) fn cpu_failed(&self) -> bool {
        self.failures > 0
    }

    /// Returns the network counters, seen from the guest.
    pub(crate) fn network(&self) -> NetworkCounters {
        NetworkCounters {
            bytes_received: self.rx_bytes,
            bytes_transmitted: self.tx_bytes,
            packets_received: self.rx_packets,
            packets_transmitted: self.tx_packets,
        }
    }

    /// Returns the disk counters.
    pub(crate) fn storage(&self) -> StorageCounters {
        StorageCounters {
            bytes_read: self.read_bytes,
            bytes_written: self.write_bytes,
            read_operations: self.read_operations,
            write_operations: self.write_operations,
        }
    }

    /// Adds the counts of one line, or of the complete object at the end of a line that was cut.
    fn add_line(&mut self, line: &[u8]) {
        // A hole reads as zeros, so zeros before the line are skipped.
        let from = line.iter().position(|byte| *byte != 0).unwrap_or(line.len());
        let line = line[from..].trim_ascii();
        if line.is_empty() {
            return;
        }
        if let Ok(whole) = serde_json::from_slice(line) {
            return self.add(&whole);
        }
        self.missed = self.missed.saturating_add(1);
        let last = line.windows(OBJECT.len()).rposition(|bytes| bytes == OBJECT);
        if let Some(Ok(object)) = last.map(|at| serde_json::from_slice(&line[at..])) {
            self.add(&object);
        }
    }

    fn add(&mut self, line: &MetricsLine) {
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
pub(crate) struct FirecrackerMetrics {
    dir: Arc<Path>,
    /// The sums after the first read. Locked while the file is read, because two readers would
    /// count a line twice.
    known: Arc<Mutex<Option<MetricsSums>>>,
}

impl FirecrackerMetrics {
    /// Returns the counters of the run in `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), known: Arc::default() }
    }

    /// Removes the files of an earlier run. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error.
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

    /// Adds the lines that were written since the last call, and returns the sums.
    ///
    /// # Errors
    /// [`BackendErrorKind::Host`] if the file is missing or cannot be read.
    pub(crate) async fn sums(&self) -> Result<MetricsSums, BackendError> {
        let metrics = self.clone();
        let summed = tokio::task::spawn_blocking(move || {
            let mut known = metrics.known.lock().unwrap_or_else(PoisonError::into_inner);
            let sums = fold(&metrics.dir, *known)?;
            *known = Some(sums);
            Ok(sums)
        });
        let error = match summed.await {
            Ok(Ok(sums)) => return Ok(sums),
            Ok(Err(error)) => error,
            Err(error) => io::Error::other(error),
        };
        let message = format!("Firecracker's counters in {} cannot be read: {error}", self.dir.display());
        Err(BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message).caused_by(error))
    }
}

/// Adds the lines in `dir` that are not in the sums yet, and stores the sums there. `known` is the
/// result of the last call.
pub(crate) fn fold(dir: &Path, known: Option<MetricsSums>) -> io::Result<MetricsSums> {
    let path = dir.join(METRICS);
    if !path.try_exists()? {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut sums = match known {
        Some(sums) => sums,
        None => load(&dir.join(SUMS))?,
    };
    let (begin, missed) = (sums.offset, sums.missed);
    // Only complete lines are summed. The rest of the file is read again after Firecracker has
    // written the end of its line.
    let mut tail = Tail::new(path, sums.offset, LIMITS);
    tail.read(|bytes| {
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for line in bytes[..whole].split_inclusive(|byte| *byte == b'\n') {
            sums.add_line(line);
        }
        Ok(TailUse::Bytes(whole))
    })?;
    sums.offset = tail.offset();
    sums.missed = sums.missed.saturating_add(tail.skipped());
    if sums.missed > missed {
        tracing::warn!(path = %dir.display(), missed = sums.missed, "lines of Firecracker's counters cannot be parsed");
    }
    if sums.offset > begin {
        match save(dir, &sums) {
            // The space is freed only after the sums are stored, so a crash in between counts no
            // line twice and loses none.
            Ok(()) => give_back(&tail),
            // The lines stay in the file until their sums can be stored, for example because the
            // disk is full now.
            Err(error) => tracing::debug!(%error, "the sums of Firecracker's counters cannot be stored"),
        }
    }
    Ok(sums)
}

fn give_back(tail: &Tail) {
    if let Err(error) = tail.give_back() {
        tracing::debug!(%error, "the file system does not support holes; the file of counters grows");
    }
}

/// Reads the sums of an earlier daemon. Sums that cannot be parsed begin at 0 again.
fn load(path: &Path) -> io::Result<MetricsSums> {
    match std::fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "the sums of Firecracker's counters could not be read; they begin at 0");
            MetricsSums::default()
        })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(MetricsSums::default()),
        Err(error) => Err(error),
    }
}

fn save(dir: &Path, sums: &MetricsSums) -> io::Result<()> {
    let fresh: PathBuf = dir.join("metrics.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(sums)?)?;
    std::fs::rename(fresh, dir.join(SUMS))
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
    async fn metrics_lines_are_summed_once_over_restarts_and_freed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        FirecrackerMetrics::begin(dir.path()).unwrap();
        std::fs::write(&path, format!("{}\n{}\n{}", line(10), line(20), &line(40)[..100])).unwrap();
        let sums = FirecrackerMetrics::new(dir.path()).sums().await.unwrap();
        assert_eq!(sums.storage().bytes_read, 30);
        assert_eq!(sums.network().packets_transmitted, 16);
        assert_eq!(FirecrackerMetrics::new(dir.path()).sums().await.unwrap(), sums, "nothing new");

        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(format!("{}\n", &line(40)[100..]).as_bytes()).unwrap();
        let sums = FirecrackerMetrics::new(dir.path()).sums().await.unwrap();
        assert_eq!(sums.storage().bytes_read, 70);
        let facts = std::fs::metadata(&path).unwrap();
        assert!(facts.blocks() * 512 < facts.len(), "{} blocks, {} bytes", facts.blocks(), facts.len());
        FirecrackerMetrics::begin(dir.path()).unwrap();
        assert!(FirecrackerMetrics::new(dir.path()).sums().await.is_err(), "no file, so nothing to sum up");
    }

    /// Returns the first bytes of each object that Firecracker writes.
    fn stamped(bytes: u64) -> String {
        line(bytes).replacen('{', r#"{"utc_timestamp_ms":1,"#, 1)
    }

    #[tokio::test]
    async fn malformed_and_endless_metrics_lines_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(LIMITS.record + 1);
        let text = format!("garbage\n{}\n{{}}\n{long}\n{}\n", line(1), line(2));
        std::fs::write(dir.path().join(METRICS), text).unwrap();
        let metrics = FirecrackerMetrics::new(dir.path());
        let sums = metrics.sums().await.unwrap();
        assert_eq!((sums.storage().bytes_read, sums.missed), (3, 4));
        assert_eq!(metrics.sums().await.unwrap(), sums, "and not met again");
    }

    #[tokio::test]
    async fn a_metrics_line_cut_by_a_full_disk_loses_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        // A half object is followed directly by the next object.
        let text = format!("{}\n{}{}\n{}\n", stamped(1), &stamped(2)[..1024], stamped(4), stamped(8));
        std::fs::write(&path, text).unwrap();
        let sums = FirecrackerMetrics::new(dir.path()).sums().await.unwrap();
        assert_eq!((sums.storage().bytes_read, sums.missed), (13, 1));
    }

    #[tokio::test]
    async fn sums_of_another_release_are_read_and_broken_sums_are_restarted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(METRICS), format!("{}\n", line(1))).unwrap();
        let sums = FirecrackerMetrics::new(dir.path()).sums().await.unwrap();
        let mut kept: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join(SUMS)).unwrap()).unwrap();
        kept.as_object_mut().unwrap().remove("missed");
        kept["from_a_newer_release"] = 1.into();
        std::fs::write(dir.path().join(SUMS), kept.to_string()).unwrap();
        assert_eq!(FirecrackerMetrics::new(dir.path()).sums().await.unwrap(), sums);
        std::fs::write(dir.path().join(SUMS), "{").unwrap();
        let mut more = OpenOptions::new().append(true).open(dir.path().join(METRICS)).unwrap();
        more.write_all(format!("{}\n", line(2)).as_bytes()).unwrap();
        assert!(FirecrackerMetrics::new(dir.path()).sums().await.unwrap().storage().bytes_read >= 2);
    }

    #[tokio::test]
    async fn sums_that_cannot_be_stored_are_still_returned() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(METRICS), format!("{}\n", line(1))).unwrap();
        // A folder at the path of the temporary file makes the write fail, also for root.
        std::fs::create_dir(dir.path().join("metrics.new")).unwrap();
        let metrics = FirecrackerMetrics::new(dir.path());
        assert_eq!(metrics.sums().await.unwrap().storage().bytes_read, 1);
        assert_eq!(metrics.sums().await.unwrap().storage().bytes_read, 1, "counted once");
        assert_eq!(FirecrackerMetrics::new(dir.path()).sums().await.unwrap().storage().bytes_read, 1);
    }
}
