//! The checked form of a configuration: every value is legal by itself and with the others.
//!
//! [`VmSpec::parse`] reads nothing but its argument. The service checks the host (the files exist,
//! the TAP is free), and each backend checks the needs of its hypervisor. A parsed specification
//! holds no text map: every plain key is a field, and the keys of one backend are a list for that
//! backend ([`BackendOptions`]).
//!
//! Each backend's `check` and `convert` take these structs apart without `..`. Therefore a new
//! field does not compile until every backend either serves it or names it as not served.

mod count;
mod imported;
mod kernel_line;
mod mac;
mod options;
mod parse;

use std::path::PathBuf;

pub use count::too_many;
pub use kernel_line::{kernel_words, kernels_part};
pub use mac::MacAddr;
pub use options::{
    BACKING_KEYS, BOOT_KEYS, BackendOption, BackendOptions, CPU_KEYS, DISK_KEYS, FreeMap, NIC_KEYS, prefix_of,
};

use crate::id::VmUid;

/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;

/// The longest kernel command line that x86 Linux keeps, without its final NUL, in bytes.
pub const MAX_KERNEL_ARGS: usize = 2047;

/// The specification of a VM that can be started, as far as its configuration decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// Kernel and arguments.
    pub boot: Boot,
    /// Disks as the guest sees them: the root device first, the others in the order given.
    pub disks: Vec<Disk>,
    /// Network interfaces in the order given.
    pub nics: Vec<Nic>,
    /// The serial console.
    pub console: Console,
    /// The policy for the end of a run.
    pub restart: RestartPolicy,
    /// Keys of the free maps that concern one backend each.
    pub options: BackendOptions,
}

/// Virtual CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// CPUs at boot; at least 1.
    pub count: u32,
    /// Ceiling for hot-plug; at least `count`.
    pub max: u32,
    /// The arrangement of `max` CPUs, where the client gives one.
    pub topology: Option<Topology>,
}

/// Arrangement of CPUs; the product is [`Cpu::max`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores in each socket.
    pub cores: u32,
    /// Threads on each core.
    pub threads: u32,
}

/// Memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes at boot; whole MiB, more than 0.
    pub size_bytes: u64,
    /// Ceiling for growth in bytes, where growth is enabled.
    pub hotplug_max_bytes: Option<u64>,
    /// The pages that back the memory.
    pub pages: PageSize,
    /// True if other processes on the host may map the memory.
    pub shared: bool,
}

/// The pages with which the host backs a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// The host's usual pages.
    Usual,
    /// Huge pages of the host's default size.
    Huge,
}

impl Memory {
    /// Returns the size in MiB.
    pub const fn size_mib(&self) -> u64 {
        self.size_bytes / MIB
    }
}

/// Kernel and arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Kernel image on the host; absolute.
    pub kernel: PathBuf,
    /// Initial RAM disk on the host; absolute.
    pub initrd: Option<PathBuf>,
    /// Kernel command line as given. Backends use [`VmSpec::kernel_args`].
    pub args: String,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Position in the configuration's list, for messages.
    pub index: usize,
    /// Name among this VM's disks.
    pub id: String,
    /// Image or block device on the host; absolute.
    pub path: PathBuf,
    /// True if the guest may only read.
    pub read_only: bool,
    /// True if the disk holds the root file system.
    pub is_root: bool,
    /// The format of the image. The image is never probed for it.
    pub format: DiskFormat,
    /// True if a qcow2 image may name a backing file.
    pub backing_files: bool,
    /// The treatment of the guest's flushes.
    pub cache: DiskCache,
    /// True if reads and writes bypass the host's page cache.
    pub direct_io: bool,
    /// The ceilings on the disk's traffic.
    pub limits: RateLimit,
}

impl Disk {
    /// Returns the path of this disk's entry in the configuration.
    pub fn field(&self) -> String {
        format!("config.storage[{}]", self.index)
    }
}

