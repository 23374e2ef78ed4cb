//! Files that a client names: their kind, their usability, and their first bytes.
//!
//! A client may name any file: a FIFO that blocks its opener, a watchdog that reboots the host once
//! it was opened, a disk on a server that does not answer. Therefore a path is examined before it
//! is opened, and opened with `O_NONBLOCK`. Callers run all functions of this module in
//! `spawn_blocking`.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;
use vmm_core::limit::HostLimit;
use vmm_core::store::{DiskKey, HostClaim};

use crate::block::{self, BlockLayers};

use crate::qcow2::{self, Head, Qcow2Header};

/// The intended use of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The file is read.
    Read,
    /// The file is read and written.
    ReadWrite,
}

/// The kinds of files that can hold a kernel or a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
}

/// The facts about a usable file, read from the open file and not from its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// The device number: of a regular file, that of its file system; of a block device, its own;
    /// of a loop device, that of its backing file.
    pub device: u64,
    /// The inode: of a regular file, its own; of a loop device, that of its backing file; 0 for
    /// another block device, which is the same device under every path.
    pub inode: u64,
    /// The disks that this one is a part of or consists of; see [`HostClaim::Disk`].
    pub lies_on: Vec<DiskKey>,
    /// The kind.
    pub kind: FileKind,
    /// The size in bytes.
    pub size: u64,
    /// The device number of a block device; 0 for a regular file.
    pub rdev: u64,
}

impl FileFacts {
    /// Returns the claim on this disk for the VM that uses it.
    pub fn claim(&self, path: &Path, access: Access) -> HostClaim {
        HostClaim::Disk {
            device: self.device,
            inode: self.inode,
            writable: access == Access::ReadWrite,
            path: path.to_path_buf(),
            lies_on: self.lies_on.clone(),
        }
    }
}

/// The reason why a file cannot be used, and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum FileProblem {
    /// There is no file at the path.
    #[error("{} does not exist on this host; create it or correct the path", .0.display())]
    Missing(PathBuf),
    /// The file's kind cannot hold a kernel or a disk.
    #[error("{} is {what}; name a regular file or a block device", .path.display())]
    WrongKind {
        /// The path.
        path: PathBuf,
        /// The file's kind, with its article.
        what: &'static str,
    },
    /// The daemon's user lacks the permission.
    #[error("{} may not be {access} by the daemon's user; change its owner or mode{}", .path.display(), or_read_only(*.access))]
    Denied {
        /// The path.
        path: PathBuf,
        /// The intended use.
        access: Access,
    },
    /// The file system or the device is read-only.
    #[error("{} cannot be written, because its file system or device is read-only; set read_only or move it", .0.display())]
    ReadOnly(PathBuf),
    /// Another user of the file excludes this use.
    #[error("{} is busy; end what uses it, and try again", .0.display())]
    Busy(PathBuf),
    /// The host failed for another reason.
    #[error("{} cannot be used: {cause}; check the path and the device that holds it", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The kernel's error. It is part of the text, because a client sees nothing but the text.
        cause: io::Error,
    },
}

impl FileProblem {
    /// Returns the limit of the host that prevented the check of the file. Such a problem is not
    /// one of the file.
    pub fn limit(&self) -> Option<HostLimit> {
        match self {
            Self::Io { cause, .. } => HostLimit::of(cause),
            Self::Missing(_)
            | Self::WrongKind { .. }
            | Self::Denied { .. }
            | Self::ReadOnly(_)
            | Self::Busy(_) => None,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::ReadWrite => "read and written",
        })
    }
}

fn or_read_only(access: Access) -> &'static str {
    match access {
        Access::Read => "",
        Access::ReadWrite => ", or set read_only",
    }
}

