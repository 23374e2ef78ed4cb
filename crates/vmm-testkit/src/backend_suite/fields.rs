//! The documented fields of a configuration: each is served, ignored with a warning, emulated, or
//! refused.
//!
//! The backend's own `check` gives the expectation. The cases find out whether CreateVm and
//! ValidateVm give the same answer, and whether an accepted configuration boots and arrives at the
//! VMM.

use std::fmt::{Debug, Display};
use std::path::PathBuf;

use vmm_core::config::{BootConfig, CpuConfig, CpuTopology, MemoryConfig, VmConfig};
use vmm_core::report::{Treatment, Warning};
use vmm_core::spec::VmSpec;
use vmm_core::state::VmState;
use vmm_core::store::VmRequest;
use vmm_service::{ListQuery, ServiceError};

use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM};
use crate::guests::TinyGuest;

/// The answer of CreateVm to a configuration.
pub(super) enum Judgement {
    /// CreateVm has created the VM.
    Accepted(CaseVerdict),
    /// CreateVm has refused the configuration.
    Refused(CaseVerdict),
}

/// Creates a VM with `config` and compares the answer with the backend's `check`. `path` is the
/// field that the verdict is about.
pub(super) async fn judge(vms: &DaemonLife, config: &VmConfig, path: &str) -> Judgement {
    let expected = match VmSpec::parse(config) {
        Ok(spec) => vms.backend.check(&spec),
        Err(report) => report,
    };
    let requested = VmRequest { backend: String::new(), config: config.clone() };
    let validated = vms.service.validate(&requested).await.expect("the files answer");
    match vms.try_create(VM, config.clone()).await {
        Ok(created) => {
            assert_eq!(expected.violations, [], "accepted, though the backend refuses");
            assert_covers(&created.warnings, &expected.warnings);
            assert_eq!(validated.violations, [], "ValidateVm and CreateVm answer alike");
            assert_eq!(validated.warnings, created.warnings, "ValidateVm and CreateVm answer alike");
            Judgement::Accepted(verdict_of(&created.warnings, path))
        }
        Err(ServiceError::Invalid(violations)) => {
            assert_covers(&violations, &expected.violations);
            assert_eq!(validated.violations, violations, "ValidateVm and CreateVm answer alike");
            let about = violations.iter().find(|found| found.field.starts_with(path));
            let about = about.unwrap_or_else(|| panic!("nothing about {path}: {violations:?}"));
            assert!(matches!(vms.get(VM), Err(ServiceError::NotFound(_))), "the name is free");
            Judgement::Refused(CaseVerdict::Rejected(about.to_string()))
        }
        Err(other) => panic!("CreateVm fails: {other:?}"),
    }
}

/// Checks that `found` contains `expected`. The service adds findings of its own, so the two may
/// differ.
fn assert_covers<T: PartialEq + Display + Debug>(found: &[T], expected: &[T]) {
    for one in expected {
        assert!(found.contains(one), "{one} is missing in {found:?}");
    }
}

fn verdict_of(warnings: &[Warning], path: &str) -> CaseVerdict {
    let Some(warning) = warnings.iter().find(|found| found.field.starts_with(path)) else {
        return CaseVerdict::Served;
    };
    match warning.treatment {
        Treatment::Served => CaseVerdict::Served,
        Treatment::Ignored => CaseVerdict::Ignored(warning.to_string()),
        Treatment::Emulated => CaseVerdict::Emulated(warning.to_string()),
    }
}

/// Runs the case of one field. An accepted configuration is booted, and a served field must show in
/// the VMM's own description.
async fn field(vms: &DaemonLife, path: &str, change: impl FnOnce(&mut VmConfig)) -> CaseVerdict {
    let mut config = vms.config(TinyGuest::Idle);
    change(&mut config);
    field_of(vms, path, config).await
}

pub(super) async fn field_of(vms: &DaemonLife, path: &str, config: VmConfig) -> CaseVerdict {
    match judge(vms, &config, path).await {
        Judgement::Refused(verdict) => verdict,
        Judgement::Accepted(verdict) => {
            vms.boot(VM).await.expect("what is accepted boots");
            vms.console_shows(VM, &TinyGuest::Idle.banner(), 1).await;
            // An ignored field leaves nothing to look for at the VMM.
            if !matches!(verdict, CaseVerdict::Ignored(_)) {
                assert_evidence(vms).await;
            }
            verdict
        }
    }
}

/// Checks that the VMM's description of itself contains the evidence of the case.
pub(super) async fn assert_evidence(vms: &DaemonLife) {
    let view = vms.view(VM).await;
    for wanted in vms.column().evidence(vms.rig.case) {
        let wanted = wanted.replace("{dir}", &vms.rig.dir().display().to_string());
        let mut rest = Some(view.as_str());
        for part in wanted.split('…') {
            rest = rest.and_then(|rest| rest.split_once(part)).map(|(_, rest)| rest);
        }
        assert!(rest.is_some(), "{wanted} is not in {view}");
    }
}

