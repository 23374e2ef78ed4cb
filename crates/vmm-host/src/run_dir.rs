//! The run folder of a VM below the runtime folder, with its sockets, log and console.
//!
//! ```text
//!   <runtime>/           0700, the daemon's own
//!     vms/               0700
//!       <uid>/           0700; named by the VM's creation, so a namesake never finds it
//! ```
//!
//! Every step opens a folder relative to one that is already open and follows no symbolic link, so
//! that a user who can write nearby cannot lead the daemon elsewhere.

mod owner;
mod spare;

use std::ffi::CString;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use vmm_core::id::VmUid;

use crate::path_errors::named;

pub use owner::{own, owner};
pub use spare::SpareMark;

/// The longest path that a unix socket can have, in bytes.
pub const MAX_SOCKET_PATH: usize = 107;

/// The file of a kept console in a run folder.
pub const KEPT_CONSOLE: &str = "console.log";

/// The deepest nesting that a removal follows. The program's own folders nest at most two deep.
const MAX_DEPTH: usize = 16;
/// The number of times that a folder is emptied which fills while it is removed.
const MAX_REMOVALS: u32 = 8;

/// Creates the run folder of `uid` below `runtime_dir`, with the folders above it, and returns its
/// path. A folder that exists already is used.
///
/// # Errors
/// Returns the kernel's error with the path: `InvalidInput` where a symbolic link or a file is in
/// the way, `PermissionDenied` where a folder belongs to another user.
pub fn create(runtime_dir: &Path, uid: VmUid) -> io::Result<PathBuf> {
    let runtime_dir = &without_trailing_slash(runtime_dir);
    let dir = uid.run_dir(runtime_dir);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(runtime_dir)
        .map_err(|error| named(runtime_dir, &error))?;
    let mut path = runtime_dir.to_path_buf();
    // `create` above follows symbolic links, so its result proves nothing. `open_ours` refuses a
    // link in the last component and a folder of another user. From here on each folder is made and
    // opened through its parent's descriptor, so a parent that is exchanged meanwhile changes
    // nothing.
    let mut folder = open_ours(rustix::fs::CWD, runtime_dir, &path)?;
    for name in below(&dir, runtime_dir) {
        path.push(name);
        match rustix::fs::mkdirat(&folder, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(named(&path, &error.into())),
        }
        folder = open_ours(&folder, Path::new(name), &path)?;
        // mkdir takes the umask off the mode, and a folder that existed may have any mode.
        rustix::fs::fchmod(&folder, Mode::RWXU).map_err(|error| named(&path, &error.into()))?;
    }
    Ok(dir)
}

/// Lists the run folders below `runtime_dir` with their VMs. Entries with other names are left out.
/// Blocks.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn list(runtime_dir: &Path) -> io::Result<Vec<(VmUid, PathBuf)>> {
    let vms = vms_dir(runtime_dir);
    let entries = match std::fs::read_dir(&vms) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(named(&vms, &error)),
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| named(&vms, &error))?;
        folders.extend(folder_uid(&entry.file_name()).map(|uid| (uid, entry.path())));
    }
    Ok(folders)
}

/// Returns the folder that holds the run folders.
pub(crate) fn vms_dir(runtime_dir: &Path) -> PathBuf {
    // Trailing slashes are removed, because the arguments of VMMs have none.
    without_trailing_slash(runtime_dir).join("vms")
}

/// Parses the name of a run folder: 32 hexadecimal digits in lower case. The other forms of a UUID
/// are refused.
pub(crate) fn folder_uid(name: &std::ffi::OsStr) -> Option<VmUid> {
    let name = name.to_str()?;
    let plain = name.len() == 32 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if plain { name.parse().ok() } else { None }
}

/// Removes the sockets of an ended run and the `.lock` files beside them from `dir`. Other files
/// and subfolders stay. A missing folder is no error.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn remove_sockets(dir: &Path) -> io::Result<()> {
    let dir = &without_trailing_slash(dir);
    let folder = match open_ours(rustix::fs::CWD, dir, dir) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for name in names(&folder).map_err(|error| named(dir, &error))? {
        let Some(stat) = stat(&folder, &name).map_err(|error| named(dir, &error))? else { continue };
        let stale = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => true,
            FileType::RegularFile => name.as_bytes().ends_with(b".lock"),
            _ => false,
        };
        if stale {
            unlink(&folder, &name, AtFlags::empty())
                .map_err(|error| named(&dir.join(text(&name)), &error))?;
        }
    }
    Ok(())
}

