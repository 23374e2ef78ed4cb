//! What runs the VMs.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};
use vmm_host::fault::FaultPoint;
use vmm_testkit::by_hand::ByHandProgram;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, on_path};
use crate::scenario::Scenario;

/// The name under which this program is a VMM.
const FAKE_VMM: &str = "fake-qemu";

/// Says whether this process is to be a VMM.
pub(crate) fn is_fake_vmm() -> bool {
    std::env::args_os().next().is_some_and(|name| Path::new(&name).file_name() == Some(OsStr::new(FAKE_VMM)))
}

/// What runs the VMs of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Backend {
    /// Processes without guests.
    Fake,
    /// QEMU in software emulation, as a microvm.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisors that somebody else started.
    AttachedCloudHypervisor,
    /// Firecrackers that somebody else started.
    AttachedFirecracker,
    /// QEMUs that somebody else started, which are imported and never created.
    AttachedQemu,
    /// QEMU in software emulation, as domains of a libvirtd.
    Libvirt,
}

impl Backend {
    pub(crate) const ALL: [Self; 8] = [
        Self::Fake,
        Self::Qemu,
        Self::CloudHypervisor,
        Self::Firecracker,
        Self::AttachedCloudHypervisor,
        Self::AttachedFirecracker,
        Self::AttachedQemu,
        Self::Libvirt,
    ];

