//! Finds a hypervisor's executable, reads its version, and refuses a version that is too old.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use vmm_core::backend::{BackendError, BackendErrorKind, BackendHealth, Effect};
use vmm_host::path;

use crate::output::{self, Output};
use crate::sanitize;

/// The longest time that a program may take to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// A version of three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
pub struct Version {
    /// Incremented by incompatible releases.
    pub major: u32,
    /// Incremented by compatible releases with new features.
    pub minor: u32,
    /// Incremented by releases that fix faults. QEMU calls it `micro`.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Version {
    /// Returns the version of these three numbers.
    pub const fn new(major: u32, minor: u32, micro: u32) -> Self {
        Self { major, minor, micro }
    }

    /// Returns the first version in `text`: a `v` and up to three numbers, as in `Firecracker
    /// v1.16.1`.
    pub fn find(text: &str) -> Option<Self> {
        text.split_whitespace().find_map(|word| Self::leading(word.strip_prefix('v')?))
    }

    /// Returns the version that `text` begins with: up to three numbers, as in `7.2.22 (Debian …)`.
    pub fn leading(text: &str) -> Option<Self> {
        let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(str::parse::<u32>);
        let major = numbers.next()?.ok()?;
        let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Self { major, minor: next(), micro: next() })
    }
}

/// Returns the version that a VMM reports of itself, in the form of [`Version`]. Text in another
/// form is sanitized and returned.
pub fn reported_version(text: &str) -> String {
    let reported = Version::leading(text.trim_start_matches('v'));
    reported.map_or_else(|| sanitize::version(text), |version| version.to_string())
}

/// The fixed facts about a hypervisor's program.
#[derive(Clone, Copy, Debug)]
pub struct ProgramSpec {
    /// The backend that runs the program.
    pub backend: &'static str,
    /// The hypervisor's name for people.
    pub title: &'static str,
    /// The executable's name as its packages install it.
    pub usual_name: &'static str,
    /// The oldest version that can be used.
    pub oldest: Version,
    /// Reads the version from the program's output.
    pub read_version: fn(&str) -> Option<Version>,
    /// Advice for people: how to install the program, and which setting names another one.
    pub remedy: &'static str,
}

/// Identifies an executable file, so that one that replaced it at the same path is recognized.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileStamp {
    path: PathBuf,
    device: u64,
    inode: u64,
    modified: Option<SystemTime>,
    size: u64,
}

/// An executable file of a usable version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstalledProgram {
    stamp: FileStamp,
    /// The version that the program printed.
    pub version: Version,
}

impl InstalledProgram {
    /// Returns the path of the executable.
    pub fn path(&self) -> &Path {
        &self.stamp.path
    }
}

/// A hypervisor's program. The executable is searched again at each use, because it may be
/// installed or upgraded while the daemon runs.
#[derive(Debug)]
pub struct Program {
    wanted: OsString,
    kind: ProgramSpec,
    last: Mutex<Option<InstalledProgram>>,
}

impl Program {
    /// Returns the program `wanted`, which is a name on the PATH or a path. Does not search for it
    /// yet.
    pub fn new(wanted: impl Into<OsString>, kind: ProgramSpec) -> Self {
        Self { wanted: wanted.into(), kind, last: Mutex::new(None) }
    }

