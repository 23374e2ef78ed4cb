//! Clears up after a domain, within the limits of what a sweep may end.
//!
//! ```text
//!              own domain                        domain of another client
//!   Clear      ended                             left alone
//!   End        ended                             ended
//!   Delete     refused while it runs, or else    refused while it runs, or else
//!              undefined                         undefined
//!   ForceDelete  undefined and ended             undefined and ended
//! ```

use std::time::Duration;

use vmm_core::backend::{BackendError, BackendErrorKind, Effect, SweepPurpose, SweepRequest};
use vmm_libvirt_wire::{Call, CallFailureKind};

use super::domain::{QUICK_CALL_TIMEOUT, is_active};
use super::process::{Sought, unproven};
use super::{LibvirtBackend, domain_of, start};

/// The time limit of libvirt in a sweep. The service waits two seconds, and ten for a deletion
/// without force.
const SWEEP_TIMEOUT: Duration = Duration::from_millis(1800);
/// The time limit of libvirt in a deletion without force, because libvirt waits for a disk then.
const DELETE_TIMEOUT: Duration = Duration::from_secs(9);
/// The part of these limits for the end of a domain, before its QEMU is killed.
const DESTROY_TIMEOUT: Duration = Duration::from_millis(500);

/// The time limit of libvirt for the user of an imported domain's QEMU.
const TELLING: Duration = Duration::from_millis(300);
/// The time in which a QEMU must end that libvirt reports as ended.
const GOING: Duration = Duration::from_millis(500);

/// Clears up after the domain of `request`.
pub(super) async fn sweep(backend: &LibvirtBackend, request: SweepRequest) -> Result<(), BackendError> {
    let domain = domain_of(&request.kind, request.uid);
    let recorded = request.run.as_ref().map(|run| &run.process);
    let sought = Sought { domain, imported: request.imported, recorded };
    // Without a connection to libvirt, the file in the run folder shows whether there is a
    // definition to remove. A VM that was never defined can be deleted without libvirt.
    let may_be_defined = request.imported || backend.is_up() || start::was_defined(&request.dir);
    match request.purpose {
        // A domain of another client goes on, because this program did not start it.
        SweepPurpose::Clear if request.imported => Ok(()),
        SweepPurpose::Clear | SweepPurpose::End => {
            if may_run(backend, sought).await {
                backend.end(sought, DESTROY_TIMEOUT).await?;
            }
            start::clear(&request.dir).await
        }
        SweepPurpose::Delete => {
            refuse_if_it_runs(backend, sought, may_be_defined).await?;
            if may_be_defined {
                undefine(backend, sought, DELETE_TIMEOUT).await?;
            }
            if request.imported { Ok(()) } else { start::clear(&request.dir).await }
        }
        SweepPurpose::ForceDelete => {
            let runs = may_run(backend, sought).await;
            // The definition is removed first, so that no other client can start the domain in
            // between. A running domain disappears when it ends.
            let timeout = if runs { SWEEP_TIMEOUT / 2 } else { SWEEP_TIMEOUT };
            let undefined = if may_be_defined { undefine(backend, sought, timeout).await } else { Ok(()) };
            if runs {
                backend.end(sought, DESTROY_TIMEOUT).await?;
            }
            // The failure to remove the definition is returned last, because the QEMU must be ended
            // and the folder cleared in any case.
            start::clear(&request.dir).await?;
            undefined
        }
    }
}

/// Returns true unless the domain provably has no QEMU.
async fn may_run(backend: &LibvirtBackend, sought: Sought<'_>) -> bool {
    !matches!(backend.find_qemu(sought, TELLING).await, Ok(None))
}

/// Refuses a deletion without force of a domain that runs. Another client of libvirt has started
/// that domain since this program last saw it, as an operator does while no daemon runs. Its
/// definition stays too, because the removal would make it a transient domain.
async fn refuse_if_it_runs(
    backend: &LibvirtBackend,
    sought: Sought<'_>,
    may_be_defined: bool,
) -> Result<(), BackendError> {
    let known = if may_be_defined { start::wait_for_domain_end(backend, sought).await? } else { None };
    let runs = match known {
        Some(domain) if is_active(domain.state) => true,
        Some(_) | None => match backend.find_qemu(sought, QUICK_CALL_TIMEOUT).await {
            Ok(None) => false,
            Ok(Some(process)) => process.wait_for(GOING).await.is_none(),
            Err(why) => return Err(unproven(why)),
        },
    };
    if !runs {
        return Ok(());
    }
    let message =
        "it runs again: another client of libvirt has started its domain; shut it down first, or use force";
    Err(BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message))
}

/// Removes the definition of a domain. Succeeds if there is none. libvirt's own files of a domain
/// that another client created stay.
async fn undefine(
    backend: &LibvirtBackend,
    sought: Sought<'_>,
    timeout: Duration,
) -> Result<(), BackendError> {
    let call = Call::Undefine { uuid: sought.domain, everything: !sought.imported };
    match backend.link.order(call, timeout).await {
        Err(error) if error.refusal() == Some(CallFailureKind::NoDomain) => Ok(()),
        result => Ok(result?),
    }
}
