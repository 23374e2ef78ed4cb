//! A copy of the host's QEMU from which a test can take parts.
//!
//! QEMU looks for its firmware and modules relative to its own program file, so a copy at another
//! place finds only the parts that the test has put beside it.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The name of the program.
const PROGRAM: &str = "qemu-system-x86_64";
/// The folders of modules below the prefix of an installation, on the usual distributions.
const MODULES: [&str; 3] = ["lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu"];

/// The copy. It lies in a folder of the caller.
#[derive(Debug)]
pub struct QemuCopy {
    prefix: PathBuf,
}

impl QemuCopy {
    /// Copies the QEMU on PATH into `folder`, with links to all its parts. Returns `None` if there
    /// is no QEMU.
    ///
    /// # Errors
    /// Returns the error of a file of the copy.
    pub fn in_folder(folder: &Path) -> io::Result<Option<Self>> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)).find(|file| file.is_file());
        let Some(real) = found else { return Ok(None) };
        let copy = Self { prefix: folder.join("qemu") };
        fs::create_dir_all(copy.prefix.join("bin"))?;
        fs::copy(&real, copy.program())?;
        let help = Command::new(&real).args(["-L", "help"]).output()?;
        for data in String::from_utf8_lossy(&help.stdout).lines().map(PathBuf::from) {
            // Each file is a link of its own, so that a test can remove one.
            if let Some(name) = data.file_name().filter(|_| data.is_dir()) {
                link_all(&data, &copy.prefix.join("share").join(name))?;
            }
        }
        let prefix = real.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
        for modules in MODULES.iter().filter(|modules| prefix.join(modules).is_dir()) {
            link_all(&prefix.join(modules), &copy.prefix.join(modules))?;
        }
        Ok(Some(copy))
    }

    /// Returns the path of the copied program.
    pub fn program(&self) -> PathBuf {
        self.prefix.join("bin").join(PROGRAM)
    }

    /// Takes away every part whose file name begins with `name`. Returns the removed links, for
    /// [`Self::put_back`].
    ///
    /// # Errors
    /// Returns the error of a file of the copy.
    pub fn take(&self, name: &str) -> io::Result<Vec<(PathBuf, PathBuf)>> {
        let mut taken = Vec::new();
        let mut folders = vec![self.prefix.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_symlink() && entry.file_name().to_string_lossy().starts_with(name) {
                    taken.push((fs::read_link(entry.path())?, entry.path()));
                    fs::remove_file(entry.path())?;
                }
            }
        }
        Ok(taken)
    }

    /// Puts parts back that were taken away.
    ///
    /// # Errors
    /// Returns the error of a file of the copy.
    pub fn put_back(&self, taken: Vec<(PathBuf, PathBuf)>) -> io::Result<()> {
        taken.into_iter().try_for_each(|(target, link)| symlink(target, link))
    }
}

fn link_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        // Two names of one file, as of bios-microvm.bin and qboot.rom, are two parts.
        symlink(entry.path().canonicalize()?, to.join(entry.file_name()))?;
    }
    Ok(())
}
