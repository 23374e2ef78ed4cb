//! The checker finds what it is there to find, and nothing else.

use super::super::history::{Change, Parts, Said};
use super::*;

/// A history on one VM, call by call.
#[derive(Default)]
struct Story(Vec<Call>);

impl Story {
    /// A call from `begin` to `end`.
    fn call(mut self, op: Op, begin: Micros, end: Micros, answer: Answer) -> Self {
        self.0.push(Call { client: 0, vm: 0, op, begin, end, settled: end, answer });
        self
    }

    /// A call whose answer was lost, and which may have an effect until `settled`.
    fn lost(mut self, op: Op, begin: Micros, settled: Micros) -> Self {
        self.0.push(Call { client: 1, vm: 0, op, begin, end: begin + 1, settled, answer: Answer::Lost });
        self
    }

    /// A VM that was created and booted by time 20.
    fn running() -> Self {
        Self::default().call(CREATE, 1, 10, said(State::Created, "a")).call(
            Op::Boot,
            11,
            20,
            state(State::Running),
        )
    }

    fn read(self, at: Micros, answer: Answer) -> Self {
        self.call(Op::Read, at, at + 1, answer)
    }

    #[track_caller]
    fn is_fine(&self) {
        assert_eq!(check(&self.0, false), []);
    }

    /// Fails unless exactly this call is a contradiction.
    #[track_caller]
    fn fails_at(&self, call: usize) {
        let found: Vec<usize> = check(&self.0, false).into_iter().map(|found| found.call).collect();
        assert_eq!(found, [call]);
    }
}

const CREATE: Op = Op::Create { config: 0 };
const DELETE: Op = Op::Delete { force: true };

fn state(state: State) -> Answer {
    Answer::Done(Said { state: Some(state), ..Said::default() })
}

fn said(state: State, uid: &str) -> Answer {
    Answer::Done(Said { state: Some(state), uid: Some(uid.to_owned()), ..Said::default() })
}

fn gone() -> Answer {
    Answer::Done(Said::default())
}

fn failed(code: &str) -> Answer {
    Answer::Failed { code: code.to_owned(), message: String::new() }
}

#[test]
fn a_plain_history_has_no_violation() {
    Story::running()
        .call(Op::Pause, 21, 30, state(State::Paused))
        .call(Op::Boot, 31, 32, Answer::Denied(State::Paused))
        .call(Op::Shutdown { force: false }, 33, 40, state(State::Shutdown))
        .call(Op::Delete { force: false }, 41, 50, gone())
        .read(51, Answer::Absent)
        .call(CREATE, 52, 53, said(State::Created, "b"))
        .is_fine();
}

#[test]
fn a_lost_acknowledged_creation_is_a_violation() {
    Story::default().call(CREATE, 1, 2, said(State::Created, "a")).read(3, Answer::Absent).fails_at(1);
}

#[test]
fn a_deletion_with_a_lost_answer_explains_an_absence_until_it_is_settled() {
    let story = || Story::default().call(CREATE, 1, 2, said(State::Created, "a")).lost(DELETE, 3, 100);
    story().read(10, said(State::Created, "a")).read(20, Answer::Absent).is_fine();
    story().read(10, Answer::Absent).read(20, said(State::Created, "a")).fails_at(3);
    story().read(110, said(State::Created, "a")).read(120, Answer::Absent).fails_at(3);
}

#[test]
fn a_deleted_vm_that_comes_back_is_a_violation() {
    Story::running().call(DELETE, 21, 30, gone()).read(31, said(State::Running, "a")).fails_at(3);
    // Even where a creation would explain that some VM is there.
    Story::running()
        .call(DELETE, 21, 30, gone())
        .call(CREATE, 31, 40, said(State::Created, "b"))
        .read(41, said(State::Created, "a"))
        .fails_at(4);
}

#[test]
fn a_lost_creation_may_have_succeeded() {
    Story::default().lost(CREATE, 1, 50).read(2, Answer::Absent).read(3, said(State::Created, "a")).is_fine();
    Story::default()
        .lost(CREATE, 1, 50)
        .read(3, said(State::Created, "a"))
        .call(CREATE, 4, 5, said(State::Created, "a"))
        .call(Op::Create { config: 1 }, 6, 7, Answer::Exists)
        .is_fine();
}

