//! Examines the file behind a disk's path, and refuses a qcow2 image that would make QEMU open
//! other files.
//!
//! A qcow2 header can name other files of the host: a backing file, which the guest reads, and a
//! data file, which the guest reads and writes. QEMU opens both without asking, so a prepared image
//! could reach any file that the daemon's user can open.

use vmm_core::spec::{Disk, DiskFormat, VmSpec};
use vmm_host::files::{self, Access, FileKind};
use vmm_host::qcow2::Qcow2Header;

use super::convert::ImageKind;

/// Examines every disk of `spec`. Blocks.
///
/// # Errors
///
/// A sentence for people that names the disk and the reason.
pub(crate) fn inspect(spec: &VmSpec) -> Result<Vec<ImageKind>, String> {
    spec.disks
        .iter()
        .map(|disk| inspect_one(disk).map_err(|problem| format!("{}.path: {problem}", disk.field())))
        .collect()
}

fn inspect_one(disk: &Disk) -> Result<ImageKind, String> {
    let access = if disk.read_only { Access::Read } else { Access::ReadWrite };
    let facts = files::inspect(&disk.path, access).map_err(|problem| problem.to_string())?;
    if disk.format == DiskFormat::Qcow2 && !disk.backing_files {
        let header = files::qcow2_header(&disk.path)
            .map_err(|error| format!("{} cannot be read: {error}", disk.path.display()))?;
        if let Some(what) = header.as_ref().and_then(other_file_kind) {
            return Err(format!(
                "{} has {what}; set options.backing_files to \"true\" if the image is trusted",
                disk.path.display()
            ));
        }
    }
    Ok(match facts.kind {
        FileKind::Regular => ImageKind::File,
        FileKind::Block => ImageKind::BlockDevice,
    })
}

/// Returns the kind of the other file that QEMU would open for an image with this header.
fn other_file_kind(header: &Qcow2Header) -> Option<&'static str> {
    match header {
        Qcow2Header { backing: Some(_), .. } => Some("a backing file"),
        Qcow2Header { external_data: true, .. } => Some("an external data file"),
        Qcow2Header { .. } => None,
    }
}
