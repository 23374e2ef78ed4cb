//! One disk: the image, and the backing files of a qcow2 image.
//!
//! ```text
//!   image ──► backing file ──► … ──► a raw file, or an image without a backing file
//!   claimed as  read-only
//!   it is used
//! ```

use std::path::{Path, PathBuf};

use vmm_core::spec::{Disk, DiskFormat};
use vmm_core::store::{DiskKey, HostClaim};
use vmm_host::files::{self, Access, FileFacts};
use vmm_host::qcow2::{self, Backing, Head, Qcow2Header};
use vmm_host::{host_use, partitions};

use super::permits::FileCheck;
use super::{FileCheckPurpose, FileCheckTerms, FileFindings};

/// The largest number of backing files of one image. A longer chain reads slowly, and is a mistake.
const MAX_CHAIN: usize = 32;

/// The number of bytes of a sector, the unit in which a guest sees a disk.
const SECTOR: u64 = 512;
/// The largest block that direct I/O needs on usual disks, in bytes.
const DIRECT_BLOCK: u64 = 4096;

/// Checks `disk`, and adds the claims on its image and on each of its backing files. `adds_root`
/// is true if the kernel's arguments will name the whole disk as the root file system.
pub(super) fn check_disk(
    file_check: &FileCheck,
    found: &mut FileFindings,
    disk: &Disk,
    adds_root: bool,
    terms: FileCheckTerms,
) {
    let field = format!("{}.path", disk.field());
    let access = if disk.read_only { Access::Read } else { Access::ReadWrite };
    let Some(facts) = found.inspect(file_check, &field, &disk.path, access) else { return };
    claim(found, &field, facts.claim(&disk.path, access));
    // A guest that only reads can at worst see a file system in the middle of a change.
    if access == Access::ReadWrite
        && let Some(using) = host_use::of(&disk.path, &facts)
    {
        let message = format!(
            "{} {using}: a guest would write beside the host, which destroys what is there; free the device, or set read_only",
            disk.path.display()
        );
        found.report.reject(&field, message);
    }
    match (disk.format, terms.purpose) {
        (DiskFormat::Raw, FileCheckPurpose::Create) => {
            probe_raw(found, disk);
            check_size(found, disk, &facts);
            if adds_root {
                let mut head = Head::new(partitions::HEAD_BYTES);
                // A file that cannot be read has been rejected already.
                if files::fill_head(&mut head, &disk.path, None).is_ok() {
                    advise_of_partitions(found, disk, &head);
                }
            }
        }
        // The image was declared raw when the VM was created. Its contents are the guest's from
        // then on.
        (DiskFormat::Raw, FileCheckPurpose::Boot) => {}
        (DiskFormat::Qcow2, purpose) => {
            let Some(header) = read_qcow2(found, &format_field(disk), &disk.path) else { return };
            let wanted = adds_root && purpose == FileCheckPurpose::Create;
            let head = wanted.then(|| Head::new(partitions::HEAD_BYTES));
            let mut chain = BackingChain { file_check, found, disk, terms, head };
            chain.walk(header, (facts.device, facts.inode));
            if let Some(head) = chain.head.take() {
                advise_of_partitions(found, disk, &head);
            }
        }
    }
}

/// Refuses a raw image whose size some hypervisor does not start with, on every backend alike.
/// Cloud Hypervisor reads the first sector, and QEMU writes with direct I/O in whole blocks of the
/// host only. QEMU takes blocks of 4,096 bytes for a file whose block size it cannot find out.
/// Warns about bytes at the end that a guest may not see, because each hypervisor cuts or fills the
/// last sector in its own way.
fn check_size(found: &mut FileFindings, disk: &Disk, facts: &FileFacts) {
    let (shown, size, field) = (disk.path.display(), facts.size, format!("{}.path", disk.field()));
    let longer = |step: u64| format!("make it longer (truncate -s %{step} {shown})");
    if size < SECTOR {
        let message = format!(
            "{shown} has {size} bytes, which is less than a sector: give it a size (truncate -s SIZE)"
        );
        found.report.reject(field, message);
    } else if size % DIRECT_BLOCK != 0 && disk.direct_io && !disk.read_only {
        let message = format!(
            "{shown} has {size} bytes, which is no multiple of {DIRECT_BLOCK}, as direct_io needs on a disk with blocks \
             of that size: {}",
            longer(DIRECT_BLOCK)
        );
        found.report.reject(field, message);
    } else if size % SECTOR != 0 {
        let message = format!(
            "{shown} has {size} bytes, which is no multiple of {SECTOR}: the hypervisor cuts or fills the last sector; {}",
            longer(SECTOR)
        );
        found.report.advise(field, message);
    } else if disk.direct_io && size % DIRECT_BLOCK != 0 {
        let message = format!(
            "{shown} has {size} bytes, which is no multiple of {DIRECT_BLOCK}: with direct_io its last sectors may be out of \
             reach on a disk with blocks of that size; {}",
            longer(DIRECT_BLOCK)
        );
        found.report.advise(field, message);
    }
}

