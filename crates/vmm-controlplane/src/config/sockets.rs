//! The check that no socket is named twice. One socket serves one VM of one backend, so two
//! endpoints that lead to the same socket are an error, however they are spelled.

use std::path::{Path, PathBuf};

use super::error::{ConfigError, Origin, printable};
use super::settings::Setting;
use super::sources::LoaderHost;
use super::values::Endpoint;

/// An endpoint setting, its value and its origin.
pub(super) type NamedEndpoint<'a> = (Setting, Option<&'a Endpoint>, Option<Origin>);

/// Returns an error for each socket that is named twice, even by another path.
pub(super) fn named_twice(endpoints: &[NamedEndpoint<'_>], host: &dyn LoaderHost) -> Vec<ConfigError> {
    let mut seen: Vec<(String, Setting, &Path)> = Vec::new();
    let mut errors = Vec::new();
    for (setting, endpoint, origin) in endpoints {
        let Some(Endpoint::Unix(sockets)) = endpoint else { continue };
        for socket in sockets {
            let identity = host.identity(socket);
            let earlier = seen.iter().find(|(known, ..)| *known == identity);
            if let Some((_, first, path)) = earlier {
                errors.push(same_socket_error(*setting, socket, *first, path, origin.clone()));
            } else {
                seen.push((identity, *setting, socket));
            }
        }
    }
    errors
}

fn same_socket_error(
    setting: Setting,
    socket: &Path,
    first: Setting,
    path: &Path,
    origin: Option<Origin>,
) -> ConfigError {
    let shown = |path: &Path| printable(&path.to_string_lossy());
    let message = format!(
        "{}: unix://{} is the same socket as unix://{} of {}, and one socket serves one VM of one backend",
        setting.key(),
        shown(socket),
        shown(path),
        first.key()
    );
    ConfigError::new(message, origin, format!("leave it out of {}", setting.variable()))
}

/// Returns the identity of the file that `path` leads to, with links followed. Two paths with the
/// same identity are one file, even if it does not exist yet.
pub(super) fn identity(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    // A socket that exists is identified by its device and inode, so links and bind mounts make no
    // difference. A socket that does not exist yet is identified by its real folder and its name.
    // If the folder does not exist either, the path itself is compared.
    if let Ok(facts) = std::fs::metadata(path) {
        return format!("{}:{}", facts.dev(), facts.ino());
    }
    let folder = path.parent().and_then(|folder| std::fs::canonicalize(folder).ok());
    let plain = || path.components().collect::<PathBuf>();
    let found = folder.zip(path.file_name()).map_or_else(plain, |(folder, name)| folder.join(name));
    found.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::super::sources::ThisHost;
    use super::*;

    #[test]
    fn one_socket_is_recognised_under_every_path() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        symlink(&real, &link).unwrap();
        let _listening = UnixListener::bind(real.join("s")).unwrap();
        std::fs::hard_link(real.join("s"), dir.path().join("hard")).unwrap();
        let unix = |paths: &[PathBuf]| Endpoint::Unix(paths.to_vec());
        let twice = |one: &[PathBuf], other: &[PathBuf]| {
            let (one, other) = (unix(one), unix(other));
            let named = [(Setting::ChEndpoint, Some(&one), None), (Setting::FcEndpoint, Some(&other), None)];
            named_twice(&named, &ThisHost).len()
        };
        assert_eq!(twice(&[real.join("s")], &[link.join("s")]), 1);
        assert_eq!(twice(&[real.join("s"), dir.path().join("hard")], &[]), 1);
        // The folders decide for sockets that do not exist yet.
        assert_eq!(twice(&[real.join("t")], &[link.join("t")]), 1);
        assert_eq!(twice(&[real.join("t")], &[real.join("u")]), 0);
        assert_eq!(twice(&[PathBuf::from("/nowhere//x")], &[PathBuf::from("/nowhere/x")]), 1);
    }
}
