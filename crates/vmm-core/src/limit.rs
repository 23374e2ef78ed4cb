//! The limits of a host that an operation can reach, recognised by the kernel's error number.

use std::error::Error;
use std::io;

/// ENOMEM, ENFILE and EMFILE, which have the same numbers on every architecture of Linux.
const ENOMEM: i32 = 12;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// A limit that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostLimit {
    /// The process has as many descriptors as it may have.
    Descriptors,
    /// The host has as many open files as it may have.
    OpenFiles,
    /// No memory is left.
    Memory,
}

impl HostLimit {
    /// Returns the limit that `error`, or an error below it, reports.
    pub fn reached(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(limit) = error.downcast_ref::<io::Error>().and_then(Self::of) {
                return Some(limit);
            }
            next = error.source();
        }
        None
    }

    /// Returns the limit that the kernel's error number stands for.
    pub fn of(error: &io::Error) -> Option<Self> {
        match error.raw_os_error()? {
            ENOMEM => Some(Self::Memory),
            ENFILE => Some(Self::OpenFiles),
            EMFILE => Some(Self::Descriptors),
            _ => None,
        }
    }

    /// Returns the limit on open files that a VMM names in its own words. A VMM passes no error
    /// number on, so the words are those that the C library has for the number.
    ///
    /// The words for ENOMEM are no limit here, because a VM that asks for more memory than there is
    /// asks for too much.
    pub fn quoted_in(words: &str) -> Option<Self> {
        if words.contains("Too many open files in system") {
            Some(Self::OpenFiles)
        } else if words.contains("Too many open files") {
            Some(Self::Descriptors)
        } else {
            None
        }
    }

    /// Returns the remedy where a VMM has reached the limit, for the end of a message.
    pub const fn advice_for_vmm(self) -> &'static str {
        match self {
            Self::Descriptors => {
                "the VMM has no file descriptor left: raise the limit of the program that starts the VMM (LimitNOFILE= of its \
                 unit, or ulimit -n), or name fewer disks and interfaces"
            }
            Self::OpenFiles | Self::Memory => self.advice(),
        }
    }

    /// Returns the remedy, for the end of a message.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Descriptors => {
                "the daemon has no file descriptor left: raise its limit (LimitNOFILE= of its unit, or ulimit -n)"
            }
            Self::OpenFiles => "the host has no open file left: raise the sysctl fs.file-max",
            Self::Memory => {
                "no memory is left: free some, or raise the limit of the daemon's control group (MemoryMax= of its unit)"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendError, BackendErrorKind, ContactProof, Effect};

    #[derive(Debug, thiserror::Error)]
    #[error("it could not be done")]
    struct WrappedIoError(#[source] io::Error);

    #[test]
    fn a_limit_error_is_found_at_any_depth_of_the_source_chain() {
        for (number, limit) in
            [(24, HostLimit::Descriptors), (23, HostLimit::OpenFiles), (12, HostLimit::Memory)]
        {
            let error = || io::Error::from_raw_os_error(number);
            assert_eq!(HostLimit::reached(&error()), Some(limit));
            assert_eq!(HostLimit::reached(&WrappedIoError(error())), Some(limit));
        }
        for number in [2, 13, 28, 111] {
            assert_eq!(HostLimit::reached(&WrappedIoError(io::Error::from_raw_os_error(number))), None);
        }
        assert_eq!(HostLimit::reached(&io::Error::other("Too many open files")), None);
    }

    #[test]
    fn a_limit_error_is_found_in_the_text_of_a_vmm() {
        let refused = |words| BackendError::refused(Effect::NotApplied, words);
        for (words, limit, advice) in [
            ("Could not open '/d': Too many open files", HostLimit::Descriptors, "starts the VMM"),
            ("Too many open files (os error 24)", HostLimit::Descriptors, "LimitNOFILE="),
            ("Too many open files in system", HostLimit::OpenFiles, "fs.file-max"),
        ] {
            let error = refused(words);
            assert_eq!((error.kind, error.vmm_limit), (BackendErrorKind::Rejected, Some(limit)));
            assert!(error.message.starts_with(words) && error.message.contains(advice), "{error}");
        }
        let error = refused("Cannot allocate memory");
        assert_eq!((error.vmm_limit, error.message.as_str()), (None, "Cannot allocate memory"));
    }

    #[test]
    fn a_limit_error_names_the_limit_to_raise() {
        let failed = || BackendError::new(BackendErrorKind::Unreachable, Effect::Unknown, "no connection");
        let error = failed().caused_by(io::Error::from_raw_os_error(24));
        assert_eq!((error.kind, error.effect), (BackendErrorKind::Exhausted, Effect::Unknown));
        assert!(error.message.contains("LimitNOFILE="), "{error}");
        assert_eq!(error.kind.contact(), ContactProof::None, "the VMM was not heard, and not proven silent");
        let error = failed().caused_by(io::Error::from_raw_os_error(111));
        assert_eq!((error.kind, error.message.as_str()), (BackendErrorKind::Unreachable, "no connection"));
    }
}
