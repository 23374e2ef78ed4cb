//! Is the event log the story of one VM, whole, and the one that clients were told?
//!
//! ```text
//!   created ─► (operation-started ─► one conclusion | what happened by itself)* ─► deleted        for each creation, in turn
//! ```
//!
//! Three questions: is each creation's story legal by itself (no end twice, none missing, nothing
//! after `deleted`), does it end where the VM is now, and do calls and events answer each other:
//! every event that a client caused has its call, and every answer was true at some moment of the
//! story.

use std::collections::{BTreeMap, HashSet};

use super::history::{Answer, Call, Event, Life, Micros, Op, SECOND, State};

/// An event bears the time at which its commit began; readers see it when that has ended.
const COMMIT: Micros = 10 * SECOND;
/// Events count milliseconds.
const MILLI: Micros = 1_000;

/// Where a VM is at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    pub(crate) uid: String,
    pub(crate) state: State,
    pub(crate) phase: String,
}

/// Everything about one name that the log is held against.
pub(crate) struct Case<'a> {
    /// The events of the name, in the order of the log.
    pub(crate) events: &'a [Event],
    /// The calls on it.
    pub(crate) calls: &'a [Call],
    /// The lives of the daemon.
    pub(crate) lives: &'a [Life],
    /// Where the VM is at the end.
    pub(crate) now: Option<Now>,
    /// The client behind an event's actor.
    pub(crate) client: &'a dyn Fn(&str) -> Option<usize>,
}

/// When a call whose answer was lost had its effect at the latest, as the log tells; `None` if it
/// never began, and so had none: nothing is touched before the log says so. That the log tells the
/// truth is what the rest of the judgement shows.
pub(crate) fn last_effect(
    call: &Call,
    events: &[Event],
    client: &dyn Fn(&str) -> Option<usize>,
) -> Option<Micros> {
    let begins = |event: &&Event| {
        let kind = match call.op {
            Op::Create { .. } => "created",
            // The one commit is the whole operation.
            Op::Update { .. } => "updated",
            _ => "operation-started",
        };
        event.kind == kind
            && event.cause == call.op.method()
            && client(&event.actor) == Some(call.client)
            && event.time + MILLI > call.begin
            && event.time <= call.end
    };
    let place = events.iter().position(|event| begins(&event))?;
    let first = &events[place];
    if first.kind != "operation-started" {
        return Some(first.time);
    }
    let mut same = events[place + 1..].iter().filter(|event| event.uid == first.uid);
    // Told again, taken up by the next daemon, or kept by it until the VMM answers: still under
    // way.
    let under_way = |event: &Event| {
        event.kind == "operation-started"
            || (event.kind == "unreachable" && event.cause == "daemon-started")
            || (event.kind == "adopted" && matches!(event.phase.as_str(), "stopping" | "rebooting"))
    };
    Some(same.find(|event| !under_way(event)).map_or(Micros::MAX, |end| end.time))
}

/// Judges the events of one name; each text is a violation.
pub(crate) fn check(case: &Case<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let mut tokens = HashSet::new();
    for event in case.events {
        if !tokens.insert(&event.token) {
            found.push(format!("two events have the token {}", event.token));
        }
    }
    stories(case, &mut found);
    for event in case.events {
        if let Err(problem) = has_a_call(event, case) {
            found.push(problem);
        }
    }
    let reported = Timeline::of(case.events);
    for call in case.calls {
        if let Err(problem) = is_told(call, case, &reported) {
            found.push(problem);
        }
    }
    found
}

/// One story a creation, one after the other.
fn stories(case: &Case<'_>, found: &mut Vec<String>) {
    let mut by_uid: BTreeMap<&str, Story> = BTreeMap::new();
    let mut last: Option<&str> = None;
    for event in case.events {
        let uid = event.uid.as_str();
        if last != Some(uid) {
            if by_uid.contains_key(uid) {
                found.push(format!("the stories of two creations of {} are mixed", event.vm_id));
            }
            if let Some(before) = last.and_then(|uid| by_uid.get(uid))
                && !before.deleted
            {
                found.push(format!("{uid} was created while another {} was there", event.vm_id));
            }
            last = Some(uid);
        }
        if let Err(problem) = by_uid.entry(uid).or_default().go_on(event, case.lives) {
            found
                .push(format!("event {} of {uid} ({}, {}): {problem}", event.token, event.kind, event.cause));
        }
    }
    let end = last.and_then(|uid| by_uid.get(uid).map(|story| (uid, story)));
    match (end, &case.now) {
        (None, None) => {}
        (None, Some(now)) => found.push(format!("{} is there, and no event tells of it", now.uid)),
        (Some((uid, story)), now) => found.extend(story.ends_at(uid, now.as_ref())),
    }
}

