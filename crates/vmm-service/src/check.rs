//! The files on the host that a configuration names: whether each is there and is what the configuration says.
//!
//! CreateVm and ValidateVm look before anything is touched, and what they find are violations. BootVm looks again, because
//! files change, and takes the claims that keep two running VMs apart.
//!
//! ```text
//!   look ── a permit, within the deadline ──► thread: kernel, initrd, disks and their backing files, console
//!     │                                         └─ the permit comes back when the thread does, however late that is
//!     └── no permit, or no answer in time ──► FilesSilent
//! ```
//!
//! A file may lie on a server that does not answer, and then the thread that looks at it hangs for as long as the server is
//! silent. Nothing can end such a thread. So the permits bound the threads that hang, and the deadline bounds the caller's wait.
//! Only the paths of clients pass through here: the daemon's own files never wait for a permit.

mod disk;

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::sync::Semaphore;
use vmm_core::backend::KernelFormat;
use vmm_core::report::Report;
use vmm_core::spec::{Console, NamedFiles};
use vmm_core::store::HostClaim;
use vmm_host::files::{self, Access, FileFacts};
use vmm_host::kernel::{HEAD_BYTES, KernelKind, kernel_kind};

/// No look takes longer.
pub(crate) const LOOK_DEADLINE: Duration = Duration::from_secs(3);
/// The most threads that look at files for one purpose, hanging ones included. The runtime has some 500 for everything.
const THREADS: usize = 32;

/// The reason for a look at files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A client wants to create a VM: a raw disk must not begin as an image of another format.
    Create,
    /// A VM is started, or was found running: a raw disk's contents are the guest's business.
    Boot,
}

impl Purpose {
    /// Returns the permits for looks of this purpose. Each purpose has its own, so that calls of CreateVm and ValidateVm which
    /// hang keep no VM from starting.
    fn permits(self) -> &'static Arc<Semaphore> {
        static CREATE: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(THREADS)));
        static BOOT: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(THREADS)));
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

/// Looks at every file of `files`, and answers within [`LOOK_DEADLINE`].
///
/// # Errors
///
/// [`FilesSilent`].
pub(crate) async fn look(files: NamedFiles, terms: Terms) -> Result<HostFacts, FilesSilent> {
    let looking = move || look_blocking(&files, terms);
    within(LOOK_DEADLINE, terms.purpose.permits(), looking).await
}

/// Runs `work` on a thread that holds one of `permits` for as long as it runs.
async fn within<T: Send + 'static>(
    deadline: Duration,
    permits: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FilesSilent> {
    let worked = async {
        let permit = Arc::clone(permits).acquire_owned().await.map_err(|_| FilesSilent)?;
        let work = move || {
            let _held = permit;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| FilesSilent)
    };
    tokio::time::timeout(deadline, worked).await.unwrap_or(Err(FilesSilent))
}

fn look_blocking(files: &NamedFiles, terms: Terms) -> HostFacts {
    let NamedFiles { kernel, initrd, disks, console } = files;
    let mut report = Report::default();
    if let Some(kernel) = kernel {
        look_at_kernel(&mut report, kernel, terms.kernels);
    }
    if let Some(initrd) = initrd {
        inspect(&mut report, "config.boot.initrd_path", initrd, Access::Read);
    }
    let mut claims = Vec::new();
    for disk in disks {
        disk::look_at(&mut report, &mut claims, disk, terms.purpose);
    }
    if let Console::File(path) = console {
        look_at_output(&mut report, path, terms.owns_output);
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

fn look_at_kernel(report: &mut Report, path: &Path, accepted: Option<&[KernelFormat]>) {
    const FIELD: &str = "config.boot.kernel_path";
    if inspect(report, FIELD, path, Access::Read).is_none() {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_look_that_hangs_keeps_its_permit_until_its_thread_returns() {
        let permits = Arc::new(Semaphore::new(1));
        let (let_go, hang) = mpsc::channel::<()>();
        let hanging = move || {
            let _ = hang.recv();
        };
        let silent = within(SOON, &permits, hanging).await;
        assert_eq!(silent, Err(FilesSilent), "the caller waits no longer than the deadline");
        assert_eq!(permits.available_permits(), 0, "the thread still hangs");
        assert_eq!(within(SOON, &permits, || ()).await, Err(FilesSilent), "no more threads");
        drop(let_go);
        let permit = permits.acquire().await.unwrap();
        drop(permit);
        assert_eq!(within(LOOK_DEADLINE, &permits, || 7).await, Ok(7));
    }
}
