//! The failures of a hypervisor, and what each proves.

use std::sync::Arc;

use crate::limit::HostLimit;

/// The knowledge of whether a failed call had an effect. After `Unknown` the caller must look again
/// and never retry blindly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing was changed.
    NotApplied,
    /// The change was made in spite of the failure.
    Applied,
    /// The answer does not show whether the change was made.
    Unknown,
}

/// Why a hypervisor could not do as asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct BackendError {
    /// The kind, for decisions.
    pub kind: BackendErrorKind,
    /// The knowledge of whether something changed.
    pub effect: Effect,
    /// The fault and the remedy, for people. Quotes the VMM where it gave a text.
    pub message: String,
    /// The limit of the host that the VMM has reached, as the VMM's own words say.
    pub vmm_limit: Option<HostLimit>,
    /// The cause.
    #[source]
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// Kinds of [`BackendError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendErrorKind {
    /// The hypervisor lacks the named feature.
    Unsupported(&'static str),
    /// The hypervisor's program is missing, too old or not usable.
    NotInstalled,
    /// The VMM refused or died, and gave a reason.
    Rejected,
    /// The host lacks something: a device, a permission, room.
    Host,
    /// The daemon or the host has no file descriptor or no memory left.
    Exhausted,
    /// The VMM does not answer within its deadline. It may be alive.
    Timeout,
    /// The VMM cannot be reached. It may be alive.
    Unreachable,
    /// The VMM's answer cannot be understood.
    Protocol,
    /// The VMM's process has ended.
    Gone,
    /// The VM did not end, although everything was tried that is allowed without force.
    StillRuns,
    /// The configuration names no way to the VM any more. Nothing was changed.
    NotServed,
}

/// The contact with a VMM, as the error of a question to the VMM proves or disproves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContactProof {
    /// The VMM answered with a refusal.
    Made,
    /// The VMM did not answer, or the answer cannot be understood.
    Lost,
    /// The VMM was not asked, or is known to have ended, which is reported elsewhere.
    None,
}

impl BackendErrorKind {
    /// Returns the contact that a failed question to a VMM proves.
    pub const fn contact(self) -> ContactProof {
        match self {
            Self::Timeout | Self::Unreachable | Self::Protocol => ContactProof::Lost,
            Self::Rejected | Self::Unsupported(_) | Self::StillRuns => ContactProof::Made,
            Self::Host | Self::Exhausted | Self::NotInstalled | Self::Gone | Self::NotServed => {
                ContactProof::None
            }
        }
    }
}

impl BackendError {
    /// Returns an error without an underlying cause.
    pub fn new(kind: BackendErrorKind, effect: Effect, message: impl Into<String>) -> Self {
        Self { kind, effect, message: message.into(), vmm_limit: None, source: None }
    }

    /// Returns the refusal of a VMM, whose words are in `message`. Where they name a limit on open
    /// files, the message says what to raise.
    pub fn refused(effect: Effect, message: impl Into<String>) -> Self {
        let mut error = Self::new(BackendErrorKind::Rejected, effect, message);
        error.vmm_limit = HostLimit::quoted_in(&error.message);
        if let Some(limit) = error.vmm_limit {
            error.message = format!("{}; {}", error.message, limit.advice_for_vmm());
        }
        error
    }

    /// Returns the error with its cause. Where the cause is a limit of the host, the kind becomes
    /// [`BackendErrorKind::Exhausted`] and the message says what to raise.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source: Arc<dyn std::error::Error + Send + Sync> = Arc::from(source.into());
        if let Some(limit) = HostLimit::reached(&*source) {
            self.kind = BackendErrorKind::Exhausted;
            if !self.message.contains(limit.advice()) {
                self.message = format!("{}; {}", self.message, limit.advice());
            }
        }
        self.source = Some(source);
        self
    }
}
