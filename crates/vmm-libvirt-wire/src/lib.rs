//! What the daemon and `vmm-libvirt-helper` say to each other: JSON, one object a line, over the helper's stdin and stdout.
//!
//! ```text
//!   daemon ── {"id":7,"call":"suspend","uuid":"…"} ─────────────────────► helper ── libvirt's own protocol ──► libvirtd
//!   daemon ◄─ {"says":"ready",…} once, or {"says":"unreachable",…} and the helper ends
//!   daemon ◄─ {"says":"answer","id":7,"ok":{"got":"done"}} or {…,"failed":{…}}, in any order
//!   daemon ◄─ {"says":"lifecycle",…}, {"says":"monitor",…} whenever libvirt has an event
//! ```
//!
//! Both ends are built together, so nothing here is for other versions: an unknown member is an error. What comes from libvirt,
//! and so in part from guests, is cut to size by the helper and read strictly by the daemon.

use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The longest line, in bytes, its end included. A host with some thousands of domains fits.
pub const MAX_LINE: usize = 2 << 20;

/// The namespace of this program's element in a domain's `<metadata>`. A name, not an address: nothing is fetched from there.
pub const MARK_NAMESPACE: &str = "urn:vmm-controlplane:libvirt:1";

/// One call of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the daemon, and borne by the answer.
    pub id: u64,
    /// The time for which the daemon waits for the answer, in milliseconds. A call that has not begun by then is not made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_ms: Option<u64>,
    /// The operation.
    #[serde(flatten)]
    pub call: Call,
}

/// What the daemon can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case")]
pub enum Call {
    /// Every domain, running or not.
    List,
    /// One domain.
    Look {
        /// The domain.
        uuid: Uuid,
    },
    /// The domain of that name.
    LookByName {
        /// The name.
        name: String,
    },
    /// What libvirt knows of a domain's configuration.
    Xml {
        /// The domain.
        uuid: Uuid,
    },
    /// Defines a domain, or gives the one of the same UUID and name another configuration for its next start.
    Define {
        /// The configuration.
        xml: String,
    },
    /// Starts a domain that is defined, with its guest's CPUs standing still.
    Start {
        /// The domain.
        uuid: Uuid,
    },
    /// Stops the guest's CPUs.
    Suspend {
        /// The domain.
        uuid: Uuid,
    },
    /// Lets the guest's CPUs go on.
    Resume {
        /// The domain.
        uuid: Uuid,
    },
    /// Presses the guest's power button.
    Shutdown {
        /// The domain.
        uuid: Uuid,
    },
    /// Presses the guest's reset button.
    Reset {
        /// The domain.
        uuid: Uuid,
    },
    /// Sets what a reset of the guest does from now on, until the domain stops.
    OnReboot {
        /// The domain.
        uuid: Uuid,
        /// Whether the guest starts again; else its domain stops.
        restart: bool,
    },
    /// Ends a domain.
    Destroy {
        /// The domain.
        uuid: Uuid,
    },
    /// Forgets a domain that does not run; one that runs is forgotten when it ends. Its disks stay.
    Undefine {
        /// The domain.
        uuid: Uuid,
        /// Whether what libvirt itself keeps of it goes too: saved memory, the records of snapshots, the firmware's variables.
        everything: bool,
    },
    /// The counters of all disks together.
    BlockStats {
        /// The domain.
        uuid: Uuid,
    },
}