fn cpu(config: &mut VmConfig) -> &mut CpuConfig {
    config.cpu.get_or_insert_default()
}

fn memory(config: &mut VmConfig) -> &mut MemoryConfig {
    config.memory.get_or_insert_default()
}

fn boot(config: &mut VmConfig) -> &mut BootConfig {
    config.boot.get_or_insert_default()
}

fn write(vms: &DaemonLife, name: &str, content: &[u8]) -> PathBuf {
    let path = vms.rig.dir().join(name);
    std::fs::write(&path, content).expect("the file can be written");
    path
}

pub(super) async fn vcpu_count(vms: DaemonLife) -> CaseVerdict {
    field(&vms, "config.cpu.vcpu_count", |config| cpu(config).vcpu_count = 2).await
}

/// More vCPUs than the backend's limit are refused.
pub(super) async fn too_many_vcpus(vms: DaemonLife) -> CaseVerdict {
    let limit = vms.backend.capabilities().limits.get("max-vcpus").copied().expect("it names its limit");
    let count = i32::try_from(limit + 1).expect("the limit is a number of vCPUs");
    let verdict = field(&vms, "config.cpu.vcpu_count", |config| cpu(config).vcpu_count = count).await;
    assert!(matches!(verdict, CaseVerdict::Rejected(_)), "it is beyond its own limit: {verdict:?}");
    verdict
}

pub(super) async fn max_vcpu_count(vms: DaemonLife) -> CaseVerdict {
    field(&vms, "config.cpu.max_vcpu_count", |config| cpu(config).max_vcpu_count = 2).await
}

pub(super) async fn topology_threads(vms: DaemonLife) -> CaseVerdict {
    topology(&vms, 1, 2).await
}

pub(super) async fn topology_sockets(vms: DaemonLife) -> CaseVerdict {
    topology(&vms, 2, 1).await
}

async fn topology(vms: &DaemonLife, sockets: i32, threads_per_core: i32) -> CaseVerdict {
    let change = |config: &mut VmConfig| {
        cpu(config).vcpu_count = 2;
        cpu(config).topology = Some(CpuTopology { sockets, cores_per_socket: 1, threads_per_core });
    };
    field(vms, "config.cpu.topology", change).await
}

pub(super) async fn memory_size(vms: DaemonLife) -> CaseVerdict {
    field(&vms, "config.memory.size_bytes", |config| memory(config).size_bytes = 96 << 20).await
}

/// Changes the size of a VM that has not booted by UpdateVm, and finds the new size at the VMM. While
/// the VM runs, its labels change and its memory does not.
pub(super) async fn memory_updated(vms: DaemonLife) -> CaseVerdict {
    let mut larger = vms.config(TinyGuest::Idle);
    memory(&mut larger).size_bytes = 96 << 20;
    let larger = VmConfig { memory: larger.memory, ..VmConfig::default() };
    let mut labelled = VmConfig::default();
    labelled.metadata.insert("team".to_owned(), "blue".to_owned());
    if vms.column().imports() {
        vms.run_tiny(TinyGuest::Idle).await;
        vms.update(VM, labelled).await.expect("labels belong to this program");
        let refused = vms.update(VM, larger).await.expect_err("the machine does not");
        assert!(matches!(refused, ServiceError::Precondition(_)), "{refused:?}");
        return CaseVerdict::Rejected(
            "UpdateVm is FAILED_PRECONDITION: another program made the VM".to_owned(),
        );
    }
    vms.create(VM, vms.config(TinyGuest::Idle)).await;
    vms.update(VM, larger.clone()).await.expect("UpdateVm succeeds");
    vms.boot(VM).await.expect("what is accepted boots");
    vms.console_shows(VM, &TinyGuest::Idle.banner(), 1).await;
    assert_evidence(&vms).await;
    vms.update(VM, labelled).await.expect("labels can change while the VM runs");
    vms.update(VM, larger).await.expect("what is stored already is no change");
    let smaller = VmConfig { memory: vms.config(TinyGuest::Idle).memory, ..VmConfig::default() };
    let refused = vms.update(VM, smaller).await.expect_err("the VM runs");
    assert!(matches!(refused, ServiceError::Precondition(_)), "{refused:?}");
    let record = vms.record(VM);
    assert_eq!((record.state, &*record.config.metadata["team"]), (VmState::Running, "blue"));
    CaseVerdict::Served
}

