//! The list of the state directories that have used a runtime folder.
//!
//! The list names a state directory for people, and proves the owner of a run folder that bears no
//! mark, as one of an earlier release.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use vmm_core::id::InstanceId;

use crate::lock;
use crate::path_errors::named;
use crate::run_dir::{self, SpareMark};

/// The name of the list of state directories in the runtime folder.
const SERVED: &str = "served";
/// The line that stands for users of the folder from before the list existed.
const UNKNOWN: &str = "unknown";
/// The longest list that is read, in bytes. A list in good faith is shorter.
const MAX_SERVED: u64 = 64 * 1024;

/// The users of a runtime folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeDirUsers {
    /// No state directory has signed. This program made nothing there, or the list was removed.
    Nobody,
    /// One state directory alone has used the folder.
    One(InstanceId),
    /// Several state directories have used the folder, or an unknown one.
    Many,
}

/// A line of the list of state directories.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Signature {
    /// The state directory's identity; `None` for one that cannot be told.
    pub instance: Option<InstanceId>,
    /// The state directory's path. Earlier releases did not record it.
    pub state_dir: Option<PathBuf>,
}

impl Signature {
    fn parse(line: &str) -> Self {
        let (instance, state_dir) = line.split_once(' ').unwrap_or((line, ""));
        let state_dir = Some(state_dir.trim()).filter(|path| !path.is_empty()).map(PathBuf::from);
        Self { instance: instance.parse().ok(), state_dir }
    }

    fn line(&self) -> String {
        let instance = self.instance.map_or_else(|| UNKNOWN.to_owned(), |instance| instance.to_string());
        // A path that the list cannot hold is left out. The line then reads as one of an earlier
        // release.
        let path = self.state_dir.as_deref().and_then(Path::to_str);
        match path.filter(|path| !path.contains(char::is_control)) {
            Some(path) => format!("{instance} {path}\n"),
            None => format!("{instance}\n"),
        }
    }

    /// Returns true if a daemon may run on the state directory now.
    fn may_live(&self) -> bool {
        let Some(state_dir) = &self.state_dir else { return true };
        // A state directory that is gone has no daemon. Any other failure proves nothing.
        match lock::holder(state_dir) {
            Ok(holder) => holder.is_some(),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }
}

/// Reads which state directories have used `runtime_dir`, without the details.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn users_of(runtime_dir: &Path) -> io::Result<RuntimeDirUsers> {
    let signatures = signatures(runtime_dir)?;
    let instances: BTreeSet<_> = signatures.into_iter().map(|signature| signature.instance).collect();
    let mut instances = instances.into_iter();
    Ok(match (instances.next(), instances.next()) {
        (None, _) => RuntimeDirUsers::Nobody,
        (Some(Some(instance)), None) => RuntimeDirUsers::One(instance),
        (Some(_), _) => RuntimeDirUsers::Many,
    })
}

/// Reads the list of the state directories that have used `runtime_dir`.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn signatures(runtime_dir: &Path) -> io::Result<BTreeSet<Signature>> {
    let path = runtime_dir.join(SERVED);
    let opened = options().read(true).open(&path);
    let text = match opened.and_then(|file| {
        let mut text = String::new();
        file.take(MAX_SERVED).read_to_string(&mut text).map(|_| text)
    }) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(named(&path, &error)),
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(Signature::parse).collect())
}

/// The result of [`record_user`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// True if the list had a line of this state directory already.
    pub known: bool,
    /// The other state directories that may use the folder.
    pub others: Vec<Signature>,
    /// True if the folder holds run folders without the mark of an owner, as of an earlier release.
    pub unmarked: bool,
}

/// Records that the state directory `instance` at `state_dir` makes run folders below
/// `runtime_dir`. Creates a missing runtime folder. Must be called before the first run folder is
/// made, and may be repeated.
///
/// The list proves the owner of run folders without a mark only. The lines of state directories
/// that have left nothing are therefore removed, so that one mistaken start has no lasting effect.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn record_user(runtime_dir: &Path, instance: InstanceId, state_dir: &Path) -> io::Result<Signed> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(runtime_dir)
        .map_err(|error| named(runtime_dir, &error))?;
    // `create` follows symbolic links. `open_ours` refuses a link and a folder of another user.
    drop(run_dir::open_ours(rustix::fs::CWD, runtime_dir, runtime_dir)?);
    let before = signatures(runtime_dir)?;
    let known = before.iter().any(|signature| signature.instance == Some(instance));
    let owners = owners(runtime_dir)?;
    let unmarked = owners.contains(&None);
    // A line stays while it may be needed: as the proof of a run folder without a mark, as the name
    // of the owner of a run folder with one, or because its daemon may be about to make one.
    let is_needed = |other: &Signature| unmarked || owners.contains(&other.instance) || other.may_live();
    let others = before.iter().filter(|signature| signature.instance != Some(instance));
    let mut others: Vec<Signature> = others.filter(|other| is_needed(other)).cloned().collect();
    // Run folders without a list may be of any state directory, as of one whose release kept none.
    if before.is_empty() && unmarked {
        others.push(Signature { instance: None, state_dir: None });
    }
    let ours = Signature { instance: Some(instance), state_dir: Some(state_dir.to_path_buf()) };
    let wanted: BTreeSet<Signature> = others.iter().cloned().chain([ours]).collect();
    if wanted != before {
        write_list(runtime_dir, &wanted)?;
    }
    Ok(Signed { known, others, unmarked })
}

