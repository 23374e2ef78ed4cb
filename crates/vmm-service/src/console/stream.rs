//! StreamConsole: a reader of a console's file that waits for more.
//!
//! ```text
//!   Waiting ── the file exists ──► reading ──► end of the file ──┬─ without follow ──► end
//!   (the VM was never booted)        ▲                           ├─ the VM is removed ► end
//!      ▲                             ├──── the file has grown ───┤
//!      └──── UpdateVm has named another file ────────────────────┘
//! ```
//!
//! A stream belongs to one creation of a VM, found by its uid. UpdateVm may name another file for
//! the console while the VM does not run. Nothing is appended to the old file from then on, so that
//! the stream reads the old file to its end before the new one.
//!
//! A stream holds at most one round of the file. The next round is read when the client has taken
//! the one before. A client that reads more slowly than the guest prints is overtaken by the
//! trimmer, and goes on with the first byte that is still kept.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use vmm_core::id::VmUid;
use vmm_core::store::VmRecord;
use vmm_host::file_watch::FileWatch;
use vmm_host::tail::{self, Tail, TailLimits, TailUse};

use super::ConsoleFile;
use crate::error::ServiceError;
use crate::failure::ConsoleFailure;
use crate::index::Waiter;
use crate::shared::Shared;

/// The most bytes of one piece.
const PIECE: usize = 64 << 10;
/// The most pieces that are read at once.
const PIECES: usize = 4;
/// The limits of the reader, which takes one piece a round.
const LIMITS: TailLimits = TailLimits { record: PIECE, round: PIECE as u64 };
/// The delay behind a short piece, in which more output collects, because a guest writes byte by
/// byte. The first byte after a silence is sent at once.
const COALESCE_DELAY: Duration = Duration::from_millis(1);
/// The longest such delay. A guest that prints without end would otherwise wake the daemon and the
/// client a thousand times a second, and slow down the calls of others.
const MAX_COALESCE_DELAY: Duration = Duration::from_millis(16);
/// The interval between two looks for a file that does not exist yet.
const FILE_INTERVAL: Duration = Duration::from_millis(100);
/// The interval at which a follower looks whether another program has replaced the file.
const RECHECK_INTERVAL: Duration = Duration::from_secs(2);

/// The part of a console that a client wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleQuery {
    /// The VM.
    pub vm_id: String,
    /// The first byte, counted from the VM's first output.
    pub offset: Option<i64>,
    /// Without an offset: the number of the last kept bytes to begin with. 0 means all.
    pub tail_bytes: i64,
    /// True if the stream goes on with new output.
    pub follow: bool,
}

/// A piece of console output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleChunk {
    /// The position of the first byte.
    pub offset: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

/// The first byte that a stream sends.
#[derive(Clone, Copy, Debug)]
enum StreamStart {
    At(u64),
    Last(u64),
    Kept,
}

/// A stream of one console.
pub struct ConsoleStream {
    shared: Arc<Shared>,
    uid: VmUid,
    /// The generation of the record that named `file`.
    generation: u64,
    file: ConsoleFile,
    start: StreamStart,
    /// The open file and its reader, once the file exists.
    reader: Option<(Arc<File>, Tail)>,
    /// The position at which the stream ends, without `follow`.
    end: Option<u64>,
    /// The waiter for the end of the VM.
    removed: Waiter,
    watch: Option<FileWatch>,
    ready: VecDeque<ConsoleChunk>,
    /// The delay behind the last short piece. `None` after a silence.
    delay: Option<Duration>,
    /// The earliest time of the next read, after a short piece.
    not_before: Option<Instant>,
}

