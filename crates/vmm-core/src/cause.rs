//! The cause of an event: the method of a client, or an observation.

use crate::state::VmOperation;
use crate::words::word_table;

word_table! {
    /// The cause of an event.
    Cause {
        /// CreateVm.
        CreateVm = "CreateVm",
        /// BootVm.
        BootVm = "BootVm",
        /// ShutdownVm.
        ShutdownVm = "ShutdownVm",
        /// PauseVm.
        PauseVm = "PauseVm",
        /// ResumeVm.
        ResumeVm = "ResumeVm",
        /// RebootVm.
        RebootVm = "RebootVm",
        /// UpdateVm.
        UpdateVm = "UpdateVm",
        /// DeleteVm without force.
        DeleteVm = "DeleteVm",
        /// DeleteVm with force.
        DeleteVmWithForce = "DeleteVm with force",
        /// The daemon was started, and has determined the state of the VM.
        DaemonStarted = "daemon-started",
        /// The files of a VM that runs answer again.
        FilesAnswer = "files-answer",
        /// The guest had ended when its VMM was asked.
        GuestEnded = "guest-ended",
        /// The VMM reported that the guest cannot go on.
        GuestFailed = "guest-failed",
        /// The guest reset itself.
        GuestReset = "guest-reset",
        /// The host was started anew.
        HostReboot = "host-reboot",
        /// A VM of another program was found.
        Imported = "imported",
        /// This program cannot run the VM, or cannot read its record.
        NotTakenUp = "not-taken-up",
        /// Another program stopped the guest's CPUs.
        PausedFromOutside = "paused-from-outside",
        /// At the VM's place runs another VM.
        PlaceTaken = "place-taken",
        /// The VMM answers again.
        ReachableAgain = "reachable-again",
        /// Another program reset the guest.
        ResetFromOutside = "reset-from-outside",
        /// The guest reset itself more often than the restart policy allows.
        RestartLoop = "restart-loop",
        /// The restart policy.
        RestartPolicy = "restart-policy",
        /// Another program resumed the guest's CPUs.
        ResumedFromOutside = "resumed-from-outside",
        /// The control socket of a VMM that lives is there again.
        SocketsBack = "sockets-back",
        /// The control socket of a VMM that lives is gone.
        SocketsGone = "sockets-gone",
        /// Another program started the VM at its place.
        StartedFromOutside = "started-from-outside",
        /// The event cannot be read. Only shown in its place.
        UnreadableEvent = "unreadable-event",
        /// The VMM did not answer.
        VmmDoesNotAnswer = "vmm-does-not-answer",
        /// The VMM ended.
        VmmExited = "vmm-exited",
        /// The VMM had ended before the daemon was started.
        VmmGoneAtStart = "vmm-gone-at-start",
    }
}

impl Cause {
    /// Returns the cause of a change that a client requested by `operation`.
    pub const fn of(operation: VmOperation) -> Self {
        match operation {
            VmOperation::Boot => Self::BootVm,
            VmOperation::Shutdown => Self::ShutdownVm,
            VmOperation::Pause => Self::PauseVm,
            VmOperation::Resume => Self::ResumeVm,
            VmOperation::Reboot => Self::RebootVm,
            VmOperation::Update => Self::UpdateVm,
            VmOperation::Delete => Self::DeleteVm,
            VmOperation::ForceDelete => Self::DeleteVmWithForce,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words that clients read and that events of earlier releases hold.
    const WORDS: [&str; 31] = [
        "CreateVm",
        "BootVm",
        "ShutdownVm",
        "PauseVm",
        "ResumeVm",
        "RebootVm",
        "UpdateVm",
        "DeleteVm",
        "DeleteVm with force",
        "daemon-started",
        "files-answer",
        "guest-ended",
        "guest-failed",
        "guest-reset",
        "host-reboot",
        "imported",
        "not-taken-up",
        "paused-from-outside",
        "place-taken",
        "reachable-again",
        "reset-from-outside",
        "restart-loop",
        "restart-policy",
        "resumed-from-outside",
        "sockets-back",
        "sockets-gone",
        "started-from-outside",
        "unreadable-event",
        "vmm-does-not-answer",
        "vmm-exited",
        "vmm-gone-at-start",
    ];

    #[test]
    fn the_words_are_those_that_clients_know() {
        let words: Vec<&str> = Cause::ALL.iter().map(Cause::as_str).collect();
        assert_eq!(words, WORDS);
        for operation in VmOperation::ALL {
            assert_eq!(Cause::of(operation).as_str(), operation.name());
        }
    }

    #[test]
    fn an_event_of_any_release_is_read_and_written_unchanged() {
        for word in WORDS {
            let json = format!("\"{word}\"");
            let cause: Cause = serde_json::from_str(&json).unwrap();
            assert!(!matches!(cause, Cause::Other(_)), "{word}");
            assert_eq!(serde_json::to_string(&cause).unwrap(), json);
        }
        let newer: Cause = serde_json::from_str("\"a-cause-to-come\"").unwrap();
        assert_eq!(newer, Cause::Other("a-cause-to-come".into()));
        assert_eq!(serde_json::to_string(&newer).unwrap(), "\"a-cause-to-come\"");
    }
}
