//! Is there an order of one VM's calls in which every answer is true?
//!
//! ```text
//!   time ─► begin a ─ begin b ─ end b ─────────── end a          each call takes effect at one moment between its
//!                 └─ worlds in which b has          │            begin and its end; one whose answer was lost takes
//!                    happened, a before it or not ◄─┘            effect before it is settled, or never
//! ```
//!
//! The search walks through the begins and ends in their order and keeps every world that is still possible: where the VM is, and
//! which of the calls under way have happened already. An end keeps the worlds in which that call can have happened with that
//! answer. No world left is a violation: an acknowledged change that vanished, a state that nothing explains, an answer that
//! cannot have been true. (Just-in-time linearisation, with lost calls as optional ones.)

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::history::{Answer, Call, Micros, Op, SeenParts, State};
use super::model::{At, Place, Surroundings, Uid, step};

/// An answer that no order of the calls explains.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Contradiction {
    /// The call, by its place in the history that was given.
    pub(crate) call: usize,
    /// What it said, and where the VM can have been.
    pub(crate) text: String,
}

/// One possible world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    place: Place,
    /// Which of the calls under way have happened, by their slots.
    happened: u128,
}

/// What happens to the search at one moment. Ordered so that what shares a moment counts as overlapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Begin,
    End,
    /// A call without an answer can have no effect any more.
    Settled,
}

/// Judges the calls on one VM, in any order. `restarts`: its policy starts it again after a failure.
pub(crate) fn check(calls: &[Call], restarts: bool) -> Vec<Contradiction> {
    let mut moments: Vec<(Micros, Moment, usize)> = Vec::new();
    for (index, call) in calls.iter().enumerate() {
        moments.push((call.begin, Moment::Begin, index));
        if call.is_open() {
            moments.push((call.latest(), Moment::Settled, index));
        } else {
            moments.push((call.end, Moment::End, index));
        }
    }
    moments.sort_unstable();
    let mut search = Search::new(calls, restarts);
    for (_, moment, index) in moments {
        match moment {
            Moment::Begin => search.begin(index),
            Moment::End => search.end(index),
            Moment::Settled => search.settle(index),
        }
    }
    search.found
}

struct Search<'a> {
    calls: &'a [Call],
    around: Vec<Surroundings>,
    uids: Vec<Uid>,
    /// The call in each slot.
    slots: Vec<Option<usize>>,
    /// Slots of calls that need not have happened.
    optional: u128,
    worlds: Vec<World>,
    found: Vec<Contradiction>,
}

