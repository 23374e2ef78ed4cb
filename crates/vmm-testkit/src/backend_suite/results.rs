//! The results of a run of the suite, and the files that keep them for the document.
//!
//! Each column has one file, `target/backend-suite/<column>.json`. A file is changed under a lock,
//! because tests run side by side, in one process or several.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Returns the root folder of the sources.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The result of a case on a column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cell", content = "detail", rename_all = "kebab-case")]
pub enum CaseVerdict {
    /// The request is served.
    Served,
    /// The request is served by other means, which the text describes.
    Emulated(String),
    /// The request is accepted with a warning and has no effect.
    Ignored(String),
    /// The request is refused with a reason.
    Rejected(String),
    /// The hypervisor cannot do this, which its capabilities state.
    NotApplicable(String),
    /// This host lacks something that the case needs.
    NotRun(String),
    /// The case failed.
    Failed(String),
}

/// The word of a verdict in the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixWord(pub &'static str);

impl CaseVerdict {
    /// Returns the word of the verdict in the matrix.
    #[must_use]
    pub const fn cell(&self) -> MatrixWord {
        MatrixWord(match self {
            Self::Served => "served",
            Self::Emulated(_) => "emulated",
            Self::Ignored(_) => "ignored",
            Self::Rejected(_) => "refused",
            Self::NotApplicable(_) => "n/a",
            Self::NotRun(_) => "not run",
            Self::Failed(_) => "**failed**",
        })
    }

    /// Returns the text of the verdict.
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

    /// Returns the verdict without the path of the test's folder, because the path differs in each
    /// run.
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

/// The results of one column.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnResults {
    /// The hypervisor's version, as the hypervisor reports it.
    pub version: String,
    /// The verdicts by case.
    pub cases: BTreeMap<String, CaseVerdict>,
}

/// Returns the folder of results: `backend-suite` in Cargo's target folder.
#[must_use]
pub fn folder() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| root().join("target")).join("backend-suite")
}

/// Reads the results of a column. `None` if there are none.
///
/// # Errors
/// The file cannot be read, or is not a file of results.
pub fn read(folder: &Path, column: &str) -> io::Result<Option<ColumnResults>> {
    match std::fs::read(folder.join(format!("{column}.json"))) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Adds a verdict to the file of its column. A failure is printed and does not fail the test.
pub(super) fn record(column: &str, version: &str, case: &str, verdict: &CaseVerdict) {
    let folder = folder();
    let write = || {
        std::fs::create_dir_all(&folder)?;
        let lock = File::create(folder.join(format!("{column}.lock")))?;
        lock.lock()?;
        let mut results = read(&folder, column).ok().flatten().unwrap_or_default();
        if results.version != version {
            // The results of another version do not describe this one.
            results = ColumnResults { version: version.to_owned(), ..ColumnResults::default() };
        }
        results.cases.insert(case.to_owned(), verdict.clone());
        let text = serde_json::to_vec_pretty(&results)?;
        // The file is replaced by a rename, because a reader must not see half of it.
        let new = folder.join(format!("{column}.new"));
        std::fs::write(&new, text)?;
        std::fs::rename(&new, folder.join(format!("{column}.json")))
    };
    if let Err(error) = write() {
        note(&format!("the results of {column} cannot be kept in {}: {error}", folder.display()));
    }
}

#[expect(clippy::print_stderr, reason = "the person who runs the tests must see it")]
fn note(text: &str) {
    eprintln!("{text}");
}
