//! The operations, the states that they begin from, and where the VM may be once they were cut
//! short.

use serde_json::{Value, json};

use crate::hypervisor::Backend;

/// A call of the API on the VM under test.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) method: &'static str,
    /// JSON object of what is sent beside the VM's name.
    options: &'static str,
}

impl Call {
    const fn new(method: &'static str) -> Self {
        Self { method, options: "{}" }
    }

    const fn with(method: &'static str, options: &'static str) -> Self {
        Self { method, options }
    }

    pub(crate) fn body(self, vm_id: &str) -> Value {
        let mut body: Value = serde_json::from_str(self.options).unwrap();
        body["vm_id"] = json!(vm_id);
        body
    }
}

const CREATE: Call = Call::new("CreateVm");
pub(crate) const BOOT: Call = Call::new("BootVm");
const PAUSE: Call = Call::new("PauseVm");
const RESUME: Call = Call::new("ResumeVm");
const SHUTDOWN: Call = Call::new("ShutdownVm");
const SHUTDOWN_BY_FORCE: Call = Call::with("ShutdownVm", r#"{"force": true}"#);
const REBOOT: Call = Call::with("RebootVm", r#"{"timeout_seconds": 1}"#);
const REBOOT_BY_FORCE: Call = Call::with("RebootVm", r#"{"force": true}"#);
const DELETE: Call = Call::new("DeleteVm");
const DELETE_BY_FORCE: Call = Call::with("DeleteVm", r#"{"force": true}"#);

/// Removes the network interface, whose TAP the program has made.
const UPDATE_MACHINE: Call = Call::with("UpdateVm", r#"{"fields": ["network"]}"#);
const UPDATE_CONSOLE: Call =
    Call::with("UpdateVm", r#"{"fields": ["console"], "config": {"console": {"enabled": false}}}"#);
const UPDATE_LABELS: Call = Call::with("UpdateVm", r#"{"config": {"metadata": {"team": "blue"}}}"#);

const TYPE: Call = Call::with("WriteConsole", r#"{"data": "dHlwZWQ="}"#);

/// With a guest that is deaf: what follows the asking comes soon.
const SHUTDOWN_SOON: Call = Call::with("ShutdownVm", r#"{"timeout_seconds": 1}"#);

/// What happens of itself: the VMM is killed, and where the restart policy says so another is
/// started.
pub(crate) const VMM_DIES: Call = Call::new("(its VMM dies)");
/// What somebody else does: a VM is started where none ran.
pub(crate) const VMM_COMES: Call = Call::new("(a VMM comes)");

/// Where a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmCondition {
    /// There is no such VM.
    Nowhere,
    /// In this state.
    In(&'static str),
}

pub(crate) const NO_VM: VmCondition = VmCondition::Nowhere;
pub(crate) const CREATED: VmCondition = VmCondition::In("VM_STATE_CREATED");
pub(crate) const RUNNING: VmCondition = VmCondition::In("VM_STATE_RUNNING");
pub(crate) const PAUSED: VmCondition = VmCondition::In("VM_STATE_PAUSED");
pub(crate) const SHUT_DOWN: VmCondition = VmCondition::In("VM_STATE_SHUTDOWN");

const PLACED: &[Backend] = &Backend::PLACED;
/// Those that the daemon starts.
const MANAGED: &[Backend] = &[Backend::Qemu, Backend::CloudHypervisor, Backend::Firecracker];
/// The columns whose consoles take input.
const WITH_INPUT: &[Backend] =
    &[Backend::Qemu, Backend::CloudHypervisor, Backend::Firecracker, Backend::Libvirt];
const EVERYWHERE: &[Backend] = &[
    Backend::Qemu,
    Backend::CloudHypervisor,
    Backend::Firecracker,
    Backend::AttachedCloudHypervisor,
    Backend::AttachedFirecracker,
    Backend::AttachedQemu,
    Backend::Libvirt,
];
/// A running QEMU is imported, not created.
const WHERE_CREATED: &[Backend] = &[
    Backend::Qemu,
    Backend::CloudHypervisor,
    Backend::Firecracker,
    Backend::AttachedCloudHypervisor,
    Backend::AttachedFirecracker,
    Backend::Libvirt,
];
/// A Firecracker runs its guest once, and another may not be started.
const WHERE_REBOOTED: &[Backend] = &[
    Backend::Qemu,
    Backend::CloudHypervisor,
    Backend::Firecracker,
    Backend::AttachedCloudHypervisor,
    Backend::AttachedQemu,
    Backend::Libvirt,
];
/// Where a tiny guest can be asked to end.
const WHERE_OBEYED: &[Backend] = &[Backend::AttachedFirecracker, Backend::AttachedQemu, Backend::Libvirt];

/// An operation and where it begins.
#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// How the fake's guest behaves.
    pub(crate) script: &'static str,
    /// What leads to where it begins; CreateVm comes first of itself.
    pub(crate) before: &'static [Call],
    pub(crate) call: Call,
    pub(crate) from: VmCondition,
    pub(crate) to: VmCondition,
    /// Where it is tried, beside the fake.
    on: &'static [Backend],
    /// Whether the fake is left out.
    not_on_the_fake: bool,
    /// Whether the guest of a real hypervisor is one that does as it is asked.
    obeyed: bool,
    /// Whether the VMM stands still when it is called.
    pub(crate) stands_still: bool,
    /// Whether a guest that resets itself is to stay down.
    pub(crate) no_resets: bool,
    /// The code of the refusal that is the right answer, of an operation that the hypervisor cannot
    /// do; empty for success.
    pub(crate) refusal: &'static str,
    /// The only point to be tried; empty for all.
    pub(crate) only: &'static str,
    /// Whether a spare VMM waits for the VM under test.
    pub(crate) with_spare: bool,
    /// Whether the next daemon dies there too, if it comes there while it carries on.
    pub(crate) twice: bool,
}

impl Scenario {
    const fn new(
        name: &'static str,
        before: &'static [Call],
        call: Call,
        from: VmCondition,
        to: VmCondition,
    ) -> Self {
        Self {
            name,
            script: "",
            before,
            call,
            from,
            to,
            on: &[],
            not_on_the_fake: false,
            obeyed: false,
            stands_still: false,
            no_resets: false,
            refusal: "",
            only: "",
            with_spare: false,
            twice: false,
        }
    }

    const fn on(mut self, hypervisors: &'static [Backend]) -> Self {
        self.on = hypervisors;
        self
    }

    /// The same where the fake has nothing of the kind.
    const fn only_on(mut self, hypervisors: &'static [Backend]) -> Self {
        self.not_on_the_fake = true;
        self.on(hypervisors)
    }

    const fn obeyed(mut self) -> Self {
        self.obeyed = true;
        self
    }

    const fn standing_still(mut self) -> Self {
        self.stands_still = true;
        self
    }

    const fn without_resets(mut self) -> Self {
        self.no_resets = true;
        self
    }

    const fn refused(mut self, code: &'static str) -> Self {
        self.refusal = code;
        self
    }

    const fn scripted(mut self, script: &'static str) -> Self {
        self.script = script;
        self
    }

    const fn with_spare(mut self) -> Self {
        self.with_spare = true;
        self.only_on(MANAGED)
    }

    const fn twice(mut self) -> Self {
        self.twice = true;
        self
    }

    /// With a guest that has been asked, and ends only when the next daemon is there.
    const fn slow(mut self) -> Self {
        self.script = "fake.slow-off=3000";
        self.only = "ladder.asked";
        self
    }

    pub(crate) const ALL: &[Self] = &[
        Self::new("create", &[], CREATE, NO_VM, CREATED).on(WHERE_CREATED),
        Self::new("boot", &[], BOOT, CREATED, RUNNING).on(WHERE_CREATED),
        Self::new("boot after shutdown", &[BOOT, SHUTDOWN_BY_FORCE], BOOT, SHUT_DOWN, RUNNING)
            .on(&[Backend::AttachedFirecracker]),
        Self::new("pause", &[BOOT], PAUSE, RUNNING, PAUSED).on(PLACED),
        Self::new("resume", &[BOOT, PAUSE], RESUME, PAUSED, RUNNING).on(PLACED),
        Self::new("shutdown", &[BOOT], SHUTDOWN, RUNNING, SHUT_DOWN).on(WHERE_OBEYED).obeyed(),
        Self::new("shutdown of a paused one", &[BOOT, PAUSE], SHUTDOWN, PAUSED, SHUT_DOWN)
            .on(&[Backend::AttachedFirecracker, Backend::AttachedQemu])
            .obeyed(),
        Self::new("shutdown of a deaf one", &[BOOT], SHUTDOWN_SOON, RUNNING, SHUT_DOWN)
            .only_on(&[Backend::AttachedCloudHypervisor]),
        Self::new("shutdown of a paused deaf one", &[BOOT, PAUSE], SHUTDOWN_SOON, PAUSED, SHUT_DOWN)
            .only_on(&[Backend::AttachedCloudHypervisor, Backend::Libvirt]),
        Self::new("shutdown that nobody obeys", &[BOOT], SHUTDOWN_SOON, RUNNING, RUNNING)
            .only_on(&[Backend::AttachedFirecracker, Backend::AttachedQemu])
            .refused("deadline_exceeded"),
        Self::new("shutdown that takes its time", &[BOOT], SHUTDOWN, RUNNING, SHUT_DOWN).slow(),
        Self::new("shutdown by force", &[BOOT], SHUTDOWN_BY_FORCE, RUNNING, SHUT_DOWN).on(PLACED),
        Self::new("shutdown by signals", &[BOOT], SHUTDOWN_BY_FORCE, RUNNING, SHUT_DOWN)
            .scripted("fake.deaf fake.stubborn"),
        Self::new("shutdown of one that stands still", &[BOOT], SHUTDOWN_BY_FORCE, RUNNING, SHUT_DOWN)
            .only_on(PLACED)
            .standing_still(),
        Self::new("reboot", &[BOOT], REBOOT, RUNNING, RUNNING).on(WHERE_REBOOTED),
        Self::new("reboot that is refused", &[BOOT], REBOOT, RUNNING, RUNNING)
            .only_on(&[Backend::AttachedFirecracker])
            .refused("unavailable"),
        Self::new("reboot that takes its time", &[BOOT], REBOOT, RUNNING, RUNNING).slow(),
        Self::new("reboot by force", &[BOOT], REBOOT_BY_FORCE, RUNNING, RUNNING).on(WHERE_REBOOTED),
        Self::new("reboot by force despite its policy", &[BOOT], REBOOT_BY_FORCE, RUNNING, RUNNING)
            .on(&[Backend::Libvirt])
            .without_resets(),
        Self::new("reboot, twice", &[BOOT], REBOOT, RUNNING, RUNNING).twice(),
        Self::new("restart by policy", &[BOOT], VMM_DIES, RUNNING, RUNNING).twice(),
        Self::new("update", &[BOOT, SHUTDOWN_BY_FORCE], UPDATE_MACHINE, SHUT_DOWN, SHUT_DOWN).on(MANAGED),
        Self::new("update of the console", &[BOOT, SHUTDOWN_BY_FORCE], UPDATE_CONSOLE, SHUT_DOWN, SHUT_DOWN)
            .on(MANAGED),
        Self::new("console input", &[BOOT], TYPE, RUNNING, RUNNING).only_on(WITH_INPUT),
        Self::new("update of a running one", &[BOOT], UPDATE_LABELS, RUNNING, RUNNING).on(PLACED),
        Self::new("delete", &[], DELETE, CREATED, NO_VM).on(&[
            Backend::AttachedCloudHypervisor,
            Backend::AttachedFirecracker,
            Backend::Libvirt,
        ]),
        Self::new("delete after shutdown", &[BOOT, SHUTDOWN_BY_FORCE], DELETE, SHUT_DOWN, NO_VM)
            .on(EVERYWHERE),
        Self::new("delete by force", &[BOOT], DELETE_BY_FORCE, RUNNING, NO_VM).on(EVERYWHERE),
        Self::new("delete of a paused one by force", &[BOOT, PAUSE], DELETE_BY_FORCE, PAUSED, NO_VM)
            .on(&[Backend::AttachedCloudHypervisor]),
        Self::new("delete by force, twice", &[BOOT], DELETE_BY_FORCE, RUNNING, NO_VM).twice(),
        Self::new("create with a spare", &[], CREATE, NO_VM, CREATED).with_spare(),
        Self::new("boot with a spare", &[], BOOT, CREATED, RUNNING).with_spare(),
        Self::new("delete with a spare", &[], DELETE, CREATED, NO_VM).with_spare(),
        Self::new("import", &[], VMM_COMES, NO_VM, RUNNING).only_on(PLACED),
        Self::new("found again", &[BOOT, VMM_DIES], VMM_COMES, SHUT_DOWN, RUNNING).only_on(PLACED),
    ];

    /// A VM that runs and to which nothing is done, for what befalls its VMM.
    pub(crate) const AT_PEACE: &Self = &Self::new("(at peace)", &[BOOT], PAUSE, RUNNING, PAUSED);

    pub(crate) fn runs_on(&self, hypervisor: Backend) -> bool {
        self.on.contains(&hypervisor) || (hypervisor == Backend::Fake && !self.not_on_the_fake)
    }

    /// Whether the operation removes the VM's network interface.
    pub(crate) fn removes_its_interface(&self) -> bool {
        self.call.options == UPDATE_MACHINE.options
    }

    /// Returns true if the operation takes the VM's console away.
    pub(crate) fn removes_its_console(&self) -> bool {
        self.call.options == UPDATE_CONSOLE.options
    }

    /// Whether the guest does as it is asked.
    pub(crate) fn obeys(&self) -> bool {
        self.obeyed
    }

    /// Whether the VM under test is one that somebody else makes.
    pub(crate) fn is_import(&self) -> bool {
        self.call.method == VMM_COMES.method && self.from == NO_VM
    }

    /// Whether a VMM that somebody else started must live through it: without force none is ended,
    /// and Cloud Hypervisor can end its VM without ending itself. Where the guest obeys it takes
    /// its VMM along.
    pub(crate) fn spares_its_vmm(&self, hypervisor: Backend) -> bool {
        let by_itself = [VMM_DIES.method, VMM_COMES.method].contains(&self.call.method);
        let by_force = self.call.options.contains("force") && hypervisor != Backend::AttachedCloudHypervisor;
        hypervisor.by_hand().is_some() && !by_itself && !by_force && !self.obeyed && !self.stands_still
    }

    /// Whether the VM is started again whenever it ends by itself. What a client ends stays down
    /// all the same.
    pub(crate) fn to_be_restarted(&self, hypervisor: Backend) -> bool {
        // A VMM that somebody else started is started again by nobody.
        hypervisor.by_hand().is_none() && [SHUTDOWN.method, VMM_DIES.method].contains(&self.call.method)
    }

    /// Where the VM may be found after the daemon died at `point` and came back.
    ///
    /// Before anything was recorded nothing has happened, and what was carried out must stand. What
    /// lies between goes forward or back; of a deletion, a shutdown and a reboot, which once begun
    /// cannot be taken back, it goes forward.
    pub(crate) fn allowed(&self, point: &str) -> Vec<VmCondition> {
        if !self.refusal.is_empty() || self.call.method == VMM_COMES.method {
            // What runs is found at each start.
            return vec![self.to];
        }
        let step = point.rsplit_once('.').map_or(point, |(_, step)| step);
        let own = self.call.method != "RebootVm";
        let forward = ["DeleteVm", "ShutdownVm", "RebootVm"].contains(&self.call.method);
        match step {
            "checked" => vec![self.from],
            "reserved" if own => vec![self.from],
            "committed" | "shown" | "applied" | "outcome-committed" => vec![self.to],
            _ if forward => vec![self.to],
            _ => vec![self.from, self.to],
        }
    }
}
