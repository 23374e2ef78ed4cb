//! A world with a VM under test and another that stands by, and what is done to them.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::process::Signal;
use serde_json::{Value, json};

use vmm_host::fault::FaultPoint;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{Answer, World, eventually, is_alive, signal, try_call_keyed, vmm_pid};
use crate::hypervisor::{Backend, ip};
use crate::inspect;
use crate::scenario::{BOOT, Call, PAUSED, RUNNING, SHUT_DOWN, Scenario, VMM_COMES, VMM_DIES, VmCondition};
use crate::stage::{Hand, Stage, name_at};

/// How many spare VMMs the daemon keeps.
pub(crate) const SPARES: &str = "UNKEY_VMCP_SPARE_VMMS";
/// The idempotency key of the call that the daemon dies over.
const KEY: &str = "d1e5-0v3r";
/// The VM under test, where the daemon makes it.
const VM: &str = "vm";
/// A VM that runs all the time and has nothing to do with it.
pub(crate) const WITNESS: &str = "witness";

/// A world with a witness, and the VM under test where the operation begins.
pub(crate) struct Case {
    pub(crate) hypervisor: Backend,
    pub(crate) scenario: &'static Scenario,
    pub(crate) world: World,
    /// The VMM under test, where the test starts it by hand.
    pub(crate) hand: Option<Hand>,
    pub(crate) stage: Rc<Stage>,
    /// The name of the VM under test.
    pub(crate) vm: String,
    /// The name of the witness.
    pub(crate) witness_vm: String,
    guest: TinyGuest,
    /// Last, so that no VMM is left when they are removed.
    taps: Taps,
    pub(crate) witness: Value,
    /// What was acknowledged on the VM under test, by uid.
    pub(crate) acknowledged: Vec<(String, &'static str)>,
    log: PathBuf,
}

/// TAPs that a failed test may leave.
#[derive(Default)]
struct Taps(Vec<String>);

impl Drop for Taps {
    fn drop(&mut self) {
        for name in self.0.iter().filter(|name| Path::new("/sys/class/net").join(name).exists()) {
            ip(&["link", "delete", name]);
        }
    }
}

impl Case {
    pub(crate) fn prepare(stage: &Rc<Stage>, scenario: &'static Scenario, armed: Option<String>) -> Self {
        let mut world = stage.world();
        let log = world.dir.path().join("passed");
        world.set_env("FAULTS_PASSED", log.to_str());
        world.set_env("FAILPOINTS", armed.as_deref());
        if scenario.with_spare {
            world.set_env(SPARES, Some("1"));
        }
        let hypervisor = stage.hypervisor;
        let guest = hypervisor.guest(scenario);
        let hand = hypervisor.by_hand().map(|kind| Hand::new(kind, &world, guest));
        let mut case = Self {
            hypervisor,
            scenario,
            vm: VM.to_owned(),
            witness_vm: stage.witness().unwrap_or_else(|| WITNESS.to_owned()),
            world,
            hand,
            stage: Rc::clone(stage),
            guest,
            taps: Taps::default(),
            witness: Value::Null,
            acknowledged: Vec::new(),
            log,
        };
        case.begin();
        case
    }

    /// The same for what has no points: a VM that runs.
    pub(crate) fn running(stage: &Rc<Stage>) -> Self {
        Self::prepare(stage, Scenario::AT_PEACE, None)
    }

    /// Brings everything to where the operation begins.
    fn begin(&mut self) {
        if let Some(hand) = &self.hand {
            if self.is_imported() {
                self.vm = name_at(&hand.socket);
            }
            match (self.scenario.is_import(), self.is_imported()) {
                (true, _) => {}
                (false, true) => hand.come(),
                (false, false) => hand.wait(),
            }
        }
        self.world.start();
        self.find_witness();
        if self.scenario.from == VmCondition::Nowhere {
            return;
        }
        if self.is_imported() {
            self.find_imported();
            let uid = self.world.info(&self.vm)["uid"].as_str().unwrap().to_owned();
            self.acknowledged.push((uid, "imported"));
        } else {
            self.create(VM, self.scenario.script);
        }
        for call in self.scenario.before {
            // What is imported runs already.
            if !(call.method == BOOT.method && self.is_imported()) {
                self.call(*call).ok();
                self.acknowledge(call.method);
            }
            if call.method == BOOT.method && self.hypervisor.is_placed() {
                // A guest that is not up hears nothing, and what it has not said yet a reset may
                // lose.
                self.wait_for_banner(1);
            }
        }
    }

    /// The witness passes points too, as often with the daemon unharmed as with one that is to die.
    fn find_witness(&mut self) {
        if self.hypervisor.is_placed() {
            eventually("the witness is listed", || {
                self.world.call("GetVmInfo", &json!({"vm_id": self.witness_vm})).status == 200
            });
            self.world.wait_for_state(&self.witness_vm, "VM_STATE_RUNNING");
        } else {
            self.create(WITNESS, "");
            self.world.boot(WITNESS);
        }
        self.witness = self.world.info(&self.witness_vm);
        if self.scenario.with_spare {
            self.wait_for_spares(1);
        }
    }

