//! The messages between the daemon and `vmm-libvirt-helper`: JSON, one object a line, over the
//! helper's stdin and stdout.
//!
//! ```text
//!   daemon ── {"id":7,"call":"suspend","uuid":"…"} ──► helper ── libvirt's protocol ──► libvirtd
//!   daemon ◄─ {"says":"ready",…} once, or {"says":"unreachable",…} and the helper ends
//!   daemon ◄─ {"says":"answer","id":7,"ok":{"got":"done"}} or {…,"failed":{…}}, in any order
//!   daemon ◄─ {"says":"lifecycle",…}, {"says":"monitor",…} whenever libvirt has an event
//! ```
//!
//! Both ends are built together, so the protocol has no versions: an unknown member is an error.
//! The helper cuts texts from libvirt to size, and the daemon reads them strictly, because guests
//! choose some of them.

use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The longest line, in bytes, with its end. The list of a host with some thousands of domains
/// fits.
pub const MAX_LINE: usize = 2 << 20;

/// The namespace of this program's element in a domain's `<metadata>`. Nothing is ever fetched from
/// this name.
pub const MARK_NAMESPACE: &str = "urn:vmm-controlplane:libvirt:1";

/// A call of the daemon, and the data to answer it by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallRequest {
    /// The number of the request. The daemon chooses it, and the answer repeats it.
    pub id: u64,
    /// The time for which the daemon waits for the answer, in milliseconds. The helper does not
    /// begin a call after that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_ms: Option<u64>,
    /// The operation.
    #[serde(flatten)]
    pub call: Call,
}

/// The calls that the daemon can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case")]
pub enum Call {
    /// Lists every domain, running or not.
    List,
    /// Describes one domain.
    #[serde(rename = "look")]
    LookUp {
        /// The domain.
        uuid: Uuid,
    },
    /// Describes the domain with this name.
    #[serde(rename = "look-by-name")]
    LookUpByName {
        /// The name.
        name: String,
    },
    /// Reads a domain's configuration from libvirt.
    Xml {
        /// The domain.
        uuid: Uuid,
    },
    /// Defines a domain. A domain with the same UUID and name gets this configuration for its next
    /// start.
    Define {
        /// The configuration.
        xml: String,
    },
    /// Starts a defined domain with the guest's CPUs stopped.
    Start {
        /// The domain.
        uuid: Uuid,
    },
    /// Stops the guest's CPUs.
    Suspend {
        /// The domain.
        uuid: Uuid,
    },
    /// Resumes the guest's CPUs.
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
    /// Sets the effect of a guest's reset until the domain stops.
    OnReboot {
        /// The domain.
        uuid: Uuid,
        /// True if the guest starts again; false if its domain stops.
        restart: bool,
    },
    /// Ends a domain.
    Destroy {
        /// The domain.
        uuid: Uuid,
    },
    /// Removes a domain from libvirt's configuration. A running domain goes when it ends. Its disks
    /// stay.
    Undefine {
        /// The domain.
        uuid: Uuid,
        /// True if libvirt's own files of the domain are removed too: saved memory, snapshot
        /// records and firmware variables.
        everything: bool,
    },
    /// Reads the counters of all disks together.
    BlockStats {
        /// The domain.
        uuid: Uuid,
    },
}

impl Call {
    /// Returns the call's name for messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::List => "list",
            Self::LookUp { .. } | Self::LookUpByName { .. } => "look",
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

