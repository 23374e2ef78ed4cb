//! The scripted result of the next call of a method.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};

/// The methods of the ports that can be scripted and are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ScriptedMethod {
    /// `Backend::launch`.
    Launch,
    /// `Backend::start_spare`.
    StartSpare,
    /// `Backend::adopt`.
    Adopt,
    /// `Backend::sweep`.
    Sweep,
    /// `Backend::ping`. A failing act makes it report the failure.
    Ping,
    /// `Vmm::pause`.
    Pause,
    /// `Vmm::resume`.
    Resume,
    /// `Vmm::shutdown`.
    Shutdown,
    /// `Vmm::reset`.
    Reset,
    /// `Vmm::sample`. A failing act makes every counter missing.
    Sample,
    /// `Vmm::trim_logs`.
    TrimLogs,
    /// `Vmm::probe`.
    Probe,
    /// `Vmm::kill`.
    Kill,
    /// `ConsoleInput::write_console`. A failure of the kind `Timeout` is that of a guest that does
    /// not read.
    WriteConsole,
}

/// The result of one call.
#[derive(Clone, Debug)]
pub enum ScriptedResult {
    /// The call succeeds.
    Succeed,
    /// The call succeeds after a time.
    Delay(Duration),
    /// The call waits for the latch, then succeeds.
    Wait(CallLatch),
    /// The call has its effect, and answers after the latch opens.
    DoThenWait(CallLatch),
    /// The call has no effect and fails in the given way.
    Fail(BackendErrorKind, Effect),
    /// The call has its effect and fails in the given way.
    DoThenFail(BackendErrorKind, Effect),
    /// The call panics, like a fault of the program.
    Panic,
}

impl ScriptedResult {
    /// Returns an act that has no effect and never answers.
    pub fn hang() -> Self {
        Self::Wait(CallLatch::default())
    }

    /// Returns an act that has its effect and never answers.
    pub fn do_then_hang() -> Self {
        Self::DoThenWait(CallLatch::default())
    }

    /// Waits or fails as this act does before the effect of the call.
    pub(super) async fn before(&self) -> Result<(), BackendError> {
        match self {
            Self::Succeed | Self::DoThenWait(_) | Self::DoThenFail(..) => Ok(()),
            Self::Delay(time) => {
                tokio::time::sleep(*time).await;
                Ok(())
            }
            Self::Wait(latch) => {
                latch.opened().await;
                Ok(())
            }
            Self::Fail(kind, effect) => Err(scripted(*kind, *effect)),
            Self::Panic => fault(),
        }
    }

    /// Waits or fails as this act does between the effect of the call and its answer.
    pub(super) async fn after(&self) -> Result<(), BackendError> {
        match self {
            Self::Succeed | Self::Delay(_) | Self::Wait(_) | Self::Fail(..) | Self::Panic => Ok(()),
            Self::DoThenWait(latch) => {
                latch.opened().await;
                Ok(())
            }
            Self::DoThenFail(kind, effect) => Err(scripted(*kind, *effect)),
        }
    }
}

#[expect(clippy::panic, reason = "simulates a fault of the program under test")]
fn fault() -> ! {
    panic!("the script panics")
}

fn scripted(kind: BackendErrorKind, effect: Effect) -> BackendError {
    BackendError::new(kind, effect, "the script says so")
}

/// A latch that delays calls until it is opened. A latch that stays closed delays them for ever.
#[derive(Clone, Debug)]
pub struct CallLatch {
    open: watch::Sender<bool>,
}

impl Default for CallLatch {
    fn default() -> Self {
        Self { open: watch::Sender::new(false) }
    }
}

impl CallLatch {
    /// Lets all calls pass, the waiting ones and the later ones.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    async fn opened(&self) {
        let mut open = self.open.subscribe();
        // The sender is in `self`, so the wait ends only when the latch is open.
        let _ = open.wait_for(|open| *open).await;
    }
}

/// The acts of every method, and the number of its calls.
#[derive(Debug, Default)]
pub(super) struct Scripts {
    next: BTreeMap<ScriptedMethod, VecDeque<ScriptedResult>>,
    always: BTreeMap<ScriptedMethod, ScriptedResult>,
    calls: BTreeMap<ScriptedMethod, usize>,
}

impl Scripts {
    pub(super) fn push(&mut self, method: ScriptedMethod, act: ScriptedResult) {
        self.next.entry(method).or_default().push_back(act);
    }

    pub(super) fn always(&mut self, method: ScriptedMethod, act: ScriptedResult) {
        self.always.insert(method, act);
    }

    /// Counts a call and returns its act.
    pub(super) fn call(&mut self, method: ScriptedMethod) -> ScriptedResult {
        *self.calls.entry(method).or_default() += 1;
        self.next
            .get_mut(&method)
            .and_then(VecDeque::pop_front)
            .or_else(|| self.always.get(&method).cloned())
            .unwrap_or(ScriptedResult::Succeed)
    }

    pub(super) fn calls(&self, method: ScriptedMethod) -> usize {
        self.calls.get(&method).copied().unwrap_or_default()
    }

    pub(super) fn clear(&mut self) {
        self.next.clear();
        self.always.clear();
    }
}
