//! Decides when each request is made, so that a QEMU that hangs holds up no other domain.
//!
//! ```text
//!   take ──► queue ──► a turn: a thread makes the call ──► answer, and the next turn begins
//!              │
//!              ├─ its domain has two calls under way, or one for counters ──► waits; others pass
//!              ├─ 256 calls are under way in all ──► waits
//!              └─ the daemon has stopped waiting for the answer ──► is not made
//! ```
//!
//! A call that needs a hanging QEMU does not come back. Therefore at most two threads serve one
//! domain, and the requests behind them wait without delaying other domains. Requests that end or
//! ask a guest wait for no turn, because they must get past the calls that hang. Requests that need
//! no QEMU wait for no turn either, because no hanging QEMU can hold them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmm_libvirt_wire::{Call, CallFailure, CallFailureKind, CallRank, CallRequest, CallResult};

/// The most calls under way that need a QEMU, each on a thread of its own. Only 128 hanging QEMUs
/// with two calls each would hold up the calls for other QEMUs.
const CALLS: usize = 256;
/// The most calls under way that need the QEMU of one domain.
const DOMAIN_CALLS: usize = 2;
/// The most requests that wait for their turn.
const QUEUE: usize = 2048;

/// Makes a call.
type MakeCall = dyn Fn(&Call) -> Result<CallResult, CallFailure> + Send + Sync;
/// Hands an answer to the daemon.
type SendAnswer = dyn Fn(u64, Result<CallResult, CallFailure>) + Send + Sync;

/// Queues requests, and makes each one on a thread of its own when its turn has come.
pub(crate) struct CallQueue {
    turns: Mutex<QueueState>,
    run: Box<MakeCall>,
    answer: Box<SendAnswer>,
}

#[derive(Default)]
struct QueueState {
    queue: VecDeque<QueuedRequest>,
    under_way: usize,
    domains: HashMap<Uuid, DomainCalls>,
}

struct QueuedRequest {
    request: CallRequest,
    /// The time at which the daemon stops waiting for the answer.
    until: Option<Instant>,
}

/// Calls that need the QEMU of one domain.
#[derive(Default)]
struct DomainCalls {
    calls: usize,
    /// The number of these calls that read counters.
    samples: usize,
}

impl CallQueue {
    pub(crate) fn new(
        run: impl Fn(&Call) -> Result<CallResult, CallFailure> + Send + Sync + 'static,
        answer: impl Fn(u64, Result<CallResult, CallFailure>) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { turns: Mutex::default(), run: Box::new(run), answer: Box::new(answer) })
    }

    /// Takes one request. Another thread answers it later. If the queue is full, this thread
    /// answers [`CallFailureKind::Busy`] at once; requests of [`CallRank::Free`] are taken even
    /// then.
    pub(crate) fn take(self: &Arc<Self>, request: CallRequest) {
        let until = request.within_ms.map(|within| Instant::now() + Duration::from_millis(within));
        let id = request.id;
        let is_full = {
            let mut turns = lock(&self.turns);
            let is_full = turns.queue.len() >= QUEUE && request.call.rank() != CallRank::Free;
            if !is_full {
                turns.queue.push_back(QueuedRequest { request, until });
            }
            is_full
        };
        if is_full {
            let message = format!("the libvirt helper has {QUEUE} calls waiting for libvirt already");
            return (self.answer)(id, Err(busy(message)));
        }
        self.start_ready();
    }

    /// Makes every call whose turn has come, and answers those that have waited too long.
    fn start_ready(self: &Arc<Self>) {
        // The lock is held only while `next` chooses. An answer may block on the daemon's pipe, and
        // a thread that has been started takes the lock itself when its turn ends.
        let (ready, late) = lock(&self.turns).next(Instant::now());
        for request in late {
            let message = "libvirt has not answered earlier calls for this VM, so this one was not made";
            (self.answer)(request.id, Err(busy(message.to_owned())));
        }
        for request in ready {
            let turn = CallPermit { desk: Arc::clone(self), rank: request.call.rank() };
            let (id, started) = (request.id, std::thread::Builder::new().spawn(move || turn.make(&request)));
            if let Err(error) = started {
                // The failed spawn dropped the closure and with it the `CallPermit`, so the room is
                // free again. Only the answer is missing.
                (self.answer)(id, Err(busy(format!("the libvirt helper can start no thread: {error}"))));
            }
        }
    }
}

