//! What was asked and what was answered: the plain facts that the checkers judge.

use std::fmt;

/// A moment in microseconds of Unix time, from a clock that never steps during a run.
pub(crate) type Micros = u64;

/// One second.
pub(crate) const SECOND: Micros = 1_000_000;

/// The four states of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum State {
    Created,
    Running,
    Paused,
    Shutdown,
}

impl State {
    pub(crate) const ALL: [Self; 4] = [Self::Created, Self::Running, Self::Paused, Self::Shutdown];

    /// The state of a JSON answer or event.
    pub(crate) fn from_wire(text: &str) -> Option<Self> {
        Self::from_name(text.strip_prefix("VM_STATE_")?)
    }

    /// The state of a message.
    pub(crate) fn from_name(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == text)
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Created => "CREATED",
            Self::Running => "RUNNING",
            Self::Paused => "PAUSED",
            Self::Shutdown => "SHUTDOWN",
        }
    }

    /// Whether a VMM holds the VM.
    pub(crate) const fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// What was asked of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Op {
    /// CreateVm with one of the VM's two configurations.
    Create {
        config: u8,
    },
    Boot,
    Pause,
    Resume,
    Reboot {
        force: bool,
    },
    Shutdown {
        force: bool,
    },
    Delete {
        force: bool,
    },
    /// UpdateVm of one part, perhaps with the generation that the client has read.
    Update {
        change: Change,
        guard: Option<Guard>,
    },
    /// WriteConsole.
    Type,
    /// StreamConsole; what was read is judged apart.
    Console,
    /// GetVmInfo, or this VM's line, or its absence, in a list.
    Read,
    /// Not a call: the test killed the VM's VMM.
    KillVmm,
}

/// A change of one part of a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Change {
    /// The label `mark`, in every state.
    Label(u8),
    /// So many MiB of memory on top of 64, while the VM does not run.
    Memory(u8),
    /// So many restarts on top of 10,000, in every state.
    Policy(u8),
    /// The protection against deletion, in every state.
    Protection(bool),
}

/// The generation that a client has read, and when it had been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Guard {
    pub(crate) generation: u64,
    pub(crate) read: Micros,
}

/// The parts of a configuration that UpdateVm changes in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Parts {
    pub(crate) label: u8,
    pub(crate) memory: u8,
    pub(crate) policy: u8,
    pub(crate) protected: bool,
}

impl Parts {
    /// These parts after a change.
    pub(crate) const fn with(mut self, change: Change) -> Self {
        match change {
            Change::Label(label) => self.label = label,
            Change::Memory(memory) => self.memory = memory,
            Change::Policy(policy) => self.policy = policy,
            Change::Protection(protected) => self.protected = protected,
        }
        self
    }
}

/// The parts that an answer shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SeenParts {
    pub(crate) label: Option<u8>,
    pub(crate) memory: Option<u8>,
    pub(crate) policy: Option<u8>,
    pub(crate) protected: Option<bool>,
}

impl SeenParts {
    /// Returns true if a VM with these parts can have answered so.
    pub(crate) fn fit(&self, parts: Parts) -> bool {
        self.label.is_none_or(|seen| seen == parts.label)
            && self.memory.is_none_or(|seen| seen == parts.memory)
            && self.policy.is_none_or(|seen| seen == parts.policy)
            && self.protected.is_none_or(|seen| seen == parts.protected)
    }

    /// These parts, and the usual ones where nothing is seen.
    pub(crate) fn or_default(&self) -> Parts {
        Parts {
            label: self.label.unwrap_or_default(),
            memory: self.memory.unwrap_or_default(),
            policy: self.policy.unwrap_or_default(),
            protected: self.protected.unwrap_or_default(),
        }
    }
}

impl Op {
    /// The method that carries it, as causes of events name it.
    pub(crate) const fn method(self) -> &'static str {
        match self {
            Self::Create { .. } => "CreateVm",
            Self::Boot => "BootVm",
            Self::Pause => "PauseVm",
            Self::Resume => "ResumeVm",
            Self::Reboot { .. } => "RebootVm",
            Self::Shutdown { .. } => "ShutdownVm",
            Self::Delete { force: false } => "DeleteVm",
            Self::Delete { force: true } => "DeleteVm with force",
            Self::Update { .. } => "UpdateVm",
            Self::Type => "WriteConsole",
            Self::Console => "StreamConsole",
            Self::Read => "GetVmInfo",
            Self::KillVmm => "SIGKILL",
        }
    }

    /// Whether it pre-empts what is under way.
    pub(crate) const fn is_forced(self) -> bool {
        matches!(self, Self::Shutdown { force: true } | Self::Delete { force: true })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { config } => write!(f, "CreateVm(config {config})"),
            Self::Reboot { force: true } | Self::Shutdown { force: true } => {
                write!(f, "{} with force", self.method())
            }
            Self::Update { change, guard } => {
                write!(f, "UpdateVm({change:?}")?;
                guard.map_or(Ok(()), |guard| write!(f, " if generation {}", guard.generation))?;
                f.write_str(")")
            }
            Self::KillVmm => f.write_str("SIGKILL of its VMM by the test"),
            _ => f.write_str(self.method()),
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Success; what it said of the VM.
    Done(Said),
    /// `not_found`, or a list without the VM.
    Absent,
    /// `failed_precondition` because this state does not admit the operation.
    Denied(State),
    /// `already_exists`.
    Exists,
    /// `aborted` because the VM has this generation and not the one that UpdateVm named.
    Stale(u64),
    /// `failed_precondition` because the part can only change while the VM does not run.
    Runs,
    /// `failed_precondition` because the VM is protected against deletion.
    Protected,
    /// Refused or failed in a way that is legal, and after which the VM may have changed.
    Failed { code: String, message: String },
    /// An answer that is never legal.
    Illegal(String),
    /// The daemon died before it answered.
    Lost,
}

