//! The files on the host that a configuration names: checks that each exists and is of the kind
//! that the configuration states.
//!
//! CreateVm and ValidateVm check the files before anything is touched, and report their findings as
//! violations. BootVm checks again, because files change, and takes the claims that keep two
//! running VMs apart.
//!
//! Files may lie on a device or server that does not answer. [`permits`] bounds the threads that
//! wait for them, and a deadline bounds the caller's wait. Only the paths of clients pass through
//! this module, and the daemon's own files never wait for a permit.

mod disk;
mod permits;

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use vmm_core::backend::{Capabilities, KernelFormat};
use vmm_core::limit::HostLimit;
use vmm_core::report::CheckReport;
use vmm_core::spec::{Console, Disk, NamedFiles, VmSpec};
use vmm_core::store::HostClaim;
use vmm_host::files::{self, Access, FileFacts};
use vmm_host::kernel::{self, KernelKind};
use vmm_host::mounts::MountTable;

use permits::{FileCheck, FileCheckPermits, PermitLimits};

/// The time that a file check may take.
pub(crate) const FILE_CHECK_TIMEOUT: Duration = Duration::from_secs(3);
/// The permits of a service's file checks for one purpose. The runtime has some 500 threads in all.
const PERMITS: PermitLimits =
    PermitLimits { quick: 32, slow: 160, slow_of_a_mount: 16, quick_limit: Duration::from_millis(250) };

/// The reason for a file check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileCheckPurpose {
    /// A client creates a VM: a raw disk must not begin as an image of another format.
    Create,
    /// A VM is started, or was found running: the guest may have written anything to a raw disk.
    Boot,
}

/// The mounts of this process, for all services in it.
static MOUNTS: LazyLock<MountTable> = LazyLock::new(MountTable::default);

/// The file checks of one service. Each purpose has its own permits, so that hanging calls of
/// CreateVm and ValidateVm keep no VM from starting.
pub(crate) struct FileChecks {
    create: Arc<FileCheckPermits>,
    boot: Arc<FileCheckPermits>,
}

impl Default for FileChecks {
    fn default() -> Self {
        let permits = || Arc::new(FileCheckPermits::new(PERMITS, |path| MOUNTS.now().served_by(path)));
        Self { create: permits(), boot: permits() }
    }
}

impl FileChecks {
    /// Returns the permits for file checks of `purpose`.
    fn permits(&self, purpose: FileCheckPurpose) -> &Arc<FileCheckPermits> {
        match purpose {
            FileCheckPurpose::Create => &self.create,
            FileCheckPurpose::Boot => &self.boot,
        }
    }

    /// Checks every file of `files`, and returns within [`FILE_CHECK_TIMEOUT`].
    ///
    /// # Errors
    ///
    /// Returns [`FilesTimedOut`] if the files do not answer in time.
    pub(crate) fn check(
        &self,
        files: NamedFiles,
        terms: FileCheckTerms,
    ) -> impl Future<Output = Result<FileFindings, FilesTimedOut>> + use<> {
        let permits = Arc::clone(self.permits(terms.purpose));
        let check = move |file_check: &FileCheck| check_files_blocking(file_check, &files, terms);
        async move { permits.run_within(FILE_CHECK_TIMEOUT, check).await }
    }
}

/// The purpose of a file check, and the formats that the backend accepts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FileCheckTerms {
    /// The reason for the file check.
    pub(crate) purpose: FileCheckPurpose,
    /// The kernel formats that the backend boots, if the backend is known.
    pub(crate) kernels: Option<&'static [KernelFormat]>,
    /// True if the backend reads extended entries of qcow2 images. `None` if the backend is not
    /// known.
    pub(crate) extended_l2: Option<bool>,
    /// True if this VM made the console's file itself.
    pub(crate) owns_output: bool,
}

impl FileCheckTerms {
    /// Returns the terms of a file check for a VM of the backend with `capabilities`, if that is
    /// known. The VM has made no file.
    pub(crate) fn of(purpose: FileCheckPurpose, capabilities: Option<&Capabilities>) -> Self {
        Self {
            purpose,
            kernels: capabilities.map(|capabilities| capabilities.kernel_formats),
            extended_l2: capabilities.map(|capabilities| capabilities.extended_l2),
            owns_output: false,
        }
    }
}

/// The findings of a file check.
#[derive(Debug)]
pub(crate) struct FileFindings {
    /// The violations.
    pub(crate) report: CheckReport,
    /// The disks and backing files that the VM would hold while it runs.
    pub(crate) claims: Vec<HostClaim>,
    /// The limit of the host that prevented the check of a file. The violations do not cover
    /// that file then.
    pub(crate) limit: Option<HostLimit>,
}