#[test]
fn an_unexplained_state_is_a_violation() {
    Story::running().read(30, state(State::Shutdown)).fails_at(2);
    Story::running().lost(Op::KillVmm, 25, 100).read(30, state(State::Shutdown)).is_fine();
    Story::running().lost(Op::Pause, 25, 100).read(30, state(State::Paused)).is_fine();
    Story::running().lost(Op::Pause, 25, 100).read(30, state(State::Shutdown)).fails_at(3);
}

#[test]
fn one_kill_explains_one_end_only() {
    Story::running()
        .lost(Op::KillVmm, 25, 1000)
        .read(30, state(State::Shutdown))
        .call(Op::Boot, 32, 40, state(State::Running))
        .read(50, state(State::Shutdown))
        .fails_at(5);
}

#[test]
fn an_undone_acknowledged_change_is_a_violation() {
    Story::running()
        .call(Op::Shutdown { force: true }, 21, 30, state(State::Shutdown))
        .read(40, state(State::Running))
        .fails_at(3);
}

#[test]
fn concurrent_calls_may_take_effect_in_either_order() {
    Story::running()
        .call(Op::Pause, 30, 40, state(State::Paused))
        .call(Op::Resume, 30, 41, state(State::Running))
        .read(50, state(State::Paused))
        .is_fine();
    Story::running()
        .call(DELETE, 30, 40, gone())
        .call(Op::Pause, 31, 41, Answer::Absent)
        .call(Op::Read, 30, 42, state(State::Running))
        .is_fine();
}

#[test]
fn a_read_of_an_older_state_is_a_violation() {
    Story::running()
        .call(Op::Pause, 30, 60, state(State::Paused))
        .read(40, state(State::Paused))
        .read(50, state(State::Running))
        .fails_at(4);
}

#[test]
fn a_refusal_must_fit_the_state() {
    Story::running().call(Op::Resume, 30, 31, Answer::Denied(State::Created)).fails_at(2);
    Story::running().call(Op::Create { config: 1 }, 30, 31, Answer::Exists).is_fine();
    Story::running().call(CREATE, 30, 31, Answer::Exists).fails_at(2);
    Story::default().call(Op::Boot, 30, 31, state(State::Running)).fails_at(0);
}

#[test]
fn a_pre_empted_call_may_or_may_not_have_had_its_effect() {
    for then in [State::Shutdown, State::Running] {
        Story::default()
            .call(CREATE, 1, 10, said(State::Created, "a"))
            .call(Op::Boot, 11, 30, failed("aborted"))
            .call(Op::Shutdown { force: true }, 12, 31, state(State::Shutdown))
            .call(Op::Boot, 32, 40, state(State::Running))
            .call(Op::Shutdown { force: true }, 41, 45, state(State::Shutdown))
            .lost(Op::Boot, 50, 60)
            .read(70, state(then))
            .is_fine();
    }
}

#[test]
fn one_fault_does_not_hide_the_next() {
    let story = Story::running()
        .read(30, Answer::Absent)
        .read(40, Answer::Absent)
        .call(CREATE, 50, 51, said(State::Created, "b"))
        .read(60, state(State::Paused));
    let found: Vec<usize> = check(&story.0, false).into_iter().map(|found| found.call).collect();
    assert_eq!(found, [2, 5]);
}

#[test]
fn many_lost_calls_are_checked_in_bounded_steps() {
    let mut story = Story::running();
    for at in 0..40 {
        let op = [Op::Pause, Op::Resume, Op::Boot, Op::Reboot { force: true }][at as usize % 4];
        story = story.lost(op, 100 + at, 10_000);
    }
    story
        .read(300, state(State::Paused))
        .read(310, state(State::Running))
        .read(320, state(State::Shutdown))
        .read(330, Answer::Absent)
        .fails_at(45);
}

/// A read of a running VM that shows these parts.
fn shows(parts: Parts) -> Answer {
    let parts = SeenParts {
        label: Some(parts.label),
        memory: Some(parts.memory),
        policy: Some(parts.policy),
        protected: Some(parts.protected),
    };
    Answer::Done(Said { state: Some(State::Running), parts, ..Said::default() })
}

