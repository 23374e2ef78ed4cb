//! Copies the console of a VM whose VMM overwrites its output file at each boot.
//!
//! ```text
//!   the VMM ──► console.boot   emptied by Cloud Hypervisor at each boot and reset,
//!                    │         written from its beginning by Firecracker
//!                    │ copied as it grows, then freed by a hole
//!                    ▼
//!               the console's file, appended to: all boots, one after the other
//!
//!   console.at    { to: the console's file, base: how long that was when this console.boot began }
//! ```
//!
//! The length of the console's file shows how much was copied. Therefore no byte is copied twice or
//! lost if the daemon ends between two writes, and the next daemon continues. If the copied part of
//! `console.boot` is no longer a hole, the VMM has begun to write the file anew.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use tokio::task::AbortHandle;
use tracing::Instrument;
use vmm_core::spec::{Console, VmSpec};
use vmm_host::file_watch::FileWatcher;
use vmm_host::tail::{RoundOutcome, Tail, TailLimits, TailUse};

/// The file in the run folder that the VMM writes to.
const BOOT: &str = "console.boot";
/// The file in the run folder that records the target of the copy.
const AT: &str = "console.at";
/// The pause between a growth of the file and its copy, in which more output collects.
const COALESCE_DELAY: Duration = Duration::from_millis(10);
/// The most bytes that are copied in one round, before another copy may run.
const LIMITS: TailLimits = TailLimits { record: 64 << 10, round: 8 << 20 };
/// The most rounds that are saved before the VMM begins its file anew. Bytes beyond these rounds
/// are lost.
const ROUNDS: usize = 8;
/// The longest time that an operation waits for the copy.
const SAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// The state of a copy that must survive restarts of the daemon.
#[derive(Debug, Serialize, Deserialize)]
struct CopyPosition {
    /// The console's file.
    to: PathBuf,
    /// The length of the console's file when the present `console.boot` began, in bytes.
    base: u64,
    /// The bytes of the present `console.boot` that are known to be freed.
    #[serde(default)]
    given_back: u64,
}

/// Copies one VM's console until it is dropped.
#[derive(Debug)]
pub(crate) struct ConsoleCopy {
    copier: Arc<ConsoleCopier>,
    task: AbortHandle,
}