impl<'a> Search<'a> {
    fn new(calls: &'a [Call], restarts: bool) -> Self {
        let mut known: HashMap<&str, u32> = HashMap::new();
        let uid = |call: &'a Call| match &call.answer {
            Answer::Done(said) => said.uid.as_deref().map(|uid| {
                let next = known.len().try_into().unwrap_or(u32::MAX);
                *known.entry(uid).or_insert(next)
            }),
            _ => None,
        };
        let uids = calls.iter().map(uid).collect();
        let forced: Vec<&Call> = calls.iter().filter(|call| call.op.is_forced()).collect();
        let overlaps = |call: &Call| {
            forced.iter().any(|other| other.begin <= call.latest() && other.latest() >= call.begin)
        };
        let around = calls.iter().map(|call| Surroundings { restarts, forced: overlaps(call) }).collect();
        let start = World { place: Place::Absent, happened: 0 };
        Self { calls, around, uids, slots: Vec::new(), optional: 0, worlds: vec![start], found: Vec::new() }
    }

    fn begin(&mut self, index: usize) {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        assert!(slot < 128, "more calls on one VM are under way than the search has room for");
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(index);
        if self.calls[index].is_open() {
            self.optional |= 1 << slot;
        }
    }

    fn slot_of(&self, index: usize) -> usize {
        self.slots.iter().position(|slot| *slot == Some(index)).expect("a call ends after it has begun")
    }

    /// A call without an answer has happened by now, or never will.
    fn settle(&mut self, index: usize) {
        let happened = self.worlds_after(self.slot_of(index));
        self.worlds.extend(happened);
        self.forget(index);
    }

    /// Frees the slot of a call that can change nothing any more.
    fn forget(&mut self, index: usize) {
        let slot = self.slot_of(index);
        self.slots[slot] = None;
        self.optional &= !(1 << slot);
        for world in &mut self.worlds {
            world.happened &= !(1 << slot);
        }
        let worlds = std::mem::take(&mut self.worlds);
        self.worlds = self.most_open(worlds);
    }

    fn end(&mut self, index: usize) {
        let slot = self.slot_of(index);
        let reached = self.most_open(self.worlds_after(slot));
        if reached.is_empty() {
            let text = self.contradiction(index);
            self.found.push(Contradiction { call: index, text });
            // Go on from what was answered, so that one fault does not hide the next.
            self.worlds = self.as_answered(index);
        } else {
            self.worlds = reached;
        }
        self.forget(index);
    }

    /// Every world in which the call in `slot` has happened, after whatever others had to happen before it. Fewest effects
    /// first, so that a world from which less can follow than from one before it is dropped at once.
    fn worlds_after(&self, slot: usize) -> Vec<World> {
        let mut open: VecDeque<World> = VecDeque::new();
        let mut known = Known { optional: self.optional, ..Known::default() };
        let mut first = self.worlds.clone();
        first.sort_by_key(|world| world.happened.count_ones());
        open.extend(first.into_iter().filter(|world| known.is_new(*world)));
        let mut reached = Vec::new();
        while let Some(world) = open.pop_front() {
            if world.happened & (1 << slot) != 0 {
                reached.push(world);
                continue;
            }
            open.extend(self.successors(world).into_iter().filter(|next| known.is_new(*next)));
        }
        reached
    }

    /// The worlds that one more effect leads to.
    fn successors(&self, world: World) -> Vec<World> {
        let mut next = Vec::new();
        for slot in self.candidates(world) {
            let Some(index) = self.slots[slot] else { continue };
            let call = &self.calls[index];
            let places = step(world.place, call.op, &call.answer, self.uids[index], self.around[index]);
            for place in places {
                // An optional call that changes nothing may as well happen later.
                if self.optional & (1 << slot) == 0 || place != world.place {
                    next.push(World { place, happened: world.happened | (1 << slot) });
                }
            }
        }
        if let Place::Vm { uid, config, parts, at: At::Restarting } = world.place {
            next.push(World { place: Place::Vm { uid, config, parts, at: At::Running }, ..world });
        }
        next
    }

    /// The slots of the calls that may happen next. Of lost calls that are alike only the one that is settled first: whatever
    /// the others can do later, it could not.
    fn candidates(&self, world: World) -> Vec<usize> {
        let mut required = Vec::new();
        let mut first: Vec<(usize, &Call, bool)> = Vec::new();
        for (slot, call) in self.slots.iter().enumerate() {
            let Some(index) = call.filter(|_| world.happened & (1 << slot) == 0) else { continue };
            let (call, forced) = (&self.calls[index], self.around[index].forced);
            if self.optional & (1 << slot) == 0 {
                required.push(slot);
                continue;
            }
            let alike = |(_, other, other_forced): &&mut (usize, &Call, bool)| {
                other.op == call.op && *other_forced == forced && is_lost(other) == is_lost(call)
            };
            match first.iter_mut().find(alike) {
                Some(known) if known.1.settled > call.settled => *known = (slot, call, forced),
                Some(_) => {}
                None => first.push((slot, call, forced)),
            }
        }
        required.extend(first.into_iter().map(|(slot, ..)| slot));
        required
    }

    /// Drops every world from which less can follow than from another: the same place, with more optional calls used up.
    fn most_open(&self, mut worlds: Vec<World>) -> Vec<World> {
        worlds.sort_unstable_by_key(|world| world.happened.count_ones());
        let mut known = Known { optional: self.optional, ..Known::default() };
        worlds.retain(|world| known.is_new(*world));
        worlds
    }

    fn contradiction(&self, index: usize) -> String {
        let call = &self.calls[index];
        let before: BTreeSet<Place> = self.worlds.iter().map(|world| world.place).collect();
        let places: Vec<String> = before.iter().map(describe).collect();
        format!(
            "{} answered \"{}\", which no order of the calls explains; it could only be {}",
            call.op,
            call.answer,
            places.join(" or ")
        )
    }

    fn as_answered(&self, index: usize) -> Vec<World> {
        let call = &self.calls[index];
        let states: Vec<State> = match (&call.answer, call.op) {
            (Answer::Absent, _) | (Answer::Done(_), Op::Delete { .. }) => Vec::new(),
            (Answer::Done(said), _) => said.state.into_iter().collect(),
            (Answer::Denied(state), _) => vec![*state],
            (_, _) => State::ALL.to_vec(),
        };
        let uid = self.uids[index];
        let seen = match &call.answer {
            Answer::Done(said) => said.parts,
            _ => SeenParts::default(),
        };
        let mut places: Vec<Place> = states.into_iter().flat_map(Place::all_shown_as).collect();
        for place in &mut places {
            if let Place::Vm { uid: known, parts, .. } = place {
                (*known, *parts) = (uid, seen.or_default());
            }
        }
        if places.is_empty() {
            places.push(Place::Absent);
        }
        places.into_iter().map(|place| World { place, happened: 0 }).collect()
    }
}

/// Whether nobody knows how the call went, rather than that it failed.
const fn is_lost(call: &Call) -> bool {
    matches!(call.answer, Answer::Lost)
}

/// The worlds that were seen, as far as later ones must be held against them.
#[derive(Default)]
struct Known {
    /// Slots of calls that need not have happened.
    optional: u128,
    /// The optional calls used up, by place and by the others that have happened.
    used: HashMap<(Place, u128), Vec<u128>>,
}

impl Known {
    /// Whether more can follow from a world than from each one before it; notes it if so.
    fn is_new(&mut self, world: World) -> bool {
        let used = world.happened & self.optional;
        let known = self.used.entry((world.place, world.happened & !self.optional)).or_default();
        let is_new = known.iter().all(|before| before & !used != 0);
        if is_new {
            known.push(used);
        }
        is_new
    }
}

fn describe(place: &Place) -> String {
    match place {
        Place::Absent => "absent".to_owned(),
        Place::Vm { at: At::Restarting, parts, .. } => {
            format!("SHUTDOWN and about to be started again with {parts:?}")
        }
        Place::Vm { at, parts, .. } => format!("{} with {parts:?}", at.shown().name()),
    }
}

#[cfg(test)]
#[path = "checker_tests.rs"]
mod tests;
