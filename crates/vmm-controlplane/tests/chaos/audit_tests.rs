//! The audit finds what it is there to find, and nothing else.

use super::super::history::Said;
use super::*;

/// A log and the calls around it, on one name.
struct Tale {
    events: Vec<Event>,
    calls: Vec<Call>,
    lives: Vec<Life>,
    now: Option<Now>,
}

impl Tale {
    fn new() -> Self {
        let life = Life { serving: Some(0), killed: None };
        Self { events: Vec::new(), calls: Vec::new(), lives: vec![life], now: None }
    }

    /// The next event, a hundred seconds after the one before, caused by client 1 where a method is the cause.
    fn event(mut self, kind: &str, cause: &str, state: State) -> Self {
        let place = self.events.len() as u64 + 1;
        let by_client = cause.contains("Vm");
        self.events.push(Event {
            token: place.to_string(),
            time: (1_000 + place * 100) * SECOND,
            vm_id: "vm".to_owned(),
            uid: "a".to_owned(),
            kind: kind.to_owned(),
            state: Some(state),
            phase: state.name().to_lowercase(),
            cause: cause.to_owned(),
            actor: if by_client { "client1" } else { "system" }.to_owned(),
            ..Event::default()
        });
        self
    }

    /// A call of client 1 around the last event.
    fn call(mut self, op: Op, state: Option<State>) -> Self {
        let end = self.events.last().map_or(0, |event| event.time) + SECOND;
        let answer = Answer::Done(Said { state, ..Said::default() });
        self.calls.push(Call { client: 1, vm: 0, op, begin: end - 150 * SECOND, end, settled: end, answer });
        self
    }

    /// The last call had no answer.
    fn lost(mut self) -> Self {
        self.calls.last_mut().unwrap().answer = Answer::Lost;
        self
    }

    /// The daemon is killed and comes back after the last event.
    fn crash(mut self) -> Self {
        let at = self.events.last().map_or(0, |event| event.time) + 10 * SECOND;
        self.lives.last_mut().unwrap().killed = Some(at);
        self.lives.push(Life { serving: Some(at + SECOND), killed: None });
        self
    }

    fn created() -> Self {
        Self::new()
            .event("created", "CreateVm", State::Created)
            .call(Op::Create { config: 0 }, Some(State::Created))
    }

    fn running() -> Self {
        Self::created()
            .event("operation-started", "BootVm", State::Created)
            .event("state-changed", "BootVm", State::Running)
            .call(Op::Boot, Some(State::Running))
    }

    /// Where the VM is at the end, in the phase that the last event told.
    fn now(mut self, state: State) -> Self {
        self.now = Some(Now { uid: "a".to_owned(), state, phase: state.name().to_lowercase() });
        self
    }

    fn found(&self) -> Vec<String> {
        let client = |actor: &str| actor.strip_prefix("client").and_then(|number| number.parse().ok());
        check(&Case {
            events: &self.events,
            calls: &self.calls,
            lives: &self.lives,
            now: self.now.clone(),
            client: &client,
        })
    }

    #[track_caller]
    fn is_fine(&self) {
        assert_eq!(self.found(), Vec::<String>::new());
    }

    /// Fails unless something was found, and all of it says `text`.
    #[track_caller]
    fn fails_with(&self, text: &str) {
        let found = self.found();
        assert!(!found.is_empty() && found.iter().all(|problem| problem.contains(text)), "{found:#?}");
    }
}

#[test]
fn a_plain_history_has_no_violation() {
    Tale::running()
        .event("operation-started", "ShutdownVm", State::Running)
        .event("state-changed", "ShutdownVm", State::Shutdown)
        .call(Op::Shutdown { force: false }, Some(State::Shutdown))
        .event("operation-started", "DeleteVm", State::Shutdown)
        .event("deleted", "DeleteVm", State::Shutdown)
        .call(Op::Delete { force: false }, None)
        .is_fine();
    Tale::new().is_fine();
}

