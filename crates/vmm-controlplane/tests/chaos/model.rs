//! What a VM may do: the contract's state machine, with the doubt that a lost answer leaves.
//!
//! ```text
//!   Absent ── create ──► Created ── boot ──► Running ◄── pause, resume ──► Paused
//!     ▲                     │    shutdown, kill │ ▲                           │
//!     └───── delete ────────┴──── Shutdown ◄────┴─┼───────────────────────────┘
//!                                 Restarting ─────┘ by its restart policy or after half a reboot, at any time
//! ```
//!
//! [`step`] answers every place in which a VM can be after an operation had this answer; none means that the answer cannot be
//! true. Written from the contract and not from the code under test.

use super::history::{Answer, Change, Op, Parts, Said, State};

/// A uid by its place in the list of those that were seen; `None` for a creation whose answer was lost.
pub(crate) type Uid = Option<u32>;

/// Where one name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// No VM bears the name.
    Absent,
    /// A VM does.
    Vm {
        /// Which creation.
        uid: Uid,
        /// The number of the configuration of its creation.
        config: u8,
        /// The parts of that configuration after UpdateVm.
        parts: Parts,
        at: At,
    },
}

/// The states of the wire, and the one behind SHUTDOWN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum At {
    Created,
    Running,
    Paused,
    Shutdown,
    /// SHUTDOWN, and its policy, or the second half of a reboot, will start it again.
    Restarting,
}

impl At {
    /// What clients see.
    pub(crate) const fn shown(self) -> State {
        match self {
            Self::Created => State::Created,
            Self::Running => State::Running,
            Self::Paused => State::Paused,
            Self::Shutdown | Self::Restarting => State::Shutdown,
        }
    }
}

impl Place {
    /// Every place that looks like `state` to clients.
    pub(crate) fn all_shown_as(state: State) -> impl Iterator<Item = Self> {
        let all = [At::Created, At::Running, At::Paused, At::Shutdown, At::Restarting];
        let shown = all.into_iter().filter(move |at| at.shown() == state);
        let parts = Parts::default();
        shown.flat_map(move |at| [0, 1].map(|config| Self::Vm { uid: None, config, parts, at }))
    }
}

/// What surrounds a call.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Surroundings {
    /// The VM has a restart policy that brings it back after a failure.
    pub(crate) restarts: bool,
    /// A forced operation may have pre-empted the call.
    pub(crate) forced: bool,
}

/// Where a VM may be after `op` was answered so. `uid` is that of the answer.
pub(crate) fn step(place: Place, op: Op, answer: &Answer, uid: Uid, around: Surroundings) -> Vec<Place> {
    match answer {
        Answer::Done(said) => done(place, op, said, uid).into_iter().collect(),
        Answer::Absent => match (place, op) {
            (_, Op::Create { .. }) | (Place::Vm { .. }, _) => Vec::new(),
            (Place::Absent, _) => vec![place],
        },
        Answer::Denied(state) => match place {
            Place::Vm { at, .. } if at.shown() == *state && denies(*state, op) => vec![place],
            Place::Absent | Place::Vm { .. } => Vec::new(),
        },
        Answer::Exists => match (place, op) {
            (Place::Vm { config, .. }, Op::Create { config: asked }) if config != asked => vec![place],
            (Place::Absent | Place::Vm { .. }, _) => Vec::new(),
        },
        Answer::Runs => match (place, op) {
            (Place::Vm { parts, at, .. }, Op::Update { change: change @ Change::Memory(_), .. })
                if at.shown().is_live() && parts.with(change) != parts =>
            {
                vec![place]
            }
            (Place::Absent | Place::Vm { .. }, _) => Vec::new(),
        },
        // Which generation a VM has is judged apart.
        Answer::Stale(_) if matches!((place, op), (Place::Vm { .. }, Op::Update { guard: Some(_), .. })) => {
            vec![place]
        }
        Answer::Stale(_) => Vec::new(),
        Answer::Protected => match (place, op) {
            (Place::Vm { parts, .. }, Op::Delete { .. }) if parts.protected => vec![place],
            (Place::Absent | Place::Vm { .. }, _) => Vec::new(),
        },
        // Somebody had to be there to fail.
        Answer::Failed { .. } if place == Place::Absent => Vec::new(),
        Answer::Failed { .. } => {
            let mut places = possible(place, op, around);
            // Its second half failed, or it was beaten to it.
            if let (Op::Reboot { .. } | Op::Boot, Place::Vm { at: At::Running, .. }) = (op, place) {
                places.push(moved(place, At::Shutdown));
            }
            places
        }
        Answer::Lost | Answer::Illegal(_) => possible(place, op, around),
    }
}

