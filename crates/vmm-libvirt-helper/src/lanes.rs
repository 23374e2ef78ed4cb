//! Which call goes over which connection, and how many may wait at once.
//!
//! libvirtd serves five calls of one connection at a time, and a call that needs a QEMU which hangs does not come back. So calls
//! that wait for a QEMU go over lanes, connections of their own with room to spare, and a domain that hangs holds two calls at
//! most. Everything else goes over the main connection, where nothing hangs but libvirtd itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use virt::connect::Connect;
use virt::error::Error;
use vmm_libvirt_wire::{Call, Failure, FailureKind, Got, Message, Request};

use crate::calls;
use crate::say::say;

/// Calls under way on one lane; libvirtd's own limit is five.
const LANE_CALLS: usize = 4;
/// Calls under way in all, a thread each.
const CALLS: usize = 64;
/// Calls under way that wait for one domain's QEMU.
const DOMAIN_CALLS: usize = 2;
/// Seconds between two signs of life of libvirtd, and how many may be missing.
const KEEP_ALIVE: (i32, u32) = (5, 4);

/// The connections.
pub(crate) struct Lanes {
    uri: String,
    main: Connect,
    extra: Mutex<Vec<Arc<Lane>>>,
    under_way: AtomicUsize,
    waiting: Mutex<HashMap<Uuid, Waiting>>,
}

struct Lane {
    connect: Connect,
    calls: AtomicUsize,
}

/// Calls that wait for one domain's QEMU.
#[derive(Default)]
struct Waiting {
    calls: usize,
    samples: usize,
}

/// Has libvirtd's silence end the connection.
pub(crate) fn keep_alive(connect: &Connect) -> Result<(), Error> {
    connect.set_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1).map(|_| ())
}

/// A version as libvirt packs it, as people write it.
pub(crate) fn version(packed: u32) -> String {
    format!("{}.{}.{}", packed / 1_000_000, packed / 1000 % 1000, packed % 1000)
}

/// Answers one request, in a thread of its own.
pub(crate) fn take(lanes: &Arc<Lanes>, request: Request) {
    let Request { id, call } = request;
    let turn = match Turn::new(lanes, &call) {
        Ok(turn) => turn,
        Err(failure) => return answer(id, Err(failure)),
    };
    std::thread::spawn(move || {
        let got = turn.run(&call);
        drop(turn);
        answer(id, got);
    });
}

fn answer(id: u64, got: Result<Got, Failure>) {
    let (ok, failed) = match got {
        Ok(got) => (Some(got), None),
        Err(failure) => (None, Some(failure)),
    };
    say(&Message::Answer { id, ok, failed });
}

impl Lanes {
    pub(crate) fn new(uri: String, main: Connect) -> Self {
        Self {
            uri,
            main,
            extra: Mutex::new(Vec::new()),
            under_way: AtomicUsize::new(0),
            waiting: Mutex::new(HashMap::new()),
        }
    }

    /// A lane with room, a new one if need be. One that is idle beside another is given up.
    fn lane(&self) -> Result<Arc<Lane>, Error> {
        let mut extra = lock(&self.extra);
        let mut idle = 0;
        extra.retain(|lane| {
            idle += usize::from(lane.calls.load(Ordering::Relaxed) == 0);
            idle <= 1 || lane.calls.load(Ordering::Relaxed) > 0
        });
        let lane = match extra.iter().find(|lane| lane.calls.load(Ordering::Relaxed) < LANE_CALLS) {
            Some(lane) => Arc::clone(lane),
            None => {
                let connect = Connect::open(Some(&self.uri))?;
                keep_alive(&connect)?;
                let lane = Arc::new(Lane { connect, calls: AtomicUsize::new(0) });
                extra.push(Arc::clone(&lane));
                lane
            }
        };
        lane.calls.fetch_add(1, Ordering::Relaxed);
        Ok(lane)
    }
}

/// The right to make one call, given back when dropped.
struct Turn {
    lanes: Arc<Lanes>,
    /// The domain whose QEMU is waited for, and whether only its counters are.
    domain: Option<(Uuid, bool)>,
}

impl Turn {
    fn new(lanes: &Arc<Lanes>, call: &Call) -> Result<Self, Failure> {
        let busy = |message: &str| Failure { kind: FailureKind::Busy, message: message.to_owned() };
        let domain = waits_for(call);
        // The end of a domain waits behind nothing.
        let is_end = matches!(call, Call::Destroy { .. });
        if !is_end && lanes.under_way.load(Ordering::Relaxed) >= CALLS {
            return Err(busy("libvirt has not answered the calls of other VMs yet"));
        }
        if let Some((uuid, samples)) = domain {
            let mut waiting = lock(&lanes.waiting);
            let waiting = waiting.entry(uuid).or_default();
            if !is_end && (waiting.calls >= DOMAIN_CALLS || samples && waiting.samples > 0) {
                return Err(busy("libvirt has not answered an earlier call for this VM yet"));
            }
            waiting.calls += 1;
            waiting.samples += usize::from(samples);
        }
        lanes.under_way.fetch_add(1, Ordering::Relaxed);
        Ok(Self { lanes: Arc::clone(lanes), domain })
    }

    fn run(&self, call: &Call) -> Result<Got, Failure> {
        if self.domain.is_none() {
            return calls::run(&self.lanes.main, call).map_err(|error| calls::failure(&error));
        }
        let lane = self.lanes.lane().map_err(|error| calls::failure(&error))?;
        let got = calls::run(&lane.connect, call).map_err(|error| calls::failure(&error));
        lane.calls.fetch_sub(1, Ordering::Relaxed);
        got
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.lanes.under_way.fetch_sub(1, Ordering::Relaxed);
        let Some((uuid, samples)) = self.domain else { return };
        let mut waiting = lock(&self.lanes.waiting);
        let Some(one) = waiting.get_mut(&uuid) else { return };
        one.calls -= 1;
        one.samples -= usize::from(samples);
        if one.calls == 0 {
            waiting.remove(&uuid);
        }
    }
}

/// The domain whose QEMU a call waits for, and whether it is for the counters.
fn waits_for(call: &Call) -> Option<(Uuid, bool)> {
    match call {
        Call::List
        | Call::Look { .. }
        | Call::LookByName { .. }
        | Call::Xml { .. }
        | Call::Define { .. }
        | Call::Undefine { .. } => None,
        Call::BlockStats { uuid } => Some((*uuid, true)),
        Call::Start { uuid }
        | Call::Suspend { uuid }
        | Call::Resume { uuid }
        | Call::Shutdown { uuid }
        | Call::Reset { uuid }
        | Call::OnReboot { uuid, .. }
        | Call::Destroy { uuid } => Some((*uuid, false)),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_unpacked() {
        assert_eq!(version(7_002_022), "7.2.22");
        assert_eq!(version(9_000_000), "9.0.0");
        assert_eq!(version(11_010_003), "11.10.3");
    }
}
