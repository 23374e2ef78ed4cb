//! Classifies failures to connect to a VMM's socket.

use std::io;

use rustix::io::Errno;
use vmm_core::backend::BackendErrorKind;

/// Returns [`BackendErrorKind::Host`] if the host has no descriptor or memory left for a
/// connection, and [`BackendErrorKind::Unreachable`] for every other failure, because those concern
/// the VMM.
pub(crate) fn failure(error: &io::Error) -> BackendErrorKind {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => BackendErrorKind::Host,
        Some(_) | None => BackendErrorKind::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_descriptors_is_no_silence_of_the_vmm() {
        let kind = |errno: Errno| failure(&io::Error::from(errno));
        assert_eq!(kind(Errno::MFILE), BackendErrorKind::Host);
        assert_eq!(kind(Errno::NFILE), BackendErrorKind::Host);
        assert_eq!(kind(Errno::CONNREFUSED), BackendErrorKind::Unreachable);
        assert_eq!(kind(Errno::NOENT), BackendErrorKind::Unreachable);
    }
}
