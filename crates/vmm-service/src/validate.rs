//! The checks of CreateVm, from the configuration of the client to the one in force. ValidateVm
//! runs these checks alone.
//!
//! ```text
//!   count ──► resolve ──► parse ──► the backend's check ──► check of the host's files
//!     │        defaults     │         only what parses            whatever files were named
//!     └ refuses what is     └───────────────── one report ─────────────────┘
//!       too much to check
//! ```

use std::sync::{Arc, LazyLock};

use vmm_core::backend::Backend;
use vmm_core::config::VmConfig;
use vmm_core::config_part::ConfigPart;
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::{Console, Disk, NamedFiles, VmSpec, too_many};
use vmm_core::store::{VmRecord, VmRequest};

use crate::check::{FileCheckPurpose, FileCheckTerms};
use crate::error::ServiceError;
use crate::failure::Failure;
use crate::places;
use crate::resolve::resolve;
use crate::shared::Shared;

/// The amount of memory, in bytes, below which no Linux guest starts.
const SMALL_MEMORY: u64 = 16 << 20;

/// The findings of all checks.
pub(crate) struct CheckedRequest {
    /// The configuration in force.
    pub(crate) config: VmConfig,
    /// The violations and warnings.
    pub(crate) report: CheckReport,
    /// The backend, if both it and the configuration are valid.
    pub(crate) accepted: Option<Arc<dyn Backend>>,
}

/// Runs every check of CreateVm and collects every finding. Touches nothing, and takes time linear
/// in the request.
///
/// # Errors
///
/// Returns [`ServiceError::Unavailable`] if the host's files do not answer, and
/// [`ServiceError::Exhausted`] if a limit of the host prevents the file check, in both cases only
/// if there is no other violation.
pub(crate) async fn check_config(
    shared: &Shared,
    uid: VmUid,
    requested: &VmRequest,
) -> Result<CheckedRequest, ServiceError> {
    if let Some(report) = too_many(&requested.config) {
        return Ok(CheckedRequest { config: VmConfig::default(), report, accepted: None });
    }
    let config = resolve(&requested.config, uid, &shared.settings.default_boot);
    let mut report = CheckReport::default();
    let backend =
        shared.backends.get(&requested.backend).map_err(|problem| report.reject("backend", problem)).ok();
    let (spec, files) = VmSpec::parse_with_files(&config);
    let spec = spec.map_err(|violations| report.merge(violations)).ok();
    if let Some(Err(import_only)) = backend.as_deref().map(places::refuse_import_only) {
        report.reject("backend", import_only.to_string());
    }
    if let Some(spec) = &spec {
        report.merge(check_spec(shared, backend.as_deref(), spec, uid));
    }
    let terms =
        FileCheckTerms::of(FileCheckPurpose::Create, backend.as_ref().map(|backend| backend.capabilities()));
    check_named_files(shared, &mut report, files, terms, &requested.config, &config).await?;
    Ok(CheckedRequest { config, report, accepted: spec.and(backend) })
}

/// A new configuration of a VM on record.
#[derive(Clone, Copy)]
pub(crate) struct ConfigRevision<'a> {
    /// The VM with its present configuration.
    pub(crate) record: &'a VmRecord,
    /// The new configuration before the program's own values were filled in.
    pub(crate) sent: &'a VmConfig,
    /// The new configuration.
    pub(crate) config: &'a VmConfig,
    /// The parts that differ from the present configuration.
    pub(crate) changed: &'a [ConfigPart],
}

/// Runs the checks of CreateVm on a new configuration of a VM on record, with two differences. Only
/// files that the change names are looked at, because the guest may have written anything to the
/// disks that stay. A change that leaves the machine as it is is not refused for a violation of
/// another part, because it could not cause one.
///
/// # Errors
///
/// As [`check_config`].
pub(crate) async fn check_revision(
    shared: &Shared,
    backend: &dyn Backend,
    revision: ConfigRevision<'_>,
) -> Result<CheckReport, ServiceError> {
    let ConfigRevision { record, sent, config, changed } = revision;
    if let Some(report) = too_many(config) {
        return Ok(report);
    }
    let mut report = CheckReport::default();
    let (spec, files) = VmSpec::parse_with_files(config);
    match spec {
        Ok(spec) => report.merge(check_spec(shared, Some(backend), &spec, record.uid)),
        Err(violations) => report.merge(violations),
    }
    let concerns = |field: &str| changed.iter().any(|part| part.holds(field));
    if record.imported {
        report.keep(concerns, concerns);
    } else if !changed.iter().any(|part| part.is_machine()) {
        report.keep(concerns, |_| true);
    }
    let terms = FileCheckTerms::of(FileCheckPurpose::Create, Some(backend.capabilities()));
    let files = changed_files(files, revision);
    check_named_files(shared, &mut report, files, terms, sent, config).await?;
    Ok(report)
}

