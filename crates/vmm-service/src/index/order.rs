//! The VMs of the index in the order of their creation, by every property that a listing filters
//! by.
//!
//! One ordered set holds each VM once for itself and once for each of its labels. The key begins
//! with the properties that a filter names, and ends with the VM's age. The VMs that match are
//! therefore adjacent, and a page begins in the middle by a search:
//!
//! ```text
//!   (all)        fake  CREATED  ─► oldest … youngest
//!   (all)        fake  RUNNING  ─► oldest … youngest
//!   (team=blue)  fake  RUNNING  ─► oldest … youngest
//!   └ group      └ partition: group, backend and state     └ age
//! ```
//!
//! A filter of state, backend and at most one label is a merge of few partitions, and their counts
//! add up to the number of VMs that match. With several labels the partitions of the rarest label
//! are walked, and the other labels are compared for each VM.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;

use vmm_core::id::{BackendName, VmUid};
use vmm_core::state::VmState;
use vmm_core::store::VmRecord;

use super::{ListPosition, StateList, contains};

/// A filter of ListVms.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListFilter {
    /// The states that match, in the order of [`VmState::ALL`]. None of them means all.
    pub(crate) states: StateList,
    /// The backend. Empty means all.
    pub(crate) backend: String,
    /// The labels that a VM must bear, all of them.
    pub(crate) labels: BTreeMap<String, String>,
}

impl ListFilter {
    /// Returns true if `record` has the labels. The partitions select by state and backend.
    pub(super) fn has_labels(&self, record: &VmRecord) -> bool {
        self.labels.iter().all(|(key, value)| record.config.metadata.get(key) == Some(value))
    }

    fn has_state(&self, state: VmState) -> bool {
        self.states == [false; 4] || contains(self.states, state)
    }
}

/// All VMs, or the VMs with one label. A label is identified by two hashes with keys that are made
/// at each start of the daemon. Their 128 bits do not collide by accident, and no client can cause
/// a collision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct VmGroup(u64, u64);

const ALL: VmGroup = VmGroup(0, 0);

/// The VMs of one group on one backend in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct VmPartition {
    group: VmGroup,
    /// The position in [`VmOrder::backends`].
    backend: u16,
    /// The position in [`VmState::ALL`].
    state: u8,
}

/// The selection of a filter.
#[derive(Debug)]
pub(super) struct Selection {
    partitions: Vec<VmPartition>,
    /// The number of VMs on the partitions.
    pub(super) count: usize,
    /// True if all of them match. Otherwise their labels must still be compared.
    pub(super) exact: bool,
}

/// The ordered set of all VMs, see the module.
#[derive(Debug, Default)]
pub(super) struct VmOrder {
    set: BTreeSet<(VmPartition, ListPosition)>,
    counts: HashMap<VmPartition, usize>,
    /// Every backend that a record has named. There are few, and none is ever removed.
    backends: Vec<BackendName>,
    keys: [RandomState; 2],
    /// The number of VMs that walks have visited, for the test that bounds the cost of a page.
    #[cfg(test)]
    pub(super) visited: std::sync::atomic::AtomicUsize,
}

impl VmOrder {
    /// Adds a VM.
    pub(super) fn insert(&mut self, record: &VmRecord) {
        let backend = self.number(&record.backend);
        for group in self.groups(record) {
            let partition = VmPartition { group, backend, state: place(record.state) };
            if self.set.insert((partition, ListPosition::of(record))) {
                *self.counts.entry(partition).or_default() += 1;
            }
        }
    }

