//! The control sockets of VMMs that this program started, and the words about those that are gone.
//!
//! Another program can remove the folder of sockets while the VMM lives. The guest runs on, and a
//! daemon that has no connection yet cannot make one.

use std::path::PathBuf;

use vmm_core::kind::VmKind;
use vmm_core::store::{RunRecord, VmRecord};
use vmm_host::lasting::{REMEDY, lost_socket};

/// The control socket of one run.
#[derive(Clone, Debug)]
pub(crate) struct Sockets {
    /// The process of the VMM.
    pid: u32,
    /// The socket on record.
    recorded: PathBuf,
    /// The run folder in which this daemon looks for the socket.
    dir: PathBuf,
}

impl Sockets {
    /// Returns the socket of `run`, or `None` for a VMM that another program started, because that
    /// program decides about its socket.
    pub(crate) fn of(record: &VmRecord, run: &RunRecord, dir: PathBuf) -> Option<Self> {
        (record.kind == VmKind::Managed).then(|| Self {
            pid: run.process.pid,
            recorded: run.socket.clone(),
            dir,
        })
    }

    /// Returns the message for people if the socket is gone and the VMM answers all the same.
    pub(crate) async fn gone_beside_a_connection(self) -> Option<String> {
        let (pid, lost) = (self.pid, self.lost().await?);
        Some(format!(
            "the VMM (process {pid}) answers, but {lost}. This daemon keeps its connection, and the next one will find none: \
             shut the VM down before you stop the daemon, and boot it again; {REMEDY}"
        ))
    }

    /// Returns the message for people if the VMM does not answer because its socket is gone.
    pub(crate) async fn gone(self) -> Option<String> {
        let Self { pid, recorded, dir } = self.clone();
        if let Some(lost) = self.lost().await {
            return Some(format!(
                "the VMM (process {pid}) lives, but {lost}. Its guest runs on and cannot be controlled: ShutdownVm or DeleteVm \
                 with force ends it, and BootVm makes the folder anew; {REMEDY}"
            ));
        }
        let folder = recorded.parent()?;
        (folder != dir).then(|| {
            format!(
                "the VMM (process {pid}) lives, but its sockets are in {}, and this daemon looks in {}: stop the daemon, and \
                 start it with the UNKEY_VMCP_RUNTIME_DIR that it had before; or ShutdownVm or DeleteVm with force ends the VMM",
                folder.display(),
                dir.display()
            )
        })
    }

    /// Returns the words about the missing folder or socket.
    async fn lost(self) -> Option<String> {
        tokio::task::spawn_blocking(move || lost_socket(&self.recorded)).await.ok().flatten()
    }
}
