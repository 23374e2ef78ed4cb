//! Translates SQLite's error codes to [`StoreError`]: the kind of error, and the remedy for people.

use std::path::Path;

use rusqlite::ErrorCode;
use vmm_core::backend::Effect;
use vmm_core::store::{StoreError, StoreErrorKind};

/// Returns a [`StoreError`] without a cause.
pub(crate) fn store_error(kind: StoreErrorKind, effect: Effect, message: impl Into<String>) -> StoreError {
    StoreError { kind, effect, message: message.into(), source: None }
}

/// Adds the cause to a [`StoreError`].
pub(crate) trait CausedBy {
    /// Returns the error with its cause.
    fn caused_by(self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self;
}

impl CausedBy for StoreError {
    fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

/// The remedy for a damaged database, at the end of every such message.
pub(crate) const REMEDY: &str = "Nothing was changed. \
     Stop the daemon and put back a backup with `vmm-controlplane restore FILE`; or, to \
     begin with no VMs at all, move the database and the files that begin with its name elsewhere (VMs \
     that still run must then be ended by hand)";

/// Returns a [`StoreErrorKind::Corrupt`] about the database at `path`. `finding` completes "the
/// database is damaged:".
pub(crate) fn corrupt(path: &Path, finding: impl std::fmt::Display) -> StoreError {
    let message = format!("the database {} is damaged: {finding}. {REMEDY}", path.display());
    store_error(StoreErrorKind::Corrupt, Effect::NotApplied, message)
}

/// Translates an error of SQLite. `doing` is the action with the database at `path`, a phrase such
/// as "writing to".
pub(crate) fn from_sqlite(path: &Path, doing: &str, effect: Effect, error: rusqlite::Error) -> StoreError {
    let kind = kind_of(&error);
    let at = path.display();
    let message = match kind {
        StoreErrorKind::Full if is_read_only(&error) => format!(
            "{doing} the database {at} failed: it is read-only. Check the mount and the permissions of its folder"
        ),
        StoreErrorKind::Full => format!(
            "{doing} the database {at} failed: no room is left on its file system. Free some and try again"
        ),
        StoreErrorKind::Corrupt => format!("{doing} the database {at} failed: it is damaged. {REMEDY}"),
        StoreErrorKind::Io if is_busy(&error) => format!(
            "{doing} the database {at} failed: another program holds it locked. End that program and try again"
        ),
        StoreErrorKind::Io
        | StoreErrorKind::NameTaken
        | StoreErrorKind::Conflict
        | StoreErrorKind::Newer
        | StoreErrorKind::Closed => format!(
            "{doing} the database {at} failed. Check that its disk is healthy and that this user may write to its folder"
        ),
    };
    store_error(kind, effect, message).caused_by(error)
}

/// Returns the kind that an error of SQLite stands for.
pub(crate) fn kind_of(error: &rusqlite::Error) -> StoreErrorKind {
    let Some(code) = error.sqlite_error_code() else {
        // The columns are typed (STRICT), so a value of another type was not written by this
        // program.
        let damaged = matches!(
            error,
            rusqlite::Error::InvalidColumnType(..)
                | rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::Utf8Error(..)
        );
        return if damaged { StoreErrorKind::Corrupt } else { StoreErrorKind::Io };
    };
    if matches!(code, ErrorCode::DiskFull | ErrorCode::ReadOnly) {
        StoreErrorKind::Full
    } else if matches!(code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) {
        StoreErrorKind::Corrupt
    } else {
        StoreErrorKind::Io
    }
}

/// Returns true if a COMMIT that ended in `error` certainly had no effect.
///
/// Without room, the end of the transaction never reached the log. After any other failure of the
/// disk the end may be in the log: this process has rolled it back, but a process that reads the
/// log after a crash would take it for committed.
pub(crate) fn proves_not_committed(error: &rusqlite::Error) -> bool {
    kind_of(error) == StoreErrorKind::Full || is_busy(error)
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

fn is_read_only(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::ReadOnly)
}