/// The treatment of a guest's flushes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskCache {
    /// Flushes reach the disk.
    Writeback,
    /// Flushes do not reach the disk.
    Unsafe,
}

/// Ceilings on the traffic of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes in a second.
    pub bytes_per_second: Option<u64>,
    /// Requests or packets in a second.
    pub operations_per_second: Option<u64>,
}

impl RateLimit {
    /// Returns true if there is no ceiling.
    pub const fn is_none(self) -> bool {
        self.bytes_per_second.is_none() && self.operations_per_second.is_none()
    }
}

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// The bytes of the disk, without a header.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl DiskFormat {
    /// Returns the word in `options.format`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Name among this VM's interfaces.
    pub id: String,
    /// Hardware address; unicast.
    pub mac: MacAddr,
    /// TAP on the host, where the client names one.
    pub tap: Option<String>,
    /// The ceilings on the interface's traffic, for each direction.
    pub limits: RateLimit,
}

/// The serial console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// The guest has no console.
    Off,
    /// The program keeps the output in the run folder.
    Kept,
    /// The output goes to a file that the client names.
    File(PathBuf),
}

/// The files that a configuration names and whose paths are legal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFiles {
    /// Kernel image.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// The serial console, whose output may go to a file.
    pub console: Console,
    /// True if the kernel's arguments name a root file system themselves.
    pub names_root: bool,
}

impl NamedFiles {
    /// Returns the files of a whole specification.
    pub fn of(spec: &VmSpec) -> Self {
        // The structs are taken apart without `..`, so a new field does not compile until this
        // function treats it.
        let VmSpec { cpu: _, memory: _, boot, disks, nics: _, console, restart: _, options: _ } = spec;
        let Boot { kernel, initrd, args } = boot;
        Self {
            kernel: Some(kernel.clone()),
            initrd: initrd.clone(),
            disks: disks.clone(),
            console: console.clone(),
            names_root: names_root(args),
        }
    }
}

/// The field of the violation that firmware is not served yet.
pub const FIRMWARE_FIELD: &str = "config.boot.boot_options[\"firmware\"]";

/// The policy for the end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// The ends that are followed by a start; `None` leaves the choice to the backend.
    pub mode: Option<RestartMode>,
    /// The number of restarts without a quiet minute in between, after which the VM stays down.
    pub max_restarts: u32,
}

/// The ends that are followed by a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RestartMode {
    /// No end. A guest's reset ends its run.
    Never,
    /// The guest's own reset.
    GuestReboot,
    /// The guest's own reset, and a death or failure of the VMM.
    OnFailure,
    /// Every end without a request, a power-off by the guest included.
    Always,
}

/// The number of restarts where the client sets none.
pub const DEFAULT_MAX_RESTARTS: u32 = 5;

/// Returns true if the kernel's arguments name a root file system.
fn names_root(args: &str) -> bool {
    kernel_words(args).any(|word| word.starts_with("root="))
}

impl VmSpec {
    /// Returns true if the kernel command line makes a Linux guest reset itself when its kernel
    /// panics: a `panic=` with another value than 0. The last of several `panic=` counts.
    pub fn resets_on_panic(&self) -> bool {
        let seconds = kernel_words(&self.boot.args).filter_map(|word| word.strip_prefix("panic=")).last();
        // Linux resets at once for a negative number, and after so many seconds for a positive one.
        // Only 0 keeps the panicked guest.
        seconds.is_some_and(|seconds| seconds.parse::<i32>().is_ok_and(|seconds| seconds != 0))
    }

    /// Returns the name of each network interface's TAP, in the order of the interfaces. CreateVm
    /// stores every name. A record of an earlier release has no name where the client gave none;
    /// that name follows from `uid`.
    pub fn tap_names(&self, uid: VmUid) -> Vec<String> {
        let named = |(index, nic): (usize, &Nic)| nic.tap.clone().unwrap_or_else(|| uid.tap_name(index));
        self.nics.iter().enumerate().map(named).collect()
    }