/// Returns those of `files` that a change names.
fn changed_files(files: NamedFiles, revision: ConfigRevision<'_>) -> NamedFiles {
    let ConfigRevision { record, config, changed, .. } = revision;
    let is_changed = |part: ConfigPart| changed.contains(&part);
    let NamedFiles { kernel, initrd, mut disks, console, names_root } = files;
    let stays = |disk: &Disk| {
        config.storage.get(disk.index).is_some_and(|device| record.config.storage.contains(device))
    };
    disks.retain(|disk| is_changed(ConfigPart::Storage) && !stays(disk));
    // A console whose file stays is not looked at, because the VM may have made the file. A new file
    // must not exist.
    let output = |config: &VmConfig| config.console.as_ref().map(|console| console.output.clone());
    let same_output = output(config) == output(&record.config);
    NamedFiles {
        kernel: kernel.filter(|_| is_changed(ConfigPart::Boot)),
        initrd: initrd.filter(|_| is_changed(ConfigPart::Boot)),
        disks,
        console: if same_output { Console::Off } else { console },
        names_root,
    }
}

/// Looks at `files` and adds the findings to `report`. The files are looked at even if the
/// configuration is refused already, so that the client gets every problem at once. `config` is the
/// configuration that `sent` was resolved to.
async fn check_named_files(
    shared: &Shared,
    report: &mut CheckReport,
    files: NamedFiles,
    terms: FileCheckTerms,
    sent: &VmConfig,
    config: &VmConfig,
) -> Result<(), ServiceError> {
    match shared.file_checks.check(files, terms).await {
        Ok(mut facts) => {
            name_default_boot(&mut facts.report, sent, config);
            report.merge(facts.report);
            if let Some(limit) = facts.limit.filter(|_| report.is_ok()) {
                return Err(Failure::FilesNotExamined { limit }.into());
            }
            Ok(())
        }
        Err(silent) if report.is_ok() => Err(Failure::FilesTimedOut(silent).into()),
        // The client has to correct the request first.
        Err(_) => Ok(()),
    }
}

/// Names the settings in the violations of files that the host named instead of the client.
/// `config` is the configuration that `sent` was resolved to.
fn name_default_boot(report: &mut CheckReport, sent: &VmConfig, config: &VmConfig) {
    // The default kernel and the default initial RAM disk are used together.
    let kernel = |config: &VmConfig| config.boot.as_ref().map(|boot| boot.kernel_path.clone());
    if kernel(sent).unwrap_or_default() == kernel(config).unwrap_or_default() {
        return;
    }
    for violation in &mut report.violations {
        let setting = match violation.field.as_str() {
            "config.boot.kernel_path" => "UNKEY_VMCP_DEFAULT_KERNEL",
            "config.boot.initrd_path" => "UNKEY_VMCP_DEFAULT_INITRD",
            _ => continue,
        };
        violation.message.push_str(&format!("; the host names this file by {setting}"));
    }
}

/// Returns every finding on `spec` that needs no file check: those of the backend, and the
/// warnings about the host and about other VMs. CreateVm, its repetition and ValidateVm therefore
/// give the same warnings.
pub(crate) fn check_spec(
    shared: &Shared,
    backend: Option<&dyn Backend>,
    spec: &VmSpec,
    uid: VmUid,
) -> CheckReport {
    let mut report = CheckReport::default();
    if let Some(backend) = backend {
        report.merge(backend.check(spec));
        backend.advise_on_host(spec, &mut report);
        advise_on_capacity(&mut report, spec, HostCapacity::of_this_host());
        let name = &backend.capabilities().name;
        if let Some(Err(reason)) = shared.backends.status(name).map(|status| status.health.version) {
            report.advise("backend", format!("{name} cannot serve now, and BootVm will fail: {reason}"));
        }
    }
    advise_on_network(shared, &mut report, backend, spec, uid);
    report
}

