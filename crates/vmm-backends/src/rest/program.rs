//! The hypervisor's program: where it is, which version, and whether this host can run it.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use tokio::io::AsyncReadExt;
use vmm_core::backend::{BackendError, BackendErrorKind, BackendHealth, Effect};
use vmm_host::{kvm, path};

use crate::words;

/// How long a program may take to say its version.
const SAYING: Duration = Duration::from_secs(5);
/// How much of what it says is read, in bytes.
const MAX_SAID: u64 = 4096;

/// A version of three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// Finds the first version in `text`: a `v` and up to three numbers, as in `Firecracker v1.16.1`.
    pub fn find(text: &str) -> Option<Self> {
        text.split_whitespace().find_map(|word| {
            let digits = word.strip_prefix('v')?;
            let end =
                digits.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(digits.len());
            let mut numbers = digits[..end].split('.').map(str::parse::<u32>);
            let major = numbers.next()?.ok()?;
            let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
            Some(Self(major, next(), next()))
        })
    }
}

/// The version that a VMM tells of itself, in the form of [`Version`]; what has another is made fit to be shown.
pub fn told_version(text: &str) -> String {
    let marked = format!("v{}", text.trim_start_matches('v'));
    Version::find(&marked).map_or_else(|| words::version(text), |version| version.to_string())
}

/// Tells a program from the one that replaced it at the same path.
type Stamp = (PathBuf, u64, u64, Option<SystemTime>);

/// A program whose version is known, as it lies on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    stamp: Stamp,
    /// Its version.
    pub version: Version,
}

impl Known {
    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.stamp.0
    }
}

/// A hypervisor's program, looked for anew at each use, because it may be installed or upgraded while the daemon runs.
#[derive(Debug)]
pub struct Program {
    wanted: OsString,
    name: &'static str,
    oldest: Version,
    known: Mutex<Option<(Stamp, Version)>>,
}

impl Program {
    /// The program `wanted` (a name on the PATH, or a path) of the hypervisor `name`, not older than `oldest`.
    pub fn new(wanted: impl Into<OsString>, name: &'static str, oldest: Version) -> Self {
        Self { wanted: wanted.into(), name, oldest, known: Mutex::new(None) }
    }

    /// Says whether the program is there and new enough, and `/dev/kvm` usable.
    pub async fn health(&self) -> BackendHealth {
        let version = match self.find().await {
            Ok((_, version)) => match tokio::task::spawn_blocking(kvm::kvm_usable).await {
                Ok(usable) => usable.map(|()| version.to_string()),
                Err(error) => Err(format!("/dev/kvm could not be examined: {error}")),
            },
            Err(error) => Err(error.message),
        };
        BackendHealth::from(version)
    }

    /// Finds the program and its version, which is asked for once per file.
    ///
    /// # Errors
    /// [`BackendErrorKind::NotInstalled`], saying what to do.
    pub async fn find(&self) -> Result<(PathBuf, Version), BackendError> {
        let wanted = self.wanted.clone();
        let stamp = match tokio::task::spawn_blocking(move || stamp(&wanted)).await {
            Ok(Ok(stamp)) => stamp,
            Ok(Err(why)) => return Err(self.unusable(&why)),
            Err(error) => return Err(self.unusable(&format!("the search was broken off: {error}"))),
        };
        if let Some(version) = self.remembered(&stamp) {
            return Ok((stamp.0, version));
        }
        let version = self.ask(&stamp.0).await?;
        *self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            Some((stamp.clone(), version));
        Ok((stamp.0, version))
    }

    /// The same where nothing need be asked; `None` where the version is not known. Blocks.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub(crate) fn known(&self) -> Result<Option<Known>, BackendError> {
        let stamp = stamp(&self.wanted).map_err(|why| self.unusable(&why))?;
        Ok(self.remembered(&stamp).map(|version| Known { stamp, version }))
    }

    /// The names under which the running program shows in `/proc`.
    pub async fn running_names(&self) -> Vec<String> {
        let wanted = self.wanted.clone();
        let real = tokio::task::spawn_blocking(move || {
            let found = path::find_program(&wanted, std::env::var_os("PATH").as_deref()).ok()?;
            path::real_name(&found)
        });
        let real = real.await.ok().flatten().filter(|real| real != self.name);
        std::iter::once(self.name.to_owned()).chain(real).collect()
    }

    /// The version of the program that `stamp` is of, if that was the last to be asked.
    fn remembered(&self, stamp: &Stamp) -> Option<Version> {
        let known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.as_ref().filter(|(known, _)| known == stamp).map(|(_, version)| *version)
    }

    async fn ask(&self, program: &Path) -> Result<Version, BackendError> {
        let said = tokio::time::timeout(SAYING, said_by(program)).await;
        let said = match said {
            Ok(Ok(said)) => said,
            Ok(Err(error)) => return Err(self.unusable(&format!("{} --version: {error}", program.display()))),
            Err(_) => {
                let seconds = SAYING.as_secs();
                return Err(
                    self.unusable(&format!("{} --version took more than {seconds} s", program.display()))
                );
            }
        };
        match Version::find(&said) {
            Some(version) if version < self.oldest => Err(self.unusable(&format!(
                "{} is version {version}, and {} is the oldest that can be used; upgrade it",
                program.display(),
                self.oldest
            ))),
            Some(version) => Ok(version),
            None => Err(self.unusable(&format!("{} --version names no version", program.display()))),
        }
    }

    fn unusable(&self, why: &str) -> BackendError {
        let message = format!("the {} backend cannot serve: {why}", self.name);
        BackendError::new(BackendErrorKind::NotInstalled, Effect::NotApplied, message)
    }
}

fn stamp(wanted: &OsStr) -> Result<Stamp, String> {
    let program = path::find_program(wanted, std::env::var_os("PATH").as_deref())?;
    let facts = std::fs::metadata(&program).map_err(|error| format!("{}: {error}", program.display()))?;
    Ok((program, facts.dev(), facts.ino(), facts.modified().ok()))
}

async fn said_by(program: &Path) -> std::io::Result<String> {
    let mut command = tokio::process::Command::new(program);
    command
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = {
        let _starting = vmm_host::process::starting();
        command.spawn()?
    };
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_SAID).read_to_end(&mut said).await?;
    }
    // What it says after that is not read; a program that goes on for ever ends with the pipe.
    child.wait().await?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        assert_eq!(Version::find("Firecracker v1.16.1\n\n2026 exiting"), Some(Version(1, 16, 1)));
        assert_eq!(Version::find("cloud-hypervisor v53.0"), Some(Version(53, 0, 0)));
        assert_eq!(Version::find("cloud-hypervisor v53.0-12-gabc-dirty"), Some(Version(53, 0, 0)));
        assert_eq!(Version::find("very well"), None);
        assert_eq!(Version::find("v99999999999"), None);
        assert_eq!(Version::find(""), None);
        assert_eq!(
            [told_version("53.0"), told_version("v1.16.1"), told_version("odd\n")],
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
        let program = Program::new(&path, "hypervisor", Version(1, 5, 0));
        assert_eq!(program.find().await.unwrap(), (path, Version(2, 0, 0)));
        script(dir.path(), "echo x v1.4.9");
        let error = program.find().await.unwrap_err();
        assert!(error.message.contains("1.5.0 is the oldest"), "{}", error.message);
        script(dir.path(), "exit 3");
        let error = program.find().await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::NotInstalled);
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let program = Program::new("/nowhere/hypervisor", "hypervisor", Version(1, 0, 0));
        let why = program.health().await.version.unwrap_err();
        assert!(why.contains("/nowhere/hypervisor"), "{why}");
    }
}
