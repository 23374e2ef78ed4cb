//! The machine-readable cause of a VM's [`Status`](crate::state::Status).

use crate::words::word_table;

word_table! {
    /// The cause of a VM's phase. The word is empty for [`Reason::Nothing`].
    #[derive(Default)]
    Reason {
        /// No cause.
        #[default]
        Nothing = "",
        /// Force pre-empted the operation.
        Aborted = "aborted",
        /// The guest could not be started.
        BootFailed = "boot-failed",
        /// A start was cut short by the end of the daemon.
        BootInterrupted = "boot-interrupted",
        /// The creation could not be recorded.
        CreateFailed = "create-failed",
        /// The deletion could not be carried out.
        DeleteFailed = "delete-failed",
        /// The domain of libvirt is another VM's.
        DomainNotOurs = "domain-not-ours",
        /// No endpoint of the configuration leads to the VM.
        EndpointNotConfigured = "endpoint-not-configured",
        /// The files of a VM that runs answer again.
        FilesAnswer = "files-answer",
        /// The files of a VM that runs could not be looked at in time.
        FilesDoNotAnswer = "files-do-not-answer",
        /// The guest crashed.
        GuestCrash = "guest-crash",
        /// The guest powered itself off.
        GuestPowerOff = "guest-power-off",
        /// The guest reset itself.
        GuestReset = "guest-reset",
        /// The host was started anew.
        HostReboot = "host-reboot",
        /// A process may be the VM's, which cannot be proven.
        IdentityUnproven = "identity-unproven",
        /// The VM was found as another program had made it.
        Imported = "imported",
        /// This program failed.
        Internal = "internal",
        /// libvirt has no domain for a process that is the VM's.
        LibvirtLostIt = "libvirt-lost-it",
        /// libvirt does not answer.
        LibvirtUnreachable = "libvirt-unreachable",
        /// This program cannot run the VM, or cannot read its record.
        NotTakenUp = "not-taken-up",
        /// An operation failed, and the VM is as before.
        OperationFailed = "operation-failed",
        /// An operation was cut short by the end of the daemon.
        OperationInterrupted = "operation-interrupted",
        /// Another program stopped the guest's CPUs.
        PausedFromOutside = "paused-from-outside",
        /// At the VM's place runs another VM.
        PlaceTaken = "place-taken",
        /// The processes of the host cannot be looked at.
        ProcessesHidden = "processes-hidden",
        /// The VMM answers again.
        ReachableAgain = "reachable-again",
        /// A reboot was cut short by the end of the daemon.
        RebootInterrupted = "reboot-interrupted",
        /// Another program reset the guest.
        ResetFromOutside = "reset-from-outside",
        /// The guest was started too often without a quiet minute.
        RestartLoop = "restart-loop",
        /// Another program resumed the guest's CPUs.
        ResumedFromOutside = "resumed-from-outside",
        /// Several processes may be the VM's.
        SeveralVmms = "several-vmms",
        /// The VM was shut down as asked.
        Shutdown = "shutdown",
        /// The socket of the VM is served by another process.
        SocketTaken = "socket-taken",
        /// The VMM lives, and its control socket or the folder of that socket is gone.
        SocketsGone = "sockets-gone",
        /// A start by policy could not even begin.
        StartNotBegun = "start-not-begun",
        /// Another program started the VM at its place.
        StartedFromOutside = "started-from-outside",
        /// Nothing proves the cause of the end.
        Unknown = "unknown",
        /// The event cannot be read.
        UnreadableEvent = "unreadable-event",
        /// The VMM did not answer.
        VmmDoesNotAnswer = "vmm-does-not-answer",
        /// The process of the VMM could not be ended.
        VmmDoesNotEnd = "vmm-does-not-end",
        /// The VMM failed, or was killed.
        VmmFailed = "vmm-failed",
        /// No process of the VM is left.
        VmmGone = "vmm-gone",
        /// The VMM did not answer when the daemon looked for it.
        VmmSilent = "vmm-silent",
        /// The VMM was ordered to end through its own interface.
        VmmToldToEnd = "vmm-told-to-end",
    }
}

impl Reason {
    /// Returns true where there is no cause.
    pub fn is_nothing(&self) -> bool {
        *self == Self::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words that clients read and that records of earlier releases hold.
    const WORDS: [&str; 44] = [
        "",
        "aborted",
        "boot-failed",
        "boot-interrupted",
        "create-failed",
        "delete-failed",
        "domain-not-ours",
        "endpoint-not-configured",
        "files-answer",
        "files-do-not-answer",
        "guest-crash",
        "guest-power-off",
        "guest-reset",
        "host-reboot",
        "identity-unproven",
        "imported",
        "internal",
        "libvirt-lost-it",
        "libvirt-unreachable",
        "not-taken-up",
        "operation-failed",
        "operation-interrupted",
        "paused-from-outside",
        "place-taken",
        "processes-hidden",
        "reachable-again",
        "reboot-interrupted",
        "reset-from-outside",
        "restart-loop",
        "resumed-from-outside",
        "several-vmms",
        "shutdown",
        "socket-taken",
        "sockets-gone",
        "start-not-begun",
        "started-from-outside",
        "unknown",
        "unreadable-event",
        "vmm-does-not-answer",
        "vmm-does-not-end",
        "vmm-failed",
        "vmm-gone",
        "vmm-silent",
        "vmm-told-to-end",
    ];

    #[test]
    fn the_wire_words_are_stable() {
        let words: Vec<&str> = Reason::ALL.iter().map(Reason::as_str).collect();
        assert_eq!(words, WORDS);
    }

    #[test]
    fn reasons_of_every_release_are_read_and_written_unchanged() {
        for word in WORDS {
            let json = format!("\"{word}\"");
            let reason: Reason = serde_json::from_str(&json).unwrap();
            assert!(!matches!(reason, Reason::Other(_)), "{word}");
            assert_eq!(serde_json::to_string(&reason).unwrap(), json);
        }
        let newer: Reason = serde_json::from_str("\"a-reason-to-come\"").unwrap();
        assert_eq!(newer, Reason::Other("a-reason-to-come".into()));
        assert_eq!(serde_json::to_string(&newer).unwrap(), "\"a-reason-to-come\"");
    }
}