impl ConsoleStream {
    pub(crate) async fn start(shared: Arc<Shared>, query: ConsoleQuery) -> Result<Self, ServiceError> {
        let start = query.start()?;
        let found = query.vm_id.parse().ok().and_then(|id| shared.index.get(&id));
        let record = found.ok_or_else(|| ServiceError::not_found(&query.vm_id))?.record;
        let file = ConsoleFile::of_record(&record, &shared.settings.runtime_dir)?;
        let removed =
            shared.index.until_removed(record.uid).ok_or_else(|| ServiceError::not_found(&query.vm_id))?;
        let end = (!query.follow).then_some(0);
        let mut stream = Self {
            shared,
            uid: record.uid,
            generation: record.generation,
            file,
            start,
            reader: None,
            end,
            removed,
            watch: None,
            ready: VecDeque::new(),
            delay: None,
            not_before: None,
        };
        if !stream.open().await?
            && let StreamStart::At(offset @ 1..) = start
        {
            return Err(past_the_end(offset, 0));
        }
        Ok(stream)
    }

    /// Waits for the next piece. Returns `None` at the end of the stream.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Unavailable`] if the file cannot be read, and
    /// [`ServiceError::Precondition`] if UpdateVm has taken the console away.
    pub async fn next(&mut self) -> Result<Option<ConsoleChunk>, ServiceError> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            // The sender of the waiter is dropped with the VM, after the last byte was written. A
            // stream that finds the VM removed therefore reads once more before it ends.
            let removed = self.removed.has_changed().is_err();
            // The same holds for a file that the configuration does not name any more.
            let updated = self.updated();
            if let Some(not_before) = self.not_before.take() {
                sleep_until(not_before).await;
            }
            let opened = self.reader.is_some() || self.open().await?;
            if opened && self.read().await? {
                continue;
            }
            if removed || self.end.is_some() {
                return Ok(None);
            }
            if let Some(record) = updated
                && self.go_over(&record)?
            {
                continue;
            }
            if opened {
                self.wait().await?;
                continue;
            }
            tokio::select! {
                _ = self.removed.changed() => {}
                () = sleep(FILE_INTERVAL) => {}
            }
        }
    }

    /// Returns the VM's record if it has changed since this stream chose its file.
    fn updated(&self) -> Option<Arc<VmRecord>> {
        self.shared.index.record(self.uid).filter(|record| record.generation != self.generation)
    }

    /// Goes on with the file that `record` names. Returns false if that is the open one.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Precondition`] if the VM has no console any more.
    fn go_over(&mut self, record: &VmRecord) -> Result<bool, ServiceError> {
        self.generation = record.generation;
        let file = ConsoleFile::of_record(record, &self.shared.settings.runtime_dir)?;
        if file == self.file {
            return Ok(false);
        }
        self.file = file;
        (self.start, self.reader, self.watch) = (StreamStart::Kept, None, None);
        Ok(true)
    }

    /// Opens the file and finds the first byte. Returns false if there is no file yet.
    async fn open(&mut self) -> Result<bool, ServiceError> {
        let path = self.file.path.clone();
        let opened = self.shared.consoles.read(&self.file, move || {
            let Some(file) = tail::open_output(&path)? else { return Ok(None) };
            let kept = tail::kept_bytes(&file)?;
            Ok(Some((file, kept)))
        });
        let Some((file, kept)) = opened.await? else { return Ok(false) };
        let first = match self.start {
            StreamStart::At(offset) if offset > kept.end => return Err(past_the_end(offset, kept.end)),
            StreamStart::At(offset) => offset.max(kept.start),
            StreamStart::Last(bytes) => kept.end.saturating_sub(bytes).max(kept.start),
            StreamStart::Kept => kept.start,
        };
        self.end = self.end.map(|_| kept.end);
        self.reader = Some((Arc::new(file), Tail::of_output(self.file.path.clone(), first, LIMITS)));
        Ok(true)
    }

    /// Reads the next pieces. Returns false at the end of the file.
    async fn read(&mut self) -> Result<bool, ServiceError> {
        let Some((file, mut tail)) = self.reader.clone() else { return Ok(false) };
        let end = self.end.unwrap_or(u64::MAX);
        let work = move || {
            let mut pieces = Vec::new();
            while pieces.len() < PIECES
                && let Some(piece) = read_piece(&mut tail, &file, end)?
            {
                pieces.push(piece);
            }
            Ok((pieces, tail))
        };
        let (pieces, tail) = self.shared.consoles.read(&self.file, work).await?;
        if let Some((_, reader)) = &mut self.reader {
            *reader = tail;
        }
        if let Some(last) = pieces.last() {
            // The watch of a file that grows would wake this stream at each write.
            self.watch = None;
            if last.data.len() < PIECE {
                let delay = next_delay(self.delay);
                (self.delay, self.not_before) = (Some(delay), Some(Instant::now() + delay));
            }
        }
        self.ready.extend(pieces);
        Ok(!self.ready.is_empty())
    }

    /// Waits until the file has more, or may have been replaced, or the VM is removed.
    async fn wait(&mut self) -> Result<(), ServiceError> {
        // The first wait begins the watch only, and the file is read again, because it may have
        // grown before the watch began.
        let Some(watch) = &self.watch else {
            self.watch = Some(self.shared.consoles.watcher.watch(&self.file.path));
            return Ok(());
        };
        self.delay = None;
        tokio::select! {
            _ = self.removed.changed() => Ok(()),
            () = watch.grown() => Ok(()),
            () = sleep(RECHECK_INTERVAL) => self.take_up_replacement().await,
        }
    }

    /// Goes on with the file that another program has put in the place of the open one.
    async fn take_up_replacement(&mut self) -> Result<(), ServiceError> {
        let Some((open, _)) = &self.reader else { return Ok(()) };
        let (open, path) = (Arc::clone(open), self.file.path.clone());
        let replaced = self.shared.consoles.read(&self.file, move || {
            let Some(now) = tail::open_output(&path)? else { return Ok(false) };
            let (now, open) = (now.metadata()?, open.metadata()?);
            Ok((now.dev(), now.ino()) != (open.dev(), open.ino()))
        });
        if replaced.await? {
            (self.start, self.reader, self.watch) = (StreamStart::Kept, None, None);
        }
        Ok(())
    }
}

