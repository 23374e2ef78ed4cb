//! The checks of the host for `doctor`. Each function returns one or a few lines and changes
//! nothing.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, OFlags, accessat, statvfs};
use rustix::process::geteuid;
use vmm_core::backend::KernelFormat;
use vmm_host::device::DeviceFault;
use vmm_host::kernel::{self, KernelKind};
use vmm_host::net::tap;
use vmm_host::{descriptors, kvm, run_dir};

use super::check::DoctorCheck;

/// The free bytes below which the store may soon be full.
const LITTLE_ROOM: u64 = 256 << 20;
/// The number of further VMs below which the limit on descriptors causes a warning.
const FEW_VMS: u64 = 50;
/// The remedy for a limit on descriptors that is too low.
const MORE_FILES: &str =
    "start the daemon with a higher hard limit: `ulimit -Hn`, or LimitNOFILE= of its systemd unit";
/// The free bytes below which the store cannot even hold its log.
const NO_ROOM: u64 = 16 << 20;

/// Checks `/dev/kvm` and the CPU's virtualisation. `needed` is true if the default backend runs
/// nothing without KVM.
pub(super) fn kvm(needed: bool) -> Vec<DoctorCheck> {
    let device = match kvm::kvm_usable() {
        Ok(()) => DoctorCheck::ok("/dev/kvm", "can be opened"),
        Err(DeviceFault { finding, remedy }) => {
            let check = if needed { DoctorCheck::fail } else { DoctorCheck::warn };
            check("/dev/kvm", finding, remedy)
        }
    };
    let hardware = if kvm::hardware_virtualisation() {
        DoctorCheck::ok("virtualisation", "the CPUs show vmx or svm")
    } else {
        DoctorCheck::warn(
            "virtualisation",
            "the CPUs show neither vmx nor svm: a KVM on this host emulates in software, and runs a common Linux kernel far too slowly",
            "enable virtualisation in the firmware, or nested virtualisation where this is a VM; else use qemu with \
             UNKEY_VMCP_QEMU_KVM=auto, which emulates",
        )
    };
    vec![device, hardware]
}

/// Checks that TAPs can be made.
pub(super) fn network() -> Vec<DoctorCheck> {
    network_lines(tap::tun_usable(), tap::has_net_admin())
}

fn network_lines(device: Result<(), DeviceFault>, may_make: bool) -> Vec<DoctorCheck> {
    const ADMIN: &str = "CAP_NET_ADMIN";
    let give = "give it to the daemon (systemd: AmbientCapabilities=CAP_NET_ADMIN)";
    let capability = match (may_make, &device) {
        (true, _) => DoctorCheck::ok(ADMIN, "is present: the daemon can make TAPs"),
        (false, Ok(())) => DoctorCheck::warn(
            ADMIN,
            "is missing: VMs can use only TAPs that exist and belong to the daemon's user",
            format!(
                "{give}, or make TAPs beforehand and name them in tap_device (`ip tuntap add dev NAME mode tap user USER`)"
            ),
        ),
        // A TAP made beforehand is no remedy, because a VMM opens it through the device.
        (false, Err(_)) => DoctorCheck::warn(
            ADMIN,
            "is missing: the daemon can make no TAPs",
            format!("{give}; without it VMs can use TAPs made beforehand, once /dev/net/tun can be opened"),
        ),
    };
    let device = match device {
        Ok(()) => DoctorCheck::ok("/dev/net/tun", "can be opened"),
        Err(DeviceFault { finding, remedy }) => {
            DoctorCheck::warn("/dev/net/tun", format!("{finding}: VMs with a network cannot boot"), remedy)
        }
    };
    vec![device, capability]
}

