//! One disk: the image, and the files that a qcow2 image is based on.
//!
//! ```text
//!   image ──► backing file ──► … ──► a raw file, or an image without a backing file
//!   claimed as  read-only
//!   it is used
//! ```

use std::path::{Path, PathBuf};

use vmm_core::report::Report;
use vmm_core::spec::{Disk, DiskFormat};
use vmm_core::store::{DiskKey, HostClaim};
use vmm_host::files::{self, Access};
use vmm_host::qcow2::{self, Backing, Qcow2Header};

use super::looks::Visitor;
use super::{Purpose, inspect};

/// The most backing files of one image. A longer chain reads slowly, and is a mistake.
const MAX_CHAIN: usize = 32;

/// Looks at `disk`, and adds the claims on its image and on each of its backing files.
pub(super) fn look_at(
    visitor: &Visitor,
    report: &mut Report,
    claims: &mut Vec<HostClaim>,
    disk: &Disk,
    purpose: Purpose,
) {
    let field = format!("{}.path", disk.field());
    let access = if disk.read_only { Access::Read } else { Access::ReadWrite };
    let Some(facts) = inspect(visitor, report, &field, &disk.path, access) else { return };
    claim(report, claims, &field, facts.claim(&disk.path, access));
    match (disk.format, purpose) {
        (DiskFormat::Raw, Purpose::Create) => probe_raw(report, disk),
        // The image was declared raw. From then on its contents are the guest's.
        (DiskFormat::Raw, Purpose::Boot) => {}
        (DiskFormat::Qcow2, _) => {
            if let Some(header) = read_qcow2(report, &format_field(disk), &disk.path) {
                Chain { visitor, report, claims, disk, purpose }.walk(header, (facts.device, facts.inode));
            }
        }
    }
}

fn format_field(disk: &Disk) -> String {
    format!("{}.options[\"format\"]", disk.field())
}

fn probe_raw(report: &mut Report, disk: &Disk) {
    let shown = disk.path.display();
    match files::head(&disk.path, qcow2::MAGIC.len()) {
        Ok(head) if head == qcow2::MAGIC => report.reject(
            format_field(disk),
            format!(
                "{shown} begins as a qcow2 image, and raw would hand the guest its header: set format to \"qcow2\""
            ),
        ),
        Ok(_) => {}
        Err(error) => {
            report.reject(format!("{}.path", disk.field()), format!("{shown} cannot be read: {error}"));
        }
    }
}

fn read_qcow2(report: &mut Report, field: &str, path: &Path) -> Option<Qcow2Header> {
    let shown = path.display();
    match files::qcow2_header(path) {
        Ok(Some(header)) => return Some(header),
        Ok(None) => report
            .reject(field, format!("{shown} is not a qcow2 image: set format to \"raw\" or leave it out")),
        Err(error) => report.reject(field, format!("{shown} cannot be used as a qcow2 image: {error}")),
    }
    None
}

/// The walk from one image along its backing files.
struct Chain<'a> {
    visitor: &'a Visitor,
    report: &'a mut Report,
    claims: &'a mut Vec<HostClaim>,
    disk: &'a Disk,
    purpose: Purpose,
}

impl Chain<'_> {
    /// Walks from the image, whose device and inode are `image`.
    fn walk(&mut self, first: Qcow2Header, image: (u64, u64)) {
        let (mut path, mut header) = (self.disk.path.clone(), first);
        let mut seen = vec![image];
        loop {
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

    /// Returns the backing file that the header of the image at `path` names, if it may be used.
    fn backing_of(&mut self, path: &Path, header: Qcow2Header) -> Option<Backing> {
        let Qcow2Header { version: _, backing, encrypted, external_data } = header;
        let shown = path.display();
        if encrypted {
            let message =
                format!("{shown} is encrypted, and no backend here is given its key: decrypt it first");
            self.report.reject(format_field(self.disk), message);
        }
        if external_data {
            let message = format!(
                "{shown} keeps its data in another file, which is not served: convert it (qemu-img convert)"
            );
            self.report.reject(format_field(self.disk), message);
        }
        let backing = backing?;
        if !self.disk.backing_files {
            self.reject(format!(
                "{shown} names a backing file, which the guest would read: set backing_files to \"true\" to allow it"
            ));
            return None;
        }
        Some(backing)
    }

    /// Claims the backing file of the image at `path`. Returns the file with its header where it is an image too.
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
        let facts = inspect(self.visitor, self.report, &field, &next, Access::Read)?;
        let file = (facts.device, facts.inode);
        if seen.contains(&file) {
            self.reject(format!("{} is based on itself", next.display()));
            return None;
        }
        seen.push(file);
        claim(self.report, self.claims, &field, facts.claim(&next, Access::Read));
        match (backing.format.as_deref(), self.purpose) {
            (Some("raw"), _) => None,
            (Some("qcow2"), _) => read_qcow2(self.report, &field, &next).map(|header| (next, header)),
            (Some(other), _) => {
                self.reject(format!(
                    "{shown} names a backing file of the format {other}; raw and qcow2 are served"
                ));
                None
            }
            // Where the format is not stated, a VMM would guess it from contents that another guest may have written.
            (None, Purpose::Create) => {
                self.reject(format!(
                    "{shown} does not say which format its backing file has: state it (qemu-img rebase -u -b FILE -F FORMAT)"
                ));
                None
            }
            (None, Purpose::Boot) => match files::qcow2_header(&next) {
                Ok(header) => header.map(|header| (next, header)),
                Err(_) => None,
            },
        }
    }

    fn field(&self) -> String {
        format!("{}.options[\"backing_files\"]", self.disk.field())
    }

    fn reject(&mut self, message: String) {
        self.report.reject(self.field(), message);
    }
}

/// Adds one claim, and rejects a file that the VM itself uses twice with a writer.
fn claim(report: &mut Report, claims: &mut Vec<HostClaim>, field: &str, claim: HostClaim) {
    if let Some(problem) = conflict(claims, &claim) {
        report.reject(field, problem);
    }
    claims.push(claim);
}

/// Returns why `claim` cannot stand beside `earlier` ones of the same VM: a disk that is written is there once.
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
