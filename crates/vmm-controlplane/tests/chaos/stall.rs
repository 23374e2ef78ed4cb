//! VMMs that stand still for a while: slow ones for less than a daemon waits, silent ones for longer.
//!
//! ```text
//!   client ── SIGSTOP ──► VMM ...... SIGCONT ◄── reviver, when the time is up or the run ends
//!                          └─ calls on this VM time out, are refused, or have their effect late
//! ```

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::history::Micros;
use super::load::{Shared, rest};
use crate::harness::signal;

/// Time between two looks for VMMs whose time is up.
const REVIVE_INTERVAL: Duration = Duration::from_millis(20);

/// One VMM that stood still.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stall {
    /// The VM, by its place among the run's names.
    pub(crate) vm: usize,
    /// Before the VMM was stopped.
    pub(crate) begin: Micros,
    /// After the VMM was let go on.
    pub(crate) end: Micros,
}

/// A VMM's process, known by its pid and by the run folder that its arguments name.
#[derive(Clone, Debug)]
pub(crate) struct VmmProcess {
    pub(crate) pid: u32,
    pub(crate) folder: String,
}

impl VmmProcess {
    /// Sends a signal if the pid is still this VMM's; says whether it was sent.
    pub(crate) fn send(&self, what: Signal) -> bool {
        let arguments = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let is_ours = String::from_utf8_lossy(&arguments).contains(&self.folder);
        if is_ours {
            signal(self.pid, what);
        }
        is_ours
    }
}

/// Every stall of a run.
pub(crate) struct Stalls {
    /// `None` from the end of the run on: nobody would let a VMM go on that a client stops then.
    under_way: Mutex<Option<Vec<UnderWay>>>,
    over: Mutex<Vec<Stall>>,
}

impl Default for Stalls {
    fn default() -> Self {
        Self { under_way: Mutex::new(Some(Vec::new())), over: Mutex::default() }
    }
}

struct UnderWay {
    vm: usize,
    process: VmmProcess,
    begin: Micros,
    until: Instant,
}

impl Stalls {
    /// Stops a VMM for `time`. Does nothing to one that stands still already, and nothing when the run has ended.
    pub(crate) fn stop(&self, vm: usize, process: VmmProcess, begin: Micros, time: Duration) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(under_way) = under_way.as_mut() else { return };
        let is_stopped = under_way.iter().any(|stall| stall.process.pid == process.pid);
        if !is_stopped && process.send(Signal::STOP) {
            under_way.push(UnderWay { vm, process, begin, until: Instant::now() + time });
        }
    }

    /// Lets every VMM go on whose time is up, until the run ends; then all of them.
    pub(crate) fn revive(&self, shared: &Shared) {
        loop {
            let ends = shared.stop.load(Ordering::Relaxed);
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            let due = under_way
                .iter_mut()
                .flat_map(|stalls| stalls.extract_if(.., |stall| ends || stall.until <= Instant::now()));
            for stall in due {
                stall.process.send(Signal::CONT);
                let over = Stall { vm: stall.vm, begin: stall.begin, end: shared.clock.now() };
                self.over.lock().unwrap_or_else(PoisonError::into_inner).push(over);
            }
            if ends {
                *under_way = None;
                return;
            }
            drop(under_way);
            rest(REVIVE_INTERVAL);
        }
    }

    /// The stalls of one VM that are over.
    pub(crate) fn of(&self, vm: usize) -> Vec<Stall> {
        let over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        over.iter().filter(|stall| stall.vm == vm).copied().collect()
    }

    /// Counts the stalls that are over.
    pub(crate) fn count(&self) -> usize {
        self.over.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// The moment from which an effect that was on its way to a VMM at `end` counts as late: a VMM that stood still between `begin`
/// and then acts on what it was sent when it goes on.
pub(crate) fn answers_from(begin: Micros, end: Micros, grace: Micros, stalls: &[Stall]) -> Micros {
    let overlaps = |from: Micros, stall: &&Stall| stall.begin <= from + grace && stall.end >= begin;
    let mut from = end;
    // A second stall may begin before the VMM has acted on what it was sent during the first.
    while let Some(later) = stalls.iter().filter(|stall| overlaps(from, stall)).map(|stall| stall.end).max()
        && later > from
    {
        from = later;
    }
    from
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effect_of_a_call_waits_for_a_stopped_vmm() {
        let stall = |begin, end| Stall { vm: 0, begin, end };
        assert_eq!(answers_from(10, 20, 5, &[]), 20);
        assert_eq!(answers_from(10, 20, 5, &[stall(0, 9)]), 20, "over before the call");
        assert_eq!(answers_from(10, 20, 5, &[stall(15, 40)]), 40);
        assert_eq!(answers_from(10, 20, 5, &[stall(15, 40), stall(44, 60)]), 60, "one stall into the next");
        assert_eq!(answers_from(10, 20, 5, &[stall(26, 40)]), 20, "the effect had shown by then");
    }
}