/// Checks that `path` is a regular file or a block device that can be opened for `access`, and
/// returns its facts. Changes nothing.
///
/// # Errors
/// Returns [`FileProblem`], whose text has the path and the remedy.
pub fn inspect(path: &Path, access: Access) -> Result<FileFacts, FileProblem> {
    let problem = |error| problem(path, access, error);
    // The kind is checked before the file is opened, because opening some devices is using them.
    kind(path, &std::fs::metadata(path).map_err(problem)?)?;
    let mut file = open(path, access).map_err(problem)?;
    let metadata = file.metadata().map_err(problem)?;
    // The facts are those of the open file, because the path may lead to another file by now.
    Ok(match kind(path, &metadata)? {
        FileKind::Regular => FileFacts {
            device: metadata.dev(),
            inode: metadata.ino(),
            lies_on: Vec::new(),
            kind: FileKind::Regular,
            size: metadata.len(),
            rdev: 0,
        },
        FileKind::Block => {
            let BlockLayers { key, lies_on } = block::layers(metadata.rdev());
            FileFacts {
                device: key.device,
                inode: key.inode,
                lies_on,
                kind: FileKind::Block,
                size: file.seek(SeekFrom::End(0)).map_err(problem)?,
                rdev: metadata.rdev(),
            }
        }
    })
}

/// Reads the first `n` bytes of a regular file or block device, or all of a shorter one.
///
/// # Errors
/// Returns the kernel's error; `InvalidInput` for any other kind of file.
pub fn head(path: &Path, n: usize) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(n.min(1 << 20));
    open_regular_or_block(path)?.take(n as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// Reads the qcow2 header of a regular file or block device; `None` where the file is no qcow2
/// image.
///
/// # Errors
/// Returns the kernel's error; `InvalidInput` for any other kind of file, and `InvalidData` for a
/// broken header.
pub fn qcow2_header(path: &Path) -> io::Result<Option<Qcow2Header>> {
    qcow2::read_header(&open_regular_or_block(path)?)
}

/// Takes the bytes that are missing in `head` from a regular file or block device: from the qcow2
/// image with `header`, or from a raw disk if there is no header.
///
/// # Errors
/// Returns the kernel's error; `InvalidInput` for any other kind of file, and the errors of
/// [`Head::fill_from_qcow2`].
pub fn fill_head(head: &mut Head, path: &Path, header: Option<&Qcow2Header>) -> io::Result<()> {
    let file = open_regular_or_block(path)?;
    match header {
        Some(header) => head.fill_from_qcow2(&file, header),
        None => head.fill_from_raw(&file),
    }
}

/// Checks that the daemon's user may write the file at `path`. Opens nothing.
///
/// # Errors
/// Returns the kernel's error: `PermissionDenied` without the permission, `ReadOnlyFilesystem` on a
/// read-only file system.
pub fn may_write(path: &Path) -> io::Result<()> {
    permits(path, rustix::fs::Access::WRITE_OK)
}

/// Checks that the daemon's user may make a file in `folder`. Makes nothing.
///
/// # Errors
/// Fails as [`may_write`] does.
pub fn may_write_into(folder: &Path) -> io::Result<()> {
    permits(folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
}

fn permits(path: &Path, access: rustix::fs::Access) -> io::Result<()> {
    // The effective user counts, because the kernel checks it when the file is opened.
    Ok(rustix::fs::accessat(rustix::fs::CWD, path, access, rustix::fs::AtFlags::EACCESS)?)
}

/// Reads the last lines of a log for people: at most `max_bytes` bytes and `max_lines` lines.
/// Invalid UTF-8 is replaced and control characters are left out. Returns an empty text where the
/// file cannot be read, because a log only completes another error.
pub fn tail_lines(path: &Path, max_bytes: usize, max_lines: usize) -> String {
    let read = || -> io::Result<(Vec<u8>, bool)> {
        let mut file = open_regular_or_block(path)?;
        let size = file.seek(SeekFrom::End(0))?;
        let from = size.saturating_sub(max_bytes as u64);
        file.seek(SeekFrom::Start(from))?;
        let mut end = Vec::new();
        file.take(max_bytes as u64).read_to_end(&mut end)?;
        Ok((end, from > 0))
    };
    let Ok((mut end, cut)) = read() else { return String::new() };
    // The cut leaves the end of a line at the beginning. That piece is dropped if a whole line
    // follows.
    if cut
        && let Some(newline) = end.iter().position(|&byte| byte == b'\n')
        && newline + 1 < end.len()
    {
        end.drain(..=newline);
    }
    let text = String::from_utf8_lossy(&end);
    let lines: Vec<String> = text.lines().map(printable).filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(max_lines)..].join("\n")
}

/// Removes control characters from a line, and with them the sequences that colour a terminal.
fn printable(line: &str) -> String {
    let mut shown = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '\t' => shown.push(' '),
            '\u{1b}' => {
                // A sequence is ESC, `[` and everything up to a letter. Any other escape has two
                // characters.
                if chars.next() == Some('[') {
                    while chars.next().is_some_and(|next| !('@'..='~').contains(&next)) {}
                }
            }
            control if control.is_control() => {}
            // These characters reverse the direction of the text behind them, which would hide a
            // path.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
            other => shown.push(other),
        }
    }
    shown
}