/// Reports the version of control groups. Nothing in this version fails without them.
pub(super) fn cgroups() -> DoctorCheck {
    let root = Path::new("/sys/fs/cgroup");
    let needless = "this version puts no VMM into a group";
    if !root.join("cgroup.controllers").exists() {
        let version =
            if root.join("unified").exists() { "version 1 with 2 beside it" } else { "version 1, or none" };
        return DoctorCheck::ok("cgroups", format!("{version}; {needless}"));
    }
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let group = root.join(own);
    let writable = accessat(CWD, &group, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
    let may = if writable { "may" } else { "may not" };
    DoctorCheck::ok(
        "cgroups",
        format!("version 2; this user {may} make groups in {}; {needless}", group.display()),
    )
}

/// Checks a directory of the daemon: its access, its owner and its free space.
pub(super) fn directory(name: &'static str, variable: &str, dir: &Path) -> Vec<DoctorCheck> {
    let advice = format!("give it to the daemon's user, or name another with {variable}");
    let Some(there) = dir.ancestors().find(|path| path.exists()) else {
        return vec![DoctorCheck::fail(name, format!("{} cannot be reached", dir.display()), advice)];
    };
    if !there.is_dir() {
        return vec![DoctorCheck::fail(
            name,
            format!("{} is a file, not a directory", there.display()),
            advice,
        )];
    }
    let missing = if there == dir { "" } else { " does not exist yet" };
    let shown = format!("{}{missing}", dir.display());
    if accessat(CWD, there, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_err() {
        let finding = format!("{shown}: user {} may not write into {}", geteuid().as_raw(), there.display());
        return vec![DoctorCheck::fail(name, finding, advice)];
    }
    let mut checks = Vec::new();
    if there == dir
        && let Ok(facts) = std::fs::metadata(dir)
    {
        checks.extend(ownership(name, dir, &facts));
    }
    checks.push(disk_room(name, &shown, there));
    checks
}

fn ownership(name: &'static str, dir: &Path, facts: &std::fs::Metadata) -> Option<DoctorCheck> {
    let (owner, this) = (facts.uid(), geteuid().as_raw());
    let shown = dir.display();
    if owner != this {
        let finding = format!("{shown} belongs to user {owner}, and this is user {this}");
        return Some(DoctorCheck::warn(
            name,
            finding,
            "run doctor as the daemon's user, because only that user's permissions matter",
        ));
    }
    let open = facts.mode() & 0o077 != 0;
    let finding = || format!("{shown} is open to other users (mode {:04o})", facts.mode() & 0o7777);
    open.then(|| DoctorCheck::warn(name, finding(), format!("`chmod 700 {shown}`")))
}

fn disk_room(name: &'static str, shown: &str, there: &Path) -> DoctorCheck {
    let free = match statvfs(there) {
        Ok(facts) => facts.f_bavail.saturating_mul(facts.f_frsize),
        Err(error) => {
            return DoctorCheck::warn(
                name,
                format!("{shown}: its free space cannot be read ({error})"),
                "look at its mount",
            );
        }
    };
    let finding = format!("{shown}: {} MiB free", free >> 20);
    let remedy = "free some room there: a full disk fails every operation on a VM";
    match free {
        ..NO_ROOM => DoctorCheck::fail(name, finding, remedy),
        NO_ROOM..LITTLE_ROOM => DoctorCheck::warn(name, finding, remedy),
        LITTLE_ROOM.. => DoctorCheck::ok(name, finding),
    }
}

/// Counts the VMs that the limit on descriptors allows. The limit is that of the running daemon, or
/// of this process if there is none.
pub(super) fn open_files(daemon: Option<u32>) -> DoctorCheck {
    const NAME: &str = "open files";
    let process = daemon.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap_or_default();
    let (Some(limit), Ok(used)) = (hard_limit(&limits), descriptors::in_use(&process)) else {
        return DoctorCheck::warn(
            NAME,
            "the open files of the daemon cannot be counted",
            "run doctor as the daemon's user",
        );
    };
    let used = if daemon.is_some() { used } else { descriptors::DAEMON };
    let more = descriptors::vms_that_fit(limit, used);
    let clients = descriptors::for_clients(limit);
    match daemon {
        Some(_) => {
            let finding = format!(
                "the daemon may open {limit} files, and {used} are open: some {more} more VMs fit, beside {clients} connections"
            );
            if more < FEW_VMS {
                DoctorCheck::warn(NAME, finding, MORE_FILES)
            } else {
                DoctorCheck::ok(NAME, finding)
            }
        }
        None => {
            let finding = format!(
                "a daemon started from here may open {limit} files: some {more} VMs fit, beside {clients} connections"
            );
            if more < FEW_VMS {
                DoctorCheck::warn(NAME, finding, MORE_FILES)
            } else {
                DoctorCheck::ok(NAME, finding)
            }
        }
    }
}

/// Returns the hard limit on open files from the text of `/proc/PID/limits`. The hard limit counts
/// because the daemon raises its soft limit to it.
fn hard_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().nth(1)? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// Checks that the socket paths of a VM are short enough for the kernel.
pub(super) fn socket_names(runtime_dir: &Path) -> DoctorCheck {
    // This is the longest path, because CONSOLE_SOCKET is the longest socket name and all folder
    // names have 32 digits.
    let longest =
        runtime_dir.join("vms").join("0".repeat(32)).join(vmm_backends::libvirt::convert::CONSOLE_SOCKET);
    let length = longest.as_os_str().len();
    match run_dir::socket_path_fits(&longest) {
        Ok(()) => DoctorCheck::ok("socket paths", format!("{length} of {} bytes", run_dir::MAX_SOCKET_PATH)),
        Err(why) => DoctorCheck::fail("socket paths", why, "set UNKEY_VMCP_RUNTIME_DIR to a shorter path"),
    }
}

/// Checks the kernel and the initial RAM disk of VMs that name none.
pub(super) fn default_boot(
    kernel: Option<&PathBuf>,
    initrd: Option<&PathBuf>,
    formats: &[KernelFormat],
) -> Vec<DoctorCheck> {
    let Some(kernel) = kernel else {
        return vec![DoctorCheck::ok(
            "default kernel",
            "none: each VM names its kernel (UNKEY_VMCP_DEFAULT_KERNEL sets one)",
        )];
    };
    let remedy = "correct UNKEY_VMCP_DEFAULT_KERNEL, or let the daemon's user read the file";
    let mut checks = vec![match readable(kernel).and_then(|()| kernel::read_kind(kernel)) {
        Ok(kind) if is_bootable(kind, formats) => {
            DoctorCheck::ok("default kernel", format!("{} can be read", kernel.display()))
        }
        Ok(_) => {
            let wanted = formats.iter().map(|format| format.as_str()).collect::<Vec<_>>().join(" or ");
            let finding = format!("{} is not what the default backend boots: {wanted}", kernel.display());
            DoctorCheck::warn(
                "default kernel",
                finding,
                "set UNKEY_VMCP_DEFAULT_KERNEL to one, or choose another backend",
            )
        }
        Err(error) => DoctorCheck::warn("default kernel", format!("{}: {error}", kernel.display()), remedy),
    }];
    if let Some(initrd) = initrd {
        checks.push(match readable(initrd) {
            Ok(()) => DoctorCheck::ok("default initrd", format!("{} can be read", initrd.display())),
            Err(error) => DoctorCheck::warn(
                "default initrd",
                format!("{}: {error}", initrd.display()),
                "correct UNKEY_VMCP_DEFAULT_INITRD, or let the daemon's user read the file",
            ),
        });
    }
    checks
}

/// Reads a byte of a regular file, to prove that it can be read.
fn readable(path: &Path) -> std::io::Result<()> {
    let file: File =
        OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a file"));
    }
    file.take(1).read_to_end(&mut Vec::new())?;
    Ok(())
}

fn is_bootable(kind: KernelKind, formats: &[KernelFormat]) -> bool {
    let has = |format| formats.contains(&format);
    match kind {
        KernelKind::BzImage => has(KernelFormat::BzImage),
        KernelKind::ElfX86_64 { pvh } => has(KernelFormat::Elf) || (pvh && has(KernelFormat::PvhElf)),
        KernelKind::Other => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::CheckVerdict;
    use super::*;

    #[test]
    fn the_hard_limit_on_descriptors_decides() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max processes             100                  200                  processes \n\
                      Max open files            1024                 4096                 files     \n";
        assert_eq!(hard_limit(limits), Some(4096));
        assert_eq!(
            hard_limit("Max open files            1024                 unlimited            files"),
            Some(u64::MAX)
        );
        assert_eq!(hard_limit(""), None);
        let check = open_files(None);
        assert!(check.finding.contains("VMs fit"), "{check:?}");
        assert_eq!(open_files(Some(u32::MAX)).verdict, CheckVerdict::Warn, "there is no such process");
    }

    #[test]
    fn no_tap_beforehand_is_advised_where_no_tap_can_be_opened() {
        let fault =
            || DeviceFault { finding: "/dev/net/tun is shut".to_owned(), remedy: "open it".to_owned() };
        let lines = network_lines(Err(fault()), false);
        assert!(lines.iter().all(|line| line.verdict == CheckVerdict::Warn), "{lines:?}");
        assert_eq!(lines[0].remedy.as_deref(), Some("open it"));
        assert!(!lines[1].remedy.as_deref().unwrap().contains("ip tuntap add"), "{lines:?}");
        let lines = network_lines(Ok(()), false);
        assert!(lines[1].remedy.as_deref().unwrap().contains("ip tuntap add"), "{lines:?}");
        let verdicts =
            |lines: Vec<DoctorCheck>| lines.into_iter().map(|line| line.verdict).collect::<Vec<_>>();
        assert_eq!(verdicts(network_lines(Ok(()), true)), [CheckVerdict::Ok; 2]);
        assert_eq!(verdicts(network_lines(Err(fault()), true)), [CheckVerdict::Warn, CheckVerdict::Ok]);
    }

    #[test]
    fn an_unusable_directory_fails_with_its_variable() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let checks = directory("state", "UNKEY_VMCP_STATE_DIR", file.path());
        let bad = checks.iter().find(|check| check.verdict == CheckVerdict::Fail).unwrap();
        assert!(bad.remedy.as_deref().unwrap().contains("UNKEY_VMCP_STATE_DIR"), "{bad:?}");
        assert!(bad.finding.ends_with("is a file, not a directory"), "{bad:?}");
    }

    #[test]
    fn a_directory_open_to_others_causes_a_warning() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let warned = |dir: &Path| {
            directory("state", "X", dir).iter().any(|check| check.finding.contains("open to other users"))
        };
        assert!(warned(dir.path()));
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!warned(dir.path()));
        assert!(!warned(&dir.path().join("not/yet")));
    }

    #[test]
    fn a_kernel_in_a_format_that_the_backend_cannot_boot_is_refused() {
        let kernel = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(kernel.path(), "not a kernel").unwrap();
        let path = kernel.path().to_path_buf();
        let checks = default_boot(Some(&path), None, &[KernelFormat::BzImage]);
        assert!(checks[0].finding.contains("a bzImage"), "{checks:?}");
        let missing = PathBuf::from("/nowhere/vmlinuz");
        let checks = default_boot(Some(&missing), Some(&missing), &[]);
        assert_eq!(checks.iter().filter(|check| check.verdict == CheckVerdict::Warn).count(), 2);
        assert_eq!(default_boot(None, None, &[])[0].verdict, CheckVerdict::Ok);
    }
}