#[test]
fn an_operation_refused_by_the_host_has_no_started_event() {
    let refused = |cause, before: Tale, state| before.event("operation-failed", cause, state);
    refused("BootVm", Tale::created(), State::Created)
        .call(Op::Boot, None)
        .lost()
        .now(State::Created)
        .is_fine();
    refused("RebootVm", Tale::running(), State::Running)
        .call(Op::Reboot { force: false }, None)
        .lost()
        .now(State::Running)
        .is_fine();
    // Every other operation begins before it fails, and a refusal moves nothing.
    refused("PauseVm", Tale::running(), State::Running)
        .call(Op::Pause, None)
        .lost()
        .now(State::Running)
        .fails_with("does not follow");
    refused("RebootVm", Tale::running(), State::Shutdown)
        .call(Op::Reboot { force: false }, None)
        .lost()
        .now(State::Shutdown)
        .fails_with("does not follow");
}

#[test]
fn an_interrupted_shutdown_may_complete_after_the_silence_of_its_vmm() {
    let cut_short = || {
        Tale::running()
            .event("operation-started", "ShutdownVm", State::Running)
            .call(Op::Shutdown { force: false }, None)
            .lost()
            .crash()
            .event("unreachable", "daemon-started", State::Running)
    };
    let came_about =
        |tale: Tale| tale.event("state-changed", "vmm-exited", State::Shutdown).now(State::Shutdown);
    came_about(cut_short()).is_fine();
    came_about(cut_short().event("unreachable", "lost", State::Running)).is_fine();
    cut_short().now(State::Running).is_fine();
    // Without a shutdown on record nothing ends by itself.
    let silent = Tale::running().crash().event("unreachable", "daemon-started", State::Running);
    came_about(silent).fails_with("with nothing under way to SHUTDOWN");
}

#[test]
fn a_vmm_may_end_after_its_shutdown_failed() {
    let failed = |cause: &str| {
        Tale::running()
            .event("operation-started", cause, State::Running)
            .event("operation-failed", cause, State::Running)
            .call(if cause == "PauseVm" { Op::Pause } else { Op::Shutdown { force: false } }, None)
            .lost()
    };
    let ends =
        |tale: Tale, cause: &str| tale.event("state-changed", cause, State::Shutdown).now(State::Shutdown);
    ends(failed("ShutdownVm"), "vmm-exited").is_fine();
    ends(failed("ShutdownVm").crash(), "vmm-gone-at-start").is_fine();
    // The daemon was not started anew.
    for cause in ["vmm-gone-at-start", "daemon-started"] {
        ends(failed("ShutdownVm"), cause).fails_with("does not follow");
    }
    ends(failed("PauseVm"), "vmm-exited").fails_with("does not follow");
}

#[test]
fn a_repeated_end_is_a_violation() {
    Tale::running()
        .event("vmm-exited", "vmm-exited", State::Shutdown)
        .event("vmm-exited", "vmm-exited", State::Shutdown)
        .now(State::Shutdown)
        .fails_with("does not follow from SHUTDOWN");
}

#[test]
fn a_missing_end_is_a_violation() {
    let begun = || Tale::running().event("operation-started", "PauseVm", State::Running);
    begun().call(Op::Pause, Some(State::Running)).now(State::Running).fails_with("is missing");
    Tale::running().fails_with("no event tells of its end");
    let again = begun().event("operation-started", "ResumeVm", State::Running).found();
    assert!(again.iter().any(|problem| problem.contains("with PauseVm under way")), "{again:#?}");
}

#[test]
fn a_log_whose_last_state_differs_from_the_vm_is_a_violation() {
    Tale::running().now(State::Running).is_fine();
    Tale::running().now(State::Paused).fails_with("the log ends with");
}

