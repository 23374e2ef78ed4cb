//! Reads a file that another process appends to, and continues where the last reading stopped.
//!
//! ```text
//!   file   ░░░░░ given back ░░░░░│ whole records │ one that is still being written
//!                                ↑ offset ──────►│
//! ```
//!
//! The writer is not trusted, and may run out of space in the middle of a record. One round reads a
//! bounded number of bytes. The reader of a record decides whether it is valid. The offset advances
//! past an invalid record too, so it is passed over once and never read again. Read bytes are given
//! back to the host by punching a hole, because a hole keeps the writer's offset valid. A hole
//! reads as zero bytes.
//!
//! A console has no records. The service trims the file at its front while others read it
//! ([`trim`], [`Tail::of_output`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

/// The largest usual block of a file system, in bytes.
const BLOCK: u64 = 4096;

/// The bounds of one round.
#[derive(Clone, Copy, Debug)]
pub struct TailLimits {
    /// The longest record, in bytes. A longer one is passed over.
    pub record: usize,
    /// The most bytes that one round reads.
    pub round: u64,
}

/// A reader's use of the bytes that it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TailUse {
    /// The first so many bytes are used up: whole records, and invalid bytes. 0 asks for more
    /// bytes.
    Bytes(usize),
    /// The first so many bytes are used up, and the reader wants no more in this round.
    Enough(usize),
}

/// The outcome of one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoundOutcome {
    /// The round has reached the end of the file.
    Done,
    /// The round has reached its limit, or the reader wants no more. More bytes may be there.
    More,
}

/// A file, and the offset up to which it was read.
#[derive(Clone, Debug)]
pub struct Tail {
    path: PathBuf,
    offset: u64,
    limits: TailLimits,
    skipped: u64,
    content: TailContent,
}

/// The form of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TailContent {
    /// Records. Holes hold none, and a shorter file was begun anew.
    Records,
    /// Bytes, each of which counts, holes as zeros. The reader handles a file that has become
    /// shorter.
    Bytes,
    /// Bytes of a file that is trimmed at its front, also during a read. Holes are skipped.
    Output,
}

impl Tail {
    /// Returns a tail of the file of records at `path`, which may not exist yet. Everything before
    /// `offset`, in bytes, was read earlier.
    pub fn new(path: PathBuf, offset: u64, limits: TailLimits) -> Self {
        Self { path, offset, limits, skipped: 0, content: TailContent::Records }
    }

    /// Returns a tail of a file without records. Every byte counts.
    pub fn of_bytes(path: PathBuf, offset: u64, limits: TailLimits) -> Self {
        Self { content: TailContent::Bytes, ..Self::new(path, offset, limits) }
    }

    /// Returns a tail of a file without records that another task may [`trim`] at any moment. Bytes
    /// that were trimmed are skipped, and a file that has become shorter is read from its beginning.
    pub fn of_output(path: PathBuf, offset: u64, limits: TailLimits) -> Self {
        Self { content: TailContent::Output, ..Self::new(path, offset, limits) }
    }

    /// Returns the offset at which the next round begins, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the number of records that were passed over because of their length.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Reads one round and passes the bytes to `take`. In a file of records, holes at the offset
    /// are skipped, and a file that has become shorter is read from its beginning, because its
    /// writer has begun anew. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error, and the error of `take`. A missing file counts as empty.
    pub fn read(&mut self, take: impl FnMut(&[u8]) -> io::Result<TailUse>) -> io::Result<RoundOutcome> {
        match open(&self.path)? {
            Some(file) => self.read_open(&file, take),
            None => Ok(RoundOutcome::Done),
        }
    }