    /// Removes a VM that was added as `record`.
    pub(super) fn remove(&mut self, record: &VmRecord) {
        let backend = self.number(&record.backend);
        for group in self.groups(record) {
            let partition = VmPartition { group, backend, state: place(record.state) };
            if self.set.remove(&(partition, ListPosition::of(record)))
                && let Some(count) = self.counts.get_mut(&partition)
            {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&partition);
                }
            }
        }
    }

    /// Selects the fewest partitions that hold every VM that matches `filter`.
    pub(super) fn select(&self, filter: &ListFilter) -> Selection {
        let groups = filter.labels.iter().map(|(key, value)| self.label(key, value));
        let rarest =
            groups.map(|group| self.partitions(group, filter)).min_by_key(|selection| selection.count);
        let selection = rarest.unwrap_or_else(|| self.partitions(ALL, filter));
        Selection { exact: filter.labels.len() < 2, ..selection }
    }

    fn partitions(&self, group: VmGroup, filter: &ListFilter) -> Selection {
        let mut selection = Selection { partitions: Vec::new(), count: 0, exact: true };
        for (name, backend) in self.backends.iter().zip(0..) {
            if !filter.backend.is_empty() && filter.backend != name.as_str() {
                continue;
            }
            for state in VmState::ALL.into_iter().filter(|state| filter.has_state(*state)) {
                let partition = VmPartition { group, backend, state: place(state) };
                if let Some(count) = self.counts.get(&partition) {
                    selection.partitions.push(partition);
                    selection.count += count;
                }
            }
        }
        selection
    }

    /// Returns the VMs on the selected partitions that are younger than `after`, oldest first.
    pub(super) fn after(
        &self,
        selection: &Selection,
        after: Option<ListPosition>,
    ) -> impl Iterator<Item = ListPosition> {
        let mut lanes: Vec<_> = selection
            .partitions
            .iter()
            .map(|partition| {
                let from = match after {
                    Some(age) => Bound::Excluded((*partition, age)),
                    None => Bound::Included((*partition, ListPosition::FIRST)),
                };
                self.set
                    .range((from, Bound::Included((*partition, ListPosition::LAST))))
                    .map(|(_, age)| {
                        #[cfg(test)]
                        self.visited.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        *age
                    })
                    .peekable()
            })
            .collect();
        std::iter::from_fn(move || {
            let next = lanes.iter_mut().filter_map(|lane| lane.peek().copied()).min()?;
            lanes.iter_mut().find_map(|lane| lane.next_if_eq(&next))
        })
    }

    /// Returns the groups that a VM belongs to.
    fn groups(&self, record: &VmRecord) -> Vec<VmGroup> {
        let labels = record.config.metadata.iter().map(|(key, value)| self.label(key, value));
        std::iter::once(ALL).chain(labels).collect()
    }

    fn label(&self, key: &str, value: &str) -> VmGroup {
        let [a, b] = &self.keys;
        // The lowest bit is set, so that no label has the group of all VMs.
        VmGroup(a.hash_one((key, value)) | 1, b.hash_one((key, value)))
    }

    fn number(&mut self, name: &BackendName) -> u16 {
        let known = self.backends.iter().position(|it| it == name);
        let number = known.unwrap_or_else(|| {
            self.backends.push(name.clone());
            self.backends.len() - 1
        });
        u16::try_from(number).unwrap_or(u16::MAX)
    }
}

/// Returns the position of a state in [`VmState::ALL`].
fn place(state: VmState) -> u8 {
    let position = (0..).zip(VmState::ALL).find(|(_, it)| *it == state);
    position.map_or(0, |(place, _)| place)
}

impl ListPosition {
    const FIRST: Self = Self { created_ms: i64::MIN, uid: VmUid::new(uuid::Uuid::nil()) };
    const LAST: Self = Self { created_ms: i64::MAX, uid: VmUid::new(uuid::Uuid::max()) };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;
    use vmm_testkit::store_suite::record;

    use super::*;

    fn vm(number: u128, created_ms: i64, state: usize, backend: usize, labels: &[bool; 3]) -> VmRecord {
        let mut vm = record("vm");
        vm.uid = VmUid::new(Uuid::from_u128(number));
        vm.created_ms = created_ms;
        vm.state = VmState::ALL[state];
        vm.backend = BackendName::new(["fake", "other"][backend]);
        let borne = ["a", "b", "c"].iter().zip(labels).filter(|(_, borne)| **borne);
        vm.config.metadata = borne.map(|(key, _)| ((*key).to_owned(), "x".to_owned())).collect();
        vm
    }

    fn matches(filter: &ListFilter, vm: &VmRecord) -> bool {
        filter.has_state(vm.state)
            && (filter.backend.is_empty() || filter.backend == vm.backend.as_str())
            && filter.has_labels(vm)
    }

    proptest! {
        /// A selection holds what a walk over all VMs finds, in the same order, from wherever it
        /// begins.
        #[test]
        fn a_selection_equals_a_filtered_walk_over_all_vms(
            vms in prop::collection::vec((0..6_i64, 0..4_usize, 0..2_usize, any::<[bool; 3]>(), any::<bool>()), 0..40),
            states: [bool; 4],
            backend in 0..4_usize,
            labels: [bool; 3],
            begin in 0..40_usize,
        ) {
            let mut order = VmOrder::default();
            let mut there = BTreeMap::new();
            for ((created_ms, state, backend, labels, leaves), number) in vms.iter().zip(1_u128..) {
                let vm = vm(number, *created_ms, *state, *backend, labels);
                order.insert(&vm);
                order.insert(&vm);
                if *leaves {
                    order.remove(&vm);
                    order.remove(&vm);
                } else {
                    there.insert(ListPosition::of(&vm), vm);
                }
            }
            let wanted = ["a", "b", "c"].iter().zip(labels).filter(|(_, wanted)| *wanted);
            let filter = ListFilter {
                states,
                backend: ["", "", "fake", "nobody"][backend].to_owned(),
                labels: wanted.map(|(key, _)| ((*key).to_owned(), "x".to_owned())).collect(),
            };
            let selection = order.select(&filter);
            let after = there.keys().nth(begin).copied();
            let found: Vec<_> =
                order.after(&selection, after).filter(|age| matches(&filter, &there[age])).collect();
            let all = there.values().filter(|vm| matches(&filter, vm)).map(ListPosition::of);
            let expected: Vec<_> = all.clone().filter(|age| after.is_none_or(|after| *age > after)).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(!selection.exact || selection.count == all.count());
        }
    }
}
