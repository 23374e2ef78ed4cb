//! Makes each call of the daemon with libvirt's own functions.

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;
use vmm_libvirt_wire::{
    Call, CallFailure, CallFailureKind, CallResult, Domain as Facts, DomainState, MARK_NAMESPACE,
};

use crate::ffi;
use crate::output::cut;

/// The longest error message or domain name that is passed on, in bytes. A longer one is cut.
const MESSAGE: usize = 4096;
/// The longest mark that is passed on, in bytes. The program's own marks are much shorter.
const MARK: usize = 1024;
/// The longest configuration that is passed on, in bytes. libvirt itself takes little more.
const XML: usize = 1 << 20;

/// Makes one call over `connect` and returns libvirt's answer or error.
pub(crate) fn run(connect: &Connect, call: &Call) -> Result<CallResult, Error> {
    match call {
        Call::List => {
            let all = connect.list_all_domains(0)?;
            // A domain that disappears between the list and the look at it is left out, because the
            // list describes the moment at which the answer is sent.
            let domains = all.iter().filter_map(|domain| facts(domain).ok()).collect();
            Ok(CallResult::Domains { domains })
        }
        Call::LookUp { uuid } => single_domain(find(connect, *uuid)),
        Call::LookUpByName { name } => single_domain(Domain::lookup_by_name(connect, name)),
        Call::Xml { uuid } => {
            let domain = find(connect, *uuid)?;
            Ok(CallResult::Xml { xml: cut(domain.get_xml_desc(0)?, XML) })
        }
        Call::Define { xml } => Domain::define_xml(connect, xml).map(|_| CallResult::Done),
        Call::Start { uuid } => done(find(connect, *uuid)?.create_with_flags(sys::VIR_DOMAIN_START_PAUSED)),
        Call::Suspend { uuid } => done(find(connect, *uuid)?.suspend()),
        Call::Resume { uuid } => resume(&find(connect, *uuid)?),
        Call::Shutdown { uuid } => {
            done(find(connect, *uuid)?.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN))
        }
        Call::Reset { uuid } => done(find(connect, *uuid)?.reset()),
        Call::OnReboot { uuid, restart } => {
            ffi::set_reboot_action(&find(connect, *uuid)?, *restart).map(|()| CallResult::Done)
        }
        Call::Destroy { uuid } => destroy(&find(connect, *uuid)?),
        Call::Undefine { uuid, everything } => undefine(&find(connect, *uuid)?, *everything),
        Call::BlockStats { uuid } => block_stats(&find(connect, *uuid)?),
    }
}

fn find(connect: &Connect, uuid: Uuid) -> Result<Domain, Error> {
    Domain::lookup_by_uuid(connect, uuid)
}

fn done(result: Result<u32, Error>) -> Result<CallResult, Error> {
    result.map(|_| CallResult::Done)
}

fn single_domain(found: Result<Domain, Error>) -> Result<CallResult, Error> {
    match found.and_then(|domain| facts(&domain)) {
        Ok(facts) => Ok(CallResult::Domains { domains: vec![facts] }),
        Err(error) if kind_of(&error) == CallFailureKind::NoDomain => {
            Ok(CallResult::Domains { domains: Vec::new() })
        }
        Err(error) => Err(error),
    }
}

fn facts(domain: &Domain) -> Result<Facts, Error> {
    let mark = domain.get_metadata(sys::VIR_DOMAIN_METADATA_ELEMENT.cast_signed(), Some(MARK_NAMESPACE), 0);
    let (state, reason) = domain.get_state()?;
    Ok(Facts {
        uuid: domain.get_uuid()?,
        name: cut(domain.get_name()?, MESSAGE),
        mark: mark.ok().filter(|mark| mark.len() <= MARK),
        state: state_of(state, reason),
        persistent: domain.is_persistent()?,
    })
}

fn state_of(state: sys::virDomainState, reason: i32) -> DomainState {
    match state {
        sys::VIR_DOMAIN_PAUSED => match reason.cast_unsigned() {
            sys::VIR_DOMAIN_PAUSED_IOERROR => DomainState::IoError,
            sys::VIR_DOMAIN_PAUSED_WATCHDOG => DomainState::Watchdog,
            sys::VIR_DOMAIN_PAUSED_CRASHED => DomainState::Crashed,
            sys::VIR_DOMAIN_PAUSED_SHUTTING_DOWN => DomainState::ShuttingDown,
            sys::VIR_DOMAIN_PAUSED_STARTING_UP
            | sys::VIR_DOMAIN_PAUSED_SAVE
            | sys::VIR_DOMAIN_PAUSED_DUMP
            | sys::VIR_DOMAIN_PAUSED_SNAPSHOT
            | sys::VIR_DOMAIN_PAUSED_MIGRATION => DomainState::Busy,
            _ => DomainState::Paused,
        },
        // A guest that sleeps counts as running, because its own devices wake it without the host.
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED | sys::VIR_DOMAIN_PMSUSPENDED => {
            DomainState::Running
        }
        sys::VIR_DOMAIN_SHUTDOWN => DomainState::ShuttingDown,
        sys::VIR_DOMAIN_CRASHED => DomainState::Crashed,
        _ => DomainState::Off,
    }
}

