//! The files on the host that a configuration names: whether each is there and is what the configuration says.
//!
//! CreateVm and ValidateVm look before anything is touched, and what they find are violations. BootVm looks again, because
//! files change, and takes the claims that keep two running VMs apart.
//!
//! Files may lie where nothing answers: [`looks`] bounds the threads that wait for them, and a deadline the caller's wait. Only
//! the paths of clients pass through here: the daemon's own files never wait for a seat.

mod disk;
mod looks;

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use vmm_core::backend::KernelFormat;
use vmm_core::report::Report;
use vmm_core::spec::{Console, Disk, NamedFiles, VmSpec};
use vmm_core::store::HostClaim;
use vmm_host::files::{self, Access, FileFacts};
use vmm_host::kernel::{HEAD_BYTES, KernelKind, kernel_kind};
use vmm_host::mounts::Mounts;

use looks::{Limits, Looks, Visitor};

/// No look takes longer.
pub(crate) const LOOK_DEADLINE: Duration = Duration::from_secs(3);
/// The seats of looks for one purpose. The runtime has some 500 threads for everything.
const SEATS: Limits = Limits { quick: 32, slow: 160, slow_of_a_mount: 16, after: Duration::from_millis(250) };

/// The reason for a look at files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A client wants to create a VM: a raw disk must not begin as an image of another format.
    Create,
    /// A VM is started, or was found running: a raw disk's contents are the guest's business.
    Boot,
}

impl Purpose {
    /// Returns the seats for looks of this purpose. Each purpose has its own, so that calls of CreateVm and ValidateVm which
    /// hang keep no VM from starting.
    fn looks(self) -> &'static Arc<Looks> {
        fn seats() -> Arc<Looks> {
            Arc::new(Looks::new(SEATS, |path| Mounts::read().served_by(path)))
        }
        static CREATE: LazyLock<Arc<Looks>> = LazyLock::new(seats);
        static BOOT: LazyLock<Arc<Looks>> = LazyLock::new(seats);
        match self {
            Self::Create => &CREATE,
            Self::Boot => &BOOT,
        }
    }
}

/// The purpose of a look at the files.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// The reason for the look.
    pub(crate) purpose: Purpose,
    /// The kernels that the backend boots, where the backend is known.
    pub(crate) kernels: Option<&'static [KernelFormat]>,
    /// True if this VM made the console's file itself.
    pub(crate) owns_output: bool,
}

/// The finding of a look.
#[derive(Debug)]
pub(crate) struct HostFacts {
    /// Violations.
    pub(crate) report: Report,
    /// The disks and backing files that the VM would hold while it runs.
    pub(crate) claims: Vec<HostClaim>,
}

/// The files did not answer within [`LOOK_DEADLINE`], or too many earlier looks still wait for theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the host's files do not answer: check the devices and servers that hold the kernel and the disks, and try again"
)]
pub(crate) struct FilesSilent;

/// Returns the claims on the disks of a VM that runs while its files do not answer: by the paths on record.
pub(crate) fn claims_by_path(spec: &VmSpec) -> Vec<HostClaim> {
    let claim = |disk: &Disk| HostClaim::Path { path: disk.path.clone(), writable: !disk.read_only };
    spec.disks.iter().map(claim).collect()
}

/// Waits for `look`, and gives up `slot` where the look is slow: a slot bounds the VMs that need processor time together, and
/// one that waits for its files needs none. Those are bounded by the seats of looks.
pub(crate) async fn without_slot_if_slow<S, T>(slot: S, look: impl Future<Output = T>) -> (T, Option<S>) {
    let mut look = std::pin::pin!(look);
    match tokio::time::timeout(SEATS.after, &mut look).await {
        Ok(found) => (found, Some(slot)),
        Err(_) => {
            drop(slot);
            (look.await, None)
        }
    }
}

/// Looks at every file of `files`, and answers within [`LOOK_DEADLINE`].
///
/// # Errors
///
/// [`FilesSilent`].
pub(crate) async fn look(files: NamedFiles, terms: Terms) -> Result<HostFacts, FilesSilent> {
    let looking = move |visitor: &Visitor| look_blocking(visitor, &files, terms);
    terms.purpose.looks().within(LOOK_DEADLINE, looking).await
}

fn look_blocking(visitor: &Visitor, files: &NamedFiles, terms: Terms) -> HostFacts {
    let NamedFiles { kernel, initrd, disks, console } = files;
    let mut report = Report::default();
    if let Some(kernel) = kernel {
        look_at_kernel(visitor, &mut report, kernel, terms.kernels);
    }
    if let Some(initrd) = initrd {
        inspect(visitor, &mut report, "config.boot.initrd_path", initrd, Access::Read);
    }
    let mut claims = Vec::new();
    for disk in disks {
        disk::look_at(visitor, &mut report, &mut claims, disk, terms.purpose);
    }
    if let Console::File(path) = console {
        look_at_output(visitor, &mut report, path, terms.owns_output);
    }
    HostFacts { report, claims }
}

fn inspect(
    visitor: &Visitor,
    report: &mut Report,
    field: &str,
    path: &Path,
    access: Access,
) -> Option<FileFacts> {
    if !visitor.may_touch(path) {
        return None;
    }
    match files::inspect(path, access) {
        Ok(facts) => Some(facts),
        Err(problem) => {
            report.reject(field, problem.to_string());
            None
        }
    }
}

fn look_at_kernel(visitor: &Visitor, report: &mut Report, path: &Path, accepted: Option<&[KernelFormat]>) {
    const FIELD: &str = "config.boot.kernel_path";
    if inspect(visitor, report, FIELD, path, Access::Read).is_none() {
        return;
    }
    let Some(accepted) = accepted else { return };
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

fn look_at_output(visitor: &Visitor, report: &mut Report, path: &Path, owned: bool) {
    const FIELD: &str = "config.console.output";
    if !visitor.may_touch(path) {
        return;
    }
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
