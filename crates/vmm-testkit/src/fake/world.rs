//! The host as the fake hypervisor sees it: its machines, and the faults noted about them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use vmm_core::backend::{Exit, ExitCause, GuestState, LaunchRequest, VmmEvent};
use vmm_core::id::VmUid;
use vmm_core::spec::VmSpec;
use vmm_core::store::{ProcessIdentity, RunRecord};

use super::control::MachineControl;
use super::script::{ScriptedMethod, ScriptedResult, Scripts};

/// The first process id of a machine. It is above the highest pid of a kernel (2^22), so no call
/// can reach a real process.
const FIRST_PID: u32 = 5_000_000;
/// The number of events of one machine that may wait to be read.
const EVENTS: usize = 256;

/// The host as the fake hypervisor sees it. Clones share the world, which outlives its backends.
#[derive(Clone, Debug, Default)]
pub struct FakeWorld {
    inner: Arc<Mutex<FakeWorldState>>,
}

#[derive(Debug, Default)]
pub(super) struct FakeWorldState {
    pub(super) scripts: Scripts,
    /// The living machines by pid.
    pub(super) machines: BTreeMap<u32, FakeMachine>,
    /// The uids for which spare VMMs wait. Like machines, spares outlive a daemon that dies.
    pub(super) spares: BTreeSet<VmUid>,
    /// The uids of machines that were spare VMMs.
    pub(super) were_spares: BTreeSet<VmUid>,
    /// The exits of ended machines by pid.
    pub(super) ended: BTreeMap<u32, Exit>,
    pub(super) faults: Vec<String>,
    started: u32,
}

/// A process that holds a guest.
#[derive(Debug)]
pub(super) struct FakeMachine {
    pub(super) uid: VmUid,
    pub(super) vm_id: String,
    /// The specification that the machine was launched with.
    pub(super) spec: VmSpec,
    pub(super) run: RunRecord,
    pub(super) guest: GuestState,
    /// True if the machine does not answer. It can be killed all the same.
    pub(super) silent: bool,
    /// True if the machine cannot be proven to be the recorded one.
    pub(super) unprovable: bool,
    /// True if the machine outlives SIGKILL.
    pub(super) unkillable: bool,
    /// True if the guest ends when it is asked to.
    pub(super) obeys: bool,
    pub(super) resets: usize,
    pub(super) since: Instant,
    pub(super) samples: u64,
    /// The paths of the writable disks.
    pub(super) writes: Vec<PathBuf>,
    /// The input of the console so far.
    pub(super) typed: Vec<u8>,
    pub(super) events: mpsc::Sender<VmmEvent>,
    pub(super) gone: watch::Sender<bool>,
}

impl FakeWorld {
    /// Makes a world without machines.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the act of the next call of `method`. Acts queue up, first in, first out.
    pub fn next(&self, method: ScriptedMethod, act: ScriptedResult) {
        self.lock().scripts.push(method, act);
    }

    /// Sets the act of every call of `method` for which [`FakeWorld::next`] has none left.
    pub fn always(&self, method: ScriptedMethod, act: ScriptedResult) {
        self.lock().scripts.always(method, act);
    }

    /// Removes all acts, so that every method succeeds again.
    pub fn behave(&self) {
        self.lock().scripts.clear();
    }

    /// Returns the number of calls of `method`.
    pub fn calls(&self, method: ScriptedMethod) -> usize {
        self.lock().scripts.calls(method)
    }

    /// Returns the number of living machines.
    pub fn living(&self) -> usize {
        self.lock().machines.len()
    }

    /// Returns the uids of the VMs with living machines, oldest machine first.
    pub fn living_uids(&self) -> Vec<VmUid> {
        self.lock().machines.values().map(|machine| machine.uid).collect()
    }

    /// Returns the uids for which spare VMMs wait, oldest first.
    pub fn spares(&self) -> Vec<VmUid> {
        self.lock().spares.iter().copied().collect()
    }

    /// Returns true if a VM's machine was a spare VMM before.
    pub fn was_spare(&self, uid: VmUid) -> bool {
        self.lock().were_spares.contains(&uid)
    }

