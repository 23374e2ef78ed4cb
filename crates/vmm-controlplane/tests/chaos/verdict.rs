//! The judgement: history, events, host and ledger, held against each other VM by VM.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::Value;

use super::audit::{self, Case, Now};
use super::checker;
use super::consoles::{self, ConsoleRead};
use super::history::{Answer, Call, Event, GRACE, Life, Op, State, settled};
use super::host::Found;
use super::load::{Addresses, Notes};
use super::plan::Vm;
use super::report::{Figures, Report, Story};
use super::stall::{self, Stall, Stalls};

/// What GetVmInfo says at the end.
#[derive(Clone, Debug)]
pub(crate) struct Present {
    pub(crate) uid: String,
    pub(crate) state: State,
    pub(crate) phase: String,
    pub(crate) pid: Option<u32>,
}

/// Everything there is at the end of a run.
pub(crate) struct Evidence<'a> {
    pub(crate) vms: &'a [Vm],
    pub(crate) stalls: &'a Stalls,
    pub(crate) addresses: Addresses,
    pub(crate) lives: &'a [Life],
    /// By VM.
    pub(crate) now: Vec<Option<Present>>,
    /// By VM.
    pub(crate) events: Vec<Vec<Value>>,
    pub(crate) all_events: Vec<Value>,
    pub(crate) found: Found,
    /// The exit code of `reconcile --dry-run`, and what it listed.
    pub(crate) ledger: (Option<i32>, Value),
}

/// Judges a run.
pub(crate) fn reach(evidence: Evidence<'_>, notes: Vec<Notes>) -> (Report, Figures) {
    let not_sent = notes.iter().map(|notes| notes.not_sent).sum();
    let mut report = Report::default();
    let mut calls: Vec<Vec<Call>> = vec![Vec::new(); evidence.vms.len()];
    let mut reads: Vec<Vec<ConsoleRead>> = vec![Vec::new(); evidence.vms.len()];
    let mut typed: Vec<HashMap<String, usize>> = vec![HashMap::new(); evidence.vms.len()];
    for notes in notes {
        report.general.extend(notes.violations);
        for read in notes.consoles {
            reads[read.vm].push(read);
        }
        for (token, vm) in notes.typed {
            typed[vm].insert(token, vm);
        }
        for call in notes.calls {
            calls[call.vm].push(call);
        }
    }
    let kills = evidence.lives.iter().filter(|life| life.killed.is_some()).count();
    let mut figures = Figures::of(calls.iter().flatten(), kills, not_sent, evidence.all_events.len())
        .with_stalls(evidence.stalls.count());
    report.general.extend(of_the_log(&evidence));
    report.general.extend(of_the_host(&evidence));
    for (place, mut calls) in calls.into_iter().enumerate() {
        calls.sort_by_key(|call| (call.begin, call.end));
        let vm = &evidence.vms[place];
        let events: Vec<Event> = evidence.events[place].iter().map(event).collect();
        settle(&mut calls, &events, &evidence, &evidence.stalls.of(place));
        let mut violations = Vec::new();
        let effective = with_effect(&calls);
        for found in checker::check(&effective, vm.restarts) {
            violations.push((effective[found.call].end, found.text));
        }
        violations.extend(answers(&calls));
        violations.extend(generations(&calls, &events));
        let of_consoles = consoles::check(&reads[place], &typed[place]);
        figures.add_console(&of_consoles);
        violations.extend(of_consoles.violations.into_iter().map(|text| (0, text)));
        let now = evidence.now[place].as_ref();
        let case = Case {
            events: &events,
            calls: &calls,
            lives: evidence.lives,
            now: now.map(|now| Now { uid: now.uid.clone(), state: now.state, phase: now.phase.clone() }),
            client: &|actor| evidence.addresses.client_of(actor),
        };
        violations.extend(audit::check(&case).into_iter().map(|text| (0, text)));
        if let Some(now) = now {
            violations.extend(of_one_vm(vm, now, &evidence.found).into_iter().map(|text| (0, text)));
        }
        if !violations.is_empty() {
            report.stories.push(Story {
                vm: vm.clone(),
                violations,
                calls,
                events,
                lives: evidence.lives.to_vec(),
            });
        }
    }
    (report, figures)
}

/// Says of every call whose effect is not known until when it may have had one.
fn settle(calls: &mut [Call], events: &[Event], evidence: &Evidence<'_>, stalls: &[Stall]) {
    let client = |actor: &str| evidence.addresses.client_of(actor);
    let late = |begin, end| stall::answers_from(begin, end, GRACE, stalls);
    for call in calls.iter_mut().filter(|call| call.is_open()) {
        call.settled = match (&call.answer, call.op) {
            (_, Op::KillVmm | Op::Read | Op::Type | Op::Console) => settled(call.end, evidence.lives),
            (Answer::Lost, _) => match audit::last_effect(call, events, &client) {
                Some(at) => settled(late(call.begin, at.max(call.end)), evidence.lives),
                None => 0,
            },
            (_, _) => settled(late(call.begin, call.end), evidence.lives),
        };
    }
}

