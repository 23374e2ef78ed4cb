//! What runs the VMs.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};
use vmm_testkit::guests::Guest;

use crate::harness::{World, on_path};

/// The name under which this program is a VMM.
const FAKE_VMM: &str = "fake-qemu";

/// Costs no CPU time while the tests wait. It is deaf: all its ends but those by the fake are the VMM's.
const GUEST: Guest = Guest::Idle;

/// Says whether this process is to be a VMM.
pub(crate) fn is_fake_vmm() -> bool {
    std::env::args_os().next().is_some_and(|name| Path::new(&name).file_name() == Some(OsStr::new(FAKE_VMM)))
}

/// What runs the VMs of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// Processes without guests.
    Fake,
    /// QEMU in software emulation, as a microvm.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
}

impl Backend {
    pub(crate) const ALL: [Self; 4] = [Self::Fake, Self::Qemu, Self::CloudHypervisor, Self::Firecracker];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fake => "fake",
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloudhypervisor",
            Self::Firecracker => "firecracker",
        }
    }

    /// Why it cannot run here.
    pub(crate) fn missing(self) -> Option<&'static str> {
        let kvm = || Path::new("/dev/kvm").exists();
        let (here, why) = match self {
            Self::Fake => (true, ""),
            Self::Qemu => (on_path("qemu-system-x86_64"), "qemu-system-x86_64 is not on PATH"),
            Self::CloudHypervisor => {
                (on_path("cloud-hypervisor") && kvm(), "cloud-hypervisor or /dev/kvm is missing")
            }
            Self::Firecracker => (on_path("firecracker") && kvm(), "firecracker or /dev/kvm is missing"),
        };
        (!here).then_some(why)
    }

    /// A world with this hypervisor alone, its daemon not started.
    pub(crate) fn world(self) -> World {
        // Looking for what is not used takes time at each start.
        const NONE: &str = "/nowhere/vmm";
        let mut world = World::new(&[("UNKEY_VMCP_METRICS_INTERVAL", "5")]);
        let uses = |hypervisor| self == hypervisor;
        if !uses(Self::CloudHypervisor) {
            world.set_env("UNKEY_VMCP_CH_BINARY", Some(NONE));
        }
        if !uses(Self::Firecracker) {
            world.set_env("UNKEY_VMCP_FC_BINARY", Some(NONE));
        }
        let backend = match self {
            Self::Fake => {
                let fake = world.dir.path().join(FAKE_VMM);
                std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &fake).unwrap();
                world.set_env("UNKEY_VMCP_QEMU_BINARY", fake.to_str());
                "qemu"
            }
            Self::Qemu => "qemu",
            Self::CloudHypervisor | Self::Firecracker => {
                world.set_env("UNKEY_VMCP_QEMU_BINARY", Some(NONE));
                self.name()
            }
        };
        world.set_env("UNKEY_VMCP_BACKEND", Some(backend));
        world
    }

    /// What a guest prints each time it starts.
    pub(crate) fn banner(self) -> String {
        match self {
            Self::Fake => vmm_testkit::fake::qemu::BANNER.to_owned(),
            Self::Qemu | Self::CloudHypervisor | Self::Firecracker => GUEST.banner(),
        }
    }

    /// The configuration of a VM with a disk of its own, and a network interface where TAPs can be made.
    pub(crate) fn config(self, world: &World, vm_id: &str, script: &str) -> Value {
        let mut config = world.tiny(GUEST);
        let disk = world.dir.path().join(format!("{vm_id}.img"));
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        config["storage"] = json!([{"path": disk}]);
        if can_make_taps() {
            config["network"] = json!([{}]);
        }
        match self {
            Self::Fake => config["boot"]["kernel_args"] = json!(script),
            Self::Qemu => config["boot"]["boot_options"] = json!({"qemu.machine": "microvm"}),
            Self::CloudHypervisor | Self::Firecracker => {}
        }
        config
    }
}

/// Whether TAPs can be made here: it takes root, /dev/net/tun and `ip`, with which they are removed if a test fails.
pub(crate) fn can_make_taps() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| {
        let name = format!("vmx{}", std::process::id());
        let made = ip(&["tuntap", "add", &name, "mode", "tap"]);
        if made {
            ip(&["link", "delete", &name]);
        }
        made
    })
}

/// Runs `ip`.
pub(crate) fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|done| done.status.success())
}
