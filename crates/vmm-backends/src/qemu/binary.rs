//! QEMU's program: where it is, which version it is, and whether that is one that works.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use std::os::unix::fs::MetadataExt;

use vmm_host::path::{find_program, real_name};

use super::qmp::QemuVersion;

/// The oldest version that understands the command line of [`super::convert`]: JSON after `-device` came with it.
const OLDEST: QemuVersion = QemuVersion { major: 6, minor: 2, micro: 0 };
/// How long QEMU may take to say its version.
const ASKING: Duration = Duration::from_secs(10);
/// What the program is called where nobody renames it.
const USUAL_NAME: &str = "qemu-system-x86_64";

/// Finds QEMU's program, and remembers the version of each file it has asked.
#[derive(Debug)]
pub(super) struct Binary {
    wanted: PathBuf,
    known: Mutex<Option<(Fingerprint, QemuVersion)>>,
}

/// A program that can be used.
#[derive(Clone, Debug)]
pub(super) struct Program {
    print: Fingerprint,
    pub(super) version: QemuVersion,
}

impl Program {
    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.print.path
    }

    /// Says whether `other` is the same file, unchanged.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

/// Tells one program file from what replaces it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fingerprint {
    path: PathBuf,
    device: u64,
    inode: u64,
    modified: Option<SystemTime>,
}

impl Binary {
    pub(super) fn new(wanted: PathBuf) -> Self {
        Self { wanted, known: Mutex::new(None) }
    }

    /// The program as it is now, or why it cannot be used and what to do.
    pub(super) async fn usable(&self) -> Result<Program, String> {
        let program = find_program(&self.wanted, std::env::var_os("PATH").as_deref()).map_err(|problem| {
            format!(
                "{problem} (Debian and Ubuntu: the package qemu-system-x86), or set UNKEY_VMCP_QEMU_BINARY"
            )
        })?;
        let facts = std::fs::metadata(&program)
            .map_err(|error| format!("{} cannot be examined: {error}", program.display()))?;
        let print = Fingerprint {
            path: program.clone(),
            device: facts.dev(),
            inode: facts.ino(),
            modified: facts.modified().ok(),
        };
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let version = match known {
            Some((known, version)) if known == print => version,
            Some(_) | None => {
                let version = ask_version(&program).await?;
                *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some((print.clone(), version));
                version
            }
        };
        if version < OLDEST {
            return Err(format!(
                "{} is QEMU {version}, and {}.{} or newer is needed; install a newer one, or set UNKEY_VMCP_QEMU_BINARY to one",
                program.display(),
                OLDEST.major,
                OLDEST.minor
            ));
        }
        Ok(Program { print, version })
    }

    /// The names under which the program shows among the host's processes.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = vec![USUAL_NAME.to_owned()];
        let wanted = self.wanted.file_name().map(|name| name.to_string_lossy().into_owned());
        let real = find_program(&self.wanted, std::env::var_os("PATH").as_deref())
            .ok()
            .and_then(|program| real_name(&program));
        for name in wanted.into_iter().chain(real) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

async fn ask_version(program: &Path) -> Result<QemuVersion, String> {
    let shown = program.display();
    let asked = {
        let _starting = vmm_host::process::starting();
        // Starts at once; the future only waits.
        tokio::process::Command::new(program)
            .arg("--version")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
    };
    let output = match tokio::time::timeout(ASKING, asked).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(format!("{shown} cannot be run: {error}")),
        Err(_) => return Err(format!("{shown} --version did not answer within {ASKING:?}")),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let said: String = if text.trim().is_empty() { complaint.trim() } else { text.trim() }.chars().take(200).collect();
        format!("{shown} does not look like QEMU: --version says {said:?}; set UNKEY_VMCP_QEMU_BINARY to qemu-system-x86_64")
    })
}

/// Reads `QEMU emulator version 7.2.22 (Debian …)`.
fn parse_version(text: &str) -> Option<QemuVersion> {
    let rest = text.split_once("QEMU emulator version ")?.1;
    let number: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
    let (major, minor) = (parts.next()??, parts.next()??);
    let micro = parts.next().flatten().unwrap_or(0);
    Some(QemuVersion { major, minor, micro })
}

/// Says whether `name` is among `names`.
pub(super) fn is_named(names: &[String], name: Option<&OsStr>) -> bool {
    name.and_then(OsStr::to_str).is_some_and(|name| names.iter().any(|known| known == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        let version = |major, minor, micro| Some(QemuVersion { major, minor, micro });
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"),
            version(7, 2, 22)
        );
        assert_eq!(parse_version("QEMU emulator version 10.1.0\n"), version(10, 1, 0));
        assert_eq!(parse_version("QEMU emulator version 9.0.50 (v9.0.0-rc1)"), version(9, 0, 50));
        assert_eq!(parse_version("bash 5.2"), None);
        assert_eq!(parse_version("QEMU emulator version x"), None);
    }
}