    /// Waits until so many spare VMMs have been started.
    pub(crate) fn wait_for_spares(&self, count: usize) {
        let started =
            || self.passed().iter().filter(|point| **point == FaultPoint::SpareStarted.name()).count();
        eventually("a spare VMM waits", || started() >= count);
    }

    /// From here on no VMM waits: the daemon ends those that do when it stops.
    fn give_up_spares(&mut self) {
        self.world.stop(Signal::TERM);
        self.world.set_env(SPARES, None);
        self.world.start();
    }

    /// Waits until the VM that somebody else started is there.
    fn find_imported(&self) {
        eventually("the VM is listed", || {
            let answer = self.world.call("GetVmInfo", &json!({"vm_id": self.vm}));
            answer.body["state"] == "VM_STATE_RUNNING"
        });
    }

    /// Whether the VM under test is one that somebody else made.
    fn is_imported(&self) -> bool {
        self.hypervisor == Backend::AttachedQemu || (self.hand.is_some() && self.scenario.is_import())
    }

    /// Waits until the guest has said that it is up, so many times.
    pub(crate) fn wait_for_banner(&self, times: usize) {
        let banner = self.hypervisor.banner(self.guest);
        match &self.hand {
            Some(hand) if self.is_imported() => {
                eventually("the guest is up", || hand.serial().matches(&banner).count() >= times);
            }
            Some(_) | None => drop(self.world.wait_for_console(&self.vm, &banner, times)),
        }
    }

    /// The VM can be used, and when it is deleted nothing of it is left, its name included.
    pub(crate) fn end(mut self) {
        if self.scenario.with_spare {
            self.give_up_spares();
        }
        if self.place_is_empty() {
            match &self.hand {
                Some(hand) if self.is_imported() => {
                    hand.come();
                    self.find_imported();
                }
                Some(_) | None => self.create(VM, self.scenario.script),
            }
        }
        self.use_it();
        self.delete(&self.vm);
        if !self.hypervisor.is_placed() {
            self.delete(WITNESS);
        }
        inspect::nothing_left(&self);
        eventually("no TAP is left", || self.tap_numbers().is_empty());
    }

    /// The VM does as it is told. It is booted again where that is cheap, or where nothing else
    /// would tell.
    fn use_it(&mut self) {
        let state = self.world.info(&self.vm)["state"].clone();
        if self.hypervisor.is_placed() && (state == "VM_STATE_RUNNING" || state == "VM_STATE_PAUSED") {
            for method in ["ResumeVm", "PauseVm"] {
                self.world.call(method, &json!({"vm_id": self.vm})).ok();
            }
            inspect::settled(self, &[PAUSED]);
            return;
        }
        if self.hypervisor == Backend::Libvirt && self.scenario.to == VmCondition::Nowhere {
            return;
        }
        if state != "VM_STATE_CREATED" {
            self.world.call("ShutdownVm", &json!({"vm_id": self.vm, "force": true})).ok();
        }
        match &self.hand {
            // It is not booted, but started by whoever started it before.
            Some(hand) if self.hypervisor == Backend::AttachedQemu => hand.come(),
            Some(_) | None => drop(self.call(BOOT).ok()),
        }
        inspect::settled(self, &[RUNNING]);
    }

    fn place_is_empty(&self) -> bool {
        self.world.call("GetVmInfo", &json!({"vm_id": self.vm})).status == 404
    }

    /// The TAPs that there are, and the kernel's numbers for them.
    pub(crate) fn tap_numbers(&self) -> Vec<(String, String)> {
        let number = |name: &String| {
            let number =
                std::fs::read_to_string(Path::new("/sys/class/net").join(name).join("ifindex")).ok()?;
            Some((name.clone(), number))
        };
        self.taps.0.iter().filter_map(number).collect()
    }

    pub(crate) fn witness_goes_on(&self) {
        let now = self.world.info(&self.witness_vm);
        assert_eq!(now["state"], "VM_STATE_RUNNING", "{now:#}");
        assert_eq!((&now["uid"], vmm_pid(&now)), (&self.witness["uid"], vmm_pid(&self.witness)), "{now:#}");
        assert!(is_alive(vmm_pid(&now)), "{now:#}");
    }

    /// Creates a VM.
    pub(crate) fn create(&mut self, vm_id: &str, script: &str) {
        let config = self.config(vm_id, script);
        self.create_as(vm_id, &config);
    }

    fn config(&self, vm_id: &str, script: &str) -> Value {
        let guest = if vm_id == VM { self.guest } else { TinyGuest::Idle };
        let mut config = self.hypervisor.config(&self.world, vm_id, guest, script);
        if vm_id == VM && self.scenario.to_be_restarted(self.hypervisor) {
            config["restart_policy"] = json!({"mode": "RESTART_MODE_ALWAYS"});
        } else if vm_id == VM && self.scenario.no_resets {
            config["restart_policy"] = json!({"mode": "RESTART_MODE_NEVER"});
        }
        config
    }

