//! Finds block devices that the host itself uses: mounted, swapped to, or part of another device.
//!
//! The kernel keeps one exclusive holder of each block device. A mount, a swap area, a RAID and the
//! device mapper are such holders. An exclusive open for reading asks for the same exclusive hold,
//! changes nothing, and fails if another holder has it. The kernel counts a disk and its partitions
//! together.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::files::{FileFacts, FileKind};

/// Returns the host's use of the disk at `path`, for a message; `None` where the host does not use
/// the disk. A regular file is in use where a loop device of the file is. Blocks.
pub fn of(path: &Path, facts: &FileFacts) -> Option<String> {
    match facts.kind {
        FileKind::Block => is_held(path).then(|| used(facts.rdev)),
        FileKind::Regular => loops_of(facts).into_iter().find(|device| is_held(device)).map(|device| {
            let number = fs::metadata(&device).map_or(0, |found| found.rdev());
            format!("is behind {}, which {}", device.display(), used(number))
        }),
    }
}

fn is_held(device: &Path) -> bool {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::EXCL | OFlags::NONBLOCK).bits().cast_signed())
        .open(device);
    opened.is_err_and(|error| error.raw_os_error() == Some(Errno::BUSY.raw_os_error()))
}

fn used(rdev: u64) -> String {
    match mount_point(rdev) {
        Some(mount) => format!("is mounted on {mount} of this host"),
        None => "is in use by this host (mounted, swapped to, or part of another device)".to_owned(),
    }
}

/// Returns the first path where the device is mounted, as far as this mount namespace shows it.
fn mount_point(rdev: u64) -> Option<String> {
    let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        (words.nth(2) == Some(number.as_str())).then(|| words.nth(1).map(str::to_owned)).flatten()
    })
}

/// Lists the loop devices whose backing file is the file of `facts`.
fn loops_of(facts: &FileFacts) -> Vec<PathBuf> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let is_of = |dir: &Path| {
        let backing = fs::read_to_string(dir.join("loop/backing_file")).ok()?;
        let found = fs::metadata(backing.trim_end_matches('\n')).ok()?;
        Some((found.dev(), found.ino()) == (facts.device, facts.inode))
    };
    devices
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"loop"))
        .filter(|entry| is_of(&entry.path()) == Some(true))
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::files::{Access, inspect};

    /// A file system on a loop device that is mounted. All of it goes with the test.
    struct Mounted {
        dir: tempfile::TempDir,
        device: String,
    }

    fn run(command: &[&str]) -> Option<String> {
        let ran = Command::new(command[0]).args(&command[1..]).output().ok()?;
        ran.status.success().then(|| String::from_utf8_lossy(&ran.stdout).trim().to_owned())
    }

    impl Mounted {
        fn new() -> Option<Self> {
            let dir = tempfile::tempdir().unwrap();
            let image = dir.path().join("disk");
            fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
            fs::create_dir(dir.path().join("mnt")).unwrap();
            run(&["mkfs.ext4", "-q", "-F", image.to_str().unwrap()])?;
            let device = run(&["losetup", "--find", "--show", image.to_str().unwrap()])?;
            let mounted = Self { dir, device };
            run(&["mount", &mounted.device, mounted.dir.path().join("mnt").to_str().unwrap()])?;
            Some(mounted)
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = run(&["umount", self.dir.path().join("mnt").to_str().unwrap()]);
            let _ = run(&["losetup", "--detach", &self.device]);
        }
    }

    #[test]
    fn a_mounted_device_and_the_file_behind_a_mounted_device_are_in_use() {
        let Some(mounted) = Mounted::new() else {
            let why =
                "no loop device can be made and mounted here: it needs root, /dev/loop-control and mkfs.ext4";
            return vmm_testkit::skip::skipped(
                "a_mounted_device_and_the_file_behind_a_mounted_device_are_in_use",
                why,
            );
        };
        let image = mounted.dir.path().join("disk");
        let hard = mounted.dir.path().join("hard");
        fs::hard_link(&image, &hard).unwrap();
        let use_of = |path: &Path| of(path, &inspect(path, Access::ReadWrite).unwrap());
        let mount_point = mounted.dir.path().join("mnt");
        for path in [Path::new(&mounted.device), &image, &hard] {
            let reported = use_of(path).unwrap_or_else(|| panic!("{} is mounted", path.display()));
            assert!(reported.contains(mount_point.to_str().unwrap()), "{reported}");
        }
        run(&["umount", mount_point.to_str().unwrap()]).expect("the file system is idle");
        for path in [Path::new(&mounted.device), &image, &hard] {
            assert_eq!(use_of(path), None, "{}", path.display());
        }
    }

    #[test]
    fn a_file_that_no_device_lies_on_is_not_in_use() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of(file.path(), &inspect(file.path(), Access::ReadWrite).unwrap()), None);
    }
}
