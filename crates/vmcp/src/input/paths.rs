//! The paths of flags.

use crate::config::Server;
use crate::failure::Failure;

/// Returns the path of a flag as the server can read it. A relative path begins at the working
/// directory of this process if the server is on this host. An empty path stays empty.
///
/// # Errors
///
/// The path is relative, and the server is on another host, the working directory is gone, or its
/// name is not UTF-8.
pub(super) fn absolute(flag: &str, path: &str, server: &Server) -> Result<String, Failure> {
    if path.is_empty() || path.starts_with('/') {
        return Ok(path.to_owned());
    }
    let refuse = || Failure::input(format!("{flag}: must be an absolute path on the host, not \"{path}\""));
    if !server.is_loopback() {
        return Err(refuse().with_remedy(format!(
            "the server {server} is on another host; write the path of the file there"
        )));
    }
    let whole = std::path::absolute(path)
        .map_err(|error| refuse().with_remedy(format!("the working directory cannot be read: {error}")))?;
    let whole = whole.into_os_string().into_string();
    whole.map_err(|_| refuse().with_remedy("the name of the working directory is not UTF-8"))
}
