//! What a run of the suite found, and where it is kept for the document.
//!
//! Each column has one file, `target/backend-suite/<column>.json`. Tests run side by side, in one process or several, so a file
//! is changed under a lock.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What a case found of a column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cell", content = "detail", rename_all = "kebab-case")]
pub enum Verdict {
    /// As asked.
    Served,
    /// As asked, by other means; the text says which.
    Emulated(String),
    /// Accepted with a warning, and without effect.
    Ignored(String),
    /// Refused, with a reason.
    Rejected(String),
    /// The hypervisor cannot, and says so in its capabilities.
    NotApplicable(String),
    /// This host lacks what it takes to find out.
    NotRun(String),
    /// The case failed.
    Failed(String),
}

/// The word in the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell(pub &'static str);

impl Verdict {
    /// The word in the matrix.
    #[must_use]
    pub const fn cell(&self) -> Cell {
        Cell(match self {
            Self::Served => "served",
            Self::Emulated(_) => "emulated",
            Self::Ignored(_) => "ignored",
            Self::Rejected(_) => "refused",
            Self::NotApplicable(_) => "n/a",
            Self::NotRun(_) => "not run",
            Self::Failed(_) => "**failed**",
        })
    }

    /// What there is to say about it.
    #[must_use]
    pub fn detail(&self) -> Option<&str> {
        match self {
            Self::Served => None,
            Self::Emulated(text)
            | Self::Ignored(text)
            | Self::Rejected(text)
            | Self::NotApplicable(text)
            | Self::NotRun(text)
            | Self::Failed(text) => Some(text),
        }
    }

    /// The same without the path of a test's folder, which is another one each time.
    pub(super) fn without(self, dir: &Path) -> Self {
        let dir = format!("{}/", dir.display());
        let short = |text: String| text.replace(&dir, "");
        match self {
            Self::Served => Self::Served,
            Self::Emulated(text) => Self::Emulated(short(text)),
            Self::Ignored(text) => Self::Ignored(short(text)),
            Self::Rejected(text) => Self::Rejected(short(text)),
            Self::NotApplicable(text) => Self::NotApplicable(short(text)),
            Self::NotRun(text) => Self::NotRun(short(text)),
            Self::Failed(text) => Self::Failed(short(text)),
        }
    }
}

/// What was found of one column.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnResults {
    /// The hypervisor's version, as it says itself.
    pub version: String,
    /// The verdicts by case.
    pub cases: BTreeMap<String, Verdict>,
}

/// The folder of results: `backend-suite` in Cargo's target folder.
#[must_use]
pub fn folder() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| super::matrix::root().join("target")).join("backend-suite")
}

/// Reads what was found of a column; `None` where nothing was.
///
/// # Errors
/// The file cannot be read, or is none of ours.
pub fn read(folder: &Path, column: &str) -> io::Result<Option<ColumnResults>> {
    match std::fs::read(folder.join(format!("{column}.json"))) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Adds a verdict to its column's file. Without a place to write to, the tests are still worth running.
pub(super) fn record(column: &str, version: &str, case: &str, verdict: &Verdict) {
    let folder = folder();
    let write = || {
        std::fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join(format!("{column}.lock")))?;
        lock.lock()?;
        let mut results = read(&folder, column).ok().flatten().unwrap_or_default();
        if results.version != version {
            // Another program's results are not this one's.
            results = ColumnResults { version: version.to_owned(), ..ColumnResults::default() };
        }
        results.cases.insert(case.to_owned(), verdict.clone());
        let text = serde_json::to_vec_pretty(&results)?;
        let new = folder.join(format!("{column}.new"));
        std::fs::write(&new, text)?;
        std::fs::rename(&new, folder.join(format!("{column}.json")))
    };
    if let Err(error) = write() {
        note(&format!("the results of {column} cannot be kept in {}: {error}", folder.display()));
    }
}

#[expect(clippy::print_stderr, reason = "whoever runs the tests is told")]
fn note(text: &str) {
    eprintln!("{text}");
}
