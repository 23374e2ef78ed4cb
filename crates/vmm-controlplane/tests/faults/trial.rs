//! One operation on one hypervisor, cut short at every point that it passes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Answer, PATIENCE, World, eventually, signal, skipped, try_call, vmm_pid};
use crate::hypervisor::{Backend, can_make_taps, ip};
use crate::inspect;
use crate::scenario::{CREATED, Call, Place, RUNNING, Scenario, VMM_DIES};

/// The VM under test.
pub(crate) const VM: &str = "vm";
/// A VM that runs all the time and has nothing to do with it.
pub(crate) const WITNESS: &str = "witness";

/// A point, and how often it is passed before it is passed for good.
#[derive(Clone, Debug)]
struct Target {
    point: String,
    before: usize,
}

/// Runs `scenario` at every point that it passes, and answers which those were.
pub(crate) fn run(test: &str, hypervisor: Backend, scenario: &'static Scenario) -> Vec<String> {
    if let Some(why) = hypervisor.missing() {
        skipped(test, why);
        return Vec::new();
    }
    if !can_make_taps() {
        skipped(&format!("{test} with a TAP"), "no TAP can be made here; it takes root, /dev/net/tun and ip");
    }
    let targets = survey(hypervisor, scenario);
    assert!(
        !targets.is_empty(),
        "no point is passed: was the daemon built without the feature fault-points?"
    );
    let wanted = |target: &&Target| scenario.only.is_empty() || target.point == scenario.only;
    for target in targets.iter().filter(wanted) {
        // Whatever fails is told with the point.
        let _at = At(target);
        Case::prepare(hypervisor, scenario, Some(target)).cut_short(target);
    }
    targets.into_iter().map(|target| target.point).collect()
}

struct At<'a>(&'a Target);

impl Drop for At<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("killed at {} (passed {} times before)", self.0.point, self.0.before);
        }
    }
}

/// The points that the operation passes, in their order.
fn survey(hypervisor: Backend, scenario: &'static Scenario) -> Vec<Target> {
    let mut case = Case::prepare(hypervisor, scenario, None);
    let mut seen = case.passed();
    let before = seen.len();
    case.call(scenario.call).ok();
    inspect::settled(&case, &[scenario.to]);
    let own = case.passed().split_off(before);
    case.end();
    let mut targets = Vec::new();
    for point in own {
        targets.push(Target {
            before: seen.iter().filter(|earlier| **earlier == point).count(),
            point: point.clone(),
        });
        seen.push(point);
    }
    targets
}

/// A world with a witness, and the VM under test where the operation begins.
pub(crate) struct Case {
    pub(crate) hypervisor: Backend,
    pub(crate) scenario: &'static Scenario,
    pub(crate) world: World,
    /// Last, so that no VMM is left when they are removed.
    taps: Taps,
    witness: Value,
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
    fn prepare(hypervisor: Backend, scenario: &'static Scenario, target: Option<&Target>) -> Self {
        let mut world = hypervisor.world();
        let log = world.dir.path().join("passed");
        world.set_env("FAULTS_PASSED", log.to_str());
        if let Some(Target { point, before }) = target {
            let times = if *before == 0 { String::new() } else { format!("{before}*off->") };
            world.set_env("FAILPOINTS", Some(&format!("{point}={times}return")));
        }
        world.start();
        let (taps, witness, acknowledged) = (Taps::default(), Value::Null, Vec::new());
        let mut case = Self { hypervisor, scenario, world, taps, witness, acknowledged, log };
        // The witness passes points too, as often with the daemon unharmed as with one that is to die.
        case.create(WITNESS, "");
        case.world.boot(WITNESS);
        if scenario.from != Place::Nowhere {
            case.create(VM, scenario.script);
            for call in scenario.before {
                case.call(*call).ok();
                case.acknowledge(call.method);
            }
        }
        case.witness = case.world.info(WITNESS);
        case
    }

    /// Dies at the point, comes back, and is inspected.
    fn cut_short(mut self, target: &Target) {
        let taps = self.tap_numbers();
        let answer = self.try_call(self.scenario.call);
        assert!(answer.is_none(), "the daemon answered before {}: {answer:?}", target.point);
        let (signal, log) = self.world.await_end();
        assert_eq!(signal, Some(Signal::KILL.as_raw()), "{}", log.join("\n"));
        let passed = self.passed().iter().filter(|passed| **passed == target.point).count();
        assert_eq!(passed, target.before + 1, "it died elsewhere");
        if self.scenario.twice {
            self.dies_again(target);
        }
        self.world.set_env("FAILPOINTS", None);
        self.world.start();

        let place = inspect::settled(&self, &self.scenario.allowed(&target.point));
        inspect::acknowledged(&self);
        if self.scenario.call.method == "RebootVm" {
            // It was begun, so it is carried through.
            self.world.wait_for_console(VM, &self.hypervisor.banner(), 2);
        }
        if place != Place::Nowhere && place != CREATED {
            let now = self.tap_numbers();
            assert!(
                taps.iter().all(|tap| now.contains(tap)),
                "a TAP with its addresses is lost: {taps:?}, {now:?}"
            );
        }
        self.witness_goes_on();
        inspect::ledger(&self);
        inspect::claims(&mut self, place);
        self.again();
        self.witness_goes_on();
        self.end();
    }

