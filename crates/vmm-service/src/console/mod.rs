//! Serial consoles: their output, which is streamed and bounded, and their input.
//!
//! ```text
//!                     ┌────────────────────────────┐
//!   VMM ── appends ──►│░░░ freed ░░░│ kept history │── read ──► ConsoleStream ──► client
//!                     └─────────────▲──────────────┘
//!                      the length   │ holes
//!                      is the       │
//!                      offset     ConsoleTrimmer
//!
//!   client ── write ──► ConsoleInput of the VMM that the actor holds ──► VMM
//! ```
//!
//! The VMM itself appends the output to a file. No byte of the output passes through the daemon
//! while no client streams it. Holes at the front of the file bound its space, and leave its
//! length, so that a position in the file is a position in the whole output.
//!
//! **Reads** touch the index and the file, and never an actor or a VMM.
//!
//! **Input does not pass the mailbox of the actor**, because a person types while the guest shuts
//! down, and that operation may take 30 s. The actor stays the only owner of the VMM's handle, and
//! shows the handle in the index for as long as it holds it. [`ConsoleInput`] is the only ability
//! that other tasks use of that handle. A write changes no record and no state of the VM, so that
//! it needs no place in the order of the operations. Operations do not wait for it: it holds a lock
//! of its own, and its time is bounded.
//!
//! [`ConsoleInput`]: vmm_core::backend::ConsoleInput

mod stream;
mod trim;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;
use vmm_core::spec::{Console, VmSpec};
use vmm_core::store::VmRecord;
use vmm_host::file_watch::FileWatcher;

use crate::error::ServiceError;
use crate::failure::ConsoleFailure;
use crate::run_folders::KEPT_CONSOLE;

pub use stream::{ConsoleChunk, ConsoleQuery, ConsoleStream};
pub(crate) use trim::ConsoleTrimmer;
pub(crate) use write::write;

/// The longest time that a read of a console's file may take.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// The number of reads of files that clients named which may be in progress. Such a file may be on
/// a server that does not answer, and nothing can end a thread that reads it.
const NAMED_READS: usize = 16;

/// The means to read consoles, which all streams share.
pub(crate) struct ConsoleFiles {
    watcher: FileWatcher,
    named_reads: Arc<Semaphore>,
}

impl Default for ConsoleFiles {
    fn default() -> Self {
        Self { watcher: FileWatcher::default(), named_reads: Arc::new(Semaphore::new(NAMED_READS)) }
    }
}

/// The file of one console.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ConsoleFile {
    path: PathBuf,
    /// True if the client named the file.
    is_named: bool,
}

impl ConsoleFile {
    /// Returns the file that takes the console of a VM of `spec`, or `None` if the VM has no
    /// console.
    fn of(spec: &VmSpec, dir: &Path) -> Option<Self> {
        match &spec.console {
            Console::Off => None,
            Console::Kept => Some(Self { path: dir.join(KEPT_CONSOLE), is_named: false }),
            Console::File(path) => Some(Self { path: path.clone(), is_named: true }),
        }
    }

    /// Returns the file of a VM on record.
    fn of_record(record: &VmRecord, runtime_dir: &Path) -> Result<Self, ServiceError> {
        let vm_id = || record.vm_id.clone();
        if record.imported {
            return Err(ConsoleFailure::NotKept { vm_id: vm_id() }.into());
        }
        let spec = VmSpec::parse(&record.config).map_err(|report| ConsoleFailure::NotKnown {
            vm_id: vm_id(),
            problems: report.into_violations(),
        })?;
        let file = Self::of(&spec, &record.uid.run_dir(runtime_dir));
        Ok(file.ok_or_else(|| ConsoleFailure::Disabled { vm_id: vm_id() })?)
    }
}

impl ConsoleFiles {
    /// Runs `work` on `file` on a thread for blocking work, for at most [`READ_TIMEOUT`].
    async fn read<T: Send + 'static>(
        &self,
        file: &ConsoleFile,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, ServiceError> {
        let unavailable = |why: &dyn std::fmt::Display| {
            ServiceError::from(ConsoleFailure::Unreadable { path: file.path.clone(), why: why.to_string() })
        };
        let reading = async {
            // The thread owns the permit, so that a read that hangs keeps it.
            let permit = match file.is_named {
                true => Arc::clone(&self.named_reads).acquire_owned().await.ok(),
                false => None,
            };
            let work = move || {
                let _permit = permit;
                work()
            };
            tokio::task::spawn_blocking(work).await
        };
        match timeout(READ_TIMEOUT, reading).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(unavailable(&error)),
            Ok(Err(error)) => Err(unavailable(&error)),
            Err(_) => {
                Err(unavailable(&format_args!("it does not answer within {} s", READ_TIMEOUT.as_secs())))
            }
        }
    }
}
