//! The QEMUs that a running daemon is attached to.
//!
//! QMP serves one client, and that client is the daemon. Another client would wait in vain, and
//! would be in the daemon's way when it reconnects. Therefore the state of these QEMUs is read from
//! the daemon's records.

use std::path::{Path, PathBuf};

use vmm_core::store::{PendingProcess, VmRecord};
use vmm_host::lock;
use vmm_host::process::{Lookup, adopt};

use crate::config::{BackendChoice, DaemonConfig, Endpoint};

/// A QEMU that the daemon is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeldQemu {
    /// The QMP socket.
    pub(super) socket: PathBuf,
    /// The finding from the daemon's records: the text to show, or the reason for which the QEMU
    /// cannot be used.
    pub(super) found: Result<String, String>,
}

/// Returns the sockets of this configuration that a daemon on this state directory is attached to.
/// The function connects to none of them. It must be called inside a Tokio runtime.
pub(super) fn held_by_daemon(config: &DaemonConfig) -> Vec<HeldQemu> {
    let Endpoint::Unix(sockets) = &config.qemu.endpoint else { return Vec::new() };
    let runs = lock::holder(&config.state_dir).is_ok_and(|holder| holder.is_some());
    // An error of the database has a line of its own in the output of `doctor`.
    let Some(snapshot) = runs.then(|| vmm_store::peek(&config.state_dir)).and_then(Result::ok).flatten()
    else {
        return Vec::new();
    };
    let unreadable = snapshot.unreadable.into_iter().map(|vm| *vm.record);
    let vms: Vec<VmRecord> = snapshot.vms.into_iter().chain(unreadable).collect();
    sockets.iter().filter_map(|socket| Some(held_qemu(socket, holder_of(socket, &vms)?))).collect()
}

/// Returns the VM that the daemon runs behind `socket`, if there is one.
fn holder_of<'a>(socket: &Path, vms: &'a [VmRecord]) -> Option<&'a VmRecord> {
    // A record alone does not prove that the daemon is attached, because the VMM may have ended
    // since. So its process must not be gone.
    vms.iter().find(|vm| {
        let is_there = vm.kind.socket().is_some_and(|named| Path::new(named) == socket);
        let process = vm.run.as_ref().map(|run| &run.process);
        is_there
            && vm.backend.as_str() == BackendChoice::Qemu.as_str()
            && vm.state.is_live()
            && process.is_some_and(|process| !matches!(adopt(process), Lookup::Gone))
    })
}

fn held_qemu(socket: &Path, vm: &VmRecord) -> HeldQemu {
    let (version, pid) =
        vm.run.as_ref().map(|run| (run.version.clone(), run.process.pid)).unwrap_or_default();
    let shown = socket.display();
    let found = if vm.pending_work().process == PendingProcess::OutOfReach {
        Err(format!("the daemon is attached to unix://{shown}, and finds: {}", vm.status.message))
    } else {
        Ok(format!(
            "version {version} at unix://{shown}, process id {pid}: the daemon is attached to it and has VM \"{}\" there, so it was \
             not asked (QMP serves one client)",
            vm.vm_id
        ))
    };
    HeldQemu { socket: socket.to_path_buf(), found }
}