    /// Returns the living machine of the VM called `vm_id`. The youngest one if there are several.
    pub fn machine(&self, vm_id: &str) -> Option<MachineControl> {
        let inner = self.lock();
        let (pid, _) = inner.machines.iter().rev().find(|(_, machine)| machine.vm_id == vm_id)?;
        Some(MachineControl::new(self.clone(), *pid))
    }

    /// Ends every machine with an unknown cause, as a crash of the host does.
    pub fn host_dies(&self) {
        let mut inner = self.lock();
        let pids: Vec<u32> = inner.machines.keys().copied().collect();
        for pid in pids {
            inner.end(pid, Exit { cause: ExitCause::Unknown, message: String::new() });
        }
    }

    /// Returns the events that must never happen. Empty, unless the program under test has a fault.
    pub fn faults(&self) -> Vec<String> {
        self.lock().faults.clone()
    }

    /// Starts a machine for `request`.
    pub(super) fn start(&self, request: &LaunchRequest) -> (RunRecord, mpsc::Receiver<VmmEvent>) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let mut inner = self.lock();
        inner.started += 1;
        let pid = FIRST_PID + inner.started;
        let run = RunRecord {
            process: ProcessIdentity {
                pid,
                start_ticks: u64::from(inner.started),
                boot_id: vmm_host::process::boot_id().unwrap_or_default(),
                namespaces: None,
            },
            socket: request.dir.join("fake.sock"),
            version: "1.0".to_owned(),
            accelerator: "none".to_owned(),
            machine: String::new(),
            started_ms: 0,
            claims: Vec::new(),
            taps: Vec::new(),
        };
        // A VM whose socket is not there counts as one whose folder was removed.
        let _ = std::fs::write(&run.socket, "");
        let writes = request.spec.disks.iter().filter(|disk| !disk.read_only).map(|disk| disk.path.clone());
        let machine = FakeMachine {
            uid: request.uid,
            vm_id: request.vm_id.to_string(),
            spec: request.spec.clone(),
            run: run.clone(),
            guest: GuestState::Running,
            silent: false,
            unprovable: false,
            unkillable: false,
            obeys: true,
            resets: 0,
            since: Instant::now(),
            samples: 0,
            writes: writes.collect(),
            typed: Vec::new(),
            events,
            gone: watch::Sender::new(false),
        };
        // The faults are noted before the machine is added, because it is no rival of itself.
        inner.hold_against(&machine);
        // A start with the uid of a spare VMM uses the spare.
        if inner.spares.remove(&request.uid) {
            inner.were_spares.insert(request.uid);
        }
        inner.machines.insert(pid, machine);
        (run, receiver)
    }

    /// Returns a new reader of the events of machine `pid`. The old reader gets no more events.
    pub(super) fn listen(&self, pid: u32) -> mpsc::Receiver<VmmEvent> {
        let (events, receiver) = mpsc::channel(EVENTS);
        if let Some(machine) = self.lock().machines.get_mut(&pid) {
            machine.events = events;
        }
        receiver
    }

    /// Waits until machine `pid` has ended.
    pub(super) async fn gone(&self, pid: u32) {
        let gone = self.lock().machines.get(&pid).map(|machine| machine.gone.subscribe());
        if let Some(mut gone) = gone {
            // A dropped sender means that the machine is gone too.
            let _ = gone.wait_for(|gone| *gone).await;
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, FakeWorldState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FakeWorldState {
    /// Ends a machine and sends its last event. Returns false if the machine had ended before.
    pub(super) fn end(&mut self, pid: u32, exit: Exit) -> bool {
        let Some(machine) = self.machines.remove(&pid) else { return false };
        machine.gone.send_replace(true);
        // The send fails if no backend reads the events any more.
        let _ = machine.events.try_send(VmmEvent::Gone(exit.clone()));
        self.ended.insert(pid, exit);
        true
    }

    /// Notes the faults that the start of `new` would be: a second machine of its VM, or a second
    /// writer of a disk.
    fn hold_against(&mut self, new: &FakeMachine) {
        for (pid, other) in &self.machines {
            if other.uid == new.uid {
                self.faults.push(format!("VM {} was started while its machine {pid} lives", new.vm_id));
            }
            for disk in new.writes.iter().filter(|disk| other.writes.contains(disk)) {
                self.faults.push(format!(
                    "{} is written by {} and {}",
                    disk.display(),
                    other.vm_id,
                    new.vm_id
                ));
            }
        }
    }
}