impl FileFindings {
    /// Looks at one file. A problem with the file is a violation of `field`.
    fn inspect(
        &mut self,
        file_check: &FileCheck,
        field: &str,
        path: &Path,
        access: Access,
    ) -> Option<FileFacts> {
        if !file_check.may_open(path) {
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

/// The error of a file check whose files did not answer within [`FILE_CHECK_TIMEOUT`], or that
/// found too many earlier file checks still waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the host's files do not answer: check the devices and servers that hold the kernel and the disks, and try again"
)]
pub(crate) struct FilesTimedOut;

/// Returns the claims on the disks of a VM that runs while its files do not answer. The disks are
/// claimed by the paths on record.
pub(crate) fn claims_by_path(spec: &VmSpec) -> Vec<HostClaim> {
    let claim = |disk: &Disk| HostClaim::Path { path: disk.path.clone(), writable: !disk.read_only };
    spec.disks.iter().map(claim).collect()
}

/// Waits for `check_files`, and drops `slot` if the file check is slow. A slot limits the VMs that
/// need processor time together, and a VM that waits for its files needs none. The permits of file
/// checks limit those VMs.
pub(crate) async fn without_slot_if_slow<S, T>(slot: S, check: impl Future<Output = T>) -> (T, Option<S>) {
    let mut check = std::pin::pin!(check);
    match tokio::time::timeout(PERMITS.quick_limit, &mut check).await {
        Ok(found) => (found, Some(slot)),
        Err(_) => {
            drop(slot);
            (check.await, None)
        }
    }
}

fn check_files_blocking(file_check: &FileCheck, files: &NamedFiles, terms: FileCheckTerms) -> FileFindings {
    let NamedFiles { kernel, initrd, disks, console, names_root } = files;
    let mut found = FileFindings { report: CheckReport::default(), claims: Vec::new(), limit: None };
    if let Some(kernel) = kernel {
        check_kernel(file_check, &mut found, kernel, terms.kernels);
    }
    if let Some(initrd) = initrd {
        found.inspect(file_check, "config.boot.initrd_path", initrd, Access::Read);
    }
    for disk in disks {
        let adds_root = disk.is_root && !names_root;
        disk::check_disk(file_check, &mut found, disk, adds_root, terms);
    }
    if let Console::File(path) = console {
        check_output(file_check, &mut found.report, path, terms.owns_output);
    }
    found
}

fn check_kernel(
    file_check: &FileCheck,
    found: &mut FileFindings,
    path: &Path,
    accepted: Option<&[KernelFormat]>,
) {
    const FIELD: &str = "config.boot.kernel_path";
    if found.inspect(file_check, FIELD, path, Access::Read).is_none() {
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
        // The most common mistake has a remedy that a user of distributions seldom knows.
        let remedy = match kind {
            KernelKind::BzImage => {
                ", which the script extract-vmlinux of the Linux sources makes of a bzImage"
            }
            KernelKind::ElfX86_64 { .. } | KernelKind::Other => "",
        };
        let message = format!("{} is {what}; this backend boots {wanted}{remedy}", path.display());
        found.report.reject(FIELD, message);
    }
}

/// Checks the file that receives the console, and at the folder in which BootVm makes that file.
fn check_output(file_check: &FileCheck, report: &mut CheckReport, path: &Path, owned: bool) {
    const FIELD: &str = "config.console.output";
    if !file_check.may_open(path) {
        return;
    }
    let refuse = |report: &mut CheckReport, why: String| report.reject(FIELD, why);
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
    use std::sync::mpsc::channel;

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn hanging_file_checks_of_one_service_do_not_delay_another() {
        let (hangs, other) = (FileChecks::default(), FileChecks::default());
        // The threads are those of another runtime, whose file checks this runtime cannot wait for:
        // its paused clock passes every deadline while it waits for a permit that another runtime
        // holds.
        let elsewhere = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let elsewhere = elsewhere.unwrap();
        let (entered, inside) = channel();
        let mut gates = Vec::new();
        for _ in 0..PERMITS.quick {
            let (gate, opened) = channel::<()>();
            let opened = Arc::new(std::sync::Mutex::new(opened));
            gates.push(gate);
            let (permits, entered) = (Arc::clone(&hangs.create), entered.clone());
            elsewhere.spawn(async move {
                let hanging = move |_: &FileCheck| {
                    let _ = entered.send(());
                    let _ = opened.lock().unwrap().recv();
                };
                permits.run_within(FILE_CHECK_TIMEOUT, hanging).await
            });
        }
        (0..PERMITS.quick).for_each(|_| inside.recv().unwrap());
        let terms = FileCheckTerms::of(FileCheckPurpose::Create, None);
        let console = Console::Off;
        let files = NamedFiles { kernel: None, initrd: None, disks: Vec::new(), console, names_root: false };
        let checked = other.check(files, terms).await;
        drop(gates);
        elsewhere.shutdown_background();
        assert!(checked.is_ok(), "the other service has permits of its own");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_file_check_gives_up_the_start_slot_of_its_vm() {
        let slots = Semaphore::new(1);
        let quick = without_slot_if_slow(slots.acquire().await.unwrap(), async { 1 }).await;
        assert!(matches!(quick, (1, Some(_))));
        assert_eq!(slots.available_permits(), 0, "the VM goes on with it");
        drop(quick);
        let slow = async {
            tokio::time::sleep(FILE_CHECK_TIMEOUT).await;
            slots.available_permits()
        };
        let slow = without_slot_if_slow(slots.acquire().await.unwrap(), slow).await;
        assert!(matches!(slow, (1, None)), "it was free while the file check waited");
    }
}