    /// Reads one round as [`Tail::read`] does, from the open `file`. The bytes of a file that was
    /// removed can still be read this way. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error, and the error of `take`.
    pub fn read_open(
        &mut self,
        file: &File,
        mut take: impl FnMut(&[u8]) -> io::Result<TailUse>,
    ) -> io::Result<RoundOutcome> {
        if self.content != TailContent::Bytes {
            if file.metadata()?.len() < self.offset {
                self.offset = 0;
            }
            self.offset = next_data(file, self.offset)?;
        }
        let end = self.offset.saturating_add(self.limits.round);
        let mut buffer = vec![0; self.limits.record];
        while self.offset < end {
            // Four cases follow. The reader has enough: the round ends, and more may be there. The
            // reader used a part: the next read begins behind it. The reader used nothing of a full
            // buffer: the record is longer than the limit, so the buffer is passed over. The reader
            // used nothing of a short buffer, or everything of it: the file ends here, perhaps in a
            // record that is still being written.
            let read = file.read_at(&mut buffer, self.offset)?;
            // Bytes that are trimmed before they are read come as zeros. A trim frees everything
            // before its end, so that nothing of this read was trimmed if its first byte still is
            // data.
            if self.content == TailContent::Output && read > 0 {
                let data = next_data(file, self.offset)?;
                if data > self.offset {
                    self.offset = data;
                    continue;
                }
            }
            let used = match take(&buffer[..read])? {
                TailUse::Enough(used) => {
                    self.offset += used.min(read) as u64;
                    return Ok(RoundOutcome::More);
                }
                TailUse::Bytes(used) => used.min(read),
            };
            self.offset += used as u64;
            if used == 0 && read == buffer.len() {
                self.offset += read as u64;
                self.skipped += 1;
            } else if used == 0 || read < buffer.len() && used == read {
                return Ok(RoundOutcome::Done);
            }
        }
        Ok(RoundOutcome::More)
    }

    /// Gives the space of everything that was read back to the host. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error, such as that the file system supports no holes.
    pub fn give_back(&self) -> io::Result<()> {
        match open(&self.path)? {
            Some(file) if self.offset > 0 => punch(&file, self.offset),
            Some(_) | None => Ok(()),
        }
    }
}

/// Gives the space of everything but the last `kept` bytes of the file at `path` back to the host,
/// as for a log that its writer appends to. The file keeps its length, which is returned: 0 where
/// the file is missing. Frees nothing where the file occupies at most twice `kept` bytes. Blocks.
///
/// # Errors
/// Returns the kernel's error, such as that the file system supports no holes.
pub fn trim(path: &Path, kept: u64) -> io::Result<u64> {
    let Some(file) = open(path)? else { return Ok(0) };
    let facts = file.metadata()?;
    let takes = facts.blocks().saturating_mul(512);
    // The hole ends where a block ends, because the kernel keeps the rest of a block as zeros,
    // which a reader could not tell from output.
    let beyond = facts.len().saturating_sub(kept) / BLOCK * BLOCK;
    // The factor keeps a log that grows slowly from being trimmed at each check.
    if beyond > 0 && takes > kept.saturating_mul(2) {
        punch(&file, beyond)?;
    }
    Ok(facts.len())
}

/// Returns the bytes of the open `file` that [`trim`] has left: from the first byte of data to the
/// end. Blocks.
///
/// # Errors
/// Returns the kernel's error.
pub fn kept_bytes(file: &File) -> io::Result<Range<u64>> {
    let first = next_data(file, 0)?;
    let end = file.metadata()?.len();
    Ok(first.min(end)..end)
}

/// Opens the regular file at `path` for reading. Returns `None` if there is no file. Blocks.
///
/// # Errors
/// Returns the kernel's error, and [`io::ErrorKind::InvalidInput`] for anything but a regular file.
pub fn open_output(path: &Path) -> io::Result<Option<File>> {
    // A link is not followed, and a FIFO does not block the open call.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(Some(file))
}

fn punch(file: &File, until: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, 0, until)?)
}