/// What a success said of the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) state: Option<State>,
    pub(crate) uid: Option<String>,
    /// The phase of its status.
    pub(crate) phase: Option<String>,
    /// Its generation.
    pub(crate) generation: Option<u64>,
    /// The shown parts of the configuration.
    pub(crate) parts: SeenParts,
    /// What DeleteVm could not free.
    pub(crate) left_behind: String,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(said) => {
                f.write_str("ok")?;
                if let Some(state) = said.state {
                    write!(f, " {}", state.name())?;
                }
                if let Some(phase) = &said.phase {
                    write!(f, "/{phase}")?;
                }
                if let Some(generation) = said.generation {
                    write!(f, " generation {generation}")?;
                }
                if said.parts != SeenParts::default() {
                    write!(f, " {:?}", said.parts.or_default())?;
                }
                said.uid.as_ref().map_or(Ok(()), |uid| write!(f, " uid {uid}"))
            }
            Self::Absent => f.write_str("not found"),
            Self::Denied(state) => write!(f, "not legal in {}", state.name()),
            Self::Exists => f.write_str("already exists"),
            Self::Stale(generation) => write!(f, "its generation is {generation}"),
            Self::Runs => f.write_str("not while it runs"),
            Self::Protected => f.write_str("protected against deletion"),
            Self::Failed { code, message } => write!(f, "{code}: {message}"),
            Self::Illegal(text) => write!(f, "ILLEGAL: {text}"),
            Self::Lost => f.write_str("no answer: the daemon died"),
        }
    }
}

/// One call and its answer, as far as they concern one VM.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// Who called; each client has one call under way at a time.
    pub(crate) client: usize,
    /// The VM, by its place among the run's names.
    pub(crate) vm: usize,
    pub(crate) op: Op,
    /// Before the first byte was sent.
    pub(crate) begin: Micros,
    /// After the last byte had come, or the loss of the connection was seen.
    pub(crate) end: Micros,
    /// When an effect that nobody was told of must have shown, or will never.
    pub(crate) settled: Micros,
    pub(crate) answer: Answer,
}

impl Call {
    /// Whether it may still change the VM after its end.
    pub(crate) const fn is_open(&self) -> bool {
        matches!(self.answer, Answer::Lost | Answer::Failed { .. } | Answer::Illegal(_))
    }

    /// The last moment at which it may change the VM.
    pub(crate) const fn latest(&self) -> Micros {
        if self.is_open() { self.settled } else { self.end }
    }
}

/// One entry of ListVmEvents.
#[derive(Clone, Debug, Default)]
pub(crate) struct Event {
    pub(crate) token: String,
    pub(crate) time: Micros,
    pub(crate) vm_id: String,
    pub(crate) uid: String,
    pub(crate) kind: String,
    pub(crate) state: Option<State>,
    pub(crate) phase: String,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) cause: String,
    pub(crate) actor: String,
    pub(crate) ended_by: String,
}

/// One life of the daemon.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Life {
    /// When it said that it serves; `None` if it was killed before.
    pub(crate) serving: Option<Micros>,
    /// When it had been killed; `None` for the one at the end.
    pub(crate) killed: Option<Micros>,
}

/// How long an effect that was on its way to a VMM may take to show.
pub(crate) const GRACE: Micros = 5 * SECOND;

/// When an effect that was under way at `from` must have shown: a daemon that starts settles what the one before it had begun,
/// and it may take a second one where the first was killed before the VMM had come to its end.
pub(crate) fn settled(from: Micros, lives: &[Life]) -> Micros {
    if from == Micros::MAX {
        return from;
    }
    let dies_soon = lives
        .iter()
        .any(|life| life.killed.is_some_and(|killed| killed + SECOND >= from && killed < from + GRACE));
    let starts: Vec<Micros> = lives.iter().filter_map(|life| life.serving).filter(|at| *at >= from).collect();
    match (dies_soon, starts.first(), starts.get(1)) {
        (true, Some(first), second) => (first + GRACE).max(second.copied().unwrap_or(0)),
        (true, None, _) => Micros::MAX,
        (false, _, _) => from + GRACE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(serving: Micros, killed: Option<Micros>) -> Life {
        Life { serving: Some(serving * SECOND), killed: killed.map(|at| at * SECOND) }
    }

    #[test]
    fn an_unfinished_call_is_settled_by_the_next_daemons() {
        let lives = [life(1, Some(10)), life(11, Some(30)), life(31, None)];
        assert_eq!(settled(2 * SECOND, &lives), 7 * SECOND, "nobody dies meanwhile");
        assert_eq!(settled(10 * SECOND, &lives), 31 * SECOND, "the second start at the latest");
        assert_eq!(settled(29 * SECOND, &lives), 36 * SECOND);
        assert_eq!(settled(29 * SECOND, &lives[..2]), Micros::MAX, "no daemon has come since");
    }
}