impl Call {
    /// Its name, for messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Look { .. } | Self::LookByName { .. } => "look",
            Self::Xml { .. } => "dumpxml",
            Self::Define { .. } => "define",
            Self::Start { .. } => "start",
            Self::Suspend { .. } => "suspend",
            Self::Resume { .. } => "resume",
            Self::Shutdown { .. } => "shutdown",
            Self::Reset { .. } => "reset",
            Self::OnReboot { .. } => "set-lifecycle-action",
            Self::Destroy { .. } => "destroy",
            Self::Undefine { .. } => "undefine",
            Self::BlockStats { .. } => "domblkstat",
        }
    }

    /// Returns what libvirtd may have to wait for before it answers the call.
    ///
    /// Each answer was observed on libvirt 9.0 with a QEMU that stood still under an earlier call: libvirtd described and
    /// redefined the domain at once, and `undefine` waited for the earlier call.
    pub const fn waits_for(&self) -> WaitsFor {
        match self {
            Self::List | Self::Look { .. } | Self::LookByName { .. } | Self::Xml { .. } => WaitsFor::Nothing,
            Self::Define { .. } => WaitsFor::Host,
            Self::Start { uuid }
            | Self::Suspend { uuid }
            | Self::Resume { uuid }
            | Self::Shutdown { uuid }
            | Self::Reset { uuid }
            | Self::OnReboot { uuid, .. }
            | Self::Destroy { uuid }
            | Self::Undefine { uuid, .. }
            | Self::BlockStats { uuid } => WaitsFor::Qemu(*uuid),
        }
    }

    /// Returns true if libvirtd may have to wait for a QEMU.
    pub const fn needs_qemu(&self) -> bool {
        matches!(self.waits_for(), WaitsFor::Qemu(_))
    }

    /// Returns the order in which the call is made among others. Calls that end, ask or forget a guest are made at once,
    /// because they must get past calls that hang.
    pub const fn rank(&self) -> Rank {
        match self {
            Self::List
            | Self::Look { .. }
            | Self::LookByName { .. }
            | Self::Xml { .. }
            | Self::Define { .. }
            | Self::Undefine { .. }
            | Self::Shutdown { .. }
            | Self::Destroy { .. } => Rank::Free,
            Self::Start { uuid }
            | Self::Suspend { uuid }
            | Self::Resume { uuid }
            | Self::Reset { uuid }
            | Self::OnReboot { uuid, .. } => Rank::Orders(*uuid),
            Self::BlockStats { uuid } => Rank::Samples(*uuid),
        }
    }

    /// Says whether the call changes nothing.
    pub const fn only_reads(&self) -> bool {
        match self {
            Self::List
            | Self::Look { .. }
            | Self::LookByName { .. }
            | Self::Xml { .. }
            | Self::BlockStats { .. } => true,
            Self::Define { .. }
            | Self::Start { .. }
            | Self::Suspend { .. }
            | Self::Resume { .. }
            | Self::Shutdown { .. }
            | Self::Reset { .. }
            | Self::OnReboot { .. }
            | Self::Destroy { .. }
            | Self::Undefine { .. } => false,
        }
    }
}

/// The reason for which libvirtd may answer a [`Call`] late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    /// libvirtd answers out of its own memory. Silence means that libvirtd itself stands still.
    Nothing,
    /// libvirtd may have to examine the program of QEMU first, which takes up to half a minute, or to write files.
    Host,
    /// The QEMU of this domain must answer, or an earlier call that waits for that QEMU must end.
    Qemu(Uuid),
}

/// The order in which calls are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// At once.
    Free,
    /// After others that need the domain's QEMU.
    Orders(Uuid),
    /// The same, and after the counters that are being read.
    Samples(Uuid),
}

/// A line of the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "says", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Message {
    /// libvirt is connected, has looked at its QEMU, and sends its events from now on.
    Ready {
        /// libvirt's own version.
        libvirt: String,
        /// The version of QEMU.
        hypervisor: String,
    },
    /// libvirt cannot be reached. The last line: the helper ends.
    Unreachable {
        /// What it said.
        failure: Failure,
    },
    /// The connection to libvirt is lost. The last line: the helper ends.
    Closed {
        /// Why, as far as libvirt says.
        why: String,
    },
    /// A call has been answered.
    Answer {
        /// The call.
        id: u64,
        /// What it got, if it succeeded.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ok: Option<Got>,
        /// Why it did not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<Failure>,
    },
    /// A domain began, ended or changed.
    Lifecycle {
        /// The domain.
        uuid: Uuid,
        /// What happened.
        event: Lifecycle,
    },
    /// QEMU said something itself.
    Monitor {
        /// The domain.
        uuid: Uuid,
        /// The name of QEMU's event, such as `RESET`.
        event: String,
        /// Its data, as QEMU wrote it.
        details: String,
    },
}

