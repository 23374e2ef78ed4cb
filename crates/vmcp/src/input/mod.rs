//! The configuration of a VM, and the change of one, from flags or from a file.

pub(crate) mod changes;
mod file;
mod flags;
mod paths;

use std::io::Read as _;

use vmm_proto::v1 as pb;

use crate::cli::Config;
use crate::config::Server;
use crate::failure::Failure;

/// The longest file that is read: the server takes 4 MiB.
const FILE_LIMIT: u64 = 4 << 20;
/// The name of the standard input on the command line.
const STANDARD_INPUT: &str = "-";

/// Returns the request that the arguments describe. A name or backend of the command line replaces
/// the file's. Relative paths of flags become absolute if the server is on this host.
///
/// # Errors
///
/// The file cannot be read, or is not a CreateVmRequest. A flag has a relative path, and the server
/// is on another host.
pub(crate) fn request(
    name: Option<&str>,
    config: &Config,
    server: &Server,
) -> Result<pb::CreateVmRequest, Failure> {
    let mut request = match &config.file {
        Some(path) => file::parse(path, &read(path)?)?,
        None => flags::request(&config.flags, server)?,
    };
    if let Some(name) = name {
        request.vm_id = name.to_owned();
    }
    if let Some(backend) = &config.backend {
        request.backend.clone_from(backend);
    }
    Ok(request)
}

/// Reads a file or the standard input, as UTF-8.
///
/// # Errors
///
/// The file cannot be read, is too long, or is not UTF-8.
pub(crate) fn read(path: &str) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::Local(format!("{}: {error}", shown(path)));
    let mut text = String::new();
    let mut take = |source: &mut dyn std::io::Read| source.take(FILE_LIMIT + 1).read_to_string(&mut text);
    let length = if path == STANDARD_INPUT {
        take(&mut std::io::stdin().lock())
    } else {
        take(&mut std::fs::File::open(path).map_err(failed)?)
    };
    if length.map_err(failed)? as u64 > FILE_LIMIT {
        return Err(Failure::input(format!("{}: is longer than {FILE_LIMIT} bytes", shown(path))));
    }
    Ok(text)
}

/// Returns the name of a file for people.
fn shown(path: &str) -> &str {
    if path == STANDARD_INPUT { "standard input" } else { path }
}
