//! QEMU's commands as Rust methods: only those in use, with only the used parts of their answers.

use serde::Deserialize;
use serde_json::{Value, json};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, GuestState, StorageCounters};

use super::qmp::{CloseReason, Qmp, QmpError};
use crate::connect_errors;
use crate::program::Version;

/// QEMU's action for a reset, both for a reset by the guest and for `system_reset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebootAction {
    /// The guest starts again in the same process.
    Reset,
    /// The process ends.
    Shutdown,
}

impl RebootAction {
    /// Returns QEMU's name of the action.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Shutdown => "shutdown",
        }
    }
}

/// The state of QEMU's guest, by QEMU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Stopped by a debugger.
    Debug,
    /// Waits for an incoming migration.
    Inmigrate,
    /// The accelerator failed; the guest cannot go on.
    InternalError,
    /// A disk failed where that stops the guest.
    IoError,
    /// Stopped by a command.
    Paused,
    /// Stopped after a migration.
    Postmigrate,
    /// Not started yet.
    Prelaunch,
    /// Stopped to end a migration.
    FinishMigrate,
    /// Stopped to restore a snapshot.
    RestoreVm,
    /// The guest's CPUs run.
    Running,
    /// Stopped to save a snapshot.
    SaveVm,
    /// The guest has powered off.
    Shutdown,
    /// The guest sleeps.
    Suspended,
    /// The guest's watchdog stopped it.
    Watchdog,
    /// The guest panicked.
    GuestPanicked,
    /// Stopped to replicate.
    Colo,
}

impl RunState {
    /// Returns the state of the guest in the terms of the port.
    pub const fn guest_state(self) -> GuestState {
        match self {
            // A sleeping guest is woken by its own devices, so it counts as running.
            Self::Running | Self::Suspended => GuestState::Running,
            Self::Debug
            | Self::Inmigrate
            | Self::Paused
            | Self::Postmigrate
            | Self::Prelaunch
            | Self::FinishMigrate
            | Self::RestoreVm
            | Self::SaveVm
            | Self::Colo => GuestState::Paused,
            Self::InternalError | Self::IoError | Self::Shutdown | Self::Watchdog | Self::GuestPanicked => {
                GuestState::Ended
            }
        }
    }

    /// Returns the state of the guest in a QEMU that another program started. A guest that has
    /// failed counts as paused, because its owner may examine it.
    pub const fn attached_guest_state(self) -> GuestState {
        match self.failure() {
            Some(_) => GuestState::Paused,
            None => self.guest_state(),
        }
    }

    /// Returns the reason for which a guest in this state cannot continue, or `None` if it can or
    /// has powered off.
    pub const fn failure(self) -> Option<&'static str> {
        match self {
            Self::InternalError => Some("the accelerator could not go on with the guest (internal-error)"),
            Self::IoError => Some("a disk of the guest failed (io-error)"),
            Self::Watchdog => Some("the guest's watchdog fired (watchdog)"),
            Self::GuestPanicked => Some("the guest panicked (guest-panicked)"),
            Self::Running
            | Self::Suspended
            | Self::Debug
            | Self::Inmigrate
            | Self::Paused
            | Self::Postmigrate
            | Self::Prelaunch
            | Self::FinishMigrate
            | Self::RestoreVm
            | Self::SaveVm
            | Self::Colo
            | Self::Shutdown => None,
        }
    }
}

/// The empty object that a command without an answer returns.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EmptyReturn {}

#[derive(Debug, Deserialize)]
struct StatusReturn {
    status: RunState,
}

#[derive(Debug, Deserialize)]
struct VersionReturn {
    qemu: Version,
}

#[derive(Debug, Deserialize)]
struct BlockStats {
    stats: BlockCounters,
}

#[derive(Debug, Deserialize)]
struct BlockCounters {
    rd_bytes: u64,
    wr_bytes: u64,
    rd_operations: u64,
    wr_operations: u64,
}

impl Qmp {
    async fn order(&self, command: &'static str, arguments: Value) -> Result<(), QmpError> {
        let EmptyReturn {} = self.execute(command, arguments).await?;
        Ok(())
    }

    /// Starts the guest's CPUs.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does. The same holds for all commands below.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.order("cont", Value::Null).await
    }

    /// Stops the guest's CPUs.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.order("stop", Value::Null).await
    }

    /// Asks for the state of the guest.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn query_status(&self) -> Result<RunState, QmpError> {
        Ok(self.execute::<StatusReturn>("query-status", Value::Null).await?.status)
    }

    /// Presses the guest's power button. Returns at once. The guest may ignore the button.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.order("system_powerdown", Value::Null).await
    }

    /// Presses the guest's reset button.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.order("system_reset", Value::Null).await
    }

    /// Sets the action of all later resets.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn set_reboot_action(&self, action: RebootAction) -> Result<(), QmpError> {
        self.order("set-action", json!({ "reboot": action.as_str() })).await
    }

    /// Ends QEMU.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn quit(&self) -> Result<(), QmpError> {
        self.order("quit", Value::Null).await
    }

    /// Reads QEMU's version again. The cheapest command.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn query_version(&self) -> Result<Version, QmpError> {
        Ok(self.execute::<VersionReturn>("query-version", Value::Null).await?.qemu)
    }

    /// Reads the block counters, summed over all disks.
    ///
    /// # Errors
    ///
    /// Fails as [`Qmp::execute`] does.
    pub async fn query_blockstats(&self) -> Result<StorageCounters, QmpError> {
        let disks: Vec<BlockStats> = self.execute("query-blockstats", Value::Null).await?;
        Ok(disks.iter().fold(StorageCounters::default(), |sum, disk| StorageCounters {
            bytes_read: sum.bytes_read.saturating_add(disk.stats.rd_bytes),
            bytes_written: sum.bytes_written.saturating_add(disk.stats.wr_bytes),
            read_operations: sum.read_operations.saturating_add(disk.stats.rd_operations),
            write_operations: sum.write_operations.saturating_add(disk.stats.wr_operations),
        }))
    }
}

impl From<QmpError> for BackendError {
    fn from(error: QmpError) -> Self {
        let unless_sent = |sent: bool| if sent { Effect::Unknown } else { Effect::NotApplied };
        let (kind, effect) = match &error {
            QmpError::Connect(error) => (connect_errors::failure(error), Effect::NotApplied),
            QmpError::NoGreeting(_) => (BackendErrorKind::Timeout, Effect::NotApplied),
            QmpError::Timeout { sent, .. } => (BackendErrorKind::Timeout, unless_sent(*sent)),
            QmpError::Refused { .. } => {
                return Self::refused(Effect::NotApplied, error.to_string()).caused_by(error);
            }
            QmpError::Closed { reason: CloseReason::Eof | CloseReason::Io(_), sent } => {
                (BackendErrorKind::Unreachable, unless_sent(*sent))
            }
            QmpError::Closed { reason: CloseReason::LineTooLong | CloseReason::Garbage(_), sent } => {
                (BackendErrorKind::Protocol, unless_sent(*sent))
            }
            QmpError::Malformed { .. } => (BackendErrorKind::Protocol, Effect::Unknown),
        };
        Self::new(kind, effect, error.to_string()).caused_by(error)
    }
}
