//! Surveys the program's traces on the host: run folders, their sockets, and the processes that
//! name them.
//!
//! ```text
//!   <runtime>/
//!     served           the state directories that have used this folder, one a line
//!     vms/<uid>/ ────► Survey.folders: sockets and their holders, the owner, the mark of a spare
//!          ▲
//!          └── named by the arguments of a process ──► Survey.users
//! ```
//!
//! A run folder bears the mark of its owner: [`run_dir::owner`], or the mark of a spare VMM. A
//! folder of an earlier release bears none, and its owner follows from its place: where one state
//! directory alone has used a runtime folder, all unmarked run folders there belong to that
//! directory. Where two have used it, or the list is missing, no owner of an unmarked folder is
//! proven. Every function here only reads, except [`record_user`]. TAPs bear their owner in their
//! own label: [`crate::net::tap`].

mod list;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use vmm_core::id::{InstanceId, VmUid};

use crate::path_errors::named;
use crate::process::{ProcessMatch, find_by_argument};
use crate::run_dir::{self, SpareMark, folder_uid, vms_dir};

pub use list::{RuntimeDirUsers, Signature, Signed, record_user, signatures, users_of};

/// The traces of VMs that were found at one moment.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// The entries of the folder of run folders, sorted by path.
    pub folders: Vec<RunFolder>,
    /// The processes with an argument that names one of the entries.
    pub users: Vec<FolderUser>,
}

/// An entry of the folder of run folders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    /// The path.
    pub path: PathBuf,
    /// The VM that the name denotes; `None` where the name is not that of a run folder.
    pub uid: Option<VmUid>,
    /// True for a folder of the daemon's user. The daemon made no other entry.
    pub own: bool,
    /// The sockets in the folder.
    pub sockets: Vec<RunSocket>,
    /// The state directory whose mark the folder bears.
    pub owner: Option<InstanceId>,
    /// The mark of a spare VMM, if the folder bears one.
    pub mark: Option<SpareMark>,
}

/// A socket in a run folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunSocket {
    /// The path.
    pub path: PathBuf,
    /// True if a process of this network namespace holds the socket. A socket without a holder is
    /// left over.
    pub held: bool,
}

/// A process that names a run folder.
#[derive(Clone, Debug)]
pub struct FolderUser {
    /// The process.
    pub found: ProcessMatch,
    /// The named paths, relative to the folder of run folders.
    pub paths: BTreeSet<PathBuf>,
}

impl FolderUser {
    /// Returns the VMs whose run folders the process names.
    pub fn uids(&self) -> BTreeSet<VmUid> {
        self.paths.iter().filter_map(|path| folder_uid(path.iter().next()?)).collect()
    }

    /// Returns true if the process names the file `name` in the run folder of `uid`.
    pub fn names(&self, uid: VmUid, name: &str) -> bool {
        self.paths.iter().any(|path| {
            let mut parts = path.iter();
            parts.next().and_then(folder_uid) == Some(uid) && parts.next().is_some_and(|part| part == name)
        })
    }
}

impl Survey {
    /// Returns the part that both surveys saw, in the state of the later one. An entry that came or
    /// went in between is in transition and no leftover.
    ///
    /// A mark counts even if it was removed in between, because its VMM then runs a VM whose record
    /// was written in between.
    #[must_use]
    pub fn lasting(self, later: Self) -> Self {
        let known = |folder: RunFolder| {
            let earlier = self.folders.iter().find(|earlier| earlier.path == folder.path)?;
            Some(RunFolder { mark: folder.mark.or_else(|| earlier.mark.clone()), ..folder })
        };
        let same = |user: &FolderUser| {
            self.users.iter().any(|earlier| earlier.found.identity == user.found.identity)
        };
        Self {
            folders: later.folders.into_iter().filter_map(known).collect(),
            users: later.users.into_iter().filter(same).collect(),
        }
    }
}

/// Surveys the traces of VMs below `runtime_dir`. A missing folder holds none. Blocks.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn survey(runtime_dir: &Path) -> io::Result<Survey> {
    let vms = vms_dir(runtime_dir);
    // The table of sockets is read before the folders. A socket that is bound in between counts as
    // not held, which [`Survey::lasting`] puts right, because the later survey sees its holder.
    let held = held_sockets(&fs::read("/proc/net/unix")?);
    let mut folders = Vec::new();
    let entries = match fs::read_dir(&vms) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(named(&vms, &error)),
    };
    for entry in entries.into_iter().flatten() {
        let entry = entry.map_err(|error| named(&vms, &error))?;
        if let Some(folder) = read_entry(&entry.path(), &held)? {
            folders.push(folder);
        }
    }
    folders.sort_by(|one, other| one.path.cmp(&other.path));
    let users = find_by_argument(&vms)?.into_iter();
    let users = users.map(|found| FolderUser { paths: found.paths_below(&vms), found }).collect();
    Ok(Survey { folders, users })
}

