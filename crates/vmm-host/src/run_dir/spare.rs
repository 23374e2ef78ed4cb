//! The mark of a run folder whose VMM waits for a VM and is not configured yet.
//!
//! ```text
//!   vms/<uid>/
//!     spare-<instance>-<backend>     from before the VMM's start until before its configuration
//! ```
//!
//! A daemon may end the processes of a run folder that no record names and that bears a mark of its
//! own, because no guest runs in it. The mark is a name without content, so it exists whole or not
//! at all.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use vmm_core::id::{BackendName, InstanceId};

use super::{named, open_ours, without_trailing_slash};

/// The beginning of a mark's file name.
const PREFIX: &str = "spare-";
/// The length of an instance's id as text, in bytes.
const INSTANCE_LEN: usize = 36;

/// The owner of a spare VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpareMark {
    /// The instance that started the VMM.
    pub instance: InstanceId,
    /// The backend that can end the VMM.
    pub backend: BackendName,
}

impl SpareMark {
    fn file_name(&self) -> OsString {
        format!("{PREFIX}{}-{}", self.instance, self.backend).into()
    }

    fn of_file_name(name: &str) -> Option<Self> {
        let (instance, backend) = name.strip_prefix(PREFIX)?.split_at_checked(INSTANCE_LEN)?;
        let backend = BackendName::new(backend.strip_prefix('-').filter(|name| !name.is_empty())?);
        Some(Self { instance: instance.parse().ok()?, backend })
    }

    /// Puts the mark on the run folder `dir`. A mark that is there already is no error. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error with the path.
    pub fn put(&self, dir: &Path) -> io::Result<()> {
        let dir = &without_trailing_slash(dir);
        let folder = open_ours(CWD, dir, dir)?;
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&folder, self.file_name(), flags, Mode::RUSR | Mode::WUSR)
            .map(drop)
            .map_err(|error| named(dir, &error.into()))
    }

    /// Removes the mark from the run folder `dir`. A missing mark is no error. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error with the path.
    pub fn take_off(&self, dir: &Path) -> io::Result<()> {
        let path = dir.join(self.file_name());
        match rustix::fs::unlinkat(CWD, &path, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(named(&path, &error.into())),
        }
    }

    /// Reads the mark of the run folder `dir`; `None` where the folder bears none. Blocks.
    ///
    /// # Errors
    /// Returns the kernel's error with the path.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        let names = fs::read_dir(dir).map_err(|error| named(dir, &error))?;
        for entry in names {
            let name = entry.map_err(|error| named(dir, &error))?.file_name();
            if let Some(mark) = name.to_str().and_then(Self::of_file_name) {
                return Ok(Some(mark));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_core::id::VmUid;

    use super::*;

    #[test]
    fn a_spare_mark_is_read_until_it_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let dir = super::super::create(base.path(), VmUid::new(Uuid::now_v7())).unwrap();
        fs::write(dir.join("vmm.log"), "spare").unwrap();
        assert_eq!(SpareMark::read(&dir).unwrap(), None);
        let mark =
            SpareMark { instance: InstanceId::new(Uuid::now_v7()), backend: BackendName::new("firecracker") };
        mark.put(&dir).unwrap();
        mark.put(&dir).unwrap();
        assert_eq!(SpareMark::read(&dir).unwrap(), Some(mark.clone()));
        mark.take_off(&dir).unwrap();
        mark.take_off(&dir).unwrap();
        assert_eq!(SpareMark::read(&dir).unwrap(), None);
        assert!(SpareMark::read(&base.path().join("none")).is_err());
    }

    #[test]
    fn an_incomplete_spare_mark_is_ignored() {
        let instance = Uuid::nil();
        for name in
            ["spare", "spare-", "spare-x-qemu", &format!("spare-{instance}"), &format!("spare-{instance}-")]
        {
            assert_eq!(SpareMark::of_file_name(name), None, "{name}");
        }
        assert!(SpareMark::of_file_name(&format!("spare-{instance}-qemu")).is_some());
    }
}
