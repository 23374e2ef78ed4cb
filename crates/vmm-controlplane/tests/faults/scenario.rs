//! The operations, the states that they begin from, and where the VM may be once they were cut short.

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
const BOOT: Call = Call::new("BootVm");
const PAUSE: Call = Call::new("PauseVm");
const RESUME: Call = Call::new("ResumeVm");
const SHUTDOWN: Call = Call::new("ShutdownVm");
const SHUTDOWN_BY_FORCE: Call = Call::with("ShutdownVm", r#"{"force": true}"#);
const REBOOT: Call = Call::with("RebootVm", r#"{"timeout_seconds": 1}"#);
const REBOOT_BY_FORCE: Call = Call::with("RebootVm", r#"{"force": true}"#);
const DELETE: Call = Call::new("DeleteVm");
const DELETE_BY_FORCE: Call = Call::with("DeleteVm", r#"{"force": true}"#);

/// What happens of itself: the VMM is killed, and the restart policy starts another.
pub(crate) const VMM_DIES: Call = Call::new("(its VMM dies)");

/// Where a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// There is no such VM.
    Nowhere,
    /// In this state.
    In(&'static str),
}

pub(crate) const CREATED: Place = Place::In("VM_STATE_CREATED");
pub(crate) const RUNNING: Place = Place::In("VM_STATE_RUNNING");
pub(crate) const PAUSED: Place = Place::In("VM_STATE_PAUSED");
pub(crate) const SHUT_DOWN: Place = Place::In("VM_STATE_SHUTDOWN");

/// An operation and where it begins.
#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// How the fake's guest behaves.
    pub(crate) script: &'static str,
    /// What leads to where it begins; CreateVm comes first of itself.
    pub(crate) before: &'static [Call],
    pub(crate) call: Call,
    pub(crate) from: Place,
    pub(crate) to: Place,
    /// Where real hypervisors are tried too.
    real: bool,
    /// The only point to be tried; empty for all.
    pub(crate) only: &'static str,
    /// Whether the next daemon dies there too, if it comes there while it carries on.
    pub(crate) twice: bool,
}

impl Scenario {
    const fn new(name: &'static str, before: &'static [Call], call: Call, from: Place, to: Place) -> Self {
        Self { name, script: "", before, call, from, to, real: false, only: "", twice: false }
    }

    const fn on_real_ones(mut self) -> Self {
        self.real = true;
        self
    }

    const fn scripted(mut self, script: &'static str) -> Self {
        self.script = script;
        self
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
        Self::new("create", &[], CREATE, Place::Nowhere, CREATED).on_real_ones(),
        Self::new("boot", &[], BOOT, CREATED, RUNNING).on_real_ones(),
        Self::new("boot after shutdown", &[BOOT, SHUTDOWN_BY_FORCE], BOOT, SHUT_DOWN, RUNNING),
        Self::new("pause", &[BOOT], PAUSE, RUNNING, PAUSED),
        Self::new("resume", &[BOOT, PAUSE], RESUME, PAUSED, RUNNING),
        Self::new("shutdown", &[BOOT], SHUTDOWN, RUNNING, SHUT_DOWN),
        Self::new("shutdown of a paused one", &[BOOT, PAUSE], SHUTDOWN, PAUSED, SHUT_DOWN),
        Self::new("shutdown that takes its time", &[BOOT], SHUTDOWN, RUNNING, SHUT_DOWN).slow(),
        Self::new("shutdown by force", &[BOOT], SHUTDOWN_BY_FORCE, RUNNING, SHUT_DOWN),
        Self::new("shutdown by signals", &[BOOT], SHUTDOWN_BY_FORCE, RUNNING, SHUT_DOWN)
            .scripted("fake.deaf fake.stubborn"),
        Self::new("reboot", &[BOOT], REBOOT, RUNNING, RUNNING).on_real_ones(),
        Self::new("reboot that takes its time", &[BOOT], REBOOT, RUNNING, RUNNING).slow(),
        Self::new("reboot by force", &[BOOT], REBOOT_BY_FORCE, RUNNING, RUNNING).on_real_ones(),
        Self::new("reboot, twice", &[BOOT], REBOOT, RUNNING, RUNNING).twice(),
        Self::new("restart by policy", &[BOOT], VMM_DIES, RUNNING, RUNNING).twice(),
        Self::new("delete", &[], DELETE, CREATED, Place::Nowhere),
        Self::new("delete after shutdown", &[BOOT, SHUTDOWN_BY_FORCE], DELETE, SHUT_DOWN, Place::Nowhere)
            .on_real_ones(),
        Self::new("delete by force", &[BOOT], DELETE_BY_FORCE, RUNNING, Place::Nowhere).on_real_ones(),
        Self::new("delete of a paused one by force", &[BOOT, PAUSE], DELETE_BY_FORCE, PAUSED, Place::Nowhere),
        Self::new("delete by force, twice", &[BOOT], DELETE_BY_FORCE, RUNNING, Place::Nowhere).twice(),
    ];

    pub(crate) fn runs_on(&self, hypervisor: Backend) -> bool {
        self.real || hypervisor == Backend::Fake
    }

    /// Whether the VM is started again whenever it ends by itself. What a client ends stays down all the same.
    pub(crate) fn to_be_restarted(&self) -> bool {
        [SHUTDOWN.method, VMM_DIES.method].contains(&self.call.method)
    }

    /// Where the VM may be found after the daemon died at `point` and came back.
    ///
    /// Before anything was recorded nothing has happened, and what was carried out must stand. What lies between goes forward
    /// or back; of a deletion, a shutdown and a reboot, which once begun cannot be taken back, it goes forward.
    pub(crate) fn allowed(&self, point: &str) -> Vec<Place> {
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