fn open(path: &Path, access: Access) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed())
        .open(path)
}

pub(crate) fn open_regular_or_block(path: &Path) -> io::Result<File> {
    let wrong = |problem: FileProblem| io::Error::new(io::ErrorKind::InvalidInput, problem.to_string());
    kind(path, &std::fs::metadata(path)?).map_err(wrong)?;
    let file = open(path, Access::Read)?;
    kind(path, &file.metadata()?).map_err(wrong)?;
    Ok(file)
}

fn kind(path: &Path, metadata: &Metadata) -> Result<FileKind, FileProblem> {
    let file_type = metadata.file_type();
    let what = if file_type.is_file() {
        return Ok(FileKind::Regular);
    } else if file_type.is_block_device() {
        return Ok(FileKind::Block);
    } else if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_socket() {
        "a socket"
    } else if file_type.is_char_device() {
        "a character device"
    } else {
        "no file that can be opened"
    };
    Err(FileProblem::WrongKind { path: path.to_path_buf(), what })
}

fn problem(path: &Path, access: Access, cause: io::Error) -> FileProblem {
    let path = path.to_path_buf();
    match cause.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::NOTDIR) => FileProblem::Missing(path),
        Some(Errno::ACCESS | Errno::PERM) => FileProblem::Denied { path, access },
        Some(Errno::ROFS) => FileProblem::ReadOnly(path),
        Some(Errno::BUSY | Errno::TXTBSY) => FileProblem::Busy(path),
        _ => FileProblem::Io { path, cause },
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, Mode};

    use super::*;

    fn written(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn one_file_has_one_identity_under_every_path() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, hard, soft) = (dir.path().join("disk"), dir.path().join("hard"), dir.path().join("soft"));
        std::fs::write(&disk, [0; 4096]).unwrap();
        std::fs::hard_link(&disk, &hard).unwrap();
        std::os::unix::fs::symlink(&disk, &soft).unwrap();
        let facts = inspect(&disk, Access::ReadWrite).unwrap();
        assert_eq!((facts.kind, facts.size, facts.rdev), (FileKind::Regular, 4096, 0));
        assert_ne!(facts.inode, 0);
        assert_eq!(inspect(&hard, Access::Read).unwrap(), facts);
        assert_eq!(inspect(&soft, Access::Read).unwrap(), facts);
        let expected = HostClaim::Disk {
            device: facts.device,
            inode: facts.inode,
            writable: true,
            path: soft.clone(),
            lies_on: Vec::new(),
        };
        assert_eq!(facts.claim(&soft, Access::ReadWrite), expected);
    }

    #[test]
    fn a_path_that_is_no_file_is_named_and_never_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, socket) = (dir.path().join("fifo"), dir.path().join("socket"));
        rustix::fs::mkfifoat(CWD, &fifo, Mode::RWXU).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let wrong = [
            (fifo.as_path(), "a FIFO"),
            (&socket, "a socket"),
            (dir.path(), "a directory"),
            (Path::new("/dev/null"), "a character device"),
        ];
        for (path, what) in wrong {
            for access in [Access::Read, Access::ReadWrite] {
                let problem = inspect(path, access).unwrap_err().to_string();
                assert_eq!(
                    problem,
                    format!("{} is {what}; name a regular file or a block device", path.display())
                );
            }
            assert_eq!(head(path, 4).unwrap_err().kind(), io::ErrorKind::InvalidInput);
            assert_eq!(tail_lines(path, 100, 10), "");
        }
    }

    #[test]
    fn a_missing_file_is_reported_as_missing() {
        let file = written(b"");
        for path in [Path::new("/nowhere/disk"), &file.path().join("below-a-file")] {
            let problem = inspect(path, Access::Read).unwrap_err();
            assert!(matches!(problem, FileProblem::Missing(_)), "{problem}");
            assert!(problem.to_string().contains("does not exist on this host"), "{problem}");
        }
    }

    #[test]
    fn each_file_error_says_what_to_do() {
        let text = |errno: Errno, access| problem(Path::new("/d"), access, errno.into()).to_string();
        assert!(
            text(Errno::ACCESS, Access::ReadWrite).ends_with("change its owner or mode, or set read_only")
        );
        assert!(text(Errno::ACCESS, Access::Read).ends_with("change its owner or mode"));
        assert!(text(Errno::ROFS, Access::ReadWrite).contains("set read_only"));
        assert!(text(Errno::TXTBSY, Access::ReadWrite).contains("is busy"));
        assert!(text(Errno::IO, Access::Read).contains("check the path"));
    }

    #[test]
    fn a_file_without_read_permission_is_refused() {
        if rustix::process::geteuid().is_root() {
            return; // Root may open everything.
        }
        let file = written(b"x");
        let forbid = std::os::unix::fs::PermissionsExt::from_mode(0o400);
        std::fs::set_permissions(file.path(), forbid).unwrap();
        assert!(inspect(file.path(), Access::Read).is_ok());
        assert!(matches!(inspect(file.path(), Access::ReadWrite), Err(FileProblem::Denied { .. })));
    }

    #[test]
    fn a_block_device_is_identified_by_its_number() {
        let devices = std::fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
        for name in devices.map(|entry| entry.file_name()) {
            let node = Path::new("/dev").join(name);
            let Ok(facts) = inspect(&node, Access::Read) else { continue };
            // A loop device is known by its file.
            if node.to_string_lossy().starts_with("/dev/loop") {
                continue;
            }
            assert_eq!(
                (facts.kind, facts.inode, facts.device),
                (FileKind::Block, 0, facts.rdev),
                "{}",
                node.display()
            );
        }
    }

    #[test]
    fn the_head_of_a_short_file_is_the_whole_file() {
        let file = written(b"QFI\xfb and more");
        assert_eq!(head(file.path(), 4).unwrap(), b"QFI\xfb");
        assert_eq!(head(file.path(), 4096).unwrap().len(), 13);
    }

    #[test]
    fn the_tail_of_a_file_is_bounded_and_printable() {
        let log = written(b"one\ntwo\n\x1b[31mred\x1b[0m\x07 \xff\n\n  \nlast\r\n");
        assert_eq!(tail_lines(log.path(), 1000, 2), "red \u{fffd}\nlast");
        assert_eq!(tail_lines(log.path(), 1000, 100).lines().count(), 4);
        let long = written("x".repeat(10_000).as_bytes());
        assert_eq!(tail_lines(long.path(), 100, 5), "x".repeat(100));
        let two = written(b"the first line\nthe second line\n");
        assert_eq!(tail_lines(two.path(), 20, 5), "the second line", "no half lines");
        assert_eq!(tail_lines(Path::new("/nowhere"), 10, 10), "");
    }
}
