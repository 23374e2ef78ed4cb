//! Run folders: the files that are made in them before a VMM, and the folders that processes use
//! when the daemon starts.
//!
//! A start begins its VMM while its intent is on the way to the disk. If the daemon dies at that
//! moment, a VMM is left that no record mentions. Its arguments name the run folder, and so the VM.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::task::JoinError;
use uuid::Uuid;
use vmm_core::id::VmUid;
use vmm_host::process::find_by_argument;
pub(crate) use vmm_host::run_dir::KEPT_CONSOLE;

/// The time that the list of this host's processes may take at the start. The kernel blocks a
/// reader of the arguments of a process whose memory is being paged in from a server that is gone.
const PROCESS_LIST_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes a file that only the owner reads, or keeps the one that exists. Blocks.
pub(crate) fn create_private_file(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        // A FIFO in place of the file must not block the open call.
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path)
        .map(|_| ())
}

/// The names of the run folders that processes use, or `None` if they are not known.
pub(crate) struct UsedRunFolders(Option<BTreeSet<OsString>>);

impl UsedRunFolders {
    /// Lists the processes of this host, once for all VMs.
    pub(crate) async fn in_use(runtime_dir: &Path) -> Self {
        // Every run folder has the same parent.
        let Some(folders) = VmUid::new(Uuid::nil()).run_dir(runtime_dir).parent().map(Path::to_path_buf)
        else {
            return Self(None);
        };
        let names = tokio::task::spawn_blocking(move || {
            let users = find_by_argument(&folders)?;
            let below = users.iter().flat_map(|user| user.paths_below(&folders));
            let first = below.filter_map(|path| path.iter().next().map(OsString::from));
            Ok::<_, io::Error>(first.collect())
        });
        Self::from_list(names).await
    }

    /// Waits for the names. Without them, every run folder counts as used.
    async fn from_list(
        names: impl Future<Output = Result<io::Result<BTreeSet<OsString>>, JoinError>>,
    ) -> Self {
        let Ok(names) = tokio::time::timeout(PROCESS_LIST_TIMEOUT, names).await else {
            tracing::warn!(
                "the processes of this host could not be listed in time, because one of them hangs in the kernel, for example \
                 on a disk that does not answer; every VM is searched for"
            );
            return Self(None);
        };
        match names {
            Ok(Ok(names)) => Self(Some(names)),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the processes of this host could not be listed; every VM is searched for");
                Self(None)
            }
            Err(error) => {
                tracing::warn!(%error, "the processes of this host could not be listed; every VM is searched for");
                Self(None)
            }
        }
    }

    /// Returns true if a process may use the run folder of `uid`.
    pub(crate) fn contains(&self, uid: VmUid) -> bool {
        let Some(names) = &self.0 else { return true };
        uid.run_dir(Path::new("/")).file_name().is_some_and(|name| names.contains(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_hanging_list_of_run_folders_counts_every_folder_as_used() {
        let uid = VmUid::new(Uuid::now_v7());
        assert!(UsedRunFolders::from_list(std::future::pending()).await.contains(uid));
        let nobody = UsedRunFolders::from_list(std::future::ready(Ok(Ok(BTreeSet::new())))).await;
        assert!(!nobody.contains(uid));
    }
}
