//! One operation on one hypervisor, cut short at every point that it passes.

use std::rc::Rc;
use std::time::Instant;

use rustix::process::Signal;

use crate::case::Case;
use crate::harness::{WAIT_TIMEOUT, skipped};
use crate::hypervisor::{Backend, can_make_taps};
use crate::inspect;
use crate::scenario::{CREATED, RUNNING, Scenario, VMM_COMES, VMM_DIES, VmCondition};
use crate::stage::{Hand, Stage};

/// A point, and how often it is passed before it is passed for good.
#[derive(Clone, Debug)]
struct Target {
    point: String,
    before: usize,
    /// Whether it is passed when the client has been answered already.
    after_answer: bool,
}

impl Target {
    /// How the daemon is told to die there.
    fn armed(&self) -> String {
        let times = if self.before == 0 { String::new() } else { format!("{}*off->", self.before) };
        format!("{}={times}return", self.point)
    }
}

/// Runs `scenario` at every point that it passes, and answers which those were.
pub(crate) fn run(test: &str, hypervisor: Backend, scenario: &'static Scenario) -> Vec<String> {
    let stage = match Stage::set(hypervisor) {
        Ok(stage) => stage,
        Err(why) => {
            skipped(test, &why);
            return Vec::new();
        }
    };
    if !can_make_taps() {
        skipped(&format!("{test} with a TAP"), "no TAP can be made here; it takes root, /dev/net/tun and ip");
    }
    let targets = survey(&stage, scenario);
    assert!(
        !targets.is_empty(),
        "no point is passed: was the daemon built without the feature fault-points?"
    );
    let wanted = |target: &&Target| scenario.only.is_empty() || target.point == scenario.only;
    for target in targets.iter().filter(wanted) {
        // Whatever fails is told with the point.
        let _at = At(target);
        Case::prepare(&stage, scenario, Some(target.armed())).cut_short(target);
    }
    stage.leave();
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
fn survey(stage: &Rc<Stage>, scenario: &'static Scenario) -> Vec<Target> {
    let mut case = Case::prepare(stage, scenario, None);
    let mut seen = case.passed();
    let before = seen.len();
    case.hold_still();
    let answer = case.call(scenario.call);
    case.expect(answer);
    inspect::settled(&case, &[scenario.to]);
    if scenario.with_spare && scenario.to == RUNNING {
        // Another takes the place of the one that was used.
        case.wait_for_spares(2);
    }
    let own = case.passed().split_off(before);
    case.end();
    let mut targets = Vec::new();
    let outcome = own.iter().position(|point| scenario.with_spare && point.ends_with("outcome-committed"));
    for (index, point) in own.into_iter().enumerate() {
        targets.push(Target {
            before: seen.iter().filter(|earlier| **earlier == point).count(),
            point: point.clone(),
            after_answer: outcome.is_some_and(|outcome| index > outcome),
        });
        seen.push(point);
    }
    targets
}

impl Case {
    /// Dies at the point, comes back, and is inspected.
    fn cut_short(mut self, target: &Target) {
        let taps = self.tap_numbers();
        let by_hand = self.hand.as_ref().and_then(Hand::pid);
        self.hold_still();
        let answer = self.try_call(self.scenario.call);
        assert!(
            answer.is_none() || target.after_answer,
            "the daemon answered before {}: {answer:?}",
            target.point
        );
        let (signal, log) = self.world.await_end();
        assert_eq!(signal, Some(Signal::KILL.as_raw()), "{}", log.join("\n"));
        let passed = self.passed().iter().filter(|passed| **passed == target.point).count();
        assert_eq!(passed, target.before + 1, "it died elsewhere");
        if self.scenario.twice {
            self.dies_again(target);
        }
        self.world.set_env("FAILPOINTS", None);
        self.world.start();

        let condition = inspect::settled(&self, &self.allowed(target));
        inspect::acknowledged(&self);
        if self.scenario.call.method == "RebootVm" && self.scenario.refusal.is_empty() {
            // It was begun, so it is carried through.
            self.wait_for_banner(2);
        }
        if self.scenario.no_resets {
            inspect::resets_end_it(&self);
        }
        if condition != VmCondition::Nowhere && condition != CREATED {
            let now = self.tap_numbers();
            let lost = taps.iter().filter(|tap| !now.contains(tap)).count();
            // An update that is on record has removed the VM's own TAP, whoever came to do it.
            let removed = self.scenario.removes_its_interface() && target.point != "update.checked";
            let expected = if removed { taps.len().min(1) } else { 0 };
            assert_eq!(lost, expected, "TAPs before and after: {taps:?}, {now:?}");
        }
        inspect::console(&self, condition);
        self.witness_goes_on();
        inspect::ledger(&self);
        inspect::claims(&mut self, condition);
        self.again(condition);
        self.witness_goes_on();
        if self.scenario.spares_its_vmm(self.hypervisor) && by_hand.is_some() {
            let now = self.hand.as_ref().and_then(Hand::pid);
            assert_eq!(now, by_hand, "a VMM that somebody else started has been ended");
        }
        self.end();
    }

    /// Where the VM may be now.
    fn allowed(&self, target: &Target) -> Vec<VmCondition> {
        if target.after_answer { vec![self.scenario.to] } else { self.scenario.allowed(&target.point) }
    }

    /// The next daemon dies as well: where the first one did if it comes there, and wherever it is
    /// by then if it does not.
    fn dies_again(&mut self, target: &Target) {
        self.world.set_env("FAILPOINTS", Some(&format!("{}=return", target.point)));
        if self.world.try_start().is_err() {
            return;
        }
        let allowed = self.allowed(target);
        let deadline = Instant::now() + WAIT_TIMEOUT;
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

    /// The client, who had no answer, calls once more: with the key of the call that was cut short,
    /// and without a key.
    fn again(&mut self, condition: VmCondition) {
        let scenario = self.scenario;
        if scenario.call.method == VMM_COMES.method {
            // Nobody has called, and it is there.
            return;
        }
        if scenario.call.method != VMM_DIES.method {
            self.again_with_key(condition);
        }
        let answer = self.call(scenario.call);
        let gone_already = scenario.to == VmCondition::Nowhere && answer.body["code"] == "not_found";
        if !gone_already {
            self.expect(answer);
        }
        inspect::settled(self, &[scenario.to]);
        inspect::events(self);
    }

    /// If the operation has been carried out, the answer is that of the call that was cut short, and
    /// nothing happens.
    fn again_with_key(&mut self, condition: VmCondition) {
        let scenario = self.scenario;
        let moved = condition == scenario.to && scenario.from != scenario.to;
        let is_done = scenario.refusal.is_empty() && (moved || scenario.call.method == "RebootVm");
        let before = self.generation();
        let (answer, replayed) = self.call_keyed(scenario.call);
        if is_done {
            assert!(replayed, "it was carried out, and the answer is another one: {answer:?}");
            assert_eq!(self.generation(), before, "the answer was given before, and something was done");
        }
        if scenario.call.method == "WriteConsole" {
            // A part of the input may have been typed, so it is never typed again.
            assert!(replayed);
            drop(answer.error("aborted"));
        } else {
            self.expect(answer);
        }
        inspect::settled(self, &[scenario.to]);
    }
}