/// Resumes the guest. A guest that runs already is no error.
fn resume(domain: &Domain) -> Result<CallResult, Error> {
    match domain.resume() {
        Err(error) if kind_of(&error) == CallFailureKind::WrongState => match domain.get_state() {
            Ok((sys::VIR_DOMAIN_RUNNING, _)) => Ok(CallResult::Done),
            Ok(_) | Err(_) => Err(error),
        },
        result => done(result),
    }
}

/// Ends a domain at once. A domain that does not run is no error.
fn destroy(domain: &Domain) -> Result<CallResult, Error> {
    match domain.destroy_flags(sys::VIR_DOMAIN_DESTROY_DEFAULT) {
        Err(error)
            if kind_of(&error) == CallFailureKind::WrongState && !domain.is_active().unwrap_or(true) =>
        {
            Ok(CallResult::Done)
        }
        result => done(result),
    }
}

/// Removes a domain from libvirt's configuration. A domain that was never defined is no error.
/// `everything` also removes the saved memory, snapshot records and firmware variables.
fn undefine(domain: &Domain, everything: bool) -> Result<CallResult, Error> {
    if !domain.is_persistent()? {
        return Ok(CallResult::Done);
    }
    let flags = if everything {
        sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | sys::VIR_DOMAIN_UNDEFINE_NVRAM
    } else {
        // libvirt refuses this call for a domain with a saved memory or a snapshot. The refusal is
        // wanted, because the caller did not ask for their removal.
        sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
    };
    domain.undefine_flags(flags).map(|()| CallResult::Done)
}

fn block_stats(domain: &Domain) -> Result<CallResult, Error> {
    // libvirt takes the empty name for all disks together.
    let all = domain.get_block_stats("")?;
    // libvirt returns a negative number for a counter that QEMU does not keep.
    let count = |number: i64| u64::try_from(number).unwrap_or(0);
    Ok(CallResult::Block {
        read_bytes: count(all.rd_bytes),
        written_bytes: count(all.wr_bytes),
        reads: count(all.rd_req),
        writes: count(all.wr_req),
    })
}

/// Converts an error of libvirt into the form that the daemon reads, with its text cut to size.
pub(crate) fn failure(error: &Error) -> CallFailure {
    CallFailure { kind: kind_of(error), message: cut(error.message().to_owned(), MESSAGE) }
}

fn kind_of(error: &Error) -> CallFailureKind {
    match error.code().to_raw() {
        sys::VIR_ERR_NO_DOMAIN => CallFailureKind::NoDomain,
        sys::VIR_ERR_OPERATION_INVALID => CallFailureKind::WrongState,
        sys::VIR_ERR_OPERATION_TIMEOUT => CallFailureKind::Timeout,
        sys::VIR_ERR_NO_CONNECT
        | sys::VIR_ERR_INVALID_CONN
        | sys::VIR_ERR_RPC
        | sys::VIR_ERR_SYSTEM_ERROR
        | sys::VIR_ERR_NO_SERVER => CallFailureKind::NoConnection,
        sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_CANCELLED
        | sys::VIR_ERR_AUTH_UNAVAILABLE
        | sys::VIR_ERR_ACCESS_DENIED
        | sys::VIR_ERR_OPERATION_DENIED => CallFailureKind::Denied,
        sys::VIR_ERR_NO_SUPPORT
        | sys::VIR_ERR_OPERATION_UNSUPPORTED
        | sys::VIR_ERR_ARGUMENT_UNSUPPORTED
        | sys::VIR_ERR_CONFIG_UNSUPPORTED => CallFailureKind::Unsupported,
        _ => CallFailureKind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirt_states_are_mapped() {
        assert_eq!(state_of(sys::VIR_DOMAIN_RUNNING, 1), DomainState::Running);
        assert_eq!(state_of(sys::VIR_DOMAIN_PAUSED, 1), DomainState::Paused);
        assert_eq!(state_of(sys::VIR_DOMAIN_PAUSED, 5), DomainState::IoError);
        assert_eq!(state_of(sys::VIR_DOMAIN_PAUSED, 11), DomainState::Busy);
        assert_eq!(state_of(sys::VIR_DOMAIN_SHUTOFF, 1), DomainState::Off);
        assert_eq!(state_of(99, 0), DomainState::Off);
    }
}