#[test]
fn an_event_after_a_deletion_is_a_violation() {
    Tale::created()
        .event("operation-started", "DeleteVm", State::Created)
        .event("deleted", "DeleteVm", State::Created)
        .call(Op::Delete { force: false }, None)
        .event("vmm-exited", "vmm-exited", State::Shutdown)
        .fails_with("after the VM was deleted");
}

#[test]
fn an_acknowledged_creation_without_an_event_is_a_violation() {
    let mut tale = Tale::created();
    tale.events.clear();
    tale.fails_with("knows of no such moment");
}

#[test]
fn an_acknowledged_deletion_without_an_event_is_a_violation() {
    Tale::running()
        .call(Op::Delete { force: true }, None)
        .now(State::Running)
        .fails_with("knows of no such moment");
}

#[test]
fn an_event_without_a_call_is_a_violation() {
    let mut tale = Tale::running().now(State::Running);
    tale.calls.pop();
    tale.fails_with("had no such call under way");
}

#[test]
fn a_daemon_started_event_needs_a_crash_before_it() {
    let interrupted = || {
        Tale::created()
            .event("operation-started", "BootVm", State::Created)
            .call(Op::Boot, Some(State::Created))
    };
    interrupted().crash().event("adopted", "daemon-started", State::Running).now(State::Running).is_fine();
    interrupted()
        .event("adopted", "daemon-started", State::Running)
        .now(State::Running)
        .fails_with("does not follow");
    interrupted()
        .crash()
        .event("state-changed", "vmm-gone-at-start", State::Created)
        .now(State::Created)
        .is_fine();
    Tale::created()
        .crash()
        .event("adopted", "daemon-started", State::Running)
        .now(State::Running)
        .fails_with("does not follow");
}

#[test]
fn a_resumed_operation_has_a_second_started_event() {
    let begun = || {
        let mut tale = Tale::running().event("operation-started", "ShutdownVm", State::Running);
        tale = tale.call(Op::Shutdown { force: false }, None).lost().crash();
        tale.event("adopted", "daemon-started", State::Running)
    };
    let again = |phase: &str| {
        let mut tale = begun();
        tale.events.last_mut().unwrap().phase = phase.to_owned();
        tale = tale
            .event("operation-started", "ShutdownVm", State::Running)
            .event("state-changed", "ShutdownVm", State::Shutdown)
            .now(State::Shutdown);
        let client = |actor: &str| actor.strip_prefix("client").and_then(|number| number.parse().ok());
        let settled = last_effect(tale.calls.last().unwrap(), &tale.events, &client).unwrap();
        tale.calls.last_mut().unwrap().settled = settled;
        (settled == tale.events.last().unwrap().time, tale)
    };
    let (at_its_end, tale) = again("stopping");
    assert!(at_its_end);
    tale.is_fine();
    assert!(!again("running").0, "what was not taken up ended with the crash");
}

#[test]
fn a_lost_call_without_an_event_had_no_effect() {
    let tale = Tale::created();
    let call = Call { answer: Answer::Lost, op: Op::Boot, ..tale.calls[0].clone() };
    assert_eq!(last_effect(&call, &tale.events, &|_| Some(1)), None);
    assert!(last_effect(&tale.calls[0], &tale.events, &|_| Some(1)).is_some());
}

#[test]
fn a_second_start_of_a_deletion_needs_a_crash() {
    let begun = || {
        Tale::created()
            .event("operation-started", "DeleteVm", State::Created)
            .call(Op::Delete { force: false }, None)
    };
    let ended = |tale: Tale| {
        let mut tale = tale.event("operation-started", "DeleteVm with force", State::Created).event(
            "deleted",
            "DeleteVm with force",
            State::Created,
        );
        let end = tale.events.last().unwrap().time + SECOND;
        let call = tale.calls.last_mut().unwrap();
        (call.answer, call.settled) = (Answer::Lost, end);
        tale
    };
    ended(begun().crash()).is_fine();
    ended(begun()).fails_with("does not follow");
}
