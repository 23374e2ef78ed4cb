//! I/O errors that name the file.

use std::io;
use std::path::Path;

/// Returns `error` with `path` in front of its text. The kind stays; the code of the kernel goes.
pub(crate) fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