/// What the events of one creation have told so far.
#[derive(Default)]
struct Story {
    state: Option<State>,
    phase: String,
    deleted: bool,
    /// The operation under way.
    open: Option<String>,
    /// A new daemon has said that it goes on with it.
    taken_up: bool,
    /// The shutdown or reboot that stays on record, because the VMM does not answer a new daemon, or
    /// because its call failed. It comes about when the VMM answers or ends, unless force or another
    /// operation is faster.
    kept: Option<String>,
    last: Micros,
}

impl Story {
    fn go_on(&mut self, event: &Event, lives: &[Life]) -> Result<(), String> {
        if self.deleted {
            return Err("it comes after the VM was deleted".to_owned());
        }
        let Some(to) = event.state else { return Err("it tells no state".to_owned()) };
        if event.kind == "updated" {
            return self.is_updated(event, to);
        }
        let from = self.state.replace(to);
        let (open, kept) = (self.open.take(), self.kept.take());
        let since = std::mem::replace(&mut self.last, event.time);
        self.phase.clone_from(&event.phase);
        let Some(from) = from else {
            let first = event.kind == "created" && to == State::Created;
            return first
                .then_some(())
                .ok_or_else(|| "the story does not begin with its creation".to_owned());
        };
        let ends = from.is_live() && !to.is_live();
        let reboots = from.is_live() && to.is_live() && event.cause == "RebootVm";
        if !event.ended_by.is_empty() && !ends && !reboots {
            return Err(format!("ended by {}, and nothing ended", event.ended_by));
        }
        let died = || {
            lives
                .iter()
                .any(|life| life.killed.is_some_and(|at| at + COMMIT > since && at < event.time + SECOND))
        };
        let in_doubt = open.as_ref().or(kept.as_ref());
        let started =
            if event.kind == "operation-started" { open.as_deref() } else { in_doubt.map(String::as_str) };
        let step = Step { from, to, started, cause: &event.cause };
        let legal = match event.kind.as_str() {
            "operation-started" => {
                self.open = Some(event.cause.clone());
                // What goes on after a crash says so once more: a deletion at once, others when
                // they are taken up.
                let deletion = event.cause.starts_with("DeleteVm") && died();
                let taken_up = std::mem::take(&mut self.taken_up) && started == Some(event.cause.as_str());
                from == to && (started.is_none() || deletion || taken_up)
            }
            "state-changed" => step.is_legal_change(died),
            "operation-failed" => {
                // The VMM may still end because of that shutdown, and its end is the outcome of it.
                let ends = matches!(event.cause.as_str(), "ShutdownVm" | "DeleteVm with force");
                self.kept = (ends && to.is_live()).then(|| "ShutdownVm".to_owned());
                step.is_legal_failure()
            }
            "vmm-exited" => {
                from.is_live() && to == State::Shutdown && (event.cause != "vmm-gone-at-start" || died())
            }
            "adopted" => {
                self.taken_up = matches!(event.phase.as_str(), "stopping" | "rebooting");
                if self.taken_up {
                    self.open.clone_from(&open);
                }
                to.is_live() && died() && (from.is_live() || started == Some("BootVm"))
            }
            "unreachable" => {
                let may_be_kept = |method: &&String| matches!(method.as_str(), "ShutdownVm" | "RebootVm");
                if event.cause == "daemon-started" || open.is_none() {
                    self.kept = in_doubt.filter(may_be_kept).cloned();
                    // The death of the daemon still counts for the change that is yet to come.
                    self.last = if self.kept.is_some() { since } else { self.last };
                }
                from == to
            }
            "reachable" => {
                self.kept = in_doubt.cloned();
                from.is_live() && to.is_live()
            }
            "guest-reset" => from == State::Running && to == State::Running,
            "deleted" => {
                self.deleted = true;
                started.is_some_and(|method| method.starts_with("DeleteVm"))
            }
            _ => false,
        };
        let doing = started.unwrap_or("nothing");
        legal.then_some(()).ok_or_else(|| {
            format!("it does not follow from {} with {doing} under way to {}", from.name(), to.name())
        })
    }

