//! The registry of hypervisors, with the differences between them that concern other modules.
//!
//! ```text
//!   ALL ──┬─ backends(config) ──► the daemon and doctor   current: the kind of the endpoint
//!         │                                               others: made when a VM needs one
//!         ├─ program, install ──► reconcile and doctor
//!         └─ prefix, columns ───► the tests that compare the lists of other crates with this one
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use vmm_backends::attached;
use vmm_backends::cloud_hypervisor::CloudHypervisorBackend;
use vmm_backends::firecracker::FirecrackerBackend;
use vmm_backends::libvirt::{LibvirtBackend, LibvirtOptions};
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::Backend;
use vmm_core::id;
use vmm_core::kind::VmKind;
use vmm_service::{BackendFamily, Backends};

use crate::config::{BackendChoice, DaemonConfig, Endpoint, KvmSetting, Setting};

/// The entry of one hypervisor.
pub(crate) struct Registration {
    /// The name in the configuration and on the wire.
    pub(crate) name: BackendChoice,
    /// The prefix of the keys in free maps that concern this hypervisor alone.
    #[cfg_attr(not(test), expect(dead_code, reason = "a test holds vmm-core's list against it"))]
    pub(crate) prefix: &'static str,
    /// The usual name of the program.
    pub(crate) program: &'static str,
    /// The advice for installing the program.
    pub(crate) install: &'static str,
    /// The setting that names VMMs which another program started.
    pub(crate) endpoint: Setting,
    /// Returns true if the VMMs that the daemon starts need /dev/kvm.
    pub(crate) needs_kvm: fn(&DaemonConfig) -> bool,
    managed: fn(&DaemonConfig) -> Arc<dyn Backend>,
    attached: fn(&DaemonConfig, Vec<PathBuf>) -> Arc<dyn Backend>,
    libvirt: Option<MakeLibvirt>,
}

/// Makes the backend of the libvirtd at a URI. The flag is true if domains that another program
/// made are imported.
type MakeLibvirt = fn(&DaemonConfig, &str, bool) -> Arc<dyn Backend>;

/// Every hypervisor.
pub(crate) static ALL: [Registration; 3] = [
    Registration {
        name: BackendChoice::CloudHypervisor,
        prefix: "ch.",
        program: "cloud-hypervisor",
        install: "install its release for this CPU, or set UNKEY_VMCP_CH_BINARY to where it is",
        endpoint: Setting::ChEndpoint,
        needs_kvm: |_| true,
        managed: |config| Arc::new(CloudHypervisorBackend::new(&config.ch.binary)),
        attached: |config, sockets| {
            let managed = CloudHypervisorBackend::new(&config.ch.binary);
            Arc::new(attached::cloud_hypervisor(sockets, managed, config.metrics_interval))
        },
        libvirt: None,
    },
    Registration {
        name: BackendChoice::Firecracker,
        prefix: "fc.",
        program: "firecracker",
        install: "install its release for this CPU, or set UNKEY_VMCP_FC_BINARY to where it is",
        endpoint: Setting::FcEndpoint,
        needs_kvm: |_| true,
        managed: |config| Arc::new(FirecrackerBackend::new(&config.fc.binary)),
        attached: |config, sockets| {
            let managed = FirecrackerBackend::new(&config.fc.binary);
            Arc::new(attached::firecracker(sockets, managed, config.metrics_interval))
        },
        libvirt: None,
    },
    Registration {
        name: BackendChoice::Qemu,
        prefix: "qemu.",
        program: "qemu-system-x86_64",
        install: "install it (Debian and Ubuntu: the package qemu-system-x86), or set UNKEY_VMCP_QEMU_BINARY to where it is",
        endpoint: Setting::QemuEndpoint,
        needs_kvm: |config| config.qemu_kvm == KvmSetting::On,
        managed: |config| Arc::new(qemu(config)),
        attached: |config, sockets| Arc::new(attached::qemu(sockets, qemu(config), config.metrics_interval)),
        libvirt: Some(|config, uri, import| {
            Arc::new(LibvirtBackend::new(LibvirtOptions {
                emulator: config.qemu.binary.clone(),
                kvm: kvm(config),
                import,
                ..LibvirtOptions::new(uri)
            }))
        }),
    },
];

/// Adds something to each call of a backend, such as a measurement.
pub(crate) type DecorateBackend = Arc<dyn Fn(Arc<dyn Backend>) -> Arc<dyn Backend> + Send + Sync>;