/// Returns the offset of the first byte from `offset` on that is not in a hole, the end of the file
/// where only a hole follows, and `offset` itself where the file system cannot report holes.
fn next_data(file: &File, offset: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data),
        Err(rustix::io::Errno::NXIO) => Ok(file.metadata()?.len().max(offset)),
        Err(_) => Ok(offset),
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    // Punching a hole needs write access.
    let opened =
        OpenOptions::new().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const LIMITS: TailLimits = TailLimits { record: 16, round: 64 };

    struct Written {
        dir: tempfile::TempDir,
    }

    impl Written {
        fn new(text: &[u8]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("file"), text).unwrap();
            Self { dir }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("file")
        }

        fn tail(&self) -> Tail {
            Tail::new(self.path(), 0, LIMITS)
        }

        fn append(&self, text: &[u8]) {
            OpenOptions::new().append(true).open(self.path()).unwrap().write_all(text).unwrap();
        }
    }

    /// Takes whole lines.
    fn lines(tail: &mut Tail) -> (Vec<String>, RoundOutcome) {
        let mut lines = Vec::new();
        let round = tail.read(|bytes| {
            let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            lines.extend(String::from_utf8_lossy(&bytes[..whole]).lines().map(str::to_owned));
            Ok(TailUse::Bytes(whole))
        });
        (lines, round.unwrap())
    }

    #[test]
    fn each_record_is_read_once_and_only_when_complete() {
        let file = Written::new(b"one\ntwo\nthr");
        let mut tail = file.tail();
        assert_eq!(lines(&mut tail), (vec!["one".to_owned(), "two".to_owned()], RoundOutcome::Done));
        assert_eq!(lines(&mut tail).0, [""; 0]);
        file.append(b"ee\n");
        assert_eq!(lines(&mut tail).0, ["three"]);
        assert_eq!(tail.offset(), 14);
    }

    #[test]
    fn an_overlong_record_is_skipped() {
        let file = Written::new(format!("{}\nafter\n", "x".repeat(40)).as_bytes());
        let mut tail = file.tail();
        assert_eq!(lines(&mut tail).0.last().unwrap(), "after");
        assert_eq!(tail.skipped(), 2);
    }

    #[test]
    fn the_bytes_of_a_round_are_bounded() {
        let file = Written::new("line\n".repeat(100).as_bytes());
        let mut tail = file.tail();
        let mut all = 0;
        loop {
            let (some, round) = lines(&mut tail);
            assert!(some.len() <= 16, "{}", some.len());
            all += some.len();
            if round == RoundOutcome::Done {
                break;
            }
        }
        assert_eq!(all, 100);
        let round = file.tail().read(|bytes| Ok(TailUse::Enough(bytes.len().min(5)))).unwrap();
        assert_eq!(round, RoundOutcome::More);
    }

    #[test]
    fn a_missing_file_is_empty_and_a_shorter_file_is_read_anew() {
        let file = Written::new(b"a long line\n");
        let mut tail = file.tail();
        lines(&mut tail);
        std::fs::write(file.path(), b"new\n").unwrap();
        assert_eq!(lines(&mut tail).0, ["new"]);
        std::fs::remove_file(file.path()).unwrap();
        assert_eq!(lines(&mut tail), (vec![], RoundOutcome::Done));
    }

    #[test]
    fn disk_space_is_given_back_and_holes_are_skipped() {
        let file = Written::new("line\n".repeat(4000).as_bytes());
        let limits = TailLimits { record: 16, round: u64::MAX };
        let mut tail = Tail::new(file.path(), 0, limits);
        assert_eq!(lines(&mut tail).0.len(), 4000);
        tail.give_back().unwrap();
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 20_000);
        let kept = std::fs::metadata(file.path()).unwrap().blocks() * 512;
        assert!(kept <= 4096, "{kept}");
        file.append(b"more\n");
        // A daemon that has lost its position reads from the start again.
        let mut anew = Tail::new(file.path(), 0, limits);
        assert_eq!(lines(&mut anew).0, ["more"]);
        assert!(anew.skipped() <= 4096 / 16, "only what shares a block with it: {}", anew.skipped());
    }

    #[test]
    fn a_tail_of_bytes_does_not_skip_holes() {
        let file = Written::new(b"");
        OpenOptions::new().write(true).open(file.path()).unwrap().set_len(8192).unwrap();
        let mut tail = Tail::of_bytes(file.path(), 0, TailLimits { record: 1000, round: 5000 });
        let mut count = 0;
        let mut read = || {
            tail.read(|bytes| {
                count += bytes.len();
                Ok(TailUse::Bytes(bytes.len()))
            })
            .unwrap()
        };
        assert_eq!((read(), read()), (RoundOutcome::More, RoundOutcome::Done));
        assert_eq!(count, 8192);
    }

    #[test]
    fn a_trimmed_log_keeps_its_end() {
        let file = Written::new("0123456789abcde\n".repeat(4096).as_bytes());
        trim(&file.path(), 8192).unwrap();
        let text = std::fs::read(file.path()).unwrap();
        assert_eq!(text.len(), 65536);
        assert!(text.ends_with("0123456789abcde\n".repeat(512).as_bytes()));
        assert!(std::fs::metadata(file.path()).unwrap().blocks() * 512 <= 8192 + 4096);
        let kept = kept_bytes(&File::open(file.path()).unwrap()).unwrap();
        assert_eq!(kept, 65536 - 8192..65536, "the hole ends where a block does");
        let small = Written::new(b"short\n");
        trim(&small.path(), 8192).unwrap();
        assert_eq!(std::fs::read(small.path()).unwrap(), b"short\n");
        trim(&small.dir.path().join("missing"), 1).unwrap();
    }

    /// Reads one round of output as text.
    fn output(tail: &mut Tail, file: &File) -> String {
        let mut text = Vec::new();
        tail.read_open(file, |bytes| {
            text.extend_from_slice(bytes);
            Ok(TailUse::Bytes(bytes.len()))
        })
        .unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn output_that_was_trimmed_is_skipped() {
        let file = Written::new("0123456789abcde\n".repeat(4096).as_bytes());
        let open = open_output(&file.path()).unwrap().unwrap();
        let mut tail = Tail::of_output(file.path(), 16, TailLimits { record: 1000, round: u64::MAX });
        trim(&file.path(), 8192).unwrap();
        assert_eq!(output(&mut tail, &open), "0123456789abcde\n".repeat(512));
        assert_eq!(tail.offset(), 65536);
        file.append(b"more\n");
        std::fs::remove_file(file.path()).unwrap();
        assert_eq!(output(&mut tail, &open), "more\n", "a removed file is read to its end");
    }

    #[test]
    fn output_that_is_trimmed_during_its_read_is_skipped() {
        let file = Written::new("0123456789abcde\n".repeat(4096).as_bytes());
        let open = open_output(&file.path()).unwrap().unwrap();
        let mut tail = Tail::of_output(file.path(), 0, TailLimits { record: 4096, round: u64::MAX });
        let mut read = Vec::new();
        tail.read_open(&open, |bytes| {
            if read.is_empty() {
                trim(&file.path(), 8192)?;
            }
            read.extend_from_slice(bytes);
            Ok(TailUse::Bytes(bytes.len()))
        })
        .unwrap();
        assert_eq!(read.len(), 4096 + 8192);
        assert!(!read.contains(&0), "no byte of a hole is taken for output");
    }

    #[test]
    fn only_a_regular_file_is_opened_as_output() {
        let file = Written::new(b"output");
        let (link, fifo) = (file.dir.path().join("link"), file.dir.path().join("fifo"));
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        for refused in [link.as_path(), &fifo, file.dir.path(), Path::new("/dev/zero")] {
            open_output(refused).unwrap_err();
        }
        assert!(open_output(&file.dir.path().join("missing")).unwrap().is_none());
    }
}