    /// An update is one commit beside whatever is under way.
    fn is_updated(&mut self, event: &Event, to: State) -> Result<(), String> {
        self.phase.clone_from(&event.phase);
        (self.state == Some(to) && event.cause == "UpdateVm")
            .then_some(())
            .ok_or_else(|| format!("an update makes no {} of {:?}", to.name(), self.state))
    }

    /// Whether the story ends where the VM is.
    fn ends_at(&self, uid: &str, now: Option<&Now>) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(method) = self.open.as_ref().filter(|_| !self.deleted) {
            found.push(format!("the end of {method} of {uid} is missing"));
        }
        match (self.deleted, now) {
            (true, None) => {}
            (true, Some(now)) => found.push(format!("{uid} was deleted last, yet {} is there", now.uid)),
            (false, None) => found.push(format!("{uid} is gone, and no event tells of its end")),
            (false, Some(now)) => {
                if now.uid != uid || Some(now.state) != self.state || now.phase != self.phase {
                    found.push(format!(
                        "the log ends with {uid} {:?}/{}, but the VM is {} {:?}/{}",
                        self.state, self.phase, now.uid, now.state, now.phase
                    ));
                }
            }
        }
        found
    }
}

/// From one event to the next.
struct Step<'a> {
    from: State,
    to: State,
    /// The operation under way.
    started: Option<&'a str>,
    cause: &'a str,
}

impl Step<'_> {
    /// Whether it concludes the operation that it names.
    fn concludes(&self) -> bool {
        self.started == Some(self.cause)
    }

    fn is_legal_change(&self, died: impl Fn() -> bool) -> bool {
        use State::{Created, Paused, Running, Shutdown};
        let move_ = (self.from, self.to);
        match self.cause {
            "BootVm" => self.concludes() && matches!(move_, (Created | Shutdown, Running)),
            "RebootVm" => self.concludes() && move_ == (Running, Running),
            "PauseVm" => self.concludes() && move_ == (Running, Paused),
            "ResumeVm" => self.concludes() && move_ == (Paused, Running),
            // A restart that was due is called off without an operation's beginning.
            "ShutdownVm" if move_ == (Shutdown, Shutdown) => self.started.is_none(),
            "ShutdownVm" => self.concludes() && self.from.is_live() && self.to == Shutdown,
            // The VMM ended while a shutdown or a reboot was on record. The second half of the reboot
            // is still to come then.
            "vmm-gone-at-start" | "vmm-exited" if self.from.is_live() => {
                (died() || self.cause == "vmm-exited")
                    && matches!(self.started, Some("ShutdownVm" | "RebootVm"))
                    && self.to == Shutdown
            }
            // The process of an interrupted start is gone.
            "vmm-gone-at-start" | "vmm-exited" => {
                (died() || self.cause == "vmm-exited")
                    && self.started == Some("BootVm")
                    && self.from == self.to
            }
            "daemon-started" => died() && self.started == Some("BootVm") && self.from == self.to,
            "restart-policy" => self.started.is_none() && move_ == (Shutdown, Shutdown),
            "paused-from-outside" => move_ == (Running, Paused),
            "resumed-from-outside" => move_ == (Paused, Running),
            "reset-from-outside" => self.from.is_live() && self.from == self.to,
            _ => false,
        }
    }

    fn is_legal_failure(&self) -> bool {
        use State::{Created, Running, Shutdown};
        let fits = match (self.cause, self.from, self.to) {
            ("BootVm", Created, Shutdown) | ("RebootVm", Running, Shutdown) => true,
            ("PauseVm" | "ResumeVm" | "ShutdownVm" | "RebootVm", from, to) => {
                from == to || (from.is_live() && to.is_live())
            }
            (_, from, to) => from == to,
        };
        // A start that the host forbids begins nothing, and its refusal is told nevertheless.
        let refused =
            self.started.is_none() && self.from == self.to && matches!(self.cause, "BootVm" | "RebootVm");
        (self.concludes() || refused) && fits
    }
}

