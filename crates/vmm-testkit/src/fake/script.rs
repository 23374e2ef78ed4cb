//! What a method does when it is called next.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};

/// The methods of the ports that can be scripted and are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// `Backend::launch`.
    Launch,
    /// `Backend::start_spare`.
    StartSpare,
    /// `Backend::adopt`.
    Adopt,
    /// `Backend::sweep`.
    Sweep,
    /// `Backend::ping`; an act that fails makes it report that.
    Ping,
    /// `Vmm::pause`.
    Pause,
    /// `Vmm::resume`.
    Resume,
    /// `Vmm::shutdown`.
    Shutdown,
    /// `Vmm::reset`.
    Reset,
    /// `Vmm::sample`; an act that fails makes every counter missing.
    Sample,
    /// `Vmm::probe`.
    Probe,
    /// `Vmm::kill`.
    Kill,
}

/// What one call does.
#[derive(Clone, Debug)]
pub enum Act {
    /// What it is for.
    Succeed,
    /// What it is for, after a while.
    Delay(Duration),
    /// What it is for, once the gate opens.
    Wait(Gate),
    /// What it is for, but the answer comes only once the gate opens.
    DoThenWait(Gate),
    /// Nothing, and says so in the given way.
    Fail(BackendErrorKind, Effect),
    /// What it is for, and then fails in the given way.
    DoThenFail(BackendErrorKind, Effect),
    /// Nothing: it panics, as a fault of the program does.
    Panic,
}

impl Act {
    /// Never comes to anything.
    pub fn hang() -> Self {
        Self::Wait(Gate::default())
    }

    /// Does what it is for and never answers.
    pub fn do_then_hang() -> Self {
        Self::DoThenWait(Gate::default())
    }

    /// Waits as long as this act waits before its effect.
    pub(super) async fn before(&self) -> Result<(), BackendError> {
        match self {
            Self::Succeed | Self::DoThenWait(_) | Self::DoThenFail(..) => Ok(()),
            Self::Delay(time) => {
                tokio::time::sleep(*time).await;
                Ok(())
            }
            Self::Wait(gate) => {
                gate.opened().await;
                Ok(())
            }
            Self::Fail(kind, effect) => Err(scripted(*kind, *effect)),
            Self::Panic => fault(),
        }
    }

    /// Does what this act does between its effect and its answer.
    pub(super) async fn after(&self) -> Result<(), BackendError> {
        match self {
            Self::Succeed | Self::Delay(_) | Self::Wait(_) | Self::Fail(..) | Self::Panic => Ok(()),
            Self::DoThenWait(gate) => {
                gate.opened().await;
                Ok(())
            }
            Self::DoThenFail(kind, effect) => Err(scripted(*kind, *effect)),
        }
    }
}

#[expect(clippy::panic, reason = "this plays a fault of the program under test")]
fn fault() -> ! {
    panic!("the script panics")
}

fn scripted(kind: BackendErrorKind, effect: Effect) -> BackendError {
    BackendError::new(kind, effect, "the script says so")
}

/// Holds calls up until it is opened; one that nobody opens holds them for ever.
#[derive(Clone, Debug)]
pub struct Gate {
    open: watch::Sender<bool>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { open: watch::Sender::new(false) }
    }
}

impl Gate {
    /// Lets everything through, now and later.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    async fn opened(&self) {
        let mut open = self.open.subscribe();
        // The sender lives in `self`, so waiting ends only when the gate is open.
        let _ = open.wait_for(|open| *open).await;
    }
}

/// The acts of every method, and how often each was called.
#[derive(Debug, Default)]
pub(super) struct Scripts {
    next: BTreeMap<Method, VecDeque<Act>>,
    always: BTreeMap<Method, Act>,
    calls: BTreeMap<Method, usize>,
}

impl Scripts {
    pub(super) fn push(&mut self, method: Method, act: Act) {
        self.next.entry(method).or_default().push_back(act);
    }

    pub(super) fn always(&mut self, method: Method, act: Act) {
        self.always.insert(method, act);
    }

    /// Counts a call and answers what it is to do.
    pub(super) fn call(&mut self, method: Method) -> Act {
        *self.calls.entry(method).or_default() += 1;
        self.next
            .get_mut(&method)
            .and_then(VecDeque::pop_front)
            .or_else(|| self.always.get(&method).cloned())
            .unwrap_or(Act::Succeed)
    }

    pub(super) fn calls(&self, method: Method) -> usize {
        self.calls.get(&method).copied().unwrap_or_default()
    }

    pub(super) fn clear(&mut self) {
        self.next.clear();
        self.always.clear();
    }
}
