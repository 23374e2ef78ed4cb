//! VMMs that another program started: one socket, one VM.
//!
//! ```text
//!   AttachedBackend ─ one AttachedSocket for each socket ──────────────────────────────┐
//!      │                                                                               │ visit
//!      │ launch   the VMM waits ──► configured and started                             ▼
//!      │ adopt    the VMM on record, and no other ──► AttachedVmm       ┌──────────────────────┐
//!      │ sweep    what a broken start made; by force the VM             │ an attached VMM:     │
//!      └ discover ──► SocketScanner: every socket without a handle ─────┤ no run folder, no    │
//!                                                                       │ log, not our child   │
//!                                                                       └──────────────────────┘
//! ```
//!
//! Invariant: a process is not touched until it is proven to be the intended one. Every connection
//! is made to a process that a pidfd holds ([`vmm_host::endpoint`]), and no request is sent to
//! another process that takes over the same socket. Without force a VMM is never signalled: a VM
//! that still runs after every call of the VMM's API was tried continues to run.
//!
//! [`AttachedHypervisor`] is the part in which hypervisors differ: the questions to a VMM
//! ([`AttachedHypervisor::identify`]), the start of a VM that the VMM holds, and the handle of a
//! running VM. Each hypervisor implements the trait in `attached.rs` of its own folder.

mod backend;
mod console;
pub(crate) mod force;
pub(crate) mod handle;
mod hypervisor;
pub(crate) mod identify;
pub(crate) mod native_config;
pub(crate) mod rest;
mod scanner;
pub(crate) mod socket;
mod vm_names;

use std::path::PathBuf;
use std::time::Duration;

use vmm_core::backend::Backend;

use backend::AttachedBackend;
pub(crate) use hypervisor::{
    AttachedHypervisor, AttachedVmFacts, AttachedVmmParts, GuestPhase, IdentifiedVmm,
};
use rest::AttachedRestHypervisor;

/// Returns the backend of the Cloud Hypervisors behind `sockets`, each of which is examined every
/// `interval`. The rules of `managed` about configurations hold there, too.
pub fn cloud_hypervisor(
    sockets: Vec<PathBuf>,
    managed: crate::cloud_hypervisor::CloudHypervisorBackend,
    interval: Duration,
) -> impl Backend {
    AttachedBackend::new(
        AttachedRestHypervisor::<crate::cloud_hypervisor::CloudHypervisor>::new(),
        sockets,
        managed,
        interval,
    )
}

/// Returns the backend of the Firecrackers behind `sockets`, each of which is examined every
/// `interval`. The rules of `managed` about configurations hold there, too.
pub fn firecracker(
    sockets: Vec<PathBuf>,
    managed: crate::firecracker::FirecrackerBackend,
    interval: Duration,
) -> impl Backend {
    AttachedBackend::new(
        AttachedRestHypervisor::<crate::firecracker::Firecracker>::new(),
        sockets,
        managed,
        interval,
    )
}

/// Returns the backend of the QEMUs whose QMP sockets are `sockets`, each of which is examined
/// every `interval`. The rules of `managed` about configurations hold there, too.
pub fn qemu(sockets: Vec<PathBuf>, managed: crate::qemu::QemuBackend, interval: Duration) -> impl Backend {
    AttachedBackend::new(crate::qemu::attached::AttachedQemu::new(), sockets, managed, interval)
}