    /// Returns the reason for which libvirtd may answer the call late.
    ///
    /// The reasons were observed on libvirt 9.0 with a QEMU that hung under an earlier call:
    /// libvirtd described and redefined the domain at once, and `undefine` waited for the earlier
    /// call.
    pub const fn waits_for(&self) -> WaitsFor {
        match self {
            Self::List | Self::LookUp { .. } | Self::LookUpByName { .. } | Self::Xml { .. } => {
                WaitsFor::Nothing
            }
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

    /// Returns the order in which the call is made among others. Calls that end, ask or forget a
    /// guest are made at once, because they must get past calls that hang.
    pub const fn rank(&self) -> CallRank {
        match self {
            Self::List
            | Self::LookUp { .. }
            | Self::LookUpByName { .. }
            | Self::Xml { .. }
            | Self::Define { .. }
            | Self::Undefine { .. }
            | Self::Shutdown { .. }
            | Self::Destroy { .. } => CallRank::Free,
            Self::Start { uuid }
            | Self::Suspend { uuid }
            | Self::Resume { uuid }
            | Self::Reset { uuid }
            | Self::OnReboot { uuid, .. } => CallRank::Orders(*uuid),
            Self::BlockStats { uuid } => CallRank::Samples(*uuid),
        }
    }

    /// Returns true if the call changes nothing.
    pub const fn only_reads(&self) -> bool {
        match self {
            Self::List
            | Self::LookUp { .. }
            | Self::LookUpByName { .. }
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
    /// libvirtd answers from its own memory. Silence means that libvirtd itself hangs.
    Nothing,
    /// libvirtd may have to examine the program of QEMU first, which takes up to half a minute, or
    /// to write files.
    Host,
    /// The QEMU of this domain must answer, or an earlier call that waits for that QEMU must end.
    Qemu(Uuid),
}

/// The order in which a call is made among other calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallRank {
    /// The call is made at once.
    Free,
    /// The call waits for others that need the domain's QEMU.
    Orders(Uuid),
    /// The call waits for others that need the domain's QEMU, and for an earlier reading of its
    /// counters.
    Samples(Uuid),
}

/// A line that the helper writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "says", rename_all = "kebab-case", deny_unknown_fields)]
pub enum HelperMessage {
    /// libvirt is connected, has examined its QEMU, and sends its events from now on.
    Ready {
        /// The version of libvirt.
        libvirt: String,
        /// The version of QEMU.
        hypervisor: String,
    },
    /// libvirt cannot be reached. The helper ends after this line.
    Unreachable {
        /// libvirt's error.
        failure: CallFailure,
    },
    /// The connection to libvirt is lost. The helper ends after this line.
    Closed {
        /// The reason, as far as libvirt gives one.
        why: String,
    },
    /// A call has been answered.
    Answer {
        /// The number of the request.
        id: u64,
        /// The result, if the call succeeded.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ok: Option<CallResult>,
        /// The failure, if the call failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<CallFailure>,
    },
    /// A domain began, ended or changed.
    Lifecycle {
        /// The domain.
        uuid: Uuid,
        /// The change.
        event: Lifecycle,
    },
    /// QEMU itself sent an event.
    Monitor {
        /// The domain.
        uuid: Uuid,
        /// The name of QEMU's event, such as `RESET`.
        event: String,
        /// The event's data, as QEMU wrote them.
        details: String,
    },
}

/// The result of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "got", rename_all = "kebab-case", deny_unknown_fields)]
pub enum CallResult {
    /// The call was carried out.
    Done,
    /// The domains that were asked for.
    Domains {
        /// One description for each domain; empty if there is none.
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

/// The facts about a domain that libvirt gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    /// The domain's UUID.
    pub uuid: Uuid,
    /// The domain's name.
    pub name: String,
    /// This program's element in the domain's metadata as XML, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
    /// The domain's activity.
    pub state: DomainState,
    /// True if libvirt keeps the domain's configuration after its end.
    pub persistent: bool,
}

/// The activity of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    /// The guest runs.
    Running,
    /// The guest's CPUs are stopped.
    Paused,
    /// libvirt has stopped the guest's CPUs for a moment, to start or save the domain.
    Busy,
    /// A disk failed, and QEMU stopped the guest's CPUs.
    IoError,
    /// The guest's watchdog stopped its CPUs.
    Watchdog,
    /// The guest crashed, and libvirt keeps the domain.
    Crashed,
    /// The guest has powered off, and the domain is about to end.
    ShuttingDown,
    /// The domain does not run.
    Off,
}

/// A change of a domain that libvirt reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lifecycle {
    /// The domain was defined, or got another configuration.
    Defined,
    /// The domain was undefined.
    Undefined,
    /// The domain was started.
    Started,
    /// The guest's CPUs were stopped.
    Suspended,
    /// The guest's CPUs were resumed.
    Resumed,
    /// The guest has powered off, or QEMU was ordered to end.
    Shutdown,
    /// The guest crashed.
    Crashed,
    /// The domain ended in order.
    Stopped,
    /// A client of libvirt ended the domain.
    Destroyed,
    /// The domain ended because QEMU failed or was killed.
    Failed,
    /// The domain ended and went on elsewhere: in a file, on another host, or in a snapshot.
    Moved,
    /// The event has no variant here.
    Other,
}

/// The reason why libvirt did not carry out a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallFailure {
    /// The kind, for decisions.
    pub kind: CallFailureKind,
    /// libvirt's text, for people.
    pub message: String,
}

/// Kinds of [`CallFailure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CallFailureKind {
    /// There is no such domain.
    NoDomain,
    /// The domain's state does not allow the call.
    WrongState,
    /// The helper has too many waiting calls, or this call has waited too long. libvirt was not
    /// asked.
    Busy,
    /// libvirt has waited in vain for an earlier call for the same domain. Nothing was done.
    Timeout,
    /// The connection is lost or cannot be made.
    NoConnection,
    /// The daemon's user lacks the permission.
    Denied,
    /// This version of libvirt does not support the call.
    Unsupported,
    /// Another failure, mostly a refusal of QEMU.
    Other,
}

/// Reads one line of at most [`MAX_LINE`] bytes into `line`, without its end. Returns `None` at the
/// end of the input.
///
/// # Errors
/// Returns the reader's error, and `InvalidData` where a line is too long or the input ends within
/// it.
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

/// Serialises a value as one line with its end.
///
/// # Errors
/// Returns an error where JSON cannot hold the value. JSON holds every value of this crate's types.
pub fn to_line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests;