/// The same VM in another state.
fn moved(place: Place, to: At) -> Place {
    match place {
        Place::Absent => Place::Absent,
        Place::Vm { uid, config, parts, .. } => Place::Vm { uid, config, parts, at: to },
    }
}

/// The same VM after a change of its configuration, if its state admits the change.
fn updated(place: Place, change: Change) -> Option<Place> {
    let Place::Vm { uid, config, parts, at } = place else { return None };
    let changed = parts.with(change);
    let admitted = changed == parts || !at.shown().is_live() || !matches!(change, Change::Memory(_));
    admitted.then_some(Place::Vm { uid, config, parts: changed, at })
}

/// Whether the contract's table refuses.
const fn denies(state: State, op: Op) -> bool {
    match op {
        Op::Boot => matches!(state, State::Paused),
        Op::Shutdown { .. } => matches!(state, State::Created),
        Op::Pause | Op::Resume | Op::Type => matches!(state, State::Created | State::Shutdown),
        Op::Reboot { .. } => !matches!(state, State::Running),
        Op::Delete { force } => !force && state.is_live(),
        Op::Create { .. } | Op::Update { .. } | Op::Console | Op::Read | Op::KillVmm => false,
    }
}

/// The one place after a success, if it can have been one.
fn done(place: Place, op: Op, said: &Said, seen: Uid) -> Option<Place> {
    let Place::Vm { uid, config, parts, at } = place else {
        let Op::Create { config } = op else { return None };
        let new = Place::Vm { uid: seen, config, parts: Parts::default(), at: At::Created };
        return (said.state == Some(State::Created)).then_some(new);
    };
    // A uid, once known, stays until the VM is gone.
    let uid = match (uid, seen) {
        (Some(known), Some(seen)) if known != seen => return None,
        (Some(known), _) => Some(known),
        (None, seen) => seen,
    };
    let here = |at| Place::Vm { uid, config, parts, at };
    let is = |state: State| said.state == Some(state);
    match op {
        Op::Create { config: asked } => (asked == config && is(at.shown())).then(|| here(at)),
        Op::Read => {
            let fits = phase_fits(at, said.phase.as_deref()) && said.parts.fit(parts);
            (is(at.shown()) && fits).then(|| here(at))
        }
        Op::Update { change, .. } => updated(here(at), change).filter(|_| is(at.shown())),
        Op::Type => at.shown().is_live().then(|| here(at)),
        Op::Console => Some(here(at)),
        Op::Boot => (!matches!(at, At::Paused) && is(State::Running)).then(|| here(At::Running)),
        Op::Shutdown { .. } => {
            (!matches!(at, At::Created) && is(State::Shutdown)).then(|| here(At::Shutdown))
        }
        Op::Pause => (at.shown().is_live() && is(State::Paused)).then(|| here(At::Paused)),
        Op::Resume => (at.shown().is_live() && is(State::Running)).then(|| here(At::Running)),
        Op::Reboot { .. } => (matches!(at, At::Running) && is(State::Running)).then(|| here(At::Running)),
        Op::Delete { force } => {
            (!parts.protected && (force || !at.shown().is_live())).then_some(Place::Absent)
        }
        Op::KillVmm => None,
    }
}

/// Whether a status can stand beside a state: one that says "stopped" owes no restart.
fn phase_fits(at: At, phase: Option<&str>) -> bool {
    match (at, phase) {
        (At::Restarting, Some("stopped" | "failed")) => false,
        (At::Created | At::Running | At::Paused | At::Shutdown, Some("restarting")) => false,
        (_, _) => true,
    }
}