/// Returns the owners of the run folders below `runtime_dir`, each once. `None` stands for a folder
/// without a mark.
fn owners(runtime_dir: &Path) -> io::Result<BTreeSet<Option<InstanceId>>> {
    let mut owners = BTreeSet::new();
    for (_, dir) in run_dir::list(runtime_dir)? {
        let owner = match run_dir::owner(&dir) {
            Ok(Some(owner)) => Some(owner),
            Ok(None) => SpareMark::read(&dir).ok().flatten().map(|mark| mark.instance),
            // The folder was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(_) => None,
        };
        owners.insert(owner);
    }
    Ok(owners)
}

/// Replaces the list. The file is replaced as a whole, so a reader never sees a part of the list.
fn write_list(runtime_dir: &Path, signatures: &BTreeSet<Signature>) -> io::Result<()> {
    let path = runtime_dir.join(SERVED);
    // Two daemons that sign at the same moment use different files. The line that is lost with the
    // earlier one returns at the next start of its daemon. Meanwhile the marks prove the owners.
    let next = runtime_dir.join(format!("{SERVED}.{}", std::process::id()));
    let text: String = signatures.iter().map(Signature::line).collect();
    let written = options().write(true).create(true).truncate(true).mode(0o600).open(&next);
    written
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&next, &path))
        .map_err(|error| {
            let _ = fs::remove_file(&next);
            named(&path, &error)
        })
}

fn options() -> fs::OpenOptions {
    let mut options = fs::OpenOptions::new();
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
    options
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_core::id::VmUid;

    use super::*;

    fn instance() -> InstanceId {
        InstanceId::new(Uuid::now_v7())
    }

    /// A state directory of a test, which signs the runtime folder.
    struct State {
        dir: tempfile::TempDir,
        instance: InstanceId,
    }

    impl State {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), instance: instance() }
        }

        fn sign(&self, runtime: &Path) -> Signed {
            record_user(runtime, self.instance, self.dir.path()).unwrap()
        }

        fn signature(&self) -> Signature {
            Signature { instance: Some(self.instance), state_dir: Some(self.dir.path().to_path_buf()) }
        }

        fn makes_a_folder(&self, runtime: &Path) -> PathBuf {
            let folder = run_dir::create(runtime, VmUid::new(Uuid::now_v7())).unwrap();
            run_dir::own(&folder, self.instance).unwrap();
            folder
        }
    }

    #[test]
    fn one_mistaken_start_has_no_lasting_effect() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = dir.path().join("run");
        let (right, mistaken) = (State::new(), State::new());
        assert_eq!(users_of(&runtime).unwrap(), RuntimeDirUsers::Nobody);
        let signed = Signed { known: false, others: vec![], unmarked: false };
        assert_eq!(right.sign(&runtime), signed);
        assert_eq!(right.sign(&runtime), Signed { known: true, ..signed.clone() });
        right.makes_a_folder(&runtime);
        let others = vec![right.signature()];
        assert_eq!(mistaken.sign(&runtime), Signed { others, ..signed.clone() });
        assert_eq!(users_of(&runtime).unwrap(), RuntimeDirUsers::Many);
        assert_eq!(right.sign(&runtime), Signed { known: true, ..signed });
        assert_eq!(users_of(&runtime).unwrap(), RuntimeDirUsers::One(right.instance));
    }

    #[test]
    fn the_entry_of_a_daemon_that_runs_or_has_a_folder_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (one, runs, has) = (State::new(), State::new(), State::new());
        let _lock = crate::lock::StateLock::acquire(runs.dir.path()).unwrap();
        runs.sign(dir.path());
        has.sign(dir.path());
        let folder = has.makes_a_folder(dir.path());
        let mut both = vec![runs.signature(), has.signature()];
        both.sort();
        assert_eq!(one.sign(dir.path()).others, both);
        run_dir::remove(&folder).unwrap();
        assert_eq!(one.sign(dir.path()).others, [runs.signature()]);
    }

    #[test]
    fn a_folder_older_than_the_list_has_no_known_owner() {
        let dir = tempfile::tempdir().unwrap();
        run_dir::create(dir.path(), VmUid::new(Uuid::now_v7())).unwrap();
        let signed = State::new().sign(dir.path());
        assert_eq!(signed.others, [Signature { instance: None, state_dir: None }]);
        assert!(signed.unmarked);
        assert_eq!(users_of(dir.path()).unwrap(), RuntimeDirUsers::Many);
    }

    #[test]
    fn the_list_of_an_earlier_release_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (earlier, now) = (instance(), State::new());
        fs::write(dir.path().join(SERVED), format!("{earlier}\n")).unwrap();
        assert_eq!(users_of(dir.path()).unwrap(), RuntimeDirUsers::One(earlier));
        // The path of its state directory is not known, so its daemon may run.
        let others = vec![Signature { instance: Some(earlier), state_dir: None }];
        assert_eq!(now.sign(dir.path()), Signed { known: false, others, unmarked: false });
        fs::write(dir.path().join(SERVED), format!("{}\n{UNKNOWN}\n", now.instance)).unwrap();
        assert_eq!(users_of(dir.path()).unwrap(), RuntimeDirUsers::Many);
        assert!(now.sign(dir.path()).known);
    }

    #[test]
    fn a_list_that_is_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/nowhere/else", dir.path().join(SERVED)).unwrap();
        assert!(record_user(dir.path(), instance(), dir.path()).is_err());
    }
}
