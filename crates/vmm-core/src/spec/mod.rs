//! The checked form of a configuration: every value is legal by itself and with the others.
//!
//! [`VmSpec::parse`] is the only way to make one. It reads nothing but its argument; what must be looked up on the host (does
//! the kernel exist? is the TAP taken?) is checked by the service, and what one hypervisor adds by its backend.

mod imported;
mod kernel_line;
mod options;
mod parse;

use std::fmt;
use std::path::PathBuf;

pub use kernel_line::{kernel_words, kernels_part};
pub use options::{
    BACKING_KEYS, BOOT_KEYS, CPU_KEYS, DISK_KEYS, NIC_KEYS, OptionScope, RateLimit, option_is_true,
    rate_limit, scope_of,
};

use crate::config::Options;

/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;

/// The longest kernel command line that x86 Linux keeps, without its final NUL, in bytes.
pub const MAX_KERNEL_ARGS: usize = 2047;

/// A VM that can be started, as far as its configuration goes.
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
    /// What follows the end of a run.
    pub restart: RestartPolicy,
}

/// Virtual CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// CPUs at boot; at least 1.
    pub count: u32,
    /// Ceiling for hot-plug; at least `count`.
    pub max: u32,
    /// How `max` CPUs are arranged, where the client says.
    pub topology: Option<Topology>,
    /// Features by key.
    pub features: Options,
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
    /// How the host backs it, by key.
    pub backing: Options,
}

impl Memory {
    /// The size in MiB.
    pub const fn size_mib(&self) -> u64 {
        self.size_bytes / MIB
    }
}

/// Boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Kernel image on the host; absolute.
    pub kernel: PathBuf,
    /// Initial RAM disk on the host; absolute.
    pub initrd: Option<PathBuf>,
    /// Kernel command line as given. Backends use [`VmSpec::kernel_args`].
    pub args: String,
    /// Boot settings by key.
    pub options: Options,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Place in the configuration's list, for messages.
    pub index: usize,
    /// Name among this VM's disks.
    pub id: String,
    /// Image or block device on the host; absolute.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether the root file system is on it.
    pub is_root: bool,
    /// How the image is laid out; never probed.
    pub format: DiskFormat,
    /// Whether a qcow2 image may name a backing file.
    pub backing_files: bool,
    /// All settings by key.
    pub options: Options,
}

impl Disk {
    /// The path of this disk's entry in the configuration.
    pub fn field(&self) -> String {
        format!("config.storage[{}]", self.index)
    }
}

/// How an image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl DiskFormat {
    /// The word in `options.format`.
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
    /// Settings by key.
    pub options: Options,
}

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The serial console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// There is none.
    Off,
    /// The program keeps its output in the run folder.
    Kept,
    /// Its output goes to a file that the client names.
    File(PathBuf),
}

/// What follows the end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// When to start again; `None` means what the backend does by default.
    pub mode: Option<RestartMode>,
    /// Restarts without a quiet minute between, after which the VM stays down.
    pub max_restarts: u32,
}

/// When to start again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RestartMode {
    /// Never: a guest's reset ends its run.
    Never,
    /// When the guest resets itself.
    GuestReboot,
    /// That, and when the VMM dies or fails.
    OnFailure,
    /// That, and when the guest powers off.
    Always,
}

/// Restarts that are allowed where the client does not say.
pub const DEFAULT_MAX_RESTARTS: u32 = 5;

impl VmSpec {
    /// The kernel command line in force: as given, and `root=/dev/vda ro|rw` where a root device is named and the line has
    /// no `root=` of its own. Alike on every backend. What follows a lone `--` is init's, so it stays last.
    pub fn kernel_args(&self) -> String {
        let args = self.boot.args.as_str();
        let (for_kernel, for_init) = args.split_at(kernels_part(args).len());
        let has_root = kernel_words(args).any(|word| word.starts_with("root="));
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
        VmSpec::parse(&config).unwrap().kernel_args()
    }

    #[test]
    fn an_open_quote_is_refused_because_it_would_swallow_what_is_added() {
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
    fn a_root_device_is_named_unless_the_line_names_one() {
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
