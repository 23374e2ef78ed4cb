//! A daemon with endpoints, and the VMMs behind them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmm_testkit::by_hand::{ByHandGuest as HandGuest, ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{Answer, World, skipped};

/// Those of `kinds` that can run here; of each other one the test says that it is skipped.
pub(crate) fn able(test: &str, kinds: &[ByHandProgram]) -> Vec<ByHandProgram> {
    let can = |kind: &ByHandProgram| match kind.missing() {
        None => true,
        Some(why) => {
            skipped(&format!("{test} on {}", kind.backend()), &why);
            false
        }
    };
    kinds.iter().copied().filter(can).collect()
}

/// The hypervisors whose VMMs can be told what to run.
pub(crate) const WAITING: [ByHandProgram; 2] = [ByHandProgram::CloudHypervisor, ByHandProgram::Firecracker];

/// A daemon attached to one socket of one hypervisor.
pub(crate) struct Bench {
    pub(crate) world: World,
    pub(crate) kind: ByHandProgram,
    pub(crate) socket: PathBuf,
}

impl Bench {
    /// Folders; the daemon is not started yet.
    pub(crate) fn new(kind: ByHandProgram) -> Self {
        let mut world = World::new(&[("UNKEY_VMCP_BACKEND", kind.backend())]);
        let socket = world.dir.path().join("vmm.sock");
        world.set_env(kind.variable(), Some(&format!("unix://{}", socket.display())));
        Self { world, kind, socket }
    }

    /// The guest of a VMM that is started by hand.
    pub(crate) fn guest(&self, guest: TinyGuest) -> HandGuest {
        HandGuest {
            kernel: guest.write_to(self.world.dir.path()).unwrap(),
            serial: self.world.dir.path().join("serial"),
            more: Vec::new(),
        }
    }

    /// Starts a VMM that runs `guest`.
    pub(crate) fn runs(&self, guest: TinyGuest) -> ByHandVmm {
        ByHandVmm::runs(self.kind, &self.socket, &self.guest(guest))
    }

    /// Starts one that waits.
    pub(crate) fn waits(&self) -> ByHandVmm {
        ByHandVmm::waits(self.kind, &self.socket)
    }

    /// What the serial port of a VMM started by hand has said.
    pub(crate) fn serial(&self) -> String {
        std::fs::read_to_string(self.world.dir.path().join("serial")).unwrap_or_default()
    }

    /// Every VM, as ListVms shows it.
    pub(crate) fn vms(&self) -> Vec<Value> {
        self.world.call("ListVms", &json!({})).ok()["vms"].as_array().cloned().unwrap_or_default()
    }

    /// The name of the one VM there is, once there is one.
    pub(crate) fn the_vm(&self) -> String {
        crate::harness::eventually("a VM is listed", || !self.vms().is_empty());
        let vms = self.vms();
        assert_eq!(vms.len(), 1, "{vms:#?}");
        vms[0]["vm_id"].as_str().unwrap().to_owned()
    }

    /// Calls a method about one VM.
    pub(crate) fn op(&self, method: &str, vm_id: &str) -> Answer {
        self.world.call(method, &json!({"vm_id": vm_id}))
    }

    pub(crate) fn shutdown(&self, vm_id: &str, seconds: i32) -> Answer {
        self.world.call("ShutdownVm", &json!({"vm_id": vm_id, "timeout_seconds": seconds}))
    }

    pub(crate) fn force(&self, method: &str, vm_id: &str) -> Answer {
        self.world.call(method, &json!({"vm_id": vm_id, "force": true}))
    }

    /// The backend as ListBackends shows it.
    pub(crate) fn backend(&self) -> Value {
        backend(&self.world, self.kind)
    }

    /// Waits until the backend can, or cannot, serve.
    pub(crate) fn until_available(&self, available: bool) -> Value {
        crate::harness::eventually("the backend's health is as wanted", || {
            (self.backend()["available"] == true) == available
        });
        self.backend()
    }
}

/// A backend as ListBackends shows it.
pub(crate) fn backend(world: &World, kind: ByHandProgram) -> Value {
    let all = world.call("ListBackends", &json!({})).ok();
    let backends = all["backends"].as_array().unwrap();
    backends.iter().find(|backend| backend["name"] == kind.backend()).unwrap().clone()
}

/// The socket's path as an endpoint.
pub(crate) fn endpoint(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}