pub(super) async fn memory_hotplug(vms: DaemonLife) -> CaseVerdict {
    let change = |config: &mut VmConfig| {
        memory(config).hotplug_enabled = true;
        memory(config).max_size_bytes = (64 + 128) << 20;
    };
    field(&vms, "config.memory.hotplug_enabled", change).await
}

pub(super) async fn memory_shared(vms: DaemonLife) -> CaseVerdict {
    let change = |config: &mut VmConfig| {
        memory(config).backing.insert("shared".to_owned(), "true".to_owned());
    };
    field(&vms, "config.memory.backing", change).await
}

pub(super) async fn memory_hugepages(vms: DaemonLife) -> CaseVerdict {
    let mut config = vms.config(TinyGuest::Idle);
    memory(&mut config).backing.insert("hugepages".to_owned(), "true".to_owned());
    let enough = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|free| free.trim().parse::<u64>().ok())
        .is_some_and(|free| free >= 64);
    if enough || !vms.column().is_real() {
        return field_of(&vms, "config.memory.backing", config).await;
    }
    match judge(&vms, &config, "config.memory.backing").await {
        Judgement::Refused(verdict) => verdict,
        // The configuration is legal, and this host cannot serve it. The boot must fail without a
        // trace, and the verdict stays open.
        Judgement::Accepted(_) => {
            let error = vms.boot(VM).await.expect_err("there are no huge pages");
            assert!(matches!(error, ServiceError::Precondition(_)), "{error:?}");
            assert!(vms.column().processes(&vms.rig.runtime_dir()).is_empty(), "nothing is left");
            CaseVerdict::NotRun("this host has no 64 free huge pages of 2 MiB".to_owned())
        }
    }
}

pub(super) async fn initrd(vms: DaemonLife) -> CaseVerdict {
    let initrd = write(&vms, "initrd.img", &[7; 8192]);
    let change = |config: &mut VmConfig| boot(config).initrd_path = initrd.display().to_string();
    field(&vms, "config.boot.initrd_path", change).await
}

pub(super) async fn kernel_args(vms: DaemonLife) -> CaseVerdict {
    field(&vms, "config.boot.kernel_args", |config| {
        boot(config).kernel_args = "console=ttyS0 reboot=k note=\"a,b\" -- one".to_owned();
    })
    .await
}

/// A kernel in the format of distributions is booted, or refused before anything is started. The
/// file of this case contains the first bytes only.
pub(super) async fn bzimage_kernel(vms: DaemonLife) -> CaseVerdict {
    let mut head = vec![0; 4096];
    // The boot flag, the magic number and the version (2.15) of the Linux boot protocol.
    head[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    head[0x202..0x206].copy_from_slice(b"HdrS");
    head[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    let kernel = write(&vms, "vmlinuz", &head);
    let mut config = vms.config(TinyGuest::Idle);
    boot(&mut config).kernel_path = kernel.display().to_string();
    match judge(&vms, &config, "config.boot.kernel_path").await {
        Judgement::Refused(verdict) | Judgement::Accepted(verdict) => verdict.without(vms.rig.dir()),
    }
}

pub(super) async fn unknown_key(vms: DaemonLife) -> CaseVerdict {
    let change = |config: &mut VmConfig| {
        memory(config).backing.insert("hugepage".to_owned(), "true".to_owned());
    };
    let verdict = field(&vms, "config.memory.backing", change).await;
    assert!(
        matches!(verdict, CaseVerdict::Rejected(_)),
        "a typo must never be dropped in silence: {verdict:?}"
    );
    verdict
}

pub(super) async fn key_of_another_backend(vms: DaemonLife) -> CaseVerdict {
    let name = vms.backend.capabilities().name.clone();
    let key = if name.as_str() == "qemu" { "ch.example" } else { "qemu.model" };
    let change = |config: &mut VmConfig| {
        cpu(config).features.insert(key.to_owned(), "max".to_owned());
    };
    let verdict = field(&vms, "config.cpu.features", change).await;
    assert!(matches!(verdict, CaseVerdict::Ignored(_)), "a warning, and no more: {verdict:?}");
    verdict
}

/// Labels are kept, returned, and usable in a search.
pub(super) async fn metadata(vms: DaemonLife) -> CaseVerdict {
    let labels = [("team".to_owned(), "ü,=\"".to_owned())];
    let verdict = field(&vms, "config.metadata", |config| config.metadata = labels.clone().into()).await;
    let find = |value: &str| {
        let metadata = [("team".to_owned(), value.to_owned())].into();
        vms.service
            .list(&ListQuery { metadata, ..ListQuery::default() })
            .expect("ListVms answers")
            .total_count
    };
    assert_eq!((find("ü,=\""), find("other")), (1, 0));
    assert_eq!(vms.record(VM).config.metadata, labels.into());
    verdict
}