/// Whether a client that an event names had a call under way that can have caused it.
fn has_a_call(event: &Event, case: &Case<'_>) -> Result<(), String> {
    let Some(client) = (case.client)(&event.actor) else {
        let by_itself = event.actor == "system";
        return by_itself
            .then_some(())
            .ok_or_else(|| format!("event {} names {:?}, who is nobody", event.token, event.actor));
    };
    let fits = |call: &&Call| {
        // A deletion that a crash cut short goes on by force.
        let same = call.op.method() == event.cause
            || (matches!(call.op, Op::Delete { .. }) && event.cause.starts_with("DeleteVm"));
        call.client == client && same && call.begin < event.time + MILLI && event.time <= call.latest()
    };
    match case.calls.iter().find(fits) {
        Some(_) => Ok(()),
        None => Err(format!(
            "event {} ({}, {}) is said to be client {client}'s, who had no such call under way",
            event.token, event.kind, event.cause
        )),
    }
}

/// When the log says what of a name.
struct Timeline {
    /// From each moment on: the VM that was there, and its state.
    entries: Vec<(Micros, Option<(String, State)>)>,
}

impl Timeline {
    fn of(events: &[Event]) -> Self {
        let mut entries = vec![(0, None)];
        for event in events {
            let there = event.state.filter(|_| event.kind != "deleted");
            entries.push((event.time, there.map(|state| (event.uid.clone(), state))));
        }
        Self { entries }
    }

    /// Whether something held at some moment between `begin` and `end`, as far as a reader could
    /// see.
    fn ever(&self, begin: Micros, end: Micros, holds: impl Fn(Option<&(String, State)>) -> bool) -> bool {
        self.entries.iter().enumerate().any(|(place, (from, there))| {
            let until =
                self.entries.get(place + 1).map_or(Micros::MAX, |(next, _)| next.saturating_add(COMMIT));
            *from <= end && until >= begin && holds(there.as_ref())
        })
    }
}

/// Whether the log knows of what a client was told.
fn is_told(call: &Call, case: &Case<'_>, reported: &Timeline) -> Result<(), String> {
    let (begin, end) = (call.begin, call.end);
    let known = match (&call.answer, call.op) {
        (Answer::Absent, _) => reported.ever(begin, end, |there| there.is_none()),
        (Answer::Done(_), Op::Type) => {
            reported.ever(begin, end, |there| there.is_some_and(|(_, at)| at.is_live()))
        }
        (Answer::Done(_), Op::Console) => reported.ever(begin, end, |there| there.is_some()),
        (Answer::Runs, _) => reported.ever(begin, end, |there| there.is_some_and(|(_, at)| at.is_live())),
        (Answer::Denied(state), _) => {
            reported.ever(begin, end, |there| there.is_some_and(|(_, at)| at == state))
        }
        (Answer::Done(_), Op::Delete { .. }) => by_this_call(call, case, "deleted"),
        (Answer::Done(_), Op::Reboot { .. }) => by_this_call(call, case, "state-changed"),
        (Answer::Done(said), _) => reported.ever(begin, end, |there| {
            there.is_some_and(|(uid, at)| {
                said.state == Some(*at) && said.uid.as_ref().is_none_or(|said| said == uid)
            })
        }),
        (Answer::Exists | Answer::Stale(_) | Answer::Protected, _)
        | (Answer::Failed { .. } | Answer::Illegal(_) | Answer::Lost, _) => true,
    };
    known.then_some(()).ok_or_else(|| {
        format!(
            "client {} was told \"{}\" of {}, and the log knows of no such moment",
            call.client, call.answer, call.op
        )
    })
}

/// Whether an event of this kind tells of this call.
fn by_this_call(call: &Call, case: &Case<'_>, kind: &str) -> bool {
    case.events.iter().any(|event| {
        event.kind == kind
            && event.cause == call.op.method()
            && (case.client)(&event.actor) == Some(call.client)
            && event.time + MILLI > call.begin
            && event.time <= call.end
    })
}

#[cfg(test)]
#[path = "audit_tests.rs"]
mod tests;