/// Every place after an operation of which nobody knows how far it came.
fn possible(place: Place, op: Op, around: Surroundings) -> Vec<Place> {
    let mut places = vec![place];
    let Place::Vm { parts, at, .. } = place else {
        if let Op::Create { config } = op {
            places.push(Place::Vm { uid: None, config, parts: Parts::default(), at: At::Created });
        }
        return places;
    };
    let failed = if around.restarts { At::Restarting } else { At::Shutdown };
    let to: &[At] = match (op, at) {
        // A start that was pre-empted has been one, however briefly.
        (Op::Boot, At::Created) if around.forced => &[At::Running, At::Shutdown],
        // A start that did not come about ends the wait for one.
        (Op::Boot, At::Restarting) => &[At::Running, At::Shutdown],
        (Op::Boot, At::Created | At::Shutdown) => &[At::Running],
        (Op::Pause, At::Running) => &[At::Paused],
        (Op::Resume, At::Paused) => &[At::Running],
        // Its second half is still to come, and may be called off.
        (Op::Reboot { .. }, At::Running) if around.forced => &[At::Restarting, At::Shutdown],
        (Op::Reboot { .. }, At::Running) => &[At::Restarting],
        // A guest that stands still is let go on before it is asked.
        (Op::Shutdown { force: false }, At::Paused) => &[At::Running, At::Shutdown],
        (Op::Shutdown { .. }, At::Running | At::Paused | At::Restarting) => &[At::Shutdown],
        (Op::KillVmm, At::Running | At::Paused) => &[failed],
        (Op::Update { change, .. }, _) => {
            places.extend(updated(place, change).filter(|after| *after != place));
            &[]
        }
        (Op::Delete { .. }, _) if parts.protected => &[],
        (Op::Delete { force: true }, _)
        | (Op::Delete { force: false }, At::Created | At::Shutdown | At::Restarting) => {
            places.push(Place::Absent);
            &[]
        }
        (_, _) => &[],
    };
    places.extend(to.iter().map(|at| moved(place, *at)));
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(at: At) -> Place {
        Place::Vm { uid: Some(7), config: 0, parts: Parts::default(), at }
    }

    fn said(state: State) -> Answer {
        Answer::Done(Said { state: Some(state), ..Said::default() })
    }

    #[test]
    fn the_models_refusals_follow_the_contract() {
        use State::{Created, Paused, Running, Shutdown};
        let table: [(Op, &[State]); 9] = [
            (Op::Boot, &[Paused]),
            (Op::Shutdown { force: true }, &[Created]),
            (Op::Pause, &[Created, Shutdown]),
            (Op::Resume, &[Created, Shutdown]),
            (Op::Reboot { force: false }, &[Created, Paused, Shutdown]),
            (Op::Delete { force: false }, &[Running, Paused]),
            (Op::Delete { force: true }, &[]),
            (Op::Type, &[Created, Shutdown]),
            (Op::Console, &[]),
        ];
        for (op, refusing) in table {
            for state in State::ALL {
                assert_eq!(denies(state, op), refusing.contains(&state), "{op} in {state:?}");
            }
        }
    }

    #[test]
    fn a_success_needs_a_legal_state() {
        let none = Surroundings::default();
        assert_eq!(step(vm(At::Paused), Op::Boot, &said(State::Running), None, none), []);
        assert_eq!(
            step(vm(At::Running), Op::Delete { force: false }, &Answer::Done(Said::default()), None, none),
            []
        );
        assert_eq!(step(Place::Absent, Op::Boot, &said(State::Running), None, none), []);
        assert_eq!(step(vm(At::Created), Op::Boot, &said(State::Running), None, none), [vm(At::Running)]);
        assert_eq!(
            step(vm(At::Created), Op::Boot, &said(State::Created), None, none),
            [],
            "it must say RUNNING"
        );
    }

    #[test]
    fn a_second_creation_makes_another_vm() {
        let read = said(State::Running);
        assert_eq!(step(vm(At::Running), Op::Read, &read, Some(8), Surroundings::default()), []);
        let unknown = Place::Vm { uid: None, config: 0, parts: Parts::default(), at: At::Running };
        assert_eq!(
            step(unknown, Op::Read, &read, Some(8), Surroundings::default()),
            [Place::Vm { uid: Some(8), config: 0, parts: Parts::default(), at: At::Running }]
        );
    }

    #[test]
    fn a_pending_restart_stays_pending() {
        let stopped = Answer::Done(Said {
            state: Some(State::Shutdown),
            phase: Some("stopped".to_owned()),
            ..Said::default()
        });
        let with_policy = Surroundings { restarts: true, forced: false };
        let killed = step(vm(At::Running), Op::KillVmm, &Answer::Lost, None, with_policy);
        assert_eq!(killed, [vm(At::Running), vm(At::Restarting)]);
        assert_eq!(step(vm(At::Restarting), Op::Read, &stopped, None, with_policy), []);
        let without = step(vm(At::Running), Op::KillVmm, &Answer::Lost, None, Surroundings::default());
        assert_eq!(without, [vm(At::Running), vm(At::Shutdown)]);
    }

    #[test]
    fn an_interrupted_boot_leaves_created_or_running() {
        let after = step(vm(At::Created), Op::Boot, &Answer::Lost, None, Surroundings::default());
        assert_eq!(after, [vm(At::Created), vm(At::Running)]);
        let forced = Surroundings { forced: true, restarts: false };
        assert!(step(vm(At::Created), Op::Boot, &Answer::Lost, None, forced).contains(&vm(At::Shutdown)));
    }
}