#[derive(Debug)]
struct ConsoleCopier {
    dir: PathBuf,
    /// The knowledge about the part of the file that was already copied.
    state: Mutex<CopyState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CopyState {
    /// An earlier daemon may have copied bytes and ended before it freed them.
    New,
    /// The copied part reads as zeros.
    Punched,
    /// The file system does not support holes.
    NoHoles,
}

/// Saves the rest of the previous `console.boot` to `to`, and creates a fresh `console.boot` for a
/// VMM that is about to start. Returns the path of the fresh file. Without `anew` the file stays in
/// place, because the VMM may hold it open and empties it itself. Blocks.
///
/// # Errors
/// Returns the kernel's error.
pub(super) fn begin(dir: &Path, to: &Path, anew: bool) -> io::Result<PathBuf> {
    ConsoleCopier { dir: dir.to_path_buf(), state: Mutex::new(CopyState::New) }.save_all()?;
    let boot = dir.join(BOOT);
    if anew {
        match std::fs::remove_file(&boot) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    // `save_all` has appended the rest of the last boot, so the target's length is where the next
    // boot begins.
    let base = std::fs::metadata(to)?.len();
    save(dir, &CopyPosition { to: to.to_path_buf(), base, given_back: 0 })?;
    if !anew {
        return Ok(boot);
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&boot)?;
    Ok(boot)
}

/// Returns true if there is a `console.boot` that a VMM may hold open, so that [`begin`] must not
/// replace it.
pub(super) fn has_begun(dir: &Path) -> bool {
    dir.join(BOOT).exists() && dir.join(AT).exists()
}

/// Returns the file to which the VMM of the VM with the run folder `dir` writes the console of
/// `spec`, or `None` without a console.
pub(super) fn file(dir: &Path, spec: &VmSpec) -> Option<PathBuf> {
    match &spec.console {
        Console::Off => None,
        Console::Kept | Console::File(_) => Some(dir.join(BOOT)),
    }
}

impl ConsoleCopy {
    /// Starts to copy the console of the VM with the run folder `dir`. Returns `None` if there is
    /// no `console.boot`.
    pub(super) fn start(dir: &Path, watcher: &FileWatcher) -> Option<Self> {
        let boot = dir.join(BOOT);
        if !boot.exists() {
            return None;
        }
        let watched = watcher.watch(&boot);
        let copier = Arc::new(ConsoleCopier { dir: dir.to_path_buf(), state: Mutex::new(CopyState::New) });
        let working = Arc::clone(&copier);
        let work = async move {
            loop {
                while run(&working, ConsoleCopier::catch_up).await == RoundOutcome::More {}
                watched.grown().await;
                // A serial port writes byte by byte, so a copy at each growth would copy single
                // bytes.
                tokio::time::sleep(COALESCE_DELAY).await;
            }
        };
        let task =
            tokio::spawn(work.instrument(tracing::debug_span!(parent: None, "console"))).abort_handle();
        Some(Self { copier, task })
    }

    /// Copies the present content, at most [`ROUNDS`] rounds and for at most [`SAVE_TIMEOUT`].
    pub(super) async fn catch_up(&self) {
        if tokio::time::timeout(SAVE_TIMEOUT, run(&self.copier, ConsoleCopier::save_all)).await.is_err() {
            tracing::warn!("the console was not copied in time; the copy goes on");
        }
    }
}

impl Drop for ConsoleCopy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(
    copier: &Arc<ConsoleCopier>,
    copy: fn(&ConsoleCopier) -> io::Result<RoundOutcome>,
) -> RoundOutcome {
    let copier = Arc::clone(copier);
    let copied = tokio::task::spawn_blocking(move || copy(&copier));
    match copied.await {
        Ok(Ok(round)) => round,
        Ok(Err(error)) => {
            tracing::warn!(%error, "the console of an attached VM cannot be copied");
            RoundOutcome::Done
        }
        // The task fails only if the runtime is shutting down.
        Err(_) => RoundOutcome::Done,
    }
}

impl ConsoleCopier {
    /// Copies rounds until everything is copied, at most [`ROUNDS`].
    fn save_all(&self) -> io::Result<RoundOutcome> {
        for _ in 0..ROUNDS {
            if self.catch_up()? == RoundOutcome::Done {
                return Ok(RoundOutcome::Done);
            }
        }
        tracing::warn!(dir = %self.dir.display(), "a console grows faster than it is copied");
        Ok(RoundOutcome::More)
    }

    /// Copies one round.
    fn catch_up(&self) -> io::Result<RoundOutcome> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.dir.join(BOOT);
        let (Some(mut at), Some(boot)) = (load(&self.dir)?, open(&path)?) else {
            return Ok(RoundOutcome::Done);
        };
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let mut log = OpenOptions::new().read(true).append(true).custom_flags(flags).open(&at.to)?;
        // The copied length follows from the target alone: its present length less `base`. A crash
        // between the append and the hole therefore leaves a length that already includes the
        // appended bytes.
        let copied = log.metadata()?.len().saturating_sub(at.base);
        let mut from = copied;
        // The VMM emptied its file, so the copy starts at its beginning and the base moves to the
        // present end of the target. The base is stored before the first byte is copied, because a
        // crash in between must not count bytes of the old file as bytes of the new one.
        if copied > 0 && has_begun_anew(&boot, &log, &at, copied, *state)? {
            at.base = log.metadata()?.len();
            at.given_back = 0;
            save(&self.dir, &at)?;
            from = 0;
        }
        let mut tail = Tail::of_bytes(path, from, LIMITS);
        let round = tail.read(|bytes| {
            log.write_all(bytes)?;
            Ok(TailUse::Bytes(bytes.len()))
        })?;
        if tail.offset() > 0 {
            *state = match tail.give_back() {
                Ok(()) => CopyState::Punched,
                Err(_) => CopyState::NoHoles,
            };
            if *state == CopyState::Punched && at.given_back != tail.offset() {
                at.given_back = tail.offset();
                save(&self.dir, &at)?;
            }
        }
        Ok(round)
    }
}

/// Returns true if the VMM has emptied its file, of which `copied` bytes were copied, and has
/// written it again.
fn has_begun_anew(
    boot: &File,
    log: &File,
    at: &CopyPosition,
    copied: u64,
    state: CopyState,
) -> io::Result<bool> {
    if boot.metadata()?.len() < copied {
        return Ok(true);
    }
    let mut first = [0; 256];
    let count = usize::try_from(copied).unwrap_or(usize::MAX).min(first.len());
    let read = boot.read_at(&mut first[..count], 0)?;
    let is_hole = first[..read].iter().all(|byte| *byte == 0);
    // A hole means that the VMM has not written these bytes since they were copied. Without a hole
    // the answer depends on this daemon's own knowledge: after a hole was punched, other bytes are
    // new ones; on a file system without holes a rewrite of the same length cannot be detected; and
    // a new daemon has only the record, or else compares the bytes with the copy.
    match state {
        _ if is_hole => Ok(false),
        CopyState::Punched => Ok(true),
        CopyState::NoHoles => Ok(false),
        CopyState::New if at.given_back >= copied => Ok(true),
        CopyState::New => {
            // The bytes were either copied and not freed, or written anew. A comparison with the
            // copy decides.
            let mut before = [0; 256];
            let known = log.read_at(&mut before[..read], at.base)?;
            Ok(before[..known] != first[..read])
        }
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    // Punching a hole requires write access.
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn load(dir: &Path) -> io::Result<Option<CopyPosition>> {
    match std::fs::read(dir.join(AT)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn save(dir: &Path, at: &CopyPosition) -> io::Result<()> {
    let fresh = dir.join("console.at.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(at)?)?;
    std::fs::rename(fresh, dir.join(AT))
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    struct Bench {
        dir: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("console.log"), "earlier\n").unwrap();
            Self { dir }
        }

        fn begin(&self) -> PathBuf {
            begin(self.dir.path(), &self.dir.path().join("console.log"), true).unwrap()
        }

        /// Returns a copier in the state of the next daemon.
        fn copier(&self) -> ConsoleCopier {
            ConsoleCopier { dir: self.dir.path().to_path_buf(), state: Mutex::new(CopyState::New) }
        }

        fn log(&self) -> String {
            std::fs::read_to_string(self.dir.path().join("console.log")).unwrap()
        }
    }

    fn append(path: &Path, text: &str) {
        OpenOptions::new().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn appended_console_output_is_copied_once() {
        let bench = Bench::new();
        let boot = bench.begin();
        let copier = bench.copier();
        for text in ["one\n", "", "two\n"] {
            append(&boot, text);
            copier.catch_up().unwrap();
            copier.catch_up().unwrap();
        }
        assert_eq!(bench.log(), "earlier\none\ntwo\n");
        // The next daemon continues.
        append(&boot, "three\n");
        bench.copier().catch_up().unwrap();
        assert_eq!(bench.log(), "earlier\none\ntwo\nthree\n");
    }

    #[test]
    fn an_endless_console_file_is_copied_in_rounds() {
        let bench = Bench::new();
        let boot = bench.begin();
        let endless = LIMITS.round * (ROUNDS as u64 + 2);
        OpenOptions::new().write(true).open(&boot).unwrap().set_len(endless).unwrap();
        let copier = bench.copier();
        assert_eq!(copier.catch_up().unwrap(), RoundOutcome::More);
        let copied = std::fs::metadata(bench.dir.path().join("console.log")).unwrap().len();
        assert_eq!(copied, LIMITS.round + "earlier\n".len() as u64);
        assert_eq!(copier.save_all().unwrap(), RoundOutcome::More, "nobody waits for all of it");
    }

    #[test]
    fn a_restarted_console_file_is_recognised_by_its_first_bytes() {
        let bench = Bench::new();
        let boot = bench.begin();
        let copier = bench.copier();
        std::fs::write(&boot, "same length\n").unwrap();
        copier.catch_up().unwrap();
        // Cloud Hypervisor does this at a reset: it empties the file, which has the same length
        // again in the next round.
        std::fs::write(&boot, "same length\n").unwrap();
        copier.catch_up().unwrap();
        std::fs::write(&boot, "x").unwrap();
        copier.catch_up().unwrap();
        assert_eq!(bench.log(), "earlier\nsame length\nsame length\nx");
    }

    #[test]
    fn repeated_output_of_a_new_boot_is_copied_by_a_restarted_daemon() {
        let bench = Bench::new();
        let boot = bench.begin();
        append(&boot, "same words\n");
        bench.copier().catch_up().unwrap();
        // The guest was reset, and the daemon ended before it had copied the new output.
        std::fs::write(&boot, "same words\n").unwrap();
        bench.copier().catch_up().unwrap();
        assert_eq!(bench.log(), "earlier\nsame words\nsame words\n");
    }

    #[test]
    fn output_copied_before_a_crash_is_not_copied_again() {
        let bench = Bench::new();
        let boot = bench.begin();
        append(&boot, "one\n");
        // The earlier daemon ended between the copy and the hole.
        append(&bench.dir.path().join("console.log"), "one\n");
        append(&boot, "two\n");
        bench.copier().catch_up().unwrap();
        assert_eq!(bench.log(), "earlier\none\ntwo\n");
    }

    #[test]
    fn the_last_output_of_a_boot_is_copied_before_the_next_boot() {
        let bench = Bench::new();
        append(&bench.begin(), "first boot\n");
        append(&bench.begin(), "second boot\n");
        bench.copier().catch_up().unwrap();
        assert_eq!(bench.log(), "earlier\nfirst boot\nsecond boot\n");
    }
}
