//! The lines of `doctor`.

use serde::Serialize;

/// The verdict on one thing that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum CheckVerdict {
    /// The thing is as it should be.
    Ok,
    /// Something cannot be done, and the default backend can serve all the same.
    Warn,
    /// The daemon cannot start, or its default backend cannot serve.
    Fail,
}

/// A line of `doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct DoctorCheck {
    /// The thing that was looked at.
    pub(super) name: String,
    /// The verdict.
    pub(super) verdict: CheckVerdict,
    /// The finding.
    pub(super) finding: String,
    /// The remedy; null if there is nothing to do.
    pub(super) remedy: Option<String>,
}

impl DoctorCheck {
    pub(super) fn ok(name: impl Into<String>, finding: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: CheckVerdict::Ok, finding: finding.into(), remedy: None }
    }

    pub(super) fn warn(
        name: impl Into<String>,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { verdict: CheckVerdict::Warn, remedy: Some(remedy.into()), ..Self::ok(name, finding) }
    }

    pub(super) fn fail(
        name: impl Into<String>,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { verdict: CheckVerdict::Fail, remedy: Some(remedy.into()), ..Self::ok(name, finding) }
    }
}