/// What a call got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "got", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Got {
    /// It was done.
    Done,
    /// Domains.
    Domains {
        /// All of them.
        domains: Vec<Domain>,
    },
    /// A configuration.
    Xml {
        /// The configuration.
        xml: String,
    },
    /// Counters.
    Block {
        /// Bytes the guest read.
        read_bytes: u64,
        /// Bytes the guest wrote.
        written_bytes: u64,
        /// Read requests.
        reads: u64,
        /// Write requests.
        writes: u64,
    },
}

/// What libvirt knows of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// This program's element in its metadata, if it has one, as XML.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
    /// What it is doing.
    pub state: DomainState,
    /// Whether it is defined, and so outlives its own end.
    pub persistent: bool,
}

/// What a domain is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    /// It runs.
    Running,
    /// Its CPUs stand still.
    Paused,
    /// libvirt stopped its CPUs for a moment, to start or save it.
    Busy,
    /// A disk of it failed, and its CPUs were stopped.
    IoError,
    /// Its watchdog stopped it.
    Watchdog,
    /// It crashed, and is kept.
    Crashed,
    /// It has powered off, and is about to be gone.
    ShuttingDown,
    /// It does not run.
    Off,
}

/// What happened to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lifecycle {
    /// It was defined, or given another configuration.
    Defined,
    /// It was undefined.
    Undefined,
    /// It was started.
    Started,
    /// Its CPUs were stopped.
    Suspended,
    /// Its CPUs go on.
    Resumed,
    /// Its guest has powered off, or QEMU was told to end.
    Shutdown,
    /// Its guest crashed.
    Crashed,
    /// It ended in order.
    Stopped,
    /// Somebody ended it through libvirt.
    Destroyed,
    /// It ended because QEMU failed or was killed.
    Failed,
    /// It ended, and went to where it is kept: a file, another host, a snapshot.
    Moved,
    /// Something else.
    Other,
}

/// Why libvirt did not do as asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// The kind, to decide by.
    pub kind: FailureKind,
    /// libvirt's words.
    pub message: String,
}

/// Kinds of [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// There is no such domain.
    NoDomain,
    /// The domain is not in a state for that.
    WrongState,
    /// The helper has too many calls waiting, or this one has waited too long. Nothing was done, and libvirt was not asked.
    Busy,
    /// libvirt has waited in vain for an earlier call for the same domain. Nothing was done.
    Timeout,
    /// The connection is lost, or cannot be made.
    NoConnection,
    /// This user may not.
    Denied,
    /// This libvirt cannot.
    Unsupported,
    /// Something else, mostly that QEMU refused.
    Other,
}

/// Reads one line of at most [`MAX_LINE`] bytes; `None` at the end.
///
/// # Errors
/// What reading says; `InvalidData` where the line is longer or ends without an end of line.
pub fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Option<()>> {
    line.clear();
    let mut limited = io::Read::take(&mut *reader, MAX_LINE as u64);
    if limited.read_until(b'\n', line)? == 0 {
        return Ok(None);
    }
    match line.pop() {
        Some(b'\n') => Ok(Some(())),
        Some(_) | None => Err(io::Error::new(io::ErrorKind::InvalidData, "a line is cut short or too long")),
    }
}

