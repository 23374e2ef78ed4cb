//! Classifies failures to connect to a VMM's socket.

use std::io;

use vmm_core::backend::BackendErrorKind;
use vmm_core::limit::HostLimit;

/// Returns [`BackendErrorKind::Host`] if the host has no descriptor or memory left for a
/// connection, and [`BackendErrorKind::Unreachable`] for every other failure, because those concern
/// the VMM.
pub(crate) fn failure(error: &io::Error) -> BackendErrorKind {
    match HostLimit::of(error) {
        Some(_) => BackendErrorKind::Exhausted,
        None => BackendErrorKind::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn exhausted_descriptors_are_not_reported_as_an_unreachable_vmm() {
        let kind = |errno: Errno| failure(&io::Error::from(errno));
        assert_eq!(kind(Errno::MFILE), BackendErrorKind::Exhausted);
        assert_eq!(kind(Errno::NFILE), BackendErrorKind::Exhausted);
        assert_eq!(kind(Errno::CONNREFUSED), BackendErrorKind::Unreachable);
        assert_eq!(kind(Errno::NOENT), BackendErrorKind::Unreachable);
    }
}