const fn update(change: Change) -> Op {
    Op::Update { change, guard: None }
}

#[test]
fn an_acknowledged_update_stays() {
    let labelled = Parts { label: 2, ..Parts::default() };
    let story = || Story::running().call(update(Change::Label(2)), 30, 40, state(State::Running));
    story().read(50, shows(labelled)).call(Op::Pause, 51, 52, state(State::Paused)).is_fine();
    story().read(50, shows(Parts::default())).fails_at(3);
    Story::running().read(50, shows(labelled)).fails_at(2);
    Story::running().call(update(Change::Label(2)), 30, 40, state(State::Paused)).fails_at(2);
}

#[test]
fn an_update_with_a_lost_answer_happens_once_or_never() {
    let labelled = Parts { label: 2, ..Parts::default() };
    let story = || Story::running().lost(update(Change::Label(2)), 30, 100);
    story().read(50, shows(Parts::default())).read(60, shows(labelled)).is_fine();
    story().read(50, shows(labelled)).read(60, shows(Parts::default())).fails_at(4);
    story().read(110, shows(Parts::default())).read(120, shows(labelled)).fails_at(4);
}

#[test]
fn the_memory_changes_only_while_the_vm_does_not_run() {
    let memory = update(Change::Memory(1));
    Story::running().call(memory, 30, 40, Answer::Runs).is_fine();
    Story::running().call(memory, 30, 40, state(State::Running)).fails_at(2);
    let shut = || Story::running().call(Op::Shutdown { force: true }, 21, 29, state(State::Shutdown));
    shut().call(memory, 30, 40, Answer::Runs).fails_at(3);
    shut()
        .call(memory, 30, 40, state(State::Shutdown))
        .call(Op::Boot, 41, 50, state(State::Running))
        // It is no change then.
        .call(memory, 51, 60, state(State::Running))
        .read(61, shows(Parts { memory: 1, ..Parts::default() }))
        .is_fine();
}

#[test]
fn a_protected_vm_is_not_deleted() {
    let protect = |on| update(Change::Protection(on));
    let story = || Story::running().call(protect(true), 30, 40, state(State::Running));
    story().call(DELETE, 41, 50, Answer::Protected).read(51, state(State::Running)).is_fine();
    story().call(DELETE, 41, 50, gone()).fails_at(3);
    story().call(protect(false), 41, 50, state(State::Running)).call(DELETE, 51, 60, gone()).is_fine();
    story().lost(DELETE, 41, 100).read(60, Answer::Absent).fails_at(4);
    Story::running().call(DELETE, 41, 50, Answer::Protected).fails_at(2);
}

#[test]
fn a_console_takes_input_while_the_vm_runs() {
    Story::running()
        .call(Op::Type, 30, 31, gone())
        .call(Op::Pause, 32, 33, state(State::Paused))
        .call(Op::Type, 34, 35, gone())
        .call(Op::Console, 36, 37, gone())
        .is_fine();
    Story::running().call(Op::Type, 30, 31, Answer::Denied(State::Shutdown)).fails_at(2);
    let shut = || Story::running().call(Op::Shutdown { force: true }, 21, 29, state(State::Shutdown));
    shut().call(Op::Type, 30, 31, gone()).fails_at(3);
    shut()
        .call(Op::Type, 30, 31, Answer::Denied(State::Shutdown))
        .call(Op::Console, 32, 33, gone())
        .is_fine();
    Story::default().call(Op::Console, 30, 31, gone()).fails_at(0);
}

#[test]
fn a_policy_may_restart_a_vm_but_not_after_a_shutdown() {
    let restarting = Answer::Done(Said {
        state: Some(State::Shutdown),
        phase: Some("restarting".to_owned()),
        ..Said::default()
    });
    let killed = || Story::running().lost(Op::KillVmm, 25, 30).read(40, restarting.clone());
    assert_eq!(check(&killed().read(50, state(State::Running)).0, true), []);
    let shut = killed().call(Op::Shutdown { force: false }, 45, 46, state(State::Shutdown));
    assert_eq!(check(&shut.read(50, state(State::Running)).0, true).len(), 1);
}