/// Warns about a root device whose `head` has a partition table while the arguments name the whole
/// disk.
fn advise_of_partitions(found: &mut FileFindings, disk: &Disk, head: &Head) {
    if partitions::has_table(head.bytes()) {
        let message = format!(
            "{} has a partition table, and the root file system is looked for on the whole disk: name the partition in \
             kernel_args, as in root=/dev/vda1",
            disk.path.display()
        );
        found.report.advise(format!("{}.is_root_device", disk.field()), message);
    }
}

fn format_field(disk: &Disk) -> String {
    format!("{}.options[\"format\"]", disk.field())
}

fn probe_raw(found: &mut FileFindings, disk: &Disk) {
    let shown = disk.path.display();
    match files::head(&disk.path, qcow2::MAGIC.len()) {
        Ok(head) if head == qcow2::MAGIC => found.report.reject(
            format_field(disk),
            format!(
                "{shown} begins as a qcow2 image, and raw would hand the guest its header: set format to \"qcow2\""
            ),
        ),
        Ok(_) => {}
        Err(error) => found.unreadable(format!("{}.path", disk.field()), &disk.path, &error),
    }
}

fn read_qcow2(found: &mut FileFindings, field: &str, path: &Path) -> Option<Qcow2Header> {
    let shown = path.display();
    match files::qcow2_header(path) {
        Ok(Some(header)) => return Some(header),
        Ok(None) => found
            .report
            .reject(field, format!("{shown} is not a qcow2 image: set format to \"raw\" or leave it out")),
        Err(error) if error.kind() != std::io::ErrorKind::InvalidData => {
            found.unreadable(field, path, &error);
        }
        Err(error) => {
            found.report.reject(field, format!("{shown} cannot be used as a qcow2 image: {error}"));
        }
    }
    None
}

/// The walk from one image along its backing files.
struct BackingChain<'a> {
    file_check: &'a FileCheck,
    found: &'a mut FileFindings,
    disk: &'a Disk,
    terms: FileCheckTerms,
    /// The first bytes of the disk as the guest sees them, if they are wanted. They become `None`
    /// at an image whose data cannot be read here.
    head: Option<Head>,
}

