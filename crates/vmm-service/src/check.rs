//! What must be looked up on the host: whether the files that a configuration names are what it says they are.
//!
//! CreateVm looks before anything is touched and calls what it finds violations; BootVm looks again, because files change, and
//! takes the claims that keep two running VMs apart. Both look off the async threads, since a file may be on a slow disk.

use std::path::Path;

use vmm_core::backend::KernelFormat;
use vmm_core::report::Report;
use vmm_core::spec::{Console, Disk, DiskFormat, VmSpec};
use vmm_core::store::{DiskKey, HostClaim};
use vmm_host::files::{self, Access, FileFacts};
use vmm_host::kernel::{HEAD_BYTES, KernelKind, is_qcow2, kernel_kind};

/// So much of a qcow2 header tells whether it names a backing file.
const QCOW2_HEADER: usize = 16;

/// What a look at the host found.
pub(crate) struct HostFacts {
    /// What is wrong.
    pub(crate) report: Report,
    /// The disks that the VM would hold while it runs.
    pub(crate) claims: Vec<HostClaim>,
}

/// Looks at every file of `spec`. `owns_output` says that this VM made the console's file itself.
pub(crate) async fn look(spec: VmSpec, kernels: &'static [KernelFormat], owns_output: bool) -> HostFacts {
    tokio::task::spawn_blocking(move || look_blocking(&spec, kernels, owns_output)).await.unwrap_or_else(
        |error| {
            let mut report = Report::default();
            report.reject("config", format!("the host's files could not be checked: {error}"));
            HostFacts { report, claims: Vec::new() }
        },
    )
}

fn look_blocking(spec: &VmSpec, kernels: &[KernelFormat], owns_output: bool) -> HostFacts {
    let mut report = Report::default();
    look_at_kernel(&mut report, &spec.boot.kernel, kernels);
    if let Some(initrd) = &spec.boot.initrd {
        inspect(&mut report, "config.boot.initrd_path", initrd, Access::Read);
    }
    let mut claims = Vec::new();
    for disk in &spec.disks {
        if let Some(claim) = look_at_disk(&mut report, disk) {
            if let Some(problem) = conflict(&claims, &claim) {
                report.reject(format!("{}.path", disk.field()), problem);
            }
            claims.push(claim);
        }
    }
    if let Console::File(path) = &spec.console {
        look_at_output(&mut report, path, owns_output);
    }
    HostFacts { report, claims }
}

fn inspect(report: &mut Report, field: &str, path: &Path, access: Access) -> Option<FileFacts> {
    match files::inspect(path, access) {
        Ok(facts) => Some(facts),
        Err(problem) => {
            report.reject(field, problem.to_string());
            None
        }
    }
}

fn look_at_kernel(report: &mut Report, path: &Path, accepted: &[KernelFormat]) {
    const FIELD: &str = "config.boot.kernel_path";
    if inspect(report, FIELD, path, Access::Read).is_none() {
        return;
    }
    let kind = match files::head(path, HEAD_BYTES) {
        Ok(head) => kernel_kind(&head),
        Err(error) => {
            report.reject(FIELD, format!("{} cannot be read: {error}", path.display()));
            return;
        }
    };
    let (usable_as, found): (&[KernelFormat], _) = match kind {
        KernelKind::BzImage => (&[KernelFormat::BzImage], KernelFormat::BzImage.as_str()),
        KernelKind::ElfX86_64 { pvh: Some(false) } => (&[KernelFormat::Elf], KernelFormat::Elf.as_str()),
        KernelKind::ElfX86_64 { pvh: Some(true) | None } => {
            (&[KernelFormat::Elf, KernelFormat::PvhElf], KernelFormat::PvhElf.as_str())
        }
        KernelKind::Other => (&[], "neither a bzImage nor an x86-64 ELF file"),
    };
    if !usable_as.iter().any(|format| accepted.contains(format)) {
        let wanted = accepted.iter().map(|format| format.as_str()).collect::<Vec<_>>().join(" or ");
        report.reject(FIELD, format!("{} is {found}; this backend boots {wanted}", path.display()));
    }
}

fn look_at_disk(report: &mut Report, disk: &Disk) -> Option<HostClaim> {
    let field = format!("{}.path", disk.field());
    let access = if disk.read_only { Access::Read } else { Access::ReadWrite };
    let facts = inspect(report, &field, &disk.path, access)?;
    match files::head(&disk.path, QCOW2_HEADER) {
        Ok(head) => look_at_format(report, disk, &head),
        Err(error) => report.reject(&field, format!("{} cannot be read: {error}", disk.path.display())),
    }
    Some(facts.claim(&disk.path, access))
}

fn look_at_format(report: &mut Report, disk: &Disk, head: &[u8]) {
    let format_field = format!("{}.options[\"format\"]", disk.field());
    let is_qcow2 = is_qcow2(head);
    match disk.format {
        DiskFormat::Raw if is_qcow2 => report.reject(
            format_field,
            format!(
                "{} begins as a qcow2 image, and raw would hand the guest its header: set format to \"qcow2\"",
                disk.path.display()
            ),
        ),
        DiskFormat::Qcow2 if !is_qcow2 => report.reject(
            format_field,
            format!("{} is not a qcow2 image: set format to \"raw\" or leave it out", disk.path.display()),
        ),
        DiskFormat::Qcow2 => {
            let names_backing_file = head.get(8..16).is_some_and(|offset| offset.iter().any(|byte| *byte != 0));
            if names_backing_file && !disk.backing_files {
                report.reject(
                    format!("{}.options[\"backing_files\"]", disk.field()),
                    format!(
                        "{} names a backing file, which the guest would read: set backing_files to \"true\" to allow it",
                        disk.path.display()
                    ),
                );
            }
        }
        DiskFormat::Raw => {}
    }
}

/// One disk twice in one VM is as bad as in two.
fn conflict(earlier: &[HostClaim], claim: &HostClaim) -> Option<String> {
    let HostClaim::Disk { device, inode, writable, path, lies_on } = claim else { return None };
    let key = DiskKey { device: *device, inode: *inode };
    earlier.iter().find_map(|other| match other {
        HostClaim::Disk { device, inode, writable: w, path: other_path, lies_on: below }
            if *w || *writable =>
        {
            let other = DiskKey { device: *device, inode: *inode };
            (key == other || lies_on.contains(&other) || below.contains(&key)).then(|| format!(
                "{} is the same disk as {}, and one of them is writable: set read_only on both, or give each its own",
                path.display(),
                other_path.display()
            ))
        }
        HostClaim::Disk { .. } | HostClaim::Tap { .. } => None,
    })
}

fn look_at_output(report: &mut Report, path: &Path, owned: bool) {
    const FIELD: &str = "config.console.output";
    match std::fs::symlink_metadata(path) {
        Ok(found) if owned && found.is_file() => {}
        Ok(_) => report.reject(
            FIELD,
            format!(
                "{} exists and was not made by this VM: name a new file, or leave output empty",
                path.display()
            ),
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if !path.parent().is_some_and(Path::is_dir) {
                report
                    .reject(FIELD, format!("the folder of {} does not exist: make it first", path.display()));
            }
        }
        Err(error) => report.reject(FIELD, format!("{} cannot be looked at: {error}", path.display())),
    }
}
