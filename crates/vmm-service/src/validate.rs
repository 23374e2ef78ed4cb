//! The checks of CreateVm, from the configuration of the client to the one in force. ValidateVm
//! runs these checks alone.
//!
//! ```text
//!   count ──► resolve ──► parse ──► the backend's check ──► check of the host's files
//!     │        defaults     │         only what parses            whatever files were named
//!     └ refuses what is     └───────────────── one report ─────────────────┘
//!       too much to check
//! ```

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use vmm_core::backend::Backend;
use vmm_core::config::{BootConfig, VmConfig};
use vmm_core::id::VmUid;
use vmm_core::kind::VmKind;
use vmm_core::report::CheckReport;
use vmm_core::spec::{MacAddr, VmSpec, too_many};
use vmm_core::store::VmRequest;

use crate::check::{FileCheckPurpose, FileCheckTerms};
use crate::error::ServiceError;
use crate::places;
use crate::settings::DefaultBoot;
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
    // The files are looked at even if the configuration is refused already, so that the client gets
    // every problem at once.
    let terms =
        FileCheckTerms::of(FileCheckPurpose::Create, backend.as_ref().map(|backend| backend.capabilities()));
    match shared.file_checks.check(files, terms).await {
        Ok(mut facts) => {
            name_default_boot(&mut facts.report, &requested.config, &config);
            report.merge(facts.report);
            if let Some(limit) = facts.limit.filter(|_| report.is_ok()) {
                let text = format!("the host's files could not be examined: {}", limit.advice());
                return Err(ServiceError::exhausted(text));
            }
        }
        Err(silent) if report.is_ok() => return Err(ServiceError::unavailable(silent.to_string())),
        // The client has to correct the request first.
        Err(_) => {}
    }
    Ok(CheckedRequest { config, report, accepted: spec.and(backend) })
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

/// Fills in the values that the client left to the program: the default kernel, device ids, MACs
/// and TAP names.
fn resolve(sent: &VmConfig, uid: VmUid, defaults: &DefaultBoot) -> VmConfig {
    let mut config = sent.clone();
    let boot = config.boot.get_or_insert_with(BootConfig::default);
    if boot.kernel_path.is_empty()
        && !boot.boot_options.contains_key("firmware")
        && !defaults.kernel.is_empty()
    {
        boot.kernel_path.clone_from(&defaults.kernel);
        boot.initrd_path.clone_from(&defaults.initrd);
        if boot.kernel_args.is_empty() {
            boot.kernel_args.clone_from(&defaults.kernel_args);
        }
    }
    fill_ids(config.storage.iter_mut().map(|disk| &mut disk.id), "disk");
    fill_ids(config.network.iter_mut().map(|nic| &mut nic.id), "net");
    for (index, nic) in config.network.iter_mut().enumerate() {
        if nic.mac_address.is_empty() {
            nic.mac_address = MacAddr(uid.mac(index)).to_string();
        }
        if nic.tap_device.is_empty() {
            nic.tap_device = uid.tap_name(index);
        }
    }
    config
}

/// Names devices `disk0`, `disk1` … by their position, and skips names that are taken.
fn fill_ids<'a>(ids: impl Iterator<Item = &'a mut String>, prefix: &str) {
    let ids: Vec<&mut String> = ids.collect();
    let mut taken: HashSet<String> = ids.iter().map(|id| id.to_string()).collect();
    // A number that is taken for one device is taken for all that follow, so the numbers are walked
    // once.
    let mut next = 0;
    for (index, id) in ids.into_iter().enumerate() {
        if !id.is_empty() {
            continue;
        }
        next = next.max(index);
        while !taken.insert(format!("{prefix}{next}")) {
            next += 1;
        }
        *id = format!("{prefix}{next}");
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_core::config::{NetworkInterface, StorageDevice};

    use super::*;

    fn uid() -> VmUid {
        VmUid::new(Uuid::now_v7())
    }

    #[test]
    fn omitted_names_are_generated_and_given_names_are_kept() {
        let named = StorageDevice { id: "disk0".to_owned(), ..StorageDevice::default() };
        let tap = NetworkInterface { tap_device: "tap0".to_owned(), ..NetworkInterface::default() };
        let sent = VmConfig {
            storage: vec![StorageDevice::default(), named],
            network: vec![NetworkInterface::default(), tap],
            ..VmConfig::default()
        };
        let uid = uid();
        let config = resolve(&sent, uid, &DefaultBoot::default());
        let ids: Vec<_> = config.storage.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk1", "disk0"]);
        assert_ne!(config.network[0].mac_address, config.network[1].mac_address);
        assert_eq!(config.network[1].id, "net1");
        let taps: Vec<_> = config.network.iter().map(|nic| nic.tap_device.as_str()).collect();
        assert_eq!(taps, [uid.tap_name(0).as_str(), "tap0"]);
    }

    #[test]
    fn hundreds_of_thousands_of_devices_are_completed_in_one_pass() {
        let mut ids = vec![String::new(); 381_000];
        ids[380_999] = "disk7".to_owned();
        fill_ids(ids.iter_mut(), "disk");
        assert_eq!((ids[6].as_str(), ids[7].as_str(), ids[8].as_str()), ("disk6", "disk8", "disk9"));
        let distinct: HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
    }

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

    #[test]
    fn the_default_kernel_is_used_only_without_a_kernel() {
        let defaults = DefaultBoot {
            kernel: "/k".to_owned(),
            initrd: "/i".to_owned(),
            kernel_args: "console=ttyS0".to_owned(),
        };
        let filled = resolve(&VmConfig::default(), uid(), &defaults).boot.unwrap();
        assert_eq!((filled.kernel_path.as_str(), filled.initrd_path.as_str()), ("/k", "/i"));
        assert_eq!(filled.kernel_args, "console=ttyS0");
        let own = BootConfig { kernel_path: "/own".to_owned(), ..BootConfig::default() };
        let kept = resolve(&VmConfig { boot: Some(own.clone()), ..VmConfig::default() }, uid(), &defaults);
        assert_eq!(kept.boot, Some(own), "defaults are used together or not at all");
    }
}