/// Returns a decorator that adds nothing.
pub(crate) fn undecorated() -> DecorateBackend {
    Arc::new(|backend| backend)
}

/// Makes the backends that `config` names, and a constructor for the backends of other kinds. Each
/// of them passes through `decorate`.
pub(crate) fn backends(config: &DaemonConfig, decorate: &DecorateBackend) -> Backends {
    let families = ALL.iter().map(|registration| registration.family(config, Arc::clone(decorate)));
    Backends::new(id::BackendName::new(config.default_backend.as_str()), families)
}

/// Finds the registration of a backend by its name on the wire.
pub(crate) fn find(name: &id::BackendName) -> Option<&'static Registration> {
    ALL.iter().find(|registration| registration.name.as_str() == name.as_str())
}

impl Registration {
    fn family(&'static self, config: &DaemonConfig, decorate: DecorateBackend) -> BackendFamily {
        let current = match (&config.hypervisor(self.name).endpoint, self.libvirt) {
            // The loader accepts a libvirt URI for QEMU only, so the last arm's libvirt case never
            // occurs. Starting VMMs is the safe answer there.
            (Endpoint::Unix(sockets), _) => (self.attached)(config, sockets.clone()),
            (Endpoint::Libvirt(uri), Some(libvirt)) => libvirt(config, uri, config.qemu_import),
            (Endpoint::Managed, _) | (Endpoint::Libvirt(_), None) => (self.managed)(config),
        };
        let config = config.clone();
        BackendFamily::new(decorate(current), move |kind| self.of_kind(&config, kind).map(&*decorate))
    }

    /// Makes the backend for VMs of a kind other than the one that the endpoint names.
    ///
    /// A socket that no endpoint names any more is left alone, because the daemon attaches only to
    /// the sockets in its configuration. Libvirt domains and the daemon's own VMMs prove their
    /// owner and are served on.
    fn of_kind(&self, config: &DaemonConfig, kind: &VmKind) -> Result<Arc<dyn Backend>, String> {
        match (kind, self.libvirt) {
            (VmKind::Managed, _) => Ok((self.managed)(config)),
            (VmKind::Libvirt { uri, .. }, Some(libvirt)) => Ok(libvirt(config, uri, false)),
            (VmKind::Attached { .. } | VmKind::Libvirt { .. } | VmKind::Unrecorded { .. }, _) => {
                Err(format!("the VM lives at {kind}, which {} no longer names", self.endpoint.variable()))
            }
        }
    }
}

fn qemu(config: &DaemonConfig) -> QemuBackend {
    QemuBackend::new(QemuOptions { binary: config.qemu.binary.clone(), kvm: kvm(config) })
}

fn kvm(config: &DaemonConfig) -> KvmMode {
    match config.qemu_kvm {
        KvmSetting::Auto => KvmMode::Auto,
        KvmSetting::On => KvmMode::On,
        KvmSetting::Off => KvmMode::Off,
    }
}

#[cfg(test)]
mod tests {
    use vmm_core::spec::prefix_of;
    use vmm_testkit::backend_suite::matrix::COLUMNS;

    use super::*;

    #[test]
    fn the_configuration_and_the_registry_have_the_same_hypervisors() {
        let names = ALL.each_ref().map(|registration| registration.name);
        assert_eq!(names, BackendChoice::ALL);
        for name in names {
            assert!(find(&id::BackendName::new(name.as_str())).is_some());
        }
    }

    #[test]
    fn the_core_and_the_registry_have_the_same_prefixes() {
        for registration in &ALL {
            let key = format!("{}key", registration.prefix);
            assert_eq!(prefix_of(&key), Some(registration.prefix));
        }
    }

    #[test]
    fn the_backend_suite_has_a_column_for_each_backend_object() {
        let columns = COLUMNS.map(|(name, _)| name);
        for registration in &ALL {
            let name = registration.name.as_str();
            let mut wanted = vec![format!("attached-{name}")];
            if registration.libvirt.is_some() {
                wanted.push(format!("libvirt-{name}"));
            }
            for column in wanted {
                assert!(columns.contains(&column.as_str()), "{column} is not among {columns:?}");
            }
            assert!(columns.iter().any(|column| column.starts_with(name)), "{name}: {columns:?}");
        }
    }
}
