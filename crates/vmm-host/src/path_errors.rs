//! Puts the file's path into I/O errors.

use std::io;
use std::path::Path;

/// Returns `error` with `path` in front of its text. The kind is kept, the kernel's error number is
/// not.
pub(crate) fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