/// Removes a run folder with everything in it. A missing folder is no error.
///
/// Only folders that [`create`] could have made are removed: `…/vms/<uid>`, owned by the daemon's
/// user. A symbolic link inside is removed and never followed. A file system that is mounted inside
/// stops the removal.
///
/// # Errors
/// Returns the kernel's error with the path; `InvalidInput` where `dir` is not a run folder.
pub fn remove(dir: &Path) -> io::Result<()> {
    let dir = &without_trailing_slash(dir);
    let Some((parent, name)) = run_folder_name(dir) else {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "not a run folder, so it is left alone");
        return Err(named(dir, &error));
    };
    let vms = match open_ours(rustix::fs::CWD, parent, parent) {
        Ok(vms) => vms,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let folder = match open_ours(&vms, Path::new(name), dir) {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // The device number distinguishes the folder's own file system from one that is mounted inside.
    let device = rustix::fs::fstat(&folder)?.st_dev;
    let name = CString::new(name)?;
    let mut attempts = MAX_REMOVALS;
    loop {
        empty(&folder, device, dir, MAX_DEPTH)?;
        attempts -= 1;
        match unlink(&vms, &name, AtFlags::REMOVEDIR) {
            // A task of the daemon that began before the VM ended, such as a sample of its
            // counters, has written one more file since. The folder is emptied again.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && attempts > 0 => {}
            removed => return removed.map_err(|error| named(dir, &error)),
        }
    }
}

/// Checks that a socket can be bound at `path`.
///
/// # Errors
/// Returns a text for people with the length of the path and the remedy.
pub fn socket_path_fits(path: &Path) -> Result<(), String> {
    let length = path.as_os_str().len();
    if length <= MAX_SOCKET_PATH {
        return Ok(());
    }
    Err(format!(
        "the socket path {} has {length} bytes, and {MAX_SOCKET_PATH} is the most that a unix socket can have; \
         set UNKEY_VMCP_RUNTIME_DIR to a path that is {} bytes shorter",
        path.display(),
        length - MAX_SOCKET_PATH,
    ))
}

/// Returns the components of `dir` after `base`.
fn below<'a>(dir: &'a Path, base: &Path) -> impl Iterator<Item = &'a std::ffi::OsStr> {
    dir.strip_prefix(base).unwrap_or(dir).iter()
}

/// Removes trailing slashes, because with one the kernel follows a link even under O_NOFOLLOW.
fn without_trailing_slash(path: &Path) -> PathBuf {
    path.components().collect()
}

/// Splits `…/vms/<32 hexadecimal digits>` into the parent folder and the name.
fn run_folder_name(dir: &Path) -> Option<(&Path, &str)> {
    let parent = dir.parent()?;
    let name = dir.file_name()?.to_str()?;
    let is_uid = name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    (dir.is_absolute() && is_uid && parent.file_name()? == "vms").then_some((parent, name))
}

/// Opens a folder below `at`. Refuses a symbolic link, a file, and a folder of another user. `path`
/// is for the error text.
pub(crate) fn open_ours(at: impl std::os::fd::AsFd, name: &Path, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let folder = match rustix::fs::openat(at, name, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(Errno::NOTDIR | Errno::LOOP) => {
            let message = "a symbolic link or a file is where a folder of the daemon belongs; remove it";
            return Err(named(path, &io::Error::new(io::ErrorKind::InvalidInput, message)));
        }
        Err(error) => return Err(named(path, &error.into())),
    };
    // The owner is read from the open folder, so the folder cannot be exchanged after the check.
    let owner = rustix::fs::fstat(&folder)?.st_uid;
    let ours = rustix::process::geteuid().as_raw();
    if owner != ours {
        let message = format!(
            "belongs to user {owner}, not to the daemon's user {ours}; remove it or change its owner"
        );
        return Err(named(path, &io::Error::new(io::ErrorKind::PermissionDenied, message)));
    }
    Ok(folder)
}

fn empty(folder: &OwnedFd, device: u64, path: &Path, depth: usize) -> io::Result<()> {
    // Nothing in the folder is trusted, because a VMM may have written any name. Each entry is
    // examined and removed through the open folder, so a link or a mount cannot redirect the
    // removal.
    for name in names(folder).map_err(|error| named(path, &error))? {
        let inner = path.join(text(&name));
        let Some(stat) = stat(folder, &name).map_err(|error| named(&inner, &error))? else { continue };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            unlink(folder, &name, AtFlags::empty()).map_err(|error| named(&inner, &error))?;
            continue;
        }
        if stat.st_dev != device || depth == 0 {
            let message =
                "another file system is mounted here, or the folders nest too deep; remove it by hand";
            return Err(named(&inner, &io::Error::new(io::ErrorKind::InvalidInput, message)));
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let child = rustix::fs::openat(folder, &name, flags, Mode::empty());
        let child = child.map_err(|error| named(&inner, &error.into()))?;
        empty(&child, device, &inner, depth - 1)?;
        unlink(folder, &name, AtFlags::REMOVEDIR).map_err(|error| named(&inner, &error))?;
    }
    Ok(())
}

