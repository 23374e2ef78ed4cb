//! The files on the host that a configuration names: checks that each exists and is of the kind
//! that the configuration states.
//!
//! CreateVm and ValidateVm look before anything is touched, and report their findings as
//! violations. BootVm looks again, because files change, and takes the claims that keep two running
//! VMs apart.
//!
//! Files may lie on a device or server that does not answer. [`looks`] bounds the threads that wait
//! for them, and a deadline bounds the caller's wait. Only the paths of clients pass through this
//! module, and the daemon's own files never wait for a permit.

mod disk;
mod looks;

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use vmm_core::backend::{Capabilities, KernelFormat};
use vmm_core::limit::HostLimit;
use vmm_core::report::Report;
use vmm_core::spec::{Console, Disk, NamedFiles, VmSpec};
use vmm_core::store::HostClaim;
use vmm_host::files::{self, Access, FileFacts};
use vmm_host::kernel::{self, KernelKind};
use vmm_host::mounts::Mounts;

use looks::{Limits, Looks, Visitor};

/// The time that a look may take.
pub(crate) const LOOK_DEADLINE: Duration = Duration::from_secs(3);
/// The permits of looks for one purpose. The runtime has some 500 threads in all.
const PERMITS: Limits =
    Limits { quick: 32, slow: 160, slow_of_a_mount: 16, after: Duration::from_millis(250) };

/// The reason for a look at files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A client creates a VM: a raw disk must not begin as an image of another format.
    Create,
    /// A VM is started, or was found running: the guest may have written anything to a raw disk.
    Boot,
}

impl Purpose {
    /// Returns the permits for looks of this purpose. Each purpose has its own, so that hanging
    /// calls of CreateVm and ValidateVm keep no VM from starting.
    fn looks(self) -> &'static Arc<Looks> {
        fn permits() -> Arc<Looks> {
            Arc::new(Looks::new(PERMITS, |path| Mounts::read().served_by(path)))
        }
        static CREATE: LazyLock<Arc<Looks>> = LazyLock::new(permits);
        static BOOT: LazyLock<Arc<Looks>> = LazyLock::new(permits);
        match self {
            Self::Create => &CREATE,
            Self::Boot => &BOOT,
        }
    }
}

/// The purpose of a look at the files, and the formats that the backend accepts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// The reason for the look.
    pub(crate) purpose: Purpose,
    /// The kernel formats that the backend boots, if the backend is known.
    pub(crate) kernels: Option<&'static [KernelFormat]>,
    /// True if the backend reads extended entries of qcow2 images. `None` if the backend is not
    /// known.
    pub(crate) extended_l2: Option<bool>,
    /// True if this VM made the console's file itself.
    pub(crate) owns_output: bool,
}

impl Terms {
    /// Returns the terms of a look for a VM of the backend with `capabilities`, if that is known.
    /// The VM has made no file.
    pub(crate) fn of(purpose: Purpose, capabilities: Option<&Capabilities>) -> Self {
        Self {
            purpose,
            kernels: capabilities.map(|capabilities| capabilities.kernel_formats),
            extended_l2: capabilities.map(|capabilities| capabilities.extended_l2),
            owns_output: false,
        }
    }
}

/// The findings of a look.
#[derive(Debug)]
pub(crate) struct HostFacts {
    /// The violations.
    pub(crate) report: Report,
    /// The disks and backing files that the VM would hold while it runs.
    pub(crate) claims: Vec<HostClaim>,
    /// The limit of the host that kept a file from being looked at. The violations do not cover
    /// that file then.
    pub(crate) limit: Option<HostLimit>,
}

impl HostFacts {
    /// Looks at one file. A problem with the file is a violation of `field`.
    fn inspect(&mut self, visitor: &Visitor, field: &str, path: &Path, access: Access) -> Option<FileFacts> {
        if !visitor.may_touch(path) {
            return None;
        }
        match files::inspect(path, access) {
            Ok(facts) => return Some(facts),
            Err(problem) => match problem.limit() {
                Some(limit) => self.limit = Some(limit),
                None => self.report.reject(field, problem.to_string()),
            },
        }
        None
    }

    /// Notes that the contents of the file at `path` cannot be read.
    fn unreadable(&mut self, field: impl Into<String>, path: &Path, error: &std::io::Error) {
        match HostLimit::of(error) {
            Some(limit) => self.limit = Some(limit),
            None => self.report.reject(field, format!("{} cannot be read: {error}", path.display())),
        }
    }
}

/// The error of a look whose files did not answer within [`LOOK_DEADLINE`], or that found too many
/// earlier looks still waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the host's files do not answer: check the devices and servers that hold the kernel and the disks, and try again"
)]
pub(crate) struct FilesSilent;

/// Returns the claims on the disks of a VM that runs while its files do not answer. The disks are
/// claimed by the paths on record.
pub(crate) fn claims_by_path(spec: &VmSpec) -> Vec<HostClaim> {
    let claim = |disk: &Disk| HostClaim::Path { path: disk.path.clone(), writable: !disk.read_only };
    spec.disks.iter().map(claim).collect()
}