    /// The next daemon dies as well: where the first one did if it comes there, and wherever it is by then if it does not.
    fn dies_again(&mut self, target: &Target) {
        self.world.set_env("FAILPOINTS", Some(&format!("{}=return", target.point)));
        if self.world.try_start().is_err() {
            return;
        }
        let allowed = self.scenario.allowed(&target.point);
        let deadline = Instant::now() + PATIENCE;
        while let Err(doubt) = inspect::look_for(self, &allowed) {
            if self.world.has_ended() {
                self.world.await_end();
                return;
            }
            assert!(Instant::now() < deadline, "{doubt}");
            inspect::pause();
        }
        self.world.stop(Signal::KILL);
    }

    /// The client, who had no answer, calls once more.
    fn again(&mut self) {
        let scenario = self.scenario;
        let answer = self.call(scenario.call);
        let gone_already = scenario.to == Place::Nowhere && answer.body["code"] == "not_found";
        if !gone_already {
            answer.ok();
        }
        inspect::settled(self, &[scenario.to]);
        inspect::events(self);
    }

    /// The VM can be used, and when it is deleted nothing of it is left, its name included.
    fn end(mut self) {
        if self.scenario.to == Place::Nowhere {
            self.create(VM, self.scenario.script);
        }
        if self.world.info(VM)["state"] != "VM_STATE_CREATED" {
            self.world.call("ShutdownVm", &json!({"vm_id": VM, "force": true})).ok();
        }
        self.world.boot(VM);
        inspect::settled(&self, &[RUNNING]);
        for vm_id in [VM, WITNESS] {
            self.delete(vm_id);
        }
        self.world.assert_nothing_left();
        eventually("no TAP is left", || self.tap_numbers().is_empty());
    }

    /// The TAPs that there are, and the kernel's numbers for them.
    fn tap_numbers(&self) -> Vec<(String, String)> {
        let number = |name: &String| {
            let number =
                std::fs::read_to_string(Path::new("/sys/class/net").join(name).join("ifindex")).ok()?;
            Some((name.clone(), number))
        };
        self.taps.0.iter().filter_map(number).collect()
    }

    fn witness_goes_on(&self) {
        let now = self.world.info(WITNESS);
        assert_eq!(now["state"], "VM_STATE_RUNNING", "{now:#}");
        assert_eq!((&now["uid"], vmm_pid(&now)), (&self.witness["uid"], vmm_pid(&self.witness)), "{now:#}");
    }

    /// Creates a VM.
    pub(crate) fn create(&mut self, vm_id: &str, script: &str) {
        let config = self.config(vm_id, script);
        self.create_as(vm_id, &config);
    }

    fn config(&self, vm_id: &str, script: &str) -> Value {
        let mut config = self.hypervisor.config(&self.world, vm_id, script);
        if vm_id == VM && self.scenario.to_be_restarted() {
            config["restart_policy"] = json!({"mode": "RESTART_MODE_ALWAYS"});
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

    /// Ends a VM and deletes everything of it. Not by force, under which a TAP has less time to go than a busy kernel needs.
    pub(crate) fn delete(&self, vm_id: &str) {
        if self.world.info(vm_id)["state"] != "VM_STATE_CREATED" {
            self.world.call("ShutdownVm", &json!({"vm_id": vm_id, "force": true})).ok();
        }
        let answer = self.world.call("DeleteVm", &json!({"vm_id": vm_id})).ok();
        assert!(answer["left_behind"].as_array().is_none_or(Vec::is_empty), "{answer}");
    }

    fn acknowledge(&mut self, method: &'static str) {
        if let Some((uid, _)) = self.acknowledged.last().cloned() {
            self.acknowledged.push((uid, method));
        }
    }

    fn body(&self, call: Call) -> Value {
        let mut body = call.body(VM);
        if call.method == "CreateVm" {
            body["config"] = self.config(VM, self.scenario.script);
        }
        body
    }

    fn call(&mut self, call: Call) -> Answer {
        if call.method == VMM_DIES.method {
            self.kill_vmm();
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
    fn try_call(&self, to: Call) -> Option<Answer> {
        if to.method == VMM_DIES.method {
            self.kill_vmm();
            return None;
        }
        try_call(self.world.url(), to.method, &self.body(to)).ok()
    }

    fn kill_vmm(&self) {
        signal(vmm_pid(&self.world.info(VM)), Signal::KILL);
    }

    /// The points passed so far, by every daemon of this world.
    fn passed(&self) -> Vec<String> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}
