//! The values of the unix socket's settings.

use std::path::PathBuf;

use super::{SOCKET_PATH_MAX, ValueError, absolute_path};

/// The end of the name of the lock beside the socket.
const LOCK_SUFFIX: &str = ".lock";

/// Reads the absolute path of a unix socket.
pub(in super::super) fn socket_path(text: &str) -> Result<PathBuf, ValueError> {
    let path = absolute_path(text)?;
    if path.file_name().is_none() || text.ends_with('/') {
        return Err(ValueError::not(
            text,
            "is no path of a file",
            "an absolute path, such as /run/vmm-controlplane.sock",
        ));
    }
    if text.len() > SOCKET_PATH_MAX {
        return Err(ValueError::not(
            text,
            &format!("is {} bytes long, and the kernel takes {SOCKET_PATH_MAX} for a socket", text.len()),
            format!("a path of {SOCKET_PATH_MAX} bytes at most"),
        ));
    }
    if text.ends_with(LOCK_SUFFIX) {
        return Err(ValueError::not(text, "is the name of a lock", "a name that does not end in .lock"));
    }
    Ok(path)
}

/// Reads permission bits in octal digits. The owner, which is the daemon, must be able to connect.
pub(in super::super) fn socket_mode(text: &str) -> Result<u32, ValueError> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode =
        u32::from_str_radix(digits, 8).ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let usable = mode.filter(|mode| (0o600..=0o777).contains(mode));
    usable.ok_or_else(|| {
        ValueError::not(text, "is no mode of a socket", "octal digits from 0600 to 0777, such as 0660")
    })
}

/// Reads a group's id, or its name, which `id_of` knows.
pub(in super::super) fn socket_group(
    text: &str,
    id_of: impl Fn(&str) -> Option<u32>,
) -> Result<u32, ValueError> {
    // The highest id means "unchanged" to the kernel.
    let id = text.parse().ok().filter(|id| *id != u32::MAX).or_else(|| id_of(text));
    id.ok_or_else(|| ValueError::not(text, "is no group of this host", "the name or the id of a group"))
}