/// Waits for `look`, and drops `slot` if the look is slow. A slot limits the VMs that need
/// processor time together, and a VM that waits for its files needs none. The permits of looks
/// limit those VMs.
pub(crate) async fn without_slot_if_slow<S, T>(slot: S, look: impl Future<Output = T>) -> (T, Option<S>) {
    let mut look = std::pin::pin!(look);
    match tokio::time::timeout(PERMITS.after, &mut look).await {
        Ok(found) => (found, Some(slot)),
        Err(_) => {
            drop(slot);
            (look.await, None)
        }
    }
}

/// Looks at every file of `files`, and returns within [`LOOK_DEADLINE`].
///
/// # Errors
///
/// Returns [`FilesSilent`] if the files do not answer in time.
pub(crate) async fn look(files: NamedFiles, terms: Terms) -> Result<HostFacts, FilesSilent> {
    let looking = move |visitor: &Visitor| look_blocking(visitor, &files, terms);
    terms.purpose.looks().within(LOOK_DEADLINE, looking).await
}

fn look_blocking(visitor: &Visitor, files: &NamedFiles, terms: Terms) -> HostFacts {
    let NamedFiles { kernel, initrd, disks, console, names_root } = files;
    let mut found = HostFacts { report: Report::default(), claims: Vec::new(), limit: None };
    if let Some(kernel) = kernel {
        look_at_kernel(visitor, &mut found, kernel, terms.kernels);
    }
    if let Some(initrd) = initrd {
        found.inspect(visitor, "config.boot.initrd_path", initrd, Access::Read);
    }
    for disk in disks {
        let adds_root = disk.is_root && !names_root;
        disk::look_at(visitor, &mut found, disk, adds_root, terms);
    }
    if let Console::File(path) = console {
        look_at_output(visitor, &mut found.report, path, terms.owns_output);
    }
    found
}

fn look_at_kernel(visitor: &Visitor, found: &mut HostFacts, path: &Path, accepted: Option<&[KernelFormat]>) {
    const FIELD: &str = "config.boot.kernel_path";
    if found.inspect(visitor, FIELD, path, Access::Read).is_none() {
        return;
    }
    let Some(accepted) = accepted else { return };
    let kind = match kernel::read_kind(path) {
        Ok(kind) => kind,
        Err(error) => return found.unreadable(FIELD, path, &error),
    };
    let (usable_as, what): (&[KernelFormat], _) = match kind {
        KernelKind::BzImage => (&[KernelFormat::BzImage], KernelFormat::BzImage.as_str()),
        KernelKind::ElfX86_64 { pvh: false } => (&[KernelFormat::Elf], KernelFormat::Elf.as_str()),
        KernelKind::ElfX86_64 { pvh: true } => {
            (&[KernelFormat::Elf, KernelFormat::PvhElf], KernelFormat::PvhElf.as_str())
        }
        KernelKind::Other => (&[], "neither a bzImage nor an x86-64 ELF file"),
    };
    if !usable_as.iter().any(|format| accepted.contains(format)) {
        let wanted = accepted.iter().map(|format| format.as_str()).collect::<Vec<_>>().join(" or ");
        let message = format!("{} is {what}; this backend boots {wanted}", path.display());
        found.report.reject(FIELD, message);
    }
}

/// Looks at the file that receives the console, and at the folder in which BootVm makes that file.
fn look_at_output(visitor: &Visitor, report: &mut Report, path: &Path, owned: bool) {
    const FIELD: &str = "config.console.output";
    if !visitor.may_touch(path) {
        return;
    }
    let refuse = |report: &mut Report, why: String| report.reject(FIELD, why);
    match std::fs::symlink_metadata(path) {
        Ok(found) if owned && found.is_file() => {
            if let Err(error) = files::may_write(path) {
                let why = format!("the daemon's user may not write {}: {error}", path.display());
                refuse(report, format!("{why}; give it to the daemon's user, or remove it"));
            }
        }
        Ok(found) if found.is_dir() => {
            refuse(report, format!("{} is a directory: name a new file in it", path.display()));
        }
        Ok(_) => {
            let why = format!("{} exists and was not made by this VM", path.display());
            refuse(report, format!("{why}: name a new file, or leave output empty"));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // The kernel makes no file by a name that ends in a slash.
            if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
                return refuse(report, format!("{} names a directory: name a file", path.display()));
            }
            let Some(folder) = path.parent().filter(|folder| folder.is_dir()) else {
                let why = format!("the folder of {} does not exist: make it first", path.display());
                return refuse(report, why);
            };
            if let Err(error) = files::may_write_into(folder) {
                let why = format!("the daemon's user may not make a file in {}: {error}", folder.display());
                refuse(report, format!("{why}; let that user write there, or name another folder"));
            }
        }
        Err(error) => refuse(report, format!("{} cannot be examined: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_look_that_is_slow_gives_up_the_slot_of_its_vm() {
        let slots = Semaphore::new(1);
        let quick = without_slot_if_slow(slots.acquire().await.unwrap(), async { 1 }).await;
        assert!(matches!(quick, (1, Some(_))));
        assert_eq!(slots.available_permits(), 0, "the VM goes on with it");
        drop(quick);
        let slow = async {
            tokio::time::sleep(LOOK_DEADLINE).await;
            slots.available_permits()
        };
        let slow = without_slot_if_slow(slots.acquire().await.unwrap(), slow).await;
        assert!(matches!(slow, (1, None)), "it was free while the look waited");
    }
}