/// The calls that can have changed something or said something.
fn with_effect(calls: &[Call]) -> Vec<Call> {
    let mut effective: Vec<Call> =
        calls.iter().filter(|call| !call.is_open() || call.settled > 0).cloned().collect();
    // A guest that stands still is let go on before it is asked to end, which may be all that came about for a while.
    let resumed = effective.iter().filter(|call| call.is_open() && call.op == Op::Shutdown { force: false });
    let resumed: Vec<Call> = resumed.map(|call| Call { op: Op::Resume, ..call.clone() }).collect();
    effective.extend(resumed);
    effective
}

fn event(json: &Value) -> Event {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Event {
        token: text(&json["token"]),
        time: text(&json["time"]).parse::<u64>().unwrap_or_default() * 1000,
        vm_id: text(&json["vm_id"]),
        uid: text(&json["uid"]),
        kind: text(&json["type"]),
        state: State::from_wire(&text(&json["state"])),
        phase: text(&json["status"]["phase"]),
        reason: text(&json["status"]["reason"]),
        message: text(&json["status"]["message"]),
        cause: text(&json["cause"]),
        actor: text(&json["actor"]),
        ended_by: text(&json["ended_by"]),
    }
}

/// Answers that are wrong whatever the order.
fn answers(calls: &[Call]) -> Vec<(u64, String)> {
    let mut found = Vec::new();
    for call in calls {
        // A forced call pre-empts before the log knows of it, so that it counts until its end even where the daemon died first.
        let near = |wanted: &dyn Fn(&Call) -> bool| {
            let until = |other: &Call| other.latest().max(other.end);
            calls.iter().any(|other| wanted(other) && other.begin <= call.end && until(other) >= call.begin)
        };
        let problem = match &call.answer {
            Answer::Illegal(text) => Some(text.clone()),
            Answer::Done(said) if !said.left_behind.is_empty() => {
                Some(format!("left behind {}", said.left_behind))
            }
            Answer::Failed { code, message } if code == "aborted" => {
                (!near(&|other| other.op.is_forced())).then(|| format!("aborted by nobody: {message}"))
            }
            // The death of a VMM is the only reason in this run for which a hypervisor may fail.
            Answer::Failed { code, message } if code == "failed_precondition" => {
                let beaten = |other: &Call| other.op == Op::KillVmm || other.op.is_forced();
                (!near(&beaten)).then(|| format!("failed for no reason of this run: {message}"))
            }
            Answer::Failed { message, .. } if message.contains("could not be recorded") => {
                Some(message.clone())
            }
            _ => None,
        };
        found.extend(problem.map(|text| (call.end, format!("{} answered: {text}", call.op))));
    }
    found
}

/// A generation counts every change: no reader sees it go back, and an UpdateVm that names one succeeds only where nothing has
/// happened since it was read.
fn generations(calls: &[Call], events: &[Event]) -> Vec<(u64, String)> {
    const MILLI: u64 = 1_000;
    let mut found = Vec::new();
    let seen: Vec<(&Call, &str, u64)> = calls
        .iter()
        .filter_map(|call| match &call.answer {
            Answer::Done(said) => Some((call, said.uid.as_deref()?, said.generation?)),
            _ => None,
        })
        .collect();
    for (call, uid, generation) in &seen {
        let before = seen.iter().filter(|(other, of, _)| of == uid && other.end < call.begin);
        if let Some(before) = before.map(|(_, _, before)| *before).max().filter(|before| before > generation)
        {
            found.push((call.end, format!("generation {generation} of {uid} was seen after {before}")));
        }
    }
    for call in calls {
        let Op::Update { guard: Some(guard), .. } = call.op else { continue };
        let since = || events.iter().filter(|event| event.time > guard.read + MILLI);
        match &call.answer {
            Answer::Stale(present) if *present == guard.generation => {
                found.push((call.end, format!("{} was refused in that very generation", call.op)));
            }
            Answer::Done(_) => {
                let between = since().find(|event| event.time + MILLI < call.begin);
                // The count begins anew with a creation.
                let anew = since().any(|event| event.kind == "created" && event.time <= call.end);
                if let Some(event) = between.filter(|_| !anew) {
                    let text = format!("{} succeeded despite the event {}", call.op, event.token);
                    found.push((call.end, text));
                }
            }
            _ => {}
        }
    }
    found
}

/// The log of all VMs is the logs of each, in one order.
fn of_the_log(evidence: &Evidence<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let mut by_vm: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    let mut tokens = BTreeSet::new();
    for event in &evidence.all_events {
        if !tokens.insert(event["token"].as_str()) {
            found.push(format!("the log has the token {} twice", event["token"]));
        }
        by_vm.entry(event["vm_id"].as_str().unwrap_or_default()).or_default().push(event);
    }
    for (place, vm) in evidence.vms.iter().enumerate() {
        let here = by_vm.remove(vm.name.as_str()).unwrap_or_default();
        if here != evidence.events[place].iter().collect::<Vec<_>>() {
            found.push(format!("the events of {} are not those of the whole log", vm.name));
        }
    }
    found.extend(by_vm.keys().map(|vm_id| format!("the log tells of {vm_id}, which nobody created")));
    found
}