/// Writes a value as one line.
///
/// # Errors
/// Where it cannot be written as JSON, which these types always can.
pub fn to_line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: Uuid = Uuid::from_u128(0x0193_f0de_0000_7000_8000_0000_0000_0001);

    fn there_and_back<T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(
        value: T,
        json: &str,
    ) {
        assert_eq!(serde_json::to_string(&value).unwrap(), json);
        assert_eq!(serde_json::from_str::<T>(json).unwrap(), value);
    }

    #[test]
    fn lines_are_as_drawn() {
        there_and_back(
            Request { id: 7, within_ms: None, call: Call::Suspend { uuid: UUID } },
            r#"{"id":7,"call":"suspend","uuid":"0193f0de-0000-7000-8000-000000000001"}"#,
        );
        there_and_back(
            Request { id: 8, within_ms: Some(9), call: Call::List },
            r#"{"id":8,"within_ms":9,"call":"list"}"#,
        );
        there_and_back(
            Message::Answer { id: 7, ok: Some(Got::Done), failed: None },
            r#"{"says":"answer","id":7,"ok":{"got":"done"}}"#,
        );
        let failure = Failure { kind: FailureKind::NoDomain, message: "no".to_owned() };
        there_and_back(
            Message::Answer { id: 7, ok: None, failed: Some(failure) },
            r#"{"says":"answer","id":7,"failed":{"kind":"no-domain","message":"no"}}"#,
        );
        there_and_back(
            Message::Lifecycle { uuid: UUID, event: Lifecycle::Destroyed },
            r#"{"says":"lifecycle","uuid":"0193f0de-0000-7000-8000-000000000001","event":"destroyed"}"#,
        );
    }

    #[test]
    fn calls_that_wait_their_turn_are_those_that_need_the_qemu_of_that_domain() {
        let named = |waits_for| match waits_for {
            WaitsFor::Nothing => "nothing",
            WaitsFor::Host => "the host",
            WaitsFor::Qemu(uuid) => {
                assert_eq!(uuid, UUID);
                "QEMU"
            }
        };
        for (call, waits_for, waits_its_turn) in [
            (Call::List, "nothing", false),
            (Call::Look { uuid: UUID }, "nothing", false),
            (Call::LookByName { name: "vm".to_owned() }, "nothing", false),
            (Call::Xml { uuid: UUID }, "nothing", false),
            (Call::Define { xml: String::new() }, "the host", false),
            (Call::Start { uuid: UUID }, "QEMU", true),
            (Call::Suspend { uuid: UUID }, "QEMU", true),
            (Call::Resume { uuid: UUID }, "QEMU", true),
            (Call::Shutdown { uuid: UUID }, "QEMU", false),
            (Call::Reset { uuid: UUID }, "QEMU", true),
            (Call::OnReboot { uuid: UUID, restart: true }, "QEMU", true),
            (Call::Destroy { uuid: UUID }, "QEMU", false),
            (Call::Undefine { uuid: UUID, everything: true }, "QEMU", false),
            (Call::BlockStats { uuid: UUID }, "QEMU", true),
        ] {
            let rank = call.rank();
            assert_eq!(named(call.waits_for()), waits_for, "{call:?}");
            assert_eq!(rank != Rank::Free, waits_its_turn, "{call:?}");
            if let Rank::Orders(uuid) | Rank::Samples(uuid) = rank {
                assert!(call.needs_qemu() && uuid == UUID, "{call:?}");
            }
        }
    }

    #[test]
    fn what_is_unknown_is_an_error() {
        for line in [
            r#"{"says":"hello"}"#,
            r#"{"says":"closed","why":"x","more":1}"#,
            r#"{"says":"answer","id":-1}"#,
            r#"{"says":"lifecycle","uuid":"x","event":"stopped"}"#,
            "[]",
            "",
        ] {
            assert!(serde_json::from_str::<Message>(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_line_has_an_end_and_a_limit() {
        let mut line = Vec::new();
        let mut two: &[u8] = b"one\ntwo";
        assert_eq!(read_line(&mut two, &mut line).unwrap(), Some(()));
        assert_eq!(line, b"one");
        assert!(read_line(&mut two, &mut line).is_err());
        assert_eq!(read_line(&mut &b""[..], &mut line).unwrap(), None);
        let long = vec![b'x'; MAX_LINE + 1];
        assert!(read_line(&mut &long[..], &mut line).is_err());
    }
}