impl BackingChain<'_> {
    /// Walks from the image, whose device and inode are `image`.
    fn walk(&mut self, first: Qcow2Header, image: (u64, u64)) {
        let (mut path, mut header) = (self.disk.path.clone(), first);
        let mut seen = vec![image];
        loop {
            self.read_head(&path, Some(&header));
            let Some(backing) = self.backing_of(&path, header) else { return };
            if seen.len() > MAX_CHAIN {
                return self.reject(format!(
                    "{} is based on more than {MAX_CHAIN} files: merge some of them (qemu-img rebase)",
                    self.disk.path.display()
                ));
            }
            match self.step(&path, &backing, &mut seen) {
                Some((next, next_header)) => (path, header) = (next, next_header),
                None => return,
            }
        }
    }

    /// Takes the first bytes of the disk from the file at `path`, as far as no file above it has
    /// given them. An image whose data cannot be read here is no reason to refuse the disk, because
    /// the bytes are wanted for a warning only.
    fn read_head(&mut self, path: &Path, header: Option<&Qcow2Header>) {
        if let Some(head) = &mut self.head
            && files::fill_head(head, path, header).is_err()
        {
            self.head = None;
        }
    }

    /// Returns the backing file that the header of the image at `path` names, if it may be used.
    fn backing_of(&mut self, path: &Path, header: Qcow2Header) -> Option<Backing> {
        self.reject_features(path, &header);
        let backing = header.backing?;
        let shown = path.display();
        if !self.disk.backing_files {
            self.reject(format!(
                "{shown} names a backing file, which the guest would read: set backing_files to \"true\" to allow it"
            ));
            return None;
        }
        Some(backing)
    }

    /// Rejects an image that the backend cannot open, or would open in a wrong way.
    fn reject_features(&mut self, path: &Path, header: &Qcow2Header) {
        let Qcow2Header {
            version: _,
            backing: _,
            encrypted,
            external_data,
            corrupt,
            extended_l2,
            unknown_features,
            unknown_compression,
            tables: _,
        } = header;
        let shown = path.display();
        let mut reject = |message: String| self.found.report.reject(format_field(self.disk), message);
        if *encrypted {
            reject(format!("{shown} is encrypted, and no backend here is given its key: decrypt it first"));
        }
        if *external_data {
            reject(format!(
                "{shown} keeps its data in another file, which is not served: convert it (qemu-img convert)"
            ));
        }
        if *corrupt {
            reject(format!("{shown} is marked as corrupt: repair it (qemu-img check -r all)"));
        }
        if *extended_l2 && self.terms.extended_l2 == Some(false) {
            reject(format!(
                "{shown} has extended L2 entries, which this backend does not read: convert it (qemu-img convert -O qcow2)"
            ));
        }
        if *unknown_features != 0 {
            reject(format!(
                "{shown} needs features that this program does not know (bits {unknown_features:#x} of its header): convert it \
                 with the program that made it"
            ));
        }
        if let Some(method) = unknown_compression {
            reject(format!(
                "{shown} is compressed by a method that this program does not know ({method}): convert it (qemu-img convert)"
            ));
        }
    }

    /// Claims the backing file of the image at `path`. Returns the file with its header if it is an
    /// image too.
    fn step(
        &mut self,
        path: &Path,
        backing: &Backing,
        seen: &mut Vec<(u64, u64)>,
    ) -> Option<(PathBuf, Qcow2Header)> {
        let shown = path.display();
        let Some(next) = backing.path(path) else {
            self.reject(format!("{shown} names the backing file \"{}\", which is no path", backing.name));
            return None;
        };
        let field = self.field();
        let facts = self.found.inspect(self.file_check, &field, &next, Access::Read)?;
        let file = (facts.device, facts.inode);
        if seen.contains(&file) {
            self.reject(format!("{} is based on itself", next.display()));
            return None;
        }
        seen.push(file);
        claim(self.found, &field, facts.claim(&next, Access::Read));
        match (backing.format.as_deref(), self.terms.purpose) {
            (Some("raw"), _) => {
                self.read_head(&next, None);
                None
            }
            (Some("qcow2"), _) => read_qcow2(self.found, &field, &next).map(|header| (next, header)),
            (Some(other), _) => {
                self.reject(format!(
                    "{shown} names a backing file of the format {other}; raw and qcow2 are served"
                ));
                None
            }
            // If the format is not stated, a VMM would guess it from contents that another guest
            // may have written.
            (None, FileCheckPurpose::Create) => {
                self.reject(format!(
                    "{shown} does not say which format its backing file has: state it (qemu-img rebase -u -b FILE -F FORMAT)"
                ));
                None
            }
            (None, FileCheckPurpose::Boot) => match files::qcow2_header(&next) {
                Ok(header) => header.map(|header| (next, header)),
                Err(_) => None,
            },
        }
    }

    fn field(&self) -> String {
        format!("{}.options[\"backing_files\"]", self.disk.field())
    }

    fn reject(&mut self, message: String) {
        self.found.report.reject(self.field(), message);
    }
}

/// Adds one claim, and rejects a file that the VM itself uses twice with a writer.
fn claim(found: &mut FileFindings, field: &str, claim: HostClaim) {
    if let Some(problem) = conflict(&found.claims, &claim) {
        found.report.reject(field, problem);
    }
    found.claims.push(claim);
}

/// Returns the reason why `claim` conflicts with `earlier` ones of the same VM. A disk that is
/// written may be used only once.
fn conflict(earlier: &[HostClaim], claim: &HostClaim) -> Option<String> {
    let HostClaim::Disk { device, inode, writable, path, lies_on } = claim else { return None };
    let key = DiskKey { device: *device, inode: *inode };
    earlier.iter().find_map(|other| match other {
        HostClaim::Disk { device, inode, writable: w, path: other_path, lies_on: below } if *w || *writable => {
            let other = DiskKey { device: *device, inode: *inode };
            (key == other || lies_on.contains(&other) || below.contains(&key)).then(|| {
                format!(
                    "{} is the same disk as {}, and one of them is writable: set read_only on both, or give each its own",
                    path.display(),
                    other_path.display()
                )
            })
        }
        HostClaim::Disk { .. } | HostClaim::Path { .. } | HostClaim::Tap { .. } => None,
    })
}
