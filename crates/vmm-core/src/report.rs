//! Findings about a configuration, each tied to the field it concerns.

use serde::{Deserialize, Serialize};

/// One finding about one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldReport {
    /// Path from the request's root, such as `config.cpu.vcpu_count` or `config.storage[0].path`.
    pub field: String,
    /// What is wrong or different, and what to do about it.
    pub message: String,
}

impl FieldReport {
    /// Ties `message` to the field at `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

impl std::fmt::Display for FieldReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// All findings of one check: what forbids the configuration, and what is merely different from what was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Reasons to refuse. Empty means that the configuration can be served.
    pub violations: Vec<FieldReport>,
    /// Ceilings and hints that are ignored, and features that are emulated.
    pub warnings: Vec<FieldReport>,
}

impl Report {
    /// Adds a reason to refuse.
    pub fn reject(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.violations.push(FieldReport::new(field, message));
    }

    /// Adds a remark that refuses nothing.
    pub fn warn(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.warnings.push(FieldReport::new(field, message));
    }

    /// Takes over all findings of `other`, leaving out what is already here word for word.
    pub fn merge(&mut self, other: Report) {
        for finding in other.violations {
            if !self.violations.contains(&finding) {
                self.violations.push(finding);
            }
        }
        for finding in other.warnings {
            if !self.warnings.contains(&finding) {
                self.warnings.push(finding);
            }
        }
    }

    /// Says whether the configuration can be served.
    pub fn is_ok(&self) -> bool {
        self.violations.is_empty()
    }
}
