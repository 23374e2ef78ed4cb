//! Registers for libvirt's events about domains and makes the one call that the `virt` crate does
//! not wrap. The events come as C callbacks.

#![expect(
    unsafe_code,
    reason = "libvirt calls back with its own pointers; each use below gives the reason why it is sound"
)]

use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::ptr;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;
use vmm_libvirt_wire::{HelperMessage, Lifecycle};

use crate::output::{cut, write_message};

/// QEMU's own events that carry more than libvirt's: the cause of a reset, and the reason for
/// QEMU's end.
const MONITOR_EVENTS: &CStr = c"^(GUEST_PANICKED|RESET|SHUTDOWN)$";
/// The longest data of a QEMU event that is passed on, in bytes. The events above have about 50.
const DETAILS: usize = 1024;

/// Starts the thread that runs libvirt's event loop. Connections need the loop for their keep-alive
/// messages, and events arrive on its thread. A failed loop ends the process.
pub(crate) fn start_event_loop() -> Result<(), Error> {
    virt::event::event_register_default_impl()?;
    std::thread::spawn(|| {
        loop {
            if let Err(error) = virt::event::event_run_default_impl() {
                eprintln!("vmm-libvirt-helper: libvirt's event loop failed: {error}");
                std::process::exit(1);
            }
        }
    });
    Ok(())
}

/// Registers for every event about a domain and for the end of the connection. Each one is sent to
/// the daemon as a [`HelperMessage`].
pub(crate) fn watch(connect: &Connect) -> Result<(), Error> {
    let lifecycle: unsafe extern "C" fn(_, _, _, _, _) -> c_int = on_lifecycle;
    // SAFETY: libvirt registers callbacks of all kinds through this one type. It casts the callback
    // back to the type of its event id before the call, and for the lifecycle event that is the
    // type of `on_lifecycle`.
    let generic = unsafe {
        std::mem::transmute::<
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int,
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
        >(lifecycle)
    };
    // SAFETY: the connection is open, a null domain stands for all domains, and there is no data
    // that libvirt would have to free.
    let registered = unsafe {
        sys::virConnectDomainEventRegisterAny(
            connect.as_ptr(),
            ptr::null_mut(),
            sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE.cast_signed(),
            Some(generic),
            ptr::null_mut(),
            None,
        )
    };
    check(registered)?;
    // SAFETY: as for the registration above; the pattern is a constant with a terminating zero.
    let registered = unsafe {
        sys::virConnectDomainQemuMonitorEventRegister(
            connect.as_ptr(),
            ptr::null_mut(),
            MONITOR_EVENTS.as_ptr(),
            Some(on_monitor),
            ptr::null_mut(),
            None,
            sys::VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX,
        )
    };
    check(registered)?;
    // SAFETY: the connection is open, and there is no data that libvirt would have to free.
    let registered = unsafe {
        sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), ptr::null_mut(), None)
    };
    check(registered)
}

/// Sets whether a reset of a running guest starts the guest again or ends its domain.
pub(crate) fn set_reboot_action(domain: &Domain, restart: bool) -> Result<(), Error> {
    let action = if restart {
        sys::VIR_DOMAIN_LIFECYCLE_ACTION_RESTART
    } else {
        sys::VIR_DOMAIN_LIFECYCLE_ACTION_DESTROY
    };
    // SAFETY: the domain is a valid handle while it is borrowed; the other arguments are numbers.
    let set = unsafe {
        sys::virDomainSetLifecycleAction(
            domain.as_ptr(),
            sys::VIR_DOMAIN_LIFECYCLE_REBOOT,
            action,
            sys::VIR_DOMAIN_AFFECT_LIVE,
        )
    };
    check(set)
}

fn check(result: c_int) -> Result<(), Error> {
    if result < 0 { Err(Error::last_error()) } else { Ok(()) }
}

/// Returns the UUID of a domain that libvirt has passed to a callback; `None` if libvirt fails.
fn uuid_of(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0_u8; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: libvirt lends the domain for the duration of the callback, and the buffer has the
    // length that libvirt writes.
    let got = unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) };
    (got == 0).then(|| Uuid::from_bytes(bytes))
}

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    _opaque: *mut c_void,
) -> c_int {
    if let Some(uuid) = uuid_of(domain) {
        write_message(&HelperMessage::Lifecycle {
            uuid,
            event: lifecycle_of(event.cast_unsigned(), detail.cast_unsigned()),
        });
    }
    0
}

fn lifecycle_of(event: c_uint, detail: c_uint) -> Lifecycle {
    match event {
        sys::VIR_DOMAIN_EVENT_DEFINED => Lifecycle::Defined,
        sys::VIR_DOMAIN_EVENT_UNDEFINED => Lifecycle::Undefined,
        sys::VIR_DOMAIN_EVENT_STARTED => Lifecycle::Started,
        sys::VIR_DOMAIN_EVENT_SUSPENDED => Lifecycle::Suspended,
        sys::VIR_DOMAIN_EVENT_RESUMED => Lifecycle::Resumed,
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => Lifecycle::Shutdown,
        sys::VIR_DOMAIN_EVENT_CRASHED => Lifecycle::Crashed,
        sys::VIR_DOMAIN_EVENT_STOPPED => match detail {
            sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => Lifecycle::Stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => Lifecycle::Destroyed,
            sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => Lifecycle::Crashed,
            sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => Lifecycle::Failed,
            sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED
            | sys::VIR_DOMAIN_EVENT_STOPPED_SAVED
            | sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT => Lifecycle::Moved,
            _ => Lifecycle::Failed,
        },
        _ => Lifecycle::Other,
    }
}

unsafe extern "C" fn on_monitor(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: *const c_char,
    _seconds: c_longlong,
    _micros: c_uint,
    details: *const c_char,
    _opaque: *mut c_void,
) {
    if let Some(uuid) = uuid_of(domain) {
        let (event, details) = (text(event), text(details));
        write_message(&HelperMessage::Monitor {
            uuid,
            event: cut(event, DETAILS),
            details: cut(details, DETAILS),
        });
    }
}

/// Copies a text that libvirt has passed to a callback. A null pointer gives an empty text.
fn text(lent: *const c_char) -> String {
    if lent.is_null() {
        return String::new();
    }
    // SAFETY: the pointer is not null, so libvirt lends a zero-terminated text for the duration of
    // the callback.
    unsafe { CStr::from_ptr(lent) }.to_string_lossy().into_owned()
}

unsafe extern "C" fn on_close(_connect: sys::virConnectPtr, reason: c_int, _opaque: *mut c_void) {
    let why = match reason.cast_unsigned() {
        sys::VIR_CONNECT_CLOSE_REASON_EOF => "libvirtd has ended or closed the connection",
        sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "libvirtd has not answered for some 20 s",
        sys::VIR_CONNECT_CLOSE_REASON_CLIENT => "the helper closed the connection",
        _ => "the connection broke",
    };
    write_message(&HelperMessage::Closed { why: why.to_owned() });
    std::process::exit(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirt_stop_reasons_are_mapped() {
        let ended = |detail| lifecycle_of(sys::VIR_DOMAIN_EVENT_STOPPED, detail);
        assert_eq!(ended(0), Lifecycle::Stopped);
        assert_eq!(ended(1), Lifecycle::Destroyed);
        assert_eq!(ended(2), Lifecycle::Crashed);
        assert_eq!(ended(4), Lifecycle::Moved);
        assert_eq!(ended(5), Lifecycle::Failed);
        assert_eq!(lifecycle_of(99, 0), Lifecycle::Other);
    }
}
