//! The layers of block devices, from `/sys/dev/block`.
//!
//! ```text
//!   partition ───── lies on ──► its whole disk
//!   device mapper,
//!   RAID, bcache ── lies on ──► each of its slaves, and what those lie on
//!   loop device ─── is ───────► its backing file
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::makedev;
use vmm_core::store::DiskKey;

/// The depth to which devices are followed. Real stacks have three or four layers.
const MAX_DEPTH: usize = 16;

/// A block device, and everything below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockLayers {
    /// The device itself, or the backing file of a loop device.
    pub(crate) key: DiskKey,
    /// The devices and files below, without `key`.
    pub(crate) lies_on: Vec<DiskKey>,
}

/// Finds the layers below the block device with the number `rdev`. A layer that cannot be read is
/// left out, and a device that the kernel does not show has no layers.
pub(crate) fn layers(rdev: u64) -> BlockLayers {
    let key = key_of(rdev);
    let mut below = BTreeSet::new();
    collect_below(rdev, 0, &mut below);
    below.remove(&key);
    BlockLayers { key, lies_on: below.into_iter().collect() }
}

fn collect_below(rdev: u64, depth: usize, below: &mut BTreeSet<DiskKey>) {
    if depth == MAX_DEPTH {
        return;
    }
    for lower in lower_devices(&sysfs(rdev)) {
        if below.insert(key_of(lower)) {
            collect_below(lower, depth + 1, below);
        }
    }
}

fn sysfs(rdev: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// Returns the device itself, or the backing file of a loop device.
fn key_of(rdev: u64) -> DiskKey {
    let itself = DiskKey { device: rdev, inode: 0 };
    let Ok(backing) = fs::read_to_string(sysfs(rdev).join("loop/backing_file")) else { return itself };
    match fs::metadata(backing.trim_end_matches('\n')) {
        Ok(file) if file.is_file() => DiskKey { device: file.dev(), inode: file.ino() },
        // The file has lost this name. Another hard link or another loop device may lead to it.
        Ok(_) | Err(_) => backing_by_number(rdev).unwrap_or(itself),
    }
}

/// Asks the kernel for the backing file of a loop device, by the program `losetup`, because only an
/// ioctl tells the inode of a file without a name. `None` where the program is missing, where this
/// user may not open the device, and for a device that is no loop device any more.
fn backing_by_number(rdev: u64) -> Option<DiskKey> {
    let device = sysfs(rdev).canonicalize().ok()?;
    let path = Path::new("/dev").join(device.file_name()?);
    // A service may have a PATH without the folders of administration programs.
    let output = ["losetup", "/usr/sbin/losetup", "/sbin/losetup"].into_iter().find_map(|program| {
        let mut losetup = Command::new(program);
        losetup.args(["--noheadings", "--output", "MAJ:MIN,BACK-INO,BACK-MAJ:MIN"]).arg(&path);
        losetup.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()
    })?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut fields = text.split_whitespace();
    // The name in /dev may lead to another device than sysfs, so the number is compared.
    let (this, inode, file_system) = (fields.next()?, fields.next()?, fields.next()?);
    (parse_number(this)? == rdev).then_some(())?;
    Some(DiskKey { device: parse_number(file_system)?, inode: inode.parse().ok()? })
}

/// Lists the devices right below the one at `dir`, by number.
fn lower_devices(dir: &Path) -> Vec<u64> {
    let mut lower: Vec<u64> = fs::read_dir(dir.join("slaves"))
        .into_iter()
        .flatten()
        .filter_map(|slave| number(&slave.ok()?.path()))
        .collect();
    if dir.join("partition").exists() {
        // sysfs has the folder of a partition inside the folder of its disk.
        lower.extend(dir.canonicalize().ok().and_then(|real| number(real.parent()?)));
    }
    lower
}

/// Reads the number of the device at `dir`, as in `8:1`.
fn number(dir: &Path) -> Option<u64> {
    parse_number(fs::read_to_string(dir.join("dev")).ok()?.trim())
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{Access, inspect};

    /// A loop device of one test. Dropping it removes the device.
    struct Loop(String);

    impl Loop {
        fn of(file: &Path) -> Option<Self> {
            let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
            made.status.success().then(|| Self(String::from_utf8_lossy(&made.stdout).trim().to_owned()))
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }

    #[test]
    fn two_loop_devices_of_one_file_are_one_disk() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
        let (Some(first), Some(second)) = (Loop::of(&file), Loop::of(&file)) else {
            let why = "losetup makes no loop devices here: it needs root and /dev/loop-control";
            return vmm_testkit::skip::skipped("two_loop_devices_of_one_file_are_one_disk", why);
        };
        let of = |path: &Path| inspect(path, Access::ReadWrite).unwrap();
        let itself = of(&file);
        for device in [&first, &second] {
            let facts = of(Path::new(&device.0));
            assert_eq!((facts.device, facts.inode), (itself.device, itself.inode), "{}", device.0);
            assert_eq!((facts.size, facts.lies_on), (1 << 20, vec![]));
        }
    }

    #[test]
    fn a_loop_device_of_an_unlinked_file_is_still_that_file() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("disk"), dir.path().join("link"));
        std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
        std::fs::hard_link(&file, &link).unwrap();
        let (Some(first), Some(second)) = (Loop::of(&file), Loop::of(&file)) else {
            let why = "losetup makes no loop devices here: it needs root and /dev/loop-control";
            return vmm_testkit::skip::skipped("a_loop_device_of_an_unlinked_file_is_still_that_file", why);
        };
        let key = |path: &Path| {
            let facts = inspect(path, Access::ReadWrite).unwrap();
            (facts.device, facts.inode)
        };
        let itself = key(&file);
        std::fs::remove_file(&file).unwrap();
        for device in [&first, &second] {
            assert_eq!(key(Path::new(&device.0)), itself, "{}", device.0);
        }
        assert_eq!(key(&link), itself);
        // Another file by the old name is another disk.
        std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
        assert_eq!(key(Path::new(&first.0)), itself);
        assert_ne!(key(&file), itself);
    }

    #[test]
    fn a_partition_lies_on_its_disk_and_a_disk_on_no_device() {
        let mut seen = 0;
        for entry in fs::read_dir("/sys/class/block").into_iter().flatten().flatten() {
            let dir = entry.path();
            let Some(rdev) = number(&dir) else { continue };
            let layers = layers(rdev);
            assert!(!layers.lies_on.contains(&layers.key), "{}", dir.display());
            if dir.join("partition").exists() {
                let whole = number(dir.canonicalize().unwrap().parent().unwrap()).unwrap();
                assert!(layers.lies_on.contains(&key_of(whole)), "{}", dir.display());
                seen += 1;
            }
        }
        if seen == 0 {
            let why = "this host shows no partition";
            vmm_testkit::skip::skipped("a_partition_lies_on_its_disk_and_a_disk_on_no_device", why);
        }
    }

    #[test]
    fn an_unknown_device_lies_on_no_device() {
        let nobody = makedev(4095, 1);
        assert_eq!(
            layers(nobody),
            BlockLayers { key: DiskKey { device: nobody, inode: 0 }, lies_on: vec![] }
        );
    }
}