    /// Returns the version of the program if it is usable and `host_serves` succeeds, or else the
    /// reason. `host_serves` may block.
    pub async fn health<E: Display + Send + 'static>(
        &self,
        host_serves: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) -> BackendHealth {
        let version = match self.find().await {
            Ok(installed) => match tokio::task::spawn_blocking(host_serves).await {
                Ok(serves) => serves.map(|()| installed.version.to_string()).map_err(|why| why.to_string()),
                Err(error) => Err(format!("the host could not be examined: {error}")),
            },
            Err(error) => Err(error.message),
        };
        BackendHealth::from(version)
    }

    /// Finds the executable and its version. The version is asked for once per file.
    ///
    /// # Errors
    /// [`BackendErrorKind::NotInstalled`], with advice for the user.
    pub async fn find(&self) -> Result<InstalledProgram, BackendError> {
        let wanted = self.wanted.clone();
        let stamp = match tokio::task::spawn_blocking(move || stamp(&wanted)).await {
            Ok(stamp) => stamp.map_err(|why| self.unusable(&why))?,
            Err(error) => return Err(self.unusable(&format!("the search was interrupted: {error}"))),
        };
        // The stamp names the inode, its size and the time of its last change, so an upgrade in
        // place is noticed and an unchanged executable is not run again.
        if let Some(installed) = self.remembered(&stamp) {
            return Ok(installed);
        }
        let version = self.ask(&stamp.path).await?;
        let installed = InstalledProgram { stamp, version };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(installed.clone());
        Ok(installed)
    }

    /// Finds the executable without running it. Returns `None` if the version of this file is not
    /// known yet. Blocks.
    ///
    /// # Errors
    /// Fails as [`Self::find`] does.
    pub(crate) fn known(&self) -> Result<Option<InstalledProgram>, BackendError> {
        let stamp = stamp(&self.wanted).map_err(|why| self.unusable(&why))?;
        Ok(self.remembered(&stamp))
    }

    /// Returns the names under which the running program may appear in `/proc`: its usual name, the
    /// configured name and the name that the configured one links to.
    pub async fn running_names(&self) -> Vec<String> {
        let wanted = self.wanted.clone();
        let real = tokio::task::spawn_blocking(move || {
            let found = path::find_program(&wanted, std::env::var_os("PATH").as_deref()).ok()?;
            path::real_name(&found)
        });
        let mut names = vec![self.kind.usual_name.to_owned()];
        let wanted = Path::new(&self.wanted).file_name().map(|name| name.to_string_lossy().into_owned());
        for name in wanted.into_iter().chain(real.await.ok().flatten()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// Returns the cached version if the executable on disk still matches `stamp`.
    fn remembered(&self, stamp: &FileStamp) -> Option<InstalledProgram> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|last| last.stamp == *stamp).cloned()
    }

    async fn ask(&self, program: &Path) -> Result<Version, BackendError> {
        let (shown, ProgramSpec { title, oldest, .. }) = (program.display(), self.kind);
        let said = match output::run(program, &["--version".into()], &[], VERSION_TIMEOUT).await {
            Ok(Output { stdout, stderr, .. }) => {
                if stdout.trim().is_empty() {
                    stderr
                } else {
                    stdout
                }
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(
                    self.unusable(&format!("{shown} --version did not answer within {VERSION_TIMEOUT:?}"))
                );
            }
            Err(error) => {
                return Err(self.unusable(&format!("{shown} cannot be run: {error}")).caused_by(error));
            }
        };
        match (self.kind.read_version)(&said) {
            Some(version) if version < oldest => Err(self.unusable(&format!(
                "{shown} is {title} {version}, and {oldest} is the oldest that can be used; upgrade it"
            ))),
            Some(version) => Ok(version),
            None => {
                let said: String = said.trim().chars().take(200).collect();
                Err(self.unusable(&format!("{shown} does not look like {title}: --version says {said:?}")))
            }
        }
    }

    fn unusable(&self, why: &str) -> BackendError {
        let message = format!("the {} backend cannot serve: {why} ({})", self.kind.backend, self.kind.remedy);
        BackendError::new(BackendErrorKind::NotInstalled, Effect::NotApplied, message)
    }
}

fn stamp(wanted: &OsStr) -> Result<FileStamp, String> {
    let path = path::find_program(wanted, std::env::var_os("PATH").as_deref())?;
    let facts = std::fs::metadata(&path)
        .map_err(|error| format!("{} cannot be examined: {error}", path.display()))?;
    let (device, inode, size) = (facts.dev(), facts.ino(), facts.len());
    Ok(FileStamp { path, device, inode, modified: facts.modified().ok(), size })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: ProgramSpec = ProgramSpec {
        backend: "test",
        title: "Hypervisor",
        usual_name: "usual",
        oldest: Version::new(1, 5, 0),
        read_version: Version::find,
        remedy: "get another",
    };

    #[test]
    fn versions_are_read_from_the_output_of_programs() {
        assert_eq!(Version::find("Firecracker v1.16.1\n\n2026 exiting"), Some(Version::new(1, 16, 1)));
        assert_eq!(Version::find("cloud-hypervisor v53.0"), Some(Version::new(53, 0, 0)));
        assert_eq!(Version::find("cloud-hypervisor v53.0-12-gabc-dirty"), Some(Version::new(53, 0, 0)));
        assert_eq!(Version::find("very well"), None);
        assert_eq!(Version::find("v99999999999"), None);
        assert_eq!(Version::find(""), None);
        assert_eq!(
            [reported_version("53.0"), reported_version("v1.16.1"), reported_version("odd\n")],
            ["53.0.0", "1.16.1", "odd "]
        );
    }

    fn script(dir: &Path, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("hypervisor");
        let fresh = dir.join("fresh");
        std::fs::write(&fresh, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(fresh, &path).unwrap();
        path
    }

    #[tokio::test]
    async fn a_replaced_program_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "echo x v2.0.0");
        let program = Program::new(&path, KIND);
        let found = program.find().await.unwrap();
        assert_eq!((found.path(), found.version), (path.as_path(), Version::new(2, 0, 0)));
        assert_eq!(program.known().unwrap(), Some(found));
        script(dir.path(), "echo x v1.4.9");
        assert_eq!(program.known().unwrap(), None);
        let error = program.find().await.unwrap_err();
        assert!(error.message.contains("1.5.0 is the oldest"), "{}", error.message);
        script(dir.path(), "echo 'no libc' >&2; exit 3");
        let error = program.find().await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::NotInstalled);
        assert!(error.message.contains("says \"no libc\" (get another)"), "{}", error.message);
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let program = Program::new("/nowhere/hypervisor", KIND);
        let why = program.health(|| Ok::<(), String>(())).await.version.unwrap_err();
        assert!(why.contains("/nowhere/hypervisor"), "{why}");
        assert_eq!(program.running_names().await, ["usual", "hypervisor"]);
    }
}