    /// Returns the kernel command line in force: the given one, with `root=/dev/vda ro` or `rw` if
    /// a root device is named and the line has no `root=` of its own. The line is the same on every
    /// backend. The part behind a lone `--` stays last, because it belongs to init.
    pub fn kernel_args(&self) -> String {
        let args = self.boot.args.as_str();
        // The root is inserted before a lone `--`, because Linux would pass it to init behind one.
        let (for_kernel, for_init) = args.split_at(kernels_part(args).len());
        let has_root = names_root(args);
        let Some(disk) = self.disks.first().filter(|disk| disk.is_root && !has_root) else {
            return args.to_owned();
        };
        let root = if disk.read_only { "root=/dev/vda ro" } else { "root=/dev/vda rw" };
        let parts = [for_kernel.trim_end(), root, for_init];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootConfig, CpuConfig, MemoryConfig, StorageDevice, VmConfig};

    fn args(given: &str, disk: Option<(bool, bool)>) -> String {
        spec(given, disk).kernel_args()
    }

    fn spec(given: &str, disk: Option<(bool, bool)>) -> VmSpec {
        let storage = disk.map(|(is_root_device, read_only)| StorageDevice {
            path: "/disk".to_owned(),
            is_root_device,
            read_only,
            ..StorageDevice::default()
        });
        let config = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 1 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig {
                kernel_path: "/kernel".to_owned(),
                kernel_args: given.to_owned(),
                ..BootConfig::default()
            }),
            storage: storage.into_iter().collect(),
            ..VmConfig::default()
        };
        VmSpec::parse(&config).unwrap()
    }

    #[test]
    fn only_a_panic_argument_makes_a_guest_reset_on_a_panic() {
        let resets = |given| spec(given, None).resets_on_panic();
        for given in ["panic=1", "quiet panic=-1 ro", "panic=0 panic=5"] {
            assert!(resets(given), "{given}");
        }
        for given in ["", "panic=0", "panic=5 panic=0", "panic=", "panic", "nopanic=1", "quiet -- panic=1"] {
            assert!(!resets(given), "{given}");
        }
    }

    #[test]
    fn an_open_quotation_mark_in_the_kernel_arguments_is_refused() {
        let boot =
            |kernel_args: &str| BootConfig { kernel_args: kernel_args.to_owned(), ..BootConfig::default() };
        let faults = |kernel_args| {
            let boot = BootConfig { kernel_path: "/kernel".to_owned(), ..boot(kernel_args) };
            let report = VmSpec::parse(&VmConfig { boot: Some(boot), ..VmConfig::default() }).unwrap_err();
            report.violations.iter().filter(|it| it.field == "config.boot.kernel_args").count()
        };
        assert_eq!(faults("a=\"b c"), 1);
        assert_eq!(faults("a=\"b c\""), 0);
        assert_eq!(faults("a -- it\"s"), 0, "init's");
    }

    #[test]
    fn a_root_argument_is_added_unless_one_is_given() {
        assert_eq!(args("console=ttyS0", Some((true, false))), "console=ttyS0 root=/dev/vda rw");
        assert_eq!(args("", Some((true, true))), "root=/dev/vda ro");
        assert_eq!(
            args("quiet -- single root=x", Some((true, false))),
            "quiet root=/dev/vda rw -- single root=x"
        );
        assert_eq!(args("-- single", Some((true, false))), "root=/dev/vda rw -- single");
        assert_eq!(args("quiet --", Some((true, false))), "quiet root=/dev/vda rw --");
        assert_eq!(
            args("note=\"a -- root=x\" quiet", Some((true, false))),
            "note=\"a -- root=x\" quiet root=/dev/vda rw"
        );
        assert_eq!(args("root=/dev/vda1 quiet", Some((true, false))), "root=/dev/vda1 quiet");
        assert_eq!(args("quiet", Some((false, false))), "quiet");
        assert_eq!(args("quiet", None), "quiet");
    }
}
