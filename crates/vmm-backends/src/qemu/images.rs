//! What lies behind a disk's path, and what a qcow2 image would open besides itself.
//!
//! A qcow2 header can name other files of the host: a backing file, whose content the guest reads, and a data file, whose
//! content it reads and writes. QEMU opens them without asking, so an image that was prepared for it could reach any file that
//! the daemon's user can.

use vmm_core::spec::{Disk, DiskFormat, VmSpec};
use vmm_host::files::{self, Access, FileKind};

use super::convert::ImageKind;

/// The first bytes of a qcow2 image, up to and with its incompatible features.
const HEADER: usize = 80;
/// What qcow2 images begin with.
const MAGIC: &[u8] = b"QFI\xfb";
/// The incompatible feature that keeps the content in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// Looks at every disk of `spec`. Blocks for as long as the kernel takes.
///
/// # Errors
///
/// What cannot be used and why, for people.
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
        let head = files::head(&disk.path, HEADER)
            .map_err(|error| format!("{} cannot be read: {error}", disk.path.display()))?;
        if let Some(what) = reaches_out(&head) {
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

/// What else a qcow2 image with this header opens. `None` for what is no qcow2 image: QEMU refuses that by itself.
fn reaches_out(head: &[u8]) -> Option<&'static str> {
    if !head.starts_with(MAGIC) {
        return None;
    }
    let version = u32::from_be_bytes(*head.get(4..8)?.first_chunk()?);
    let backing = u64::from_be_bytes(*head.get(8..16)?.first_chunk()?);
    if backing != 0 {
        return Some("a backing file");
    }
    if version < 3 {
        return None;
    }
    let incompatible = u64::from_be_bytes(*head.get(72..80)?.first_chunk()?);
    (incompatible & EXTERNAL_DATA != 0).then_some("an external data file")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32, backing: u64, incompatible: u64) -> Vec<u8> {
        let mut head = vec![0; HEADER];
        head[..4].copy_from_slice(MAGIC);
        head[4..8].copy_from_slice(&version.to_be_bytes());
        head[8..16].copy_from_slice(&backing.to_be_bytes());
        head[72..80].copy_from_slice(&incompatible.to_be_bytes());
        head
    }

    #[test]
    fn only_what_opens_other_files_is_told() {
        assert_eq!(reaches_out(&header(3, 0, 0)), None);
        assert_eq!(reaches_out(&header(3, 512, 0)), Some("a backing file"));
        assert_eq!(reaches_out(&header(3, 0, EXTERNAL_DATA)), Some("an external data file"));
        assert_eq!(reaches_out(&header(2, 0, EXTERNAL_DATA)), None, "version 2 has no features there");
        assert_eq!(reaches_out(&header(2, 72, 0)), Some("a backing file"));
        assert_eq!(reaches_out(b"QFI\xfb\0\0"), None, "cut short: QEMU refuses it");
        assert_eq!(reaches_out(&[0; 512]), None);
    }
}