fn read_entry(path: &Path, held: &BTreeSet<OsString>) -> io::Result<Option<RunFolder>> {
    let facts = match fs::symlink_metadata(path) {
        Ok(facts) => facts,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(path, &error)),
    };
    let own = facts.is_dir() && facts.uid() == rustix::process::geteuid().as_raw();
    let mut sockets = Vec::new();
    // A folder of another user may be closed to the daemon. `own` is false then, and the folder
    // counts as empty.
    for entry in own.then(|| fs::read_dir(path).ok()).flatten().into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            let path = entry.path();
            sockets.push(RunSocket { held: held.contains(path.as_os_str()), path });
        }
    }
    sockets.sort_by(|one, other| one.path.cmp(&other.path));
    let mark = own.then(|| SpareMark::read(path).ok()).flatten().flatten();
    let owner = own.then(|| run_dir::owner(path).ok()).flatten().flatten();
    let uid = path.file_name().and_then(folder_uid);
    Ok(Some(RunFolder { path: path.to_path_buf(), uid, own, sockets, owner, mark }))
}

/// Returns the paths in `/proc/net/unix`. A line has seven fields and then the path, which may hold
/// spaces.
fn held_sockets(table: &[u8]) -> BTreeSet<OsString> {
    let path = |line: &[u8]| {
        let at = line.windows(2).position(|pair| pair == b" /")? + 1;
        Some(std::ffi::OsStr::from_bytes(&line[at..]).to_owned())
    };
    table.split(|&byte| byte == b'\n').filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use uuid::Uuid;
    use vmm_core::id::BackendName;

    use super::*;

    fn instance() -> InstanceId {
        InstanceId::new(Uuid::now_v7())
    }

    #[test]
    fn a_survey_lists_held_sockets_and_unknown_files() {
        let dir = tempfile::tempdir().unwrap();
        assert!(survey(dir.path()).unwrap().folders.is_empty());
        let uid = VmUid::new(Uuid::now_v7());
        let folder = run_dir::create(dir.path(), uid).unwrap();
        let _held = UnixListener::bind(folder.join("a held.sock")).unwrap();
        drop(UnixListener::bind(folder.join("left.sock")).unwrap());
        fs::write(dir.path().join("vms/strange"), "").unwrap();
        let survey = survey(&dir.path().join("")).unwrap();
        assert_eq!(survey.folders.len(), 2);
        let ours = survey.folders.iter().find(|folder| folder.uid == Some(uid)).unwrap();
        assert!(ours.own);
        let held: Vec<bool> = ours.sockets.iter().map(|socket| socket.held).collect();
        assert_eq!(held, [true, false], "{:?}", ours.sockets);
        let strange = survey.folders.iter().find(|folder| folder.uid.is_none()).unwrap();
        assert!(!strange.own);
    }

    #[test]
    fn only_the_canonical_form_of_a_uid_is_read() {
        let uid = "0192000000007000800000000000000a";
        assert!(folder_uid(uid.as_ref()).is_some());
        for no in ["01920000-0000-7000-8000-00000000000a", "01920000000070008000000000000g0a", "x", ""] {
            assert_eq!(folder_uid(no.as_ref()), None, "{no}");
        }
    }

    #[test]
    fn a_mark_removed_between_two_surveys_still_counts() {
        let dir = tempfile::tempdir().unwrap();
        let folder = run_dir::create(dir.path(), VmUid::new(Uuid::now_v7())).unwrap();
        let mark = SpareMark { instance: instance(), backend: BackendName::new("qemu") };
        let before = survey(dir.path()).unwrap();
        assert_eq!(before.folders[0].mark, None);
        mark.put(&folder).unwrap();
        let marked = survey(dir.path()).unwrap();
        assert_eq!(marked.folders[0].mark, Some(mark.clone()));
        assert_eq!(before.lasting(marked.clone()).folders[0].mark, Some(mark.clone()));
        mark.take_off(&folder).unwrap();
        let reported = survey(dir.path()).unwrap();
        assert_eq!(reported.folders[0].mark, None);
        assert_eq!(marked.lasting(reported).folders[0].mark, Some(mark));
    }
}
