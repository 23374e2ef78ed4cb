//! The mark of a run folder's owner.
//!
//! ```text
//!   vms/<uid>/
//!     owner-<instance>     from the making of the folder until its removal
//! ```
//!
//! Several state directories may use one runtime folder, by intent or by mistake. The mark tells
//! whose each run folder is. The mark is a name without content, so it exists whole or not at all.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use vmm_core::id::InstanceId;

use super::{named, open_ours, without_trailing_slash};

/// The beginning of a mark's file name.
const PREFIX: &str = "owner-";

/// Marks the run folder `dir` as one of `instance`. A mark that is there already is no error.
/// Blocks.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn own(dir: &Path, instance: InstanceId) -> io::Result<()> {
    let dir = &without_trailing_slash(dir);
    let folder = open_ours(CWD, dir, dir)?;
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(&folder, format!("{PREFIX}{instance}"), flags, Mode::RUSR | Mode::WUSR)
        .map(drop)
        .map_err(|error| named(dir, &error.into()))
}

/// Returns the owner of the run folder `dir`; `None` where the folder bears no mark, as one of an
/// earlier release, or more than one. Blocks.
///
/// # Errors
/// Returns the kernel's error with the path.
pub fn owner(dir: &Path) -> io::Result<Option<InstanceId>> {
    let mut found = None;
    for entry in fs::read_dir(dir).map_err(|error| named(dir, &error))? {
        let name = entry.map_err(|error| named(dir, &error))?.file_name();
        let Some(instance) = name.to_str().and_then(marked) else { continue };
        if found.replace(instance).is_some() {
            return Ok(None);
        }
    }
    Ok(found)
}

fn marked(name: &str) -> Option<InstanceId> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_core::id::VmUid;

    use super::*;

    #[test]
    fn a_run_folder_belongs_to_the_owner_of_its_mark() {
        let base = tempfile::tempdir().unwrap();
        let dir = super::super::create(base.path(), VmUid::new(Uuid::now_v7())).unwrap();
        fs::write(dir.join("owner-x"), "").unwrap();
        assert_eq!(owner(&dir).unwrap(), None);
        let [one, other] = [(); 2].map(|()| InstanceId::new(Uuid::now_v7()));
        own(&dir, one).unwrap();
        own(&dir, one).unwrap();
        assert_eq!(owner(&dir).unwrap(), Some(one));
        own(&dir, other).unwrap();
        assert_eq!(owner(&dir).unwrap(), None, "two marks prove nothing");
        assert!(owner(&base.path().join("none")).is_err());
        assert!(own(&base.path().join("none"), one).is_err());
    }
}