/// Nothing is on the host without a VM on record, and the ledger says so too.
fn of_the_host(evidence: &Evidence<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let known: BTreeSet<&str> = evidence.now.iter().flatten().map(|now| now.uid.as_str()).collect();
    let there = &evidence.found;
    let unknown = |uid: &str| !known.contains(uid);
    found.extend(
        there.vmms.iter().filter(|(uid, _)| unknown(uid)).map(|item| format!("processes of no VM: {item:?}")),
    );
    found.extend(
        there.taps.iter().filter(|(uid, _)| unknown(uid)).map(|item| format!("TAPs of no VM: {item:?}")),
    );
    found.extend(
        there
            .sockets
            .iter()
            .filter(|(uid, _)| unknown(uid))
            .map(|item| format!("sockets of no VM: {item:?}")),
    );
    found.extend(
        there.folders.iter().filter(|uid| unknown(uid)).map(|uid| format!("a run folder of no VM: {uid}")),
    );
    let (code, ledger) = &evidence.ledger;
    if *code != Some(0) {
        found.push(format!("`reconcile --dry-run` ended with {code:?}"));
    }
    for item in ledger["items"].as_array().into_iter().flatten() {
        if item["decision"] != "keep" || item["vm_id"].is_null() {
            found.push(format!("`reconcile --dry-run` found {item}"));
        }
    }
    found
}

/// A VM has what its state says, once.
fn of_one_vm(vm: &Vm, now: &Present, there: &Found) -> Vec<String> {
    let mut found = Vec::new();
    let vmms = there.vmms.get(&now.uid).cloned().unwrap_or_default();
    let expected: Vec<u32> = now.pid.into_iter().collect();
    if vmms != expected || now.state.is_live() == vmms.is_empty() {
        found.push(format!(
            "{} is {:?} with process {:?}, and these run: {vmms:?}",
            vm.name, now.state, now.pid
        ));
    }
    if !matches!(now.phase.as_str(), "created" | "running" | "paused" | "stopped" | "failed") {
        found.push(format!("{} does not come to rest: it is {}", vm.name, now.phase));
    }
    let taps = there.taps.get(&now.uid).map_or(0, Vec::len);
    let wanted = match (vm.nic, now.state) {
        (false, _) | (true, State::Created) => taps == 0,
        (true, State::Running | State::Paused) => taps == 1,
        // A VM keeps its TAPs through a shutdown.
        (true, State::Shutdown) => taps <= 1,
    };
    if !wanted {
        found.push(format!("{} is {:?} and has {taps} TAPs", vm.name, now.state));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::history::{Change, Guard, Said};
    use super::*;

    fn call(op: Op, begin: u64, end: u64, answer: Answer) -> Call {
        Call { client: 1, vm: 0, op, begin, end, settled: 0, answer }
    }

    #[test]
    fn a_generation_that_goes_back_is_a_violation() {
        let read = |begin, generation| {
            let said = Said { uid: Some("a".to_owned()), generation: Some(generation), ..Said::default() };
            call(Op::Read, begin, begin + 5, Answer::Done(said))
        };
        assert_eq!(generations(&[read(10, 3), read(20, 3), read(30, 4)], &[]), []);
        assert_eq!(generations(&[read(10, 4), read(12, 3)], &[]), [], "they overlap");
        assert_eq!(generations(&[read(10, 4), read(20, 3)], &[]).len(), 1);
    }

    #[test]
    fn an_update_of_a_generation_that_has_passed_is_a_violation() {
        let guard = Some(Guard { generation: 5, read: 10_000 });
        let op = Op::Update { change: Change::Label(1), guard };
        let event = |kind: &str, time| Event { kind: kind.to_owned(), time, ..Event::default() };
        let done = || [call(op, 30_000, 40_000, Answer::Done(Said::default()))];
        assert_eq!(generations(&done(), &[event("state-changed", 5_000), event("updated", 35_000)]), []);
        assert_eq!(generations(&done(), &[event("state-changed", 20_000)]).len(), 1);
        assert_eq!(generations(&done(), &[event("deleted", 20_000), event("created", 25_000)]), []);
        assert_eq!(generations(&[call(op, 30_000, 40_000, Answer::Stale(6))], &[]), []);
        assert_eq!(generations(&[call(op, 30_000, 40_000, Answer::Stale(5))], &[]).len(), 1);
    }

    #[test]
    fn a_forced_call_without_an_event_may_have_pre_empted_another() {
        let aborted = Answer::Failed { code: "aborted".to_owned(), message: "pre-empted".to_owned() };
        let shutdown = call(Op::Shutdown { force: false }, 10, 90, aborted);
        let forced = |begin| call(Op::Delete { force: true }, begin, 99, Answer::Lost);
        assert_eq!(answers(&[shutdown.clone(), forced(50)]), []);
        assert_eq!(answers(&[shutdown.clone(), forced(95)]).len(), 1, "it came later");
        assert_eq!(answers(&[shutdown]).len(), 1);
    }
}
