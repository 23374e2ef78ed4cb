//! Findings about a configuration, each with the field that it concerns.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The most violations, and the most warnings, that one report lists.
///
/// A client mends a few at a time, and one answer has room for fewer. The bound also keeps a check
/// linear in the size of its input, although each new finding is compared with the listed ones.
pub const MAX_FINDINGS: usize = 100;

/// One finding about one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldReport {
    /// Path from the request's root, such as `config.cpu.vcpu_count` or `config.storage[0].path`.
    pub field: String,
    /// The fault or the difference, and the remedy.
    pub message: String,
}

impl FieldReport {
    /// Ties `message` to the field at `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

impl fmt::Display for FieldReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// The treatment of a value that a backend does not serve as the client sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// The value has no effect.
    Ignored,
    /// The program or the backend does something else instead.
    Emulated,
    /// The value is served. The remark is about its consequences.
    Served,
}

/// A remark that is no reason to refuse a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Path from the request's root.
    pub field: String,
    /// The treatment of the value.
    pub treatment: Treatment,
    /// The difference, and the remedy.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

impl From<Warning> for FieldReport {
    fn from(warning: Warning) -> Self {
        let Warning { field, treatment: _, message } = warning;
        Self { field, message }
    }
}

/// All findings of one check: the reasons to refuse a configuration, and remarks that are no such
/// reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// The reasons to refuse the configuration, at most [`MAX_FINDINGS`]. Without any the
    /// configuration can be served.
    pub violations: Vec<FieldReport>,
    /// The ignored ceilings and hints, and the emulated features; at most [`MAX_FINDINGS`].
    pub warnings: Vec<Warning>,
    /// The number of violations beyond the listed ones.
    unlisted: usize,
}

impl CheckReport {
    /// Adds a reason to refuse, unless an equal one is listed.
    pub fn reject(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(FieldReport::new(field, message));
    }

    /// Adds a warning of a value that has no effect.
    pub fn ignore(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.warn(field, Treatment::Ignored, message);
    }

    /// Adds a warning of a value that something else replaces.
    pub fn emulate(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.warn(field, Treatment::Emulated, message);
    }

    /// Adds a remark about a value that is served.
    pub fn advise(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.warn(field, Treatment::Served, message);
    }

    /// Adds all findings of `other` that are not listed here yet.
    pub fn merge(&mut self, other: CheckReport) {
        let CheckReport { violations, warnings, unlisted } = other;
        self.unlisted += unlisted;
        violations.into_iter().for_each(|finding| self.add(finding));
        warnings.into_iter().for_each(|warning| self.add_warning(warning));
    }

    /// Removes the violations and the warnings whose field their function refuses.
    pub fn keep(&mut self, violation: impl Fn(&str) -> bool, warning: impl Fn(&str) -> bool) {
        let before = self.violations.len();
        self.violations.retain(|found| violation(&found.field));
        self.warnings.retain(|found| warning(&found.field));
        if self.violations.len() < before && self.violations.is_empty() {
            // The violations beyond the listed ones concern the same fields as those that went.
            self.unlisted = 0;
        }
    }

    /// Returns true if the configuration can be served.
    pub fn is_ok(&self) -> bool {
        self.violations.is_empty()
    }

    /// Returns the violations for a client. If more were found than are listed, the last one has
    /// their number.
    pub fn into_violations(self) -> Vec<FieldReport> {
        let CheckReport { mut violations, warnings: _, unlisted } = self;
        if unlisted > 0 {
            let message =
                format!("has {unlisted} more violations, which are not listed: correct these first");
            violations.push(FieldReport::new("config", message));
        }
        violations
    }

    fn add(&mut self, finding: FieldReport) {
        if self.violations.contains(&finding) {
            return;
        }
        if self.violations.len() < MAX_FINDINGS {
            self.violations.push(finding);
        } else {
            self.unlisted += 1;
        }
    }

    fn warn(&mut self, field: impl Into<String>, treatment: Treatment, message: impl Into<String>) {
        self.add_warning(Warning { field: field.into(), treatment, message: message.into() });
    }

    fn add_warning(&mut self, warning: Warning) {
        // Warnings beyond the bound are dropped without a count, because no warning refuses
        // anything.
        if self.warnings.len() < MAX_FINDINGS && !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_lists_a_hundred_findings_and_counts_the_rest() {
        let mut report = CheckReport::default();
        for number in 0..400_000 {
            report.reject(format!("config.storage[{number}].path"), "is required");
        }
        let mut merged = report.clone();
        merged.merge(report);
        assert_eq!(merged.violations.len(), MAX_FINDINGS);
        let reported = merged.into_violations();
        assert_eq!(reported.len(), MAX_FINDINGS + 1);
        assert!(reported[MAX_FINDINGS].message.contains("more violations"), "{}", reported[MAX_FINDINGS]);
    }

    #[test]
    fn a_repeated_finding_is_listed_once() {
        let mut report = CheckReport::default();
        report.reject("config.cpu", "is required");
        report.ignore("config.boot", "has no effect");
        let mut merged = report.clone();
        merged.merge(report.clone());
        assert_eq!(merged, report);
        assert_eq!(merged.into_violations(), [FieldReport::new("config.cpu", "is required")]);
    }
}