/// Reads all names of a folder. The list is complete before the first removal, because file systems
/// differ in how a listing under way reacts to removals.
fn names(folder: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

fn stat(folder: &OwnedFd, name: &CString) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes one name. A missing name is no error, because a VMM that ends removes its own socket.
fn unlink(folder: &OwnedFd, name: &CString, flags: AtFlags) -> io::Result<()> {
    match rustix::fs::unlinkat(folder, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn text(name: &CString) -> &std::ffi::OsStr {
    std::ffi::OsStr::from_bytes(name.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    const UID: &str = "01920000-0000-7000-8000-00000000000a";

    fn uid() -> VmUid {
        UID.parse().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_run_folder_is_private() {
        let base = tempfile::tempdir().unwrap();
        let runtime_dir = base.path().join("a/b");
        let dir = create(&runtime_dir, uid()).unwrap();
        assert_eq!(dir, runtime_dir.join("vms").join(UID.replace('-', "")));
        for folder in [&base.path().join("a"), &runtime_dir, &runtime_dir.join("vms"), &dir] {
            assert_eq!(mode(folder), 0o700, "{}", folder.display());
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(create(&runtime_dir.join(""), uid()).unwrap(), dir, "again");
        assert_eq!(mode(&dir), 0o700);
    }

    #[test]
    fn symbolic_links_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let refused = |runtime_dir: &Path| {
            let error = create(runtime_dir, uid()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
            assert!(error.to_string().contains("symbolic link"), "{error}");
        };
        let link = base.path().join("runtime");
        symlink(elsewhere.path(), &link).unwrap();
        refused(&link);
        refused(&link.join(""));
        let runtime_dir = base.path().join("real");
        fs::create_dir(&runtime_dir).unwrap();
        symlink(elsewhere.path(), runtime_dir.join("vms")).unwrap();
        refused(&runtime_dir);
        fs::remove_file(runtime_dir.join("vms")).unwrap();
        let dir = create(&runtime_dir, uid()).unwrap();
        fs::remove_dir(&dir).unwrap();
        symlink(elsewhere.path(), &dir).unwrap();
        refused(&runtime_dir);
        fs::write(elsewhere.path().join("precious"), "x").unwrap();
        assert!(remove(&dir).is_err());
        assert!(remove(&dir.join("")).is_err());
        assert!(elsewhere.path().join("precious").exists());
    }

    #[test]
    fn only_sockets_and_their_locks_are_removed_first() {
        let base = tempfile::tempdir().unwrap();
        let dir = create(base.path(), uid()).unwrap();
        let _listener = UnixListener::bind(dir.join("api.sock")).unwrap();
        for name in ["api.sock.lock", "log", "console"] {
            fs::write(dir.join(name), name).unwrap();
        }
        fs::create_dir(dir.join("odd.lock")).unwrap();
        remove_sockets(&dir).unwrap();
        remove_sockets(&dir).unwrap();
        let mut left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["console", "log", "odd.lock"]);
        remove_sockets(&base.path().join("none")).unwrap();
    }

    #[test]
    fn a_run_folder_is_removed_with_its_content_only() {
        let base = tempfile::tempdir().unwrap();
        let precious = base.path().join("precious");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("disk"), "x").unwrap();
        let dir = create(base.path(), uid()).unwrap();
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::write(dir.join("a/b/file"), "x").unwrap();
        symlink(&precious, dir.join("a/link")).unwrap();
        symlink(precious.join("disk"), dir.join("disk")).unwrap();
        let _listener = UnixListener::bind(dir.join("s")).unwrap();
        remove(&dir).unwrap();
        assert!(!dir.exists());
        assert!(precious.join("disk").exists());
        remove(&dir).unwrap();
        remove(&base.path().join("none/vms").join(UID.replace('-', ""))).unwrap();
    }

    #[test]
    fn a_folder_that_is_no_run_folder_is_not_removed() {
        let base = tempfile::tempdir().unwrap();
        let hex = UID.replace('-', "");
        let close =
            [base.path().to_path_buf(), base.path().join("vms/short"), base.path().join("other").join(&hex)];
        for dir in close {
            fs::create_dir_all(&dir).unwrap();
            assert_eq!(remove(&dir).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{}", dir.display());
            assert!(dir.exists());
        }
        assert!(remove(&Path::new("vms").join(&hex)).is_err(), "relative");
        assert!(remove(&base.path().join("vms/x/..").join(&hex)).is_err());
    }

    #[test]
    fn a_socket_path_has_at_most_107_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = |length: usize| dir.path().join("x".repeat(length - dir.path().as_os_str().len() - 1));
        let (longest, too_long) = (path(MAX_SOCKET_PATH), path(MAX_SOCKET_PATH + 1));
        assert_eq!(socket_path_fits(&longest), Ok(()));
        UnixListener::bind(&longest).unwrap();
        let text = socket_path_fits(&too_long).unwrap_err();
        assert!(text.contains("UNKEY_VMCP_RUNTIME_DIR to a path that is 1 bytes shorter"), "{text}");
        UnixListener::bind(&too_long).unwrap_err();
    }
}
