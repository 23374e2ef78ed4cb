//! Finds programs, and quotes words for a shell.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};

/// Finds a program as a shell would: a name in the folders of `path`, and anything with a slash at
/// that path. The result is absolute. Empty and relative entries of `path` are passed over, because
/// the working directory must not decide which program is started.
///
/// # Errors
/// Returns a text for people with the places that were searched.
pub fn find_program(name_or_path: impl AsRef<OsStr>, path: Option<&OsStr>) -> Result<PathBuf, String> {
    let wanted = Path::new(name_or_path.as_ref());
    let shown = wanted.display();
    if wanted.as_os_str().is_empty() {
        return Err("no program is named".to_owned());
    }
    if wanted.as_os_str().as_encoded_bytes().contains(&b'/') {
        let absolute = std::path::absolute(wanted).map_err(|error| format!("{shown}: {error}"))?;
        return runnable(&absolute).map(|()| absolute);
    }
    let path = path.unwrap_or_default();
    let mut refused = None;
    for folder in std::env::split_paths(path).filter(|folder| folder.is_absolute()) {
        let candidate = folder.join(wanted);
        match runnable(&candidate) {
            Ok(()) => return Ok(candidate),
            // An unusable program is reported only if no later folder has a usable one.
            Err(reason) if candidate.exists() => refused = refused.or(Some(reason)),
            Err(_) => {}
        }
    }
    Err(refused.unwrap_or_else(|| {
        format!("{shown} is not on the PATH ({}); install it, or name it by its full path", path.display())
    }))
}

/// Quotes a text as one word for a POSIX shell. Plain words are returned unchanged.
#[must_use]
pub fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Returns the file name that a running program shows in `/proc`. Symbolic links are followed.
pub fn real_name(program: &Path) -> Option<String> {
    let real = std::fs::canonicalize(program).ok()?;
    Some(real.file_name()?.to_string_lossy().into_owned())
}

fn runnable(program: &Path) -> Result<(), String> {
    let shown = program.display();
    match std::fs::metadata(program) {
        Ok(facts) if facts.is_file() => {}
        Ok(_) => return Err(format!("{shown} is not a file")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(format!("{shown} does not exist; install it, or correct the path"));
        }
        Err(error) => return Err(format!("{shown} cannot be examined: {error}")),
    }
    rustix::fs::accessat(CWD, program, Access::EXEC_OK, AtFlags::EACCESS)
        .map_err(|_| format!("{shown} may not be run by the daemon's user; make it executable"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn program(dir: &Path, name: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn the_first_executable_file_in_path_is_found() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        program(a.path(), "vmm", 0o644);
        let good = program(b.path(), "vmm", 0o755);
        let path = std::env::join_paths([Path::new(""), Path::new("."), a.path(), b.path()]).unwrap();
        assert_eq!(find_program("vmm", Some(&path)), Ok(good.clone()));
        assert_eq!(find_program(&good, None), Ok(good));
        let text = find_program("vmm", Some(a.path().as_os_str())).unwrap_err();
        assert!(text.contains("make it executable"), "{text}");
    }

    #[test]
    fn quoted_words_survive_a_shell() {
        assert_eq!(shell_word("path=/run/vmm-1/ch.sock"), "path=/run/vmm-1/ch.sock");
        for text in ["", "it's $(here)", "/a b/c;d", "~", "\"*\"\\"] {
            let shell = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", shell_word(text))])
                .output();
            assert_eq!(String::from_utf8(shell.unwrap().stdout).unwrap(), text);
        }
    }

    #[test]
    fn a_missing_program_is_explained() {
        let dir = tempfile::tempdir().unwrap();
        let text = find_program("no-such-vmm", Some(dir.path().as_os_str())).unwrap_err();
        assert!(text.starts_with("no-such-vmm is not on the PATH ("), "{text}");
        assert!(find_program(dir.path(), None).unwrap_err().contains("is not a file"));
        assert!(find_program("/nowhere/vmm", None).unwrap_err().contains("does not exist"));
        assert!(find_program("", None).is_err());
    }

    #[test]
    fn the_current_directory_is_never_searched() {
        // Tests run in the package's folder, which holds this file.
        assert!(find_program("Cargo.toml", Some(OsStr::new(".:"))).unwrap_err().contains("not on the PATH"));
    }

    #[test]
    fn a_link_shows_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let real = program(dir.path(), "vmm-1.2", 0o755);
        let link = dir.path().join("vmm");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(real_name(&link).as_deref(), Some("vmm-1.2"));
        assert_eq!(real_name(&dir.path().join("none")), None);
    }
}
