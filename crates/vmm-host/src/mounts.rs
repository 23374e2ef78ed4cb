//! Finds mounts whose files are served by a server or by another process of this host.
//!
//! A check of a file on such a mount waits for as long as its server is silent. Therefore the way
//! to a file is followed here without a step into such a mount.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The file in which the kernel shows the mounts of this process.
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// The number of symbolic links that the kernel follows on one path.
const MAX_LINKS: usize = 40;

/// The file systems whose files a server or another process serves. `fuse` and every type that
/// begins with `fuse` belong to them as well.
const SERVED: &[&str] = &[
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "virtiofs",
    "ceph",
    "lustre",
    "afs",
    "orangefs",
    "beegfs",
    "gpfs",
    "ocfs2",
    "gfs2",
    "glusterfs",
    "autofs",
];

/// Keeps the mounts of this process's namespace between two questions.
///
/// A host with many containers has thousands of mounts, and the kernel writes all of them anew for
/// each reader. Therefore the table is read again only after the kernel reported a change.
#[derive(Debug, Default)]
pub struct MountTable {
    read: Mutex<Option<MountTableRead>>,
}

/// The last reading of the mounts.
#[derive(Debug)]
struct MountTableRead {
    file: File,
    mounts: Arc<Mounts>,
}

impl MountTable {
    /// Returns the mounts as they are now. Returns none where the kernel does not show them.
    pub fn now(&self) -> Arc<Mounts> {
        let mut read = self.lock();
        match read.as_mut().filter(|read| !changed(&read.file)) {
            Some(read) => Arc::clone(&read.mounts),
            None => {
                *read = MountTableRead::of(read.take().map(|read| read.file));
                read.as_ref().map(|read| Arc::clone(&read.mounts)).unwrap_or_default()
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<MountTableRead>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MountTableRead {
    /// Reads the mounts from `file`, or from a file that is opened now.
    fn of(file: Option<File>) -> Option<Self> {
        let mut file = file.map_or_else(|| File::open(MOUNTINFO), Ok).ok()?;
        let mut text = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut text)).ok()?;
        Some(Self { file, mounts: Arc::new(Mounts::parse(&text)) })
    }
}

/// Returns true if the mounts changed since `file` was opened or asked about last. An error counts
/// as a change.
fn changed(file: &File) -> bool {
    // The kernel reports a change once for each open file, as an error and as priority data. A
    // change between this call and the reading is reported again at the next call.
    let mut asked = [PollFd::new(file, PollFlags::PRI)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(poll(&mut asked, Some(&at_once)), Ok(0))
}

/// The mounts of this process's namespace at one moment.
#[derive(Debug, Default)]
pub struct Mounts {
    /// Each mount point, and true where a server or another process serves its files.
    points: HashMap<PathBuf, bool>,
}

impl Mounts {
    fn parse(text: &[u8]) -> Self {
        let mut points = HashMap::new();
        for line in text.split(|byte| *byte == b'\n') {
            let mut fields = line.split(|byte| *byte == b' ');
            let Some(point) = fields.nth(4) else { continue };
            let kind = fields.skip_while(|field| *field != b"-").nth(1).unwrap_or_default();
            let kind = String::from_utf8_lossy(kind);
            // The last of several mounts on one point hides the others.
            let served = kind.starts_with("fuse") || SERVED.contains(&kind.as_ref());
            points.insert(unescape(point), served);
        }
        Self { points }
    }

    /// Returns the first mount on the way to the absolute `path` whose files a server or another
    /// process serves. Follows symbolic links as far as that mount, and touches no file in it.
    /// `None` where there is no such mount or no such path.
    pub fn served_by(&self, path: &Path) -> Option<PathBuf> {
        // The walk resolves the path component by component, as the kernel does. realpath(3)
        // would wait for the server of the mount that is looked for.
        let mut links = 0;
        let mut here = PathBuf::from("/");
        let mut ahead: VecDeque<OsString> = names(path);
        while let Some(name) = ahead.pop_front() {
            if name == ".." {
                here.pop();
                continue;
            }
            let next = here.join(&name);
            match self.points.get(&next) {
                Some(true) => return Some(next),
                // A mount point is never a symbolic link, so `read_link` is not needed.
                Some(false) => {
                    here = next;
                    continue;
                }
                None => {}
            }
            // An error means that the component is no link or does not exist. In both cases the
            // walk goes on with the component's own name.
            let Ok(target) = std::fs::read_link(&next) else {
                here = next;
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return None;
            }
            if target.is_absolute() {
                here = PathBuf::from("/");
            }
            for name in names(&target).into_iter().rev() {
                ahead.push_front(name);
            }
        }
        None
    }
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(name).collect()
}

/// Decodes a path of mountinfo, in which some characters are three octal digits behind a backslash.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let code = (*first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    fn mounts(points: &[(&Path, &str)]) -> Mounts {
        let line = |(point, kind): &(&Path, &str)| {
            let point = point.display().to_string().replace(' ', "\\040");
            format!("36 35 98:0 / {point} rw,noatime master:1 - {kind} source rw\n")
        };
        Mounts::parse(points.iter().map(line).collect::<String>().as_bytes())
    }

    #[test]
    fn a_path_is_followed_to_the_first_mount_that_can_hang() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (hung, plain) = (root.join("hung mount"), root.join("plain"));
        for folder in [&hung, &plain] {
            std::fs::create_dir(folder).unwrap();
        }
        symlink(&hung, root.join("absolute")).unwrap();
        symlink("../absolute", plain.join("relative")).unwrap();
        symlink("../plain/relative/x", plain.join("twice")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let mounts = mounts(&[(&root, "ext4"), (&hung, "fuse.sshfs"), (&plain, "tmpfs")]);
        let found = |path: &str| mounts.served_by(&root.join(path));
        assert_eq!(found("plain/file"), None);
        assert_eq!(found("no/such/file"), None);
        assert_eq!(found("loop/file"), None);
        assert_eq!(found("hung mount/a/b"), Some(hung.clone()));
        assert_eq!(found("absolute/file"), Some(hung.clone()));
        assert_eq!(found("plain/../absolute"), Some(hung.clone()));
        assert_eq!(found("plain/twice"), Some(hung.clone()), "a link to a link to a link");
    }

    #[test]
    fn the_later_of_two_mounts_on_one_point_is_used() {
        let point = Path::new("/mnt");
        assert_eq!(mounts(&[(point, "nfs4"), (point, "xfs")]).served_by(Path::new("/mnt/disk")), None);
        let served = mounts(&[(point, "xfs"), (point, "nfs4")]).served_by(Path::new("/mnt/disk"));
        assert_eq!(served.as_deref(), Some(point));
    }

    #[test]
    fn the_mounts_of_this_process_can_be_read() {
        assert!(MountTable::default().now().points.contains_key(Path::new("/proc")));
    }

    #[test]
    fn unchanged_mounts_are_read_once() {
        let table = MountTable::default();
        let first = table.now();
        let read_again = (0..20).filter(|_| !Arc::ptr_eq(&first, &table.now())).count();
        // Another program may mount something meanwhile.
        assert!(read_again < 20, "each question read the mounts");
    }

    #[test]
    fn a_new_mount_is_seen_at_the_next_check() {
        struct Mounted(PathBuf);
        impl Drop for Mounted {
            fn drop(&mut self) {
                let _ = Command::new("umount").arg(&self.0).status();
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let point = dir.path().canonicalize().unwrap().join("point");
        std::fs::create_dir(&point).unwrap();
        let table = MountTable::default();
        assert!(!table.now().points.contains_key(&point));
        let mount = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&point).output();
        if !mount.as_ref().is_ok_and(|mount| mount.status.success()) {
            let why = format!("no mount is possible here: {mount:?}");
            return vmm_testkit::skip::skipped("a_new_mount_is_seen_at_the_next_check", &why);
        }
        let mounted = Mounted(point.clone());
        assert!(table.now().points.contains_key(&point));
        drop(mounted);
        assert!(!table.now().points.contains_key(&point));
    }
}