fn busy(message: String) -> CallFailure {
    CallFailure { kind: CallFailureKind::Busy, message }
}

impl QueueState {
    /// Splits the queue: returns the requests whose turn has come, then those whose time is over.
    /// The remaining requests keep their order.
    fn next(&mut self, now: Instant) -> (Vec<CallRequest>, Vec<CallRequest>) {
        let (mut ready, mut late) = (Vec::new(), Vec::new());
        let mut queue = std::mem::take(&mut self.queue);
        // One pass from front to back keeps the order of requests that compete for the same room. A
        // request that must wait does not stop the requests behind it that need other room.
        queue.retain(|QueuedRequest { request, until }| {
            let rank = request.call.rank();
            // The daemon gave this request up at `until`, so a call made now would change a VM for
            // which nobody waits. A request of `CallRank::Free` is exempt, because it never waited
            // for a turn.
            if rank != CallRank::Free && until.is_some_and(|until| until <= now) {
                late.push(request.clone());
                return false;
            }
            let begins = self.may_begin(rank);
            if begins {
                self.begin(rank);
                ready.push(request.clone());
            }
            !begins
        });
        self.queue = queue;
        (ready, late)
    }

    fn may_begin(&self, rank: CallRank) -> bool {
        let (uuid, is_sample) = match rank {
            CallRank::Free => return true,
            CallRank::Orders(uuid) => (uuid, false),
            CallRank::Samples(uuid) => (uuid, true),
        };
        let domain = self.domains.get(&uuid);
        // A sample waits for an earlier sample of its domain, so reading counters takes at most one
        // of the two threads and an order always finds the other.
        self.under_way < CALLS
            && domain.is_none_or(|domain| domain.calls < DOMAIN_CALLS && !(is_sample && domain.samples > 0))
    }

    fn begin(&mut self, rank: CallRank) {
        let (CallRank::Orders(uuid) | CallRank::Samples(uuid)) = rank else { return };
        self.under_way += 1;
        let domain = self.domains.entry(uuid).or_default();
        domain.calls += 1;
        domain.samples += usize::from(matches!(rank, CallRank::Samples(_)));
    }

    fn end(&mut self, rank: CallRank) {
        let (CallRank::Orders(uuid) | CallRank::Samples(uuid)) = rank else { return };
        self.under_way -= 1;
        let Some(domain) = self.domains.get_mut(&uuid) else { return };
        domain.calls -= 1;
        domain.samples -= usize::from(matches!(rank, CallRank::Samples(_)));
        if domain.calls == 0 {
            self.domains.remove(&uuid);
        }
    }
}

/// The right to make one call. Dropping it gives its room back and starts the calls that waited.
struct CallPermit {
    desk: Arc<CallQueue>,
    rank: CallRank,
}

impl CallPermit {
    fn make(self, request: &CallRequest) {
        let got = (self.desk.run)(&request.call);
        (self.desk.answer)(request.id, got);
    }
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        // The end comes before the next start, because `start_ready` counts this turn's room as
        // free. The drop also happens when a call panics, so a panic takes no room for good.
        lock(&self.desk.turns).end(self.rank);
        self.desk.start_ready();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Condvar;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// A libvirt whose calls that need a QEMU return only when the test lets them.
    #[derive(Default)]
    struct Libvirt {
        begun: Mutex<Vec<Call>>,
        changed: Condvar,
        goes_on: Mutex<bool>,
        went_on: Condvar,
    }

    impl Libvirt {
        fn make(&self, call: &Call) -> Result<CallResult, CallFailure> {
            lock(&self.begun).push(call.clone());
            self.changed.notify_all();
            let mut goes_on = lock(&self.goes_on);
            while call.rank() != CallRank::Free && !*goes_on {
                goes_on = self.went_on.wait(goes_on).unwrap();
            }
            Ok(CallResult::Done)
        }

        fn let_go(&self) {
            *lock(&self.goes_on) = true;
            self.went_on.notify_all();
        }

        /// Waits until so many calls have begun.
        fn wait_for(&self, calls: usize) {
            let mut begun = lock(&self.begun);
            while begun.len() < calls {
                begun = self.changed.wait(begun).unwrap();
            }
        }

        fn begun(&self) -> usize {
            lock(&self.begun).len()
        }
    }

