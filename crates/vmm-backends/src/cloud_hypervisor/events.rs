//! Reads the events that Cloud Hypervisor writes to its event file: JSON objects, one after the
//! other.
//!
//! The file outlives the daemon, so the next daemon can read the events of the time between. The
//! part that was read is freed by punching a hole, which keeps offsets valid. A hole reads as zero
//! bytes, which no event contains. The read position is stored in a second file, because not every
//! file system supports holes and an event must not be reported twice.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use vmm_host::tail::{Tail, TailLimits, TailUse};

/// The file's name in the run folder.
pub(super) const EVENTS: &str = "events";
/// The name in the run folder of the file that records how far [`EVENTS`] was read.
const READ: &str = "events.read";
/// The most bytes that are read in one round. A longer event is skipped.
const LIMITS: TailLimits = TailLimits { record: 64 << 10, round: 8 << 20 };
/// The bytes at the end of the file that a daemon reads when it takes over.
const TAIL: u64 = 256 << 10;

/// An event of a VM or its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloudHypervisorEvent {
    /// The guest is being reset.
    Rebooting,
    /// The guest's CPUs were stopped.
    Paused,
    /// The guest's CPUs were started again.
    Resumed,
    /// The guest has powered off, or the VM was shut down.
    Shutdown,
    /// The guest's kernel has panicked, and no other kernel takes over.
    Panicked,
    /// Any other event.
    Other,
}

impl CloudHypervisorEvent {
    /// Returns true for an event that ends the run. The age of such an event does not matter.
    const fn is_final(self) -> bool {
        matches!(self, Self::Shutdown | Self::Panicked)
    }
}

#[derive(Deserialize)]
struct EventEntry {
    #[serde(default)]
    timestamp: EventTimestamp,
    source: String,
    event: String,
    properties: Option<EventProperties>,
}

/// The properties of an event that are used.
#[derive(Deserialize)]
struct EventProperties {
    /// The event that the guest's panic device reported. A guest also reports the load of a crash
    /// kernel there.
    event: Option<String>,
}

/// The time since the VMM began to write events, on a monotonic clock.
#[derive(Clone, Copy, Default, Deserialize)]
struct EventTimestamp {
    secs: u64,
    nanos: u32,
}

impl EventEntry {
    fn event_name(&self) -> Option<&str> {
        self.properties.as_ref()?.event.as_deref()
    }

    fn kind(&self) -> CloudHypervisorEvent {
        match (self.source.as_str(), self.event.as_str()) {
            ("vm", "rebooting") => CloudHypervisorEvent::Rebooting,
            ("vm", "paused") => CloudHypervisorEvent::Paused,
            ("vm", "resumed") => CloudHypervisorEvent::Resumed,
            ("vm", "shutdown") => CloudHypervisorEvent::Shutdown,
            ("guest", "panic") if self.event_name() == Some("panic") => CloudHypervisorEvent::Panicked,
            _ => CloudHypervisorEvent::Other,
        }
    }

    /// Returns the time since the VMM began to write events.
    fn time(&self) -> Duration {
        Duration::from_secs(self.timestamp.secs)
            .saturating_add(Duration::from_nanos(self.timestamp.nanos.into()))
    }
}

/// Reads the event file of one run, each event once.
#[derive(Clone, Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    tail: Tail,
    /// The age of the VMM up to which the VM's record includes every event.
    known_until: Duration,
}

impl EventFile {
    /// Returns a reader that begins at the first event of the run in `dir`.
    pub(super) fn from_start(dir: &Path) -> Self {
        Self::at(dir.join(EVENTS), 0)
    }

    /// Returns a reader that begins at the stored position, or near the end of the file if none is
    /// stored. Blocks.
    pub(super) fn continue_run(dir: &Path) -> Self {
        let path = dir.join(EVENTS);
        let len = std::fs::symlink_metadata(&path).map_or(0, |facts| facts.len());
        let read = std::fs::read_to_string(dir.join(READ)).ok().and_then(|text| text.parse::<u64>().ok());
        let known = read.filter(|read| *read <= len).unwrap_or_default();
        Self::at(path, known.max(len.saturating_sub(TAIL)))
    }

    fn at(path: PathBuf, offset: u64) -> Self {
        Self { tail: Tail::new(path.clone(), offset, LIMITS), path, known_until: Duration::ZERO }
    }