    /// Creates a VM with this configuration.
    pub(crate) fn create_as(&mut self, vm_id: &str, config: &Value) {
        let created = self.world.create(vm_id, config);
        self.note(&created, vm_id);
    }

    fn note(&mut self, created: &Value, vm_id: &str) {
        let uid = created["uid"].as_str().unwrap();
        self.taps.0.push(uid.parse::<vmm_core::id::VmUid>().unwrap().tap_name(0));
        if vm_id == VM {
            self.acknowledged.push((uid.to_owned(), "CreateVm"));
        }
    }

    /// Ends a VM and deletes everything of it. Not by force, under which a TAP has less time to go
    /// than a busy kernel needs.
    pub(crate) fn delete(&self, vm_id: &str) {
        if self.world.info(vm_id)["state"] != "VM_STATE_CREATED" {
            self.world.call("ShutdownVm", &json!({"vm_id": vm_id, "force": true})).ok();
        }
        let answer = self.world.call("DeleteVm", &json!({"vm_id": vm_id})).ok();
        assert!(answer["left_behind"].as_array().is_none_or(Vec::is_empty), "{answer}");
    }

    fn acknowledge(&mut self, method: &'static str) {
        if method == VMM_DIES.method {
            return;
        }
        if let Some((uid, _)) = self.acknowledged.last().cloned() {
            self.acknowledged.push((uid, method));
        }
    }

    fn body(&self, call: Call) -> Value {
        let mut body = call.body(&self.vm);
        if call.method == "CreateVm" {
            body["config"] = self.config(VM, self.scenario.script);
        }
        body
    }

    pub(crate) fn call(&mut self, call: Call) -> Answer {
        let pid = |case: &Self| case.world.info(&case.vm)["backend_info"]["pid"].clone();
        let died = (call.method == VMM_DIES.method).then(|| pid(self));
        if self.befalls(call) {
            if died.is_some() {
                eventually("its end is noticed", || died.as_ref() != Some(&pid(self)));
            }
            if died.is_some() && self.scenario.call.method != VMM_DIES.method {
                self.world.wait_for_state(&self.vm, "VM_STATE_SHUTDOWN");
                inspect::settled(self, &[SHUT_DOWN]);
            }
            return Answer { status: 200, body: Value::Null };
        }
        let answer = self.world.call(call.method, &self.body(call));
        if call.method == "CreateVm" && answer.status == 200 {
            let created = answer.body.clone();
            self.note(&created, VM);
        }
        answer
    }

    /// Calls a daemon that may die over it.
    pub(crate) fn try_call(&self, to: Call) -> Option<Answer> {
        if self.befalls(to) {
            return None;
        }
        try_call_keyed(self.world.url(), to.method, &self.body(to), KEY).ok().map(|(answer, _)| answer)
    }

    /// Calls with the key of the call that the daemon died over. Also says whether the answer is
    /// the one to that call.
    pub(crate) fn call_keyed(&mut self, call: Call) -> (Answer, bool) {
        self.befalls(call);
        let keyed = try_call_keyed(self.world.url(), call.method, &self.body(call), KEY);
        let (answer, replayed) = keyed.unwrap_or_else(|error| panic!("no answer: {error}"));
        if call.method == "CreateVm" && answer.status == 200 {
            self.note(&answer.body, VM);
        }
        (answer, replayed)
    }

    /// The generation of the VM under test, if it exists.
    pub(crate) fn generation(&self) -> Value {
        self.world.call("GetVmInfo", &json!({"vm_id": self.vm})).body["generation"].clone()
    }

    /// Has happen what no client calls for; says whether `call` is of that kind. Where a VMM has to
    /// wait for a call, it does then.
    fn befalls(&self, call: Call) -> bool {
        if call.method == VMM_DIES.method {
            signal(vmm_pid(&self.world.info(&self.vm)), Signal::KILL);
            return true;
        }
        if call.method == VMM_COMES.method {
            self.vmm_comes();
            return true;
        }
        if let Some(hand) = self.hand.as_ref().filter(|_| call.method == BOOT.method) {
            hand.wait();
        }
        false
    }

    /// Somebody else starts the VM.
    pub(crate) fn vmm_comes(&self) {
        if let Some(hand) = &self.hand {
            hand.come();
        } else if let Some(libvirtd) = &self.stage.libvirtd {
            if libvirtd.domains().contains(&self.vm) {
                libvirtd.virsh(&["start", &self.vm]);
            } else {
                libvirtd.run_foreign_domain(&self.vm, &self.guest.write_to(self.world.dir.path()).unwrap());
            }
        }
    }

    /// Has the VMM stand still, where that is part of the scenario.
    pub(crate) fn hold_still(&self) {
        if self.scenario.stands_still {
            signal(vmm_pid(&self.world.info(&self.vm)), Signal::STOP);
        }
    }

    /// The answer is the one that the scenario wants.
    #[track_caller]
    pub(crate) fn expect(&self, answer: Answer) {
        match self.scenario.refusal {
            "" => drop(answer.ok()),
            code => drop(answer.error(code)),
        }
    }

    /// The points passed so far, by every daemon of this world.
    pub(crate) fn passed(&self) -> Vec<String> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}