    /// Those whose VMs live where somebody else says.
    pub(crate) const PLACED: [Self; 4] =
        [Self::AttachedCloudHypervisor, Self::AttachedFirecracker, Self::AttachedQemu, Self::Libvirt];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fake => "fake",
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloudhypervisor",
            Self::Firecracker => "firecracker",
            Self::AttachedCloudHypervisor => "attached-cloudhypervisor",
            Self::AttachedFirecracker => "attached-firecracker",
            Self::AttachedQemu => "attached-qemu",
            Self::Libvirt => "libvirt-qemu",
        }
    }

    /// The name by which the daemon knows it.
    const fn backend(self) -> &'static str {
        match self {
            Self::CloudHypervisor | Self::AttachedCloudHypervisor => "cloudhypervisor",
            Self::Firecracker | Self::AttachedFirecracker => "firecracker",
            Self::Fake | Self::Qemu | Self::AttachedQemu | Self::Libvirt => "qemu",
        }
    }

    /// What the test starts by hand for it.
    pub(crate) const fn by_hand(self) -> Option<ByHandProgram> {
        match self {
            Self::AttachedCloudHypervisor => Some(ByHandProgram::CloudHypervisor),
            Self::AttachedFirecracker => Some(ByHandProgram::Firecracker),
            Self::AttachedQemu => Some(ByHandProgram::Qemu),
            Self::Fake | Self::Qemu | Self::CloudHypervisor | Self::Firecracker | Self::Libvirt => None,
        }
    }

    /// Whether its VMs live where somebody else says.
    pub(crate) fn is_placed(self) -> bool {
        Self::PLACED.contains(&self)
    }

    /// The points that nothing passes on it, of one on which every operation is tried: the rest must all have been passed.
    pub(crate) fn beyond(self) -> Option<Vec<FaultPoint>> {
        // Only VMMs that the daemon starts itself can be started ahead, and the fake one cannot.
        let spares = [FaultPoint::SpareFolderMade, FaultPoint::SpareMarked, FaultPoint::SpareStarted];
        self.beyond_beside_spares().map(|beyond| beyond.iter().copied().chain(spares).collect())
    }

    fn beyond_beside_spares(self) -> Option<&'static [FaultPoint]> {
        use FaultPoint as P;
        match self {
            // Where the daemon starts the VMMs itself nothing is found, and nothing outlives a run.
            Self::Fake => Some(&[
                P::LaunchPartlyConfigured,
                // It takes no input.
                P::ConsoleWritten,
                P::DeleteRunEnded,
                P::ImportTaken,
                P::ImportCommitted,
                P::FoundTaken,
            ]),
            // A reset is in place there, whatever the policy.
            Self::AttachedCloudHypervisor => Some(&[
                P::LaunchSpawned,
                P::LaunchPartlyConfigured,
                P::ConsoleWritten,
                P::ResetPrepared,
                P::ResetOrdered,
            ]),
            // It cannot be reset, nor powered off but by the end of its process.
            Self::AttachedFirecracker => Some(&[
                P::LaunchSpawned,
                P::ConsoleWritten,
                P::RebootApplied,
                P::RebootOutcomeCommitted,
                P::LadderOrdered,
                P::ResetPrepared,
                P::ResetOrdered,
            ]),
            // Import only.
            Self::AttachedQemu => Some(&[
                P::CreateChecked,
                P::CreateCommitted,
                P::CreateShown,
                P::StartReserved,
                P::StartTapsProvided,
                P::StartFolderMade,
                P::LaunchSpawned,
                P::LaunchConnected,
                P::LaunchPartlyConfigured,
                P::LaunchConfigured,
                P::LaunchStarted,
                P::StartLaunched,
                P::ConsoleWritten,
                P::BootIntentCommitted,
                P::BootOutcomeCommitted,
                P::ResetPrepared,
                P::ResetOrdered,
            ]),
            Self::Libvirt => Some(&[P::LaunchPartlyConfigured]),
            Self::Qemu | Self::CloudHypervisor | Self::Firecracker => None,
        }
    }

    /// Why it cannot run here. What a libvirtd needs shows when it is started.
    pub(crate) fn missing(self) -> Option<String> {
        if let Some(kind) = self.by_hand() {
            return kind.missing();
        }
        let kvm = || Path::new("/dev/kvm").exists();
        let (here, why) = match self {
            Self::Qemu => (on_path("qemu-system-x86_64"), "qemu-system-x86_64 is not on PATH"),
            Self::CloudHypervisor => {
                (on_path("cloud-hypervisor") && kvm(), "cloud-hypervisor or /dev/kvm is missing")
            }
            Self::Firecracker => (on_path("firecracker") && kvm(), "firecracker or /dev/kvm is missing"),
            Self::Fake
            | Self::AttachedCloudHypervisor
            | Self::AttachedFirecracker
            | Self::AttachedQemu
            | Self::Libvirt => (true, ""),
        };
        (!here).then(|| why.to_owned())
    }

    /// A world with this hypervisor alone, its daemon not started.
    pub(crate) fn world(self) -> World {
        // Looking for what is not used takes time at each start.
        const NONE: &str = "/nowhere/vmm";
        // Where there are no events that is how long a change may go unseen.
        let interval = if self.is_placed() { "1" } else { "5" };
        let mut world = World::new(&[("UNKEY_VMCP_METRICS_INTERVAL", interval)]);
        let uses = |hypervisor| self == hypervisor;
        if !uses(Self::CloudHypervisor) {
            world.set_env("UNKEY_VMCP_CH_BINARY", Some(NONE));
        }
        if !uses(Self::Firecracker) {
            world.set_env("UNKEY_VMCP_FC_BINARY", Some(NONE));
        }
        match self {
            Self::Fake => {
                let fake = world.dir.path().join(FAKE_VMM);
                std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &fake).unwrap();
                world.set_env("UNKEY_VMCP_QEMU_BINARY", fake.to_str());
            }
            Self::Qemu | Self::Libvirt => {}
            Self::CloudHypervisor
            | Self::Firecracker
            | Self::AttachedCloudHypervisor
            | Self::AttachedFirecracker
            | Self::AttachedQemu => world.set_env("UNKEY_VMCP_QEMU_BINARY", Some(NONE)),
        }
        world.set_env("UNKEY_VMCP_BACKEND", Some(self.backend()));
        world
    }

    /// The guest of a VM under test. One that is to obey keeps a CPU busy; the other ends with its VMM alone.
    pub(crate) fn guest(self, scenario: &Scenario) -> TinyGuest {
        match self {
            Self::AttachedFirecracker if scenario.obeys() => TinyGuest::Obey,
            Self::AttachedQemu | Self::Libvirt if scenario.obeys() => TinyGuest::Button,
            _ => TinyGuest::Idle,
        }
    }

    /// What a guest prints each time it starts.
    pub(crate) fn banner(self, guest: TinyGuest) -> String {
        if self == Self::Fake { vmm_testkit::fake::qemu::BANNER.to_owned() } else { guest.banner() }
    }

    /// The configuration of a VM with a disk of its own, and a network interface where TAPs can be made.
    pub(crate) fn config(self, world: &World, vm_id: &str, guest: TinyGuest, script: &str) -> Value {
        let mut config = world.tiny(guest);
        let disk = world.dir.path().join(format!("{vm_id}.img"));
        std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        config["storage"] = json!([{"path": disk}]);
        if can_make_taps() {
            config["network"] = json!([{}]);
        }
        match self {
            Self::Fake => config["boot"]["kernel_args"] = json!(script),
            Self::Qemu => config["boot"]["boot_options"] = json!({"qemu.machine": "microvm"}),
            Self::CloudHypervisor
            | Self::Firecracker
            | Self::AttachedCloudHypervisor
            | Self::AttachedFirecracker
            | Self::AttachedQemu
            | Self::Libvirt => {}
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