    /// Skips events from before the VMM had the age `known_until`, unless an event ended the run.
    pub(super) fn known_until(mut self, known_until: Duration) -> Self {
        self.known_until = known_until;
        self
    }

    /// Removes the files of an earlier run. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub(super) fn begin(dir: &Path) -> io::Result<()> {
        for name in [EVENTS, READ] {
            match std::fs::remove_file(dir.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Reads at most `most` events after the last position. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub(super) fn read(&mut self, most: usize) -> io::Result<Vec<CloudHypervisorEvent>> {
        let (begin, skipped) = (self.tail.offset(), self.tail.skipped());
        let mut events = Vec::new();
        self.tail.read(|bytes| {
            let mut used = 0;
            loop {
                let room = most - events.len();
                let (some, more) = parse(&bytes[used..], room);
                used += more;
                let all = some.len() < room;
                let fresh =
                    some.into_iter().filter(|(event, time)| event.is_final() || *time >= self.known_until);
                events.extend(fresh.map(|(event, _)| event));
                if all || events.len() == most {
                    break;
                }
            }
            Ok(if events.len() < most { TailUse::Bytes(used) } else { TailUse::Enough(used) })
        })?;
        if self.tail.skipped() > skipped {
            tracing::warn!(path = %self.path.display(), "a part of the event file that is too long for an event was skipped");
        }
        if self.tail.offset() > begin {
            if let Err(error) = self.save_position() {
                tracing::debug!(path = %self.path.display(), %error, "the read position of the events cannot be stored");
            }
            if let Err(error) = self.tail.give_back() {
                tracing::debug!(path = %self.path.display(), %error, "the file system does not support holes; the event file grows");
            }
        }
        Ok(events)
    }

    fn save_position(&self) -> io::Result<()> {
        let fresh = self.path.with_file_name("events.new");
        std::fs::write(&fresh, self.tail.offset().to_string())?;
        std::fs::rename(fresh, self.path.with_file_name(READ))
    }
}

/// Returns the complete events in `bytes`, at most `most`, each with the time since the VMM began
/// to write, and the length of `bytes` up to the end of the last event.
pub(super) fn parse(bytes: &[u8], most: usize) -> (Vec<(CloudHypervisorEvent, Duration)>, usize) {
    let mut events = Vec::new();
    let mut used = 0;
    while events.len() < most {
        // The bytes before an object are a hole, the blank between two events, or the rest of an
        // event whose beginning was not read.
        let Some(begin) = bytes[used..].windows(2).position(|pair| pair == b"{\n") else {
            let kept = usize::from(bytes.last() == Some(&b'{'));
            let rest = bytes[used..].iter().all(|byte| byte.is_ascii_whitespace() || *byte == 0);
            return (events, if rest { bytes.len() } else { bytes.len().saturating_sub(kept).max(used) });
        };
        let from = used + begin;
        let mut stream = serde_json::Deserializer::from_slice(&bytes[from..]).into_iter::<EventEntry>();
        match stream.next() {
            Some(Ok(event)) => {
                used = from + stream.byte_offset();
                events.push((event.kind(), event.time()));
            }
            // The rest of this event is still being written.
            Some(Err(error)) if error.is_eof() => return (events, from),
            // The match was an inner object or is no event, so the search goes on behind it.
            Some(Err(_)) | None => used = from + 1,
        }
    }
    (events, used)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an event in the form of Cloud Hypervisor 53.
    fn event(source: &str, event: &str) -> String {
        event_at(0, source, event)
    }

    fn event_at(secs: u64, source: &str, event: &str) -> String {
        format!(
            "{{\n  \"timestamp\": {{\n    \"secs\": {secs},\n    \"nanos\": 7\n  }},\n  \"source\": \"{source}\",\n  \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n"
        )
    }

    fn kinds(bytes: &[u8], most: usize) -> (Vec<CloudHypervisorEvent>, usize) {
        let (events, used) = parse(bytes, most);
        (events.into_iter().map(|(event, _)| event).collect(), used)
    }

    #[test]
    fn events_before_the_recorded_change_are_skipped_except_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let text = [(4, "rebooting"), (5, "shutdown"), (6, "paused"), (7, "resumed")]
            .map(|(secs, name)| event_at(secs, "vm", name))
            .concat();
        std::fs::write(dir.path().join(EVENTS), text).unwrap();
        let read = |known| EventFile::from_start(dir.path()).known_until(Duration::from_secs(known)).read(10);
        assert_eq!(read(7).unwrap(), [CloudHypervisorEvent::Shutdown, CloudHypervisorEvent::Resumed]);
        std::fs::write(dir.path().join(EVENTS), event_at(4, "vm", "rebooting")).unwrap();
        assert_eq!(read(4).unwrap(), [CloudHypervisorEvent::Rebooting]);
    }

    #[test]
    fn events_split_at_any_byte_are_read_whole() {
        let text =
            format!("{}{}{}", event("vm", "rebooting"), event("vmm", "starting"), event("vm", "paused"));
        for cut in 0..text.len() {
            let (mut events, used) = kinds(&text.as_bytes()[..cut], 100);
            let (rest, _) = kinds(&text.as_bytes()[used..], 100);
            events.extend(rest);
            assert_eq!(
                events,
                [CloudHypervisorEvent::Rebooting, CloudHypervisorEvent::Other, CloudHypervisorEvent::Paused],
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn a_guest_panic_differs_from_a_loaded_crash_kernel() {
        for (word, expected) in
            [("panic", CloudHypervisorEvent::Panicked), ("crash_loaded", CloudHypervisorEvent::Other)]
        {
            let reported =
                event("guest", "panic").replace("null", &format!("{{\n    \"event\": \"{word}\"\n  }}"));
            assert_eq!(kinds(reported.as_bytes(), 100).0, [expected], "{reported}");
        }
        assert_eq!(kinds(event("guest", "panic").as_bytes(), 100).0, [CloudHypervisorEvent::Other]);
    }

    #[test]
    fn holes_and_malformed_events_are_skipped() {
        let text = format!(
            "\0\0\0\"nanos\": 7\n  }},\n}}\n\n{}garbage{}",
            event("vm", "paused"),
            event("vm", "resumed")
        );
        assert_eq!(
            kinds(text.as_bytes(), 100).0,
            [CloudHypervisorEvent::Paused, CloudHypervisorEvent::Resumed]
        );
        assert_eq!(kinds(text.as_bytes(), 1).0, [CloudHypervisorEvent::Paused]);
        assert_eq!(kinds(&[0; 5000], 100), (vec![], 5000));
        assert_eq!(kinds(b"", 100), (vec![], 0));
    }

    #[test]
    fn a_read_event_file_gives_its_disk_space_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::from_start(dir.path());
        assert!(file.read(10).unwrap().is_empty(), "not there yet");
        std::fs::write(dir.path().join(EVENTS), event("vm", "paused").repeat(500)).unwrap();
        let mut events = Vec::new();
        for _ in 0..10 {
            events.extend(file.read(100).unwrap());
        }
        assert_eq!(events.len(), 500);
        let mut taken_over = EventFile::continue_run(dir.path());
        assert!(taken_over.read(10).unwrap().is_empty(), "what was read is a hole by now");
    }

    #[test]
    fn a_restarted_daemon_continues_on_a_file_system_without_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(EVENTS);
        let text = event("vm", "paused");
        std::fs::write(&path, &text).unwrap();
        assert_eq!(EventFile::from_start(dir.path()).read(10).unwrap(), [CloudHypervisorEvent::Paused]);
        // The file keeps its first bytes, as on a file system without holes.
        std::fs::write(&path, text + &event("vm", "resumed")).unwrap();
        assert_eq!(EventFile::continue_run(dir.path()).read(10).unwrap(), [CloudHypervisorEvent::Resumed]);
        assert!(EventFile::continue_run(dir.path()).read(10).unwrap().is_empty());
        // The next run starts with no events.
        EventFile::begin(dir.path()).unwrap();
        std::fs::write(&path, event("vm", "rebooting")).unwrap();
        assert_eq!(EventFile::continue_run(dir.path()).read(10).unwrap(), [CloudHypervisorEvent::Rebooting]);
    }

    #[test]
    fn an_endless_event_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let endless = format!("{{\n\"source\": \"{}", "x".repeat(2 * LIMITS.record));
        std::fs::write(dir.path().join(EVENTS), format!("{endless}{}", event("vm", "paused"))).unwrap();
        let mut file = EventFile::from_start(dir.path());
        assert_eq!(file.read(10).unwrap(), [CloudHypervisorEvent::Paused]);
        assert!(file.read(10).unwrap().is_empty());
    }
}