    /// The answers that a desk has sent, each with the number of its call.
    type Answers = Receiver<(u64, Result<CallResult, CallFailure>)>;

    fn desk() -> (Arc<CallQueue>, Arc<Libvirt>, Answers) {
        let libvirt = Arc::new(Libvirt::default());
        let (answers, answered) = channel();
        let maker = Arc::clone(&libvirt);
        let desk =
            CallQueue::new(move |call| maker.make(call), move |id, got| answers.send((id, got)).unwrap());
        (desk, libvirt, answered)
    }

    fn domain(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn ask(desk: &Arc<CallQueue>, id: u64, call: Call) {
        desk.take(CallRequest { id, within_ms: None, call });
    }

    #[test]
    fn calls_to_many_domains_are_all_answered() {
        let (desk, libvirt, answered) = desk();
        let domains = 3 * CALLS;
        for number in 0..domains {
            ask(&desk, number as u64, Call::BlockStats { uuid: domain(number as u128) });
        }
        libvirt.wait_for(CALLS);
        libvirt.let_go();
        let mut ids = BTreeSet::new();
        for (id, got) in answered.iter().take(domains) {
            assert_eq!(got, Ok(CallResult::Done));
            assert!(ids.insert(id), "each is answered once");
        }
        assert_eq!(ids.len(), domains);
    }

    #[test]
    fn a_hanging_domain_delays_no_other_and_can_be_destroyed() {
        let (desk, libvirt, answered) = desk();
        let (hangs, other) = (domain(1), domain(2));
        for id in 0..10 {
            ask(&desk, id, Call::BlockStats { uuid: hangs });
        }
        for id in 10..20 {
            ask(&desk, id, Call::Suspend { uuid: hangs });
        }
        libvirt.wait_for(2);
        ask(&desk, 20, Call::Suspend { uuid: other });
        libvirt.wait_for(3);
        let begun = lock(&libvirt.begun).clone();
        let expected =
            [Call::BlockStats { uuid: hangs }, Call::Suspend { uuid: hangs }, Call::Suspend { uuid: other }];
        assert!(expected.iter().all(|call| begun.contains(call)), "{begun:?}");
        // Asking the guest and ending the domain overtake all other calls.
        for (id, call) in [(21, Call::Shutdown { uuid: hangs }), (22, Call::Destroy { uuid: hangs })] {
            ask(&desk, id, call);
            assert_eq!(answered.recv().unwrap(), (id, Ok(CallResult::Done)));
        }
        assert_eq!(libvirt.begun(), 5);
        libvirt.let_go();
        assert_eq!(answered.iter().take(21).filter(|(_, got)| got.is_ok()).count(), 21);
    }

    #[test]
    fn an_expired_call_is_not_made() {
        let (desk, libvirt, answered) = desk();
        for id in 0..2 {
            ask(&desk, id, Call::Suspend { uuid: domain(1) });
        }
        libvirt.wait_for(2);
        desk.take(CallRequest { id: 2, within_ms: Some(0), call: Call::Reset { uuid: domain(1) } });
        let (id, late) = answered.recv().unwrap();
        assert_eq!((id, late.unwrap_err().kind), (2, CallFailureKind::Busy));
        libvirt.let_go();
        assert_eq!(answered.iter().take(2).count(), 2);
        assert_eq!(libvirt.begun(), 2, "the reset was never made");
    }

    #[test]
    fn a_full_queue_refuses_calls_and_accepts_a_destroy() {
        let (desk, libvirt, answered) = desk();
        for id in 0..(QUEUE + DOMAIN_CALLS) as u64 {
            ask(&desk, id, Call::Suspend { uuid: domain(1) });
        }
        ask(&desk, 90_000, Call::Suspend { uuid: domain(1) });
        let (id, full) = answered.recv().unwrap();
        let full = full.unwrap_err();
        assert_eq!((id, full.kind), (90_000, CallFailureKind::Busy));
        assert!(full.message.contains("calls waiting"), "{}", full.message);
        ask(&desk, 90_001, Call::Destroy { uuid: domain(1) });
        assert_eq!(answered.recv().unwrap(), (90_001, Ok(CallResult::Done)));
        libvirt.let_go();
        assert_eq!(answered.iter().take(QUEUE + DOMAIN_CALLS).count(), QUEUE + DOMAIN_CALLS);
    }
}
