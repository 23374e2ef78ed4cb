//! What the `virt` crate does not wrap: libvirt's events about domains, which come as C callbacks, and one call.

#![expect(
    unsafe_code,
    reason = "libvirt calls back with its own pointers; each use below says why it is sound"
)]

use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::ptr;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;
use vmm_libvirt_wire::{Lifecycle, Message};

use crate::say::{cut, say};

/// QEMU's own events that say more than libvirt's: who reset the guest, and why QEMU ends.
const MONITOR_EVENTS: &CStr = c"^(GUEST_PANICKED|RESET|SHUTDOWN)$";
/// The longest data of an event of QEMU; those above have some 50 bytes.
const DETAILS: usize = 1024;

/// Starts the thread in which libvirt's connections live and its events arrive.
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

/// Has every event about a domain, and the end of the connection, said to the daemon.
pub(crate) fn watch(connect: &Connect) -> Result<(), Error> {
    let lifecycle: unsafe extern "C" fn(_, _, _, _, _) -> c_int = on_lifecycle;
    // SAFETY: libvirt's own way to register: it casts the callback back to the type that belongs to the event's id before it
    // calls it, and that is the type of `on_lifecycle`.
    let generic = unsafe {
        std::mem::transmute::<
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int,
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
        >(lifecycle)
    };
    // SAFETY: the connection is open, a null domain means all of them, and there is no data to free.
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
    // SAFETY: as above; the pattern is a constant.
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
    // SAFETY: as above.
    let registered = unsafe {
        sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), ptr::null_mut(), None)
    };
    check(registered)
}

/// Sets what a reset of a running guest does.
pub(crate) fn set_reboot_action(domain: &Domain, restart: bool) -> Result<(), Error> {
    let action = if restart {
        sys::VIR_DOMAIN_LIFECYCLE_ACTION_RESTART
    } else {
        sys::VIR_DOMAIN_LIFECYCLE_ACTION_DESTROY
    };
    // SAFETY: the domain is a valid handle for as long as it is borrowed; the rest are numbers.
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

/// The UUID of a domain that a callback was given.
fn uuid_of(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0_u8; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: libvirt lends the domain for the time of the callback, and the buffer has the length that it wants.
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
        say(&Message::Lifecycle { uuid, event: lifecycle_of(event.cast_unsigned(), detail.cast_unsigned()) });
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
        say(&Message::Monitor { uuid, event: cut(event, DETAILS), details: cut(details, DETAILS) });
    }
}

/// The text of a callback; empty where there is none.
fn text(lent: *const c_char) -> String {
    if lent.is_null() {
        return String::new();
    }
    // SAFETY: not null, and so a text with an end that libvirt lends for the time of the callback.
    unsafe { CStr::from_ptr(lent) }.to_string_lossy().into_owned()
}

unsafe extern "C" fn on_close(_connect: sys::virConnectPtr, reason: c_int, _opaque: *mut c_void) {
    let why = match reason.cast_unsigned() {
        sys::VIR_CONNECT_CLOSE_REASON_EOF => "libvirtd has ended or closed the connection",
        sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "libvirtd has not answered for some 20 s",
        sys::VIR_CONNECT_CLOSE_REASON_CLIENT => "the helper closed the connection",
        _ => "the connection broke",
    };
    say(&Message::Closed { why: why.to_owned() });
    std::process::exit(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_a_domain_are_told_apart() {
        let ended = |detail| lifecycle_of(sys::VIR_DOMAIN_EVENT_STOPPED, detail);
        assert_eq!(ended(0), Lifecycle::Stopped);
        assert_eq!(ended(1), Lifecycle::Destroyed);
        assert_eq!(ended(2), Lifecycle::Crashed);
        assert_eq!(ended(4), Lifecycle::Moved);
        assert_eq!(ended(5), Lifecycle::Failed);
        assert_eq!(lifecycle_of(99, 0), Lifecycle::Other);
    }
}