impl ConsoleQuery {
    fn start(&self) -> Result<StreamStart, ServiceError> {
        let negative =
            |field: &str, value: i64| ServiceError::invalid(field, format!("must be 0 or more, not {value}"));
        let bytes = u64::try_from(self.tail_bytes).map_err(|_| negative("tail_bytes", self.tail_bytes))?;
        match self.offset {
            Some(offset) => {
                Ok(StreamStart::At(u64::try_from(offset).map_err(|_| negative("offset", offset))?))
            }
            None if bytes == 0 => Ok(StreamStart::Kept),
            None => Ok(StreamStart::Last(bytes)),
        }
    }
}

/// Returns the delay behind a short piece, if `before` was that behind the piece before.
fn next_delay(before: Option<Duration>) -> Duration {
    before.map_or(COALESCE_DELAY, |before| MAX_COALESCE_DELAY.min(2 * before))
}

fn past_the_end(offset: u64, end: u64) -> ServiceError {
    ConsoleFailure::PastTheEnd { offset, end }.into()
}

/// Reads the next piece before `end`. Returns `None` at the end. Blocks.
fn read_piece(tail: &mut Tail, file: &File, end: u64) -> io::Result<Option<ConsoleChunk>> {
    if tail.offset() >= end {
        return Ok(None);
    }
    let mut data = Vec::new();
    let room = usize::try_from(end.saturating_sub(tail.offset())).unwrap_or(usize::MAX);
    tail.read_open(file, |bytes| {
        data = bytes[..bytes.len().min(room)].to_vec();
        Ok(if data.is_empty() { TailUse::Bytes(0) } else { TailUse::Enough(data.len()) })
    })?;
    let offset = tail.offset().saturating_sub(data.len() as u64);
    Ok((!data.is_empty()).then_some(ConsoleChunk { offset, data }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_of_a_stream_grows_while_its_guest_prints() {
        let delays: Vec<_> =
            std::iter::successors(Some(next_delay(None)), |delay| Some(next_delay(Some(*delay))))
                .map(|delay| delay.as_millis())
                .take(7)
                .collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 16, 16]);
    }
}