/// Warns about network interfaces that may not work as the client expects: BootVm could not make or
/// use their TAP, the TAP does not exist and so is in no bridge, or another VM has their address.
fn advise_on_network(
    shared: &Shared,
    report: &mut CheckReport,
    backend: Option<&dyn Backend>,
    spec: &VmSpec,
    uid: VmUid,
) {
    // The VMM of a managed VM opens its TAPs as the daemon's user. libvirt and a VMM of another
    // program open them themselves.
    let is_managed = backend.is_some_and(|backend| backend.kind_of_new(uid) == VmKind::Managed);
    let device = || if is_managed { shared.taps.may_open() } else { Ok(()) };
    for (index, (nic, tap)) in spec.nics.iter().zip(spec.tap_names(uid)).enumerate() {
        let field = format!("config.network[{index}].tap_device");
        if shared.taps.exists(&tap) {
            if let Err(error) = shared.taps.may_use(&tap) {
                report.advise(field, format!("BootVm will fail: {error}"));
            } else if let Err(fault) = device() {
                report.advise(field, format!("BootVm will fail: TAP {tap} cannot be used, because {fault}"));
            }
        } else if let Err(error) = shared.taps.may_make(&tap) {
            report.advise(field, format!("BootVm will fail: {error}"));
        } else if !uid.made_tap_name(&tap) {
            report.advise(
                field,
                format!("{tap} does not exist: BootVm makes it, without a bridge and without an address"),
            );
        }
        if let Some(other) = shared.index.other_with_mac(nic.mac, uid) {
            report.advise(
                format!("config.network[{index}].mac_address"),
                format!(
                    "{} is the address of VM \"{other}\" too: on one network, each would get frames that are \
                     for the other; leave mac_address empty, and a unique one is chosen",
                    nic.mac
                ),
            );
        }
    }
}

/// The memory and the CPUs of the host.
#[derive(Clone, Copy)]
struct HostCapacity {
    memory: u64,
    cpus: usize,
}

impl HostCapacity {
    fn of_this_host() -> Self {
        // The number of CPUs is asked for once, because the question reads files of the control
        // groups. If the number is not known, there is no warning.
        static CPUS: LazyLock<usize> =
            LazyLock::new(|| std::thread::available_parallelism().map_or(usize::MAX, std::num::NonZero::get));
        Self { memory: vmm_host::memory::total(), cpus: *CPUS }
    }
}

/// Warns about a size that is legal but that this host, or any guest, can hardly serve.
fn advise_on_capacity(report: &mut CheckReport, spec: &VmSpec, host: HostCapacity) {
    let size = spec.memory.size_bytes;
    if size > host.memory {
        report.advise(
            "config.memory.size_bytes",
            format!(
                "is more than this host has ({} bytes): BootVm may fail, or the guest may be killed",
                host.memory
            ),
        );
    } else if size < SMALL_MEMORY {
        report.advise(
            "config.memory.size_bytes",
            format!(
                "is too little for most guests: Linux does not start with less than {SMALL_MEMORY} bytes"
            ),
        );
    }
    if usize::try_from(spec.cpu.count).is_ok_and(|count| count > host.cpus) {
        report.advise(
            "config.cpu.vcpu_count",
            format!(
                "is more than the CPUs of this host ({}): the vCPUs take turns, and the guest is slow",
                host.cpus
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use vmm_core::config::BootConfig;

    use super::*;

    #[test]
    fn sizes_beyond_this_host_are_warnings() {
        use vmm_core::config::{CpuConfig, MemoryConfig};
        let host = HostCapacity { memory: 4 << 30, cpus: 2 };
        let warned = |vcpus, bytes| {
            let boot = BootConfig { kernel_path: "/k".to_owned(), ..BootConfig::default() };
            let config = VmConfig {
                cpu: Some(CpuConfig { vcpu_count: vcpus, ..CpuConfig::default() }),
                memory: Some(MemoryConfig { size_bytes: bytes, ..MemoryConfig::default() }),
                boot: Some(boot),
                ..VmConfig::default()
            };
            let mut report = CheckReport::default();
            advise_on_capacity(&mut report, &VmSpec::parse(&config).unwrap(), host);
            assert!(report.is_ok());
            report.warnings.into_iter().map(|warning| warning.field).collect::<Vec<_>>()
        };
        let (memory, cpu) = ("config.memory.size_bytes", "config.cpu.vcpu_count");
        assert_eq!(warned(2, 4 << 30), [""; 0]);
        assert_eq!(warned(2, 16 << 20), [""; 0]);
        assert_eq!(warned(1, 1 << 20), [memory]);
        assert_eq!(warned(200, 1 << 40), [memory, cpu]);
        assert!(HostCapacity::of_this_host().memory > 0 && HostCapacity::of_this_host().cpus > 0);
    }
}
