//! Which of QEMU's RESET events are resets of the guest.
//!
//! On q35 a reset leaves the firmware's writable copy in place. The firmware finds itself there when the CPU starts again,
//! concludes that a program jumped to its entry point, and resets the machine properly: once more, by two means, of which QEMU
//! counts one or both. So one reset shows as two or three events:
//!
//! ```text
//!   reset by guest or host      firmware resets       boots
//!   ───────┬───────────────────────┬──┬─────────────────►
//!        counted                  ignored
//!          └── at most FIRMWARE ───┘  └ at most ECHO
//! ```

use std::time::Duration;

use super::convert::Machine;

/// How long the firmware may take until it resets the machine; seconds only on a host that is short of CPUs.
const FIRMWARE: Duration = Duration::from_secs(3);
/// How far apart the events of one reset may be.
const ECHO: Duration = Duration::from_millis(50);

/// Tells resets of the guest from their echoes.
#[derive(Debug)]
pub(super) struct ResetFilter {
    machine: Machine,
    phase: Phase,
}

/// Times are QEMU's own, so that a delay in the daemon changes nothing.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// The guest runs.
    Guest,
    /// There was a reset, and the firmware has not made its own yet.
    Firmware { since: Duration },
    /// The firmware has.
    Echoes { since: Duration },
}

impl ResetFilter {
    pub(super) fn new(machine: Machine) -> Self {
        Self { machine, phase: Phase::Guest }
    }

    /// Takes a RESET event of time `at`, and says whether the guest made it.
    pub(super) fn is_guest_reset(&mut self, by_guest: bool, at: Duration) -> bool {
        let (counted, phase) = match (self.machine, self.phase) {
            (Machine::Microvm, phase) => (by_guest, phase),
            (Machine::Q35, Phase::Firmware { since }) if by_guest && within(since, at, FIRMWARE) => {
                (false, Phase::Echoes { since: at })
            }
            (Machine::Q35, Phase::Echoes { since }) if by_guest && within(since, at, ECHO) => {
                (false, Phase::Echoes { since })
            }
            (Machine::Q35, Phase::Guest | Phase::Firmware { .. } | Phase::Echoes { .. }) => {
                (by_guest, Phase::Firmware { since: at })
            }
        };
        self.phase = phase;
        counted
    }
}

/// Says whether `at` is at most `span` after `since`. A clock that was set back proves nothing.
fn within(since: Duration, at: Duration, span: Duration) -> bool {
    at.checked_sub(since).is_some_and(|passed| passed <= span)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: bool = false;
    const GUEST: bool = true;

    fn counted(machine: Machine, events: &[(bool, u64)]) -> Vec<u64> {
        let mut filter = ResetFilter::new(machine);
        let mut counted = Vec::new();
        for (by_guest, at) in events {
            if filter.is_guest_reset(*by_guest, Duration::from_millis(*at)) {
                counted.push(*at);
            }
        }
        counted
    }

    #[test]
    fn the_firmware_of_q35_is_not_the_guest() {
        let none: [u64; 0] = [];
        assert_eq!(counted(Machine::Q35, &[(HOST, 0), (GUEST, 48), (GUEST, 49)]), none);
        assert_eq!(counted(Machine::Q35, &[(HOST, 0), (GUEST, 64)]), none);
        assert_eq!(counted(Machine::Q35, &[(GUEST, 0), (GUEST, 48), (GUEST, 49)]), [0]);
    }

    #[test]
    fn every_reset_of_a_looping_guest_counts_once() {
        let events =
            [(GUEST, 0), (GUEST, 50), (GUEST, 51), (GUEST, 400), (GUEST, 450), (GUEST, 800), (GUEST, 850)];
        assert_eq!(counted(Machine::Q35, &events), [0, 400, 800]);
    }

    #[test]
    fn a_reset_long_after_another_counts_though_the_firmware_made_none() {
        assert_eq!(counted(Machine::Q35, &[(HOST, 0), (GUEST, 5_000), (GUEST, 5_050)]), [5_000]);
        assert_eq!(
            counted(Machine::Q35, &[(GUEST, 9_000), (GUEST, 1_000)]),
            [9_000, 1_000],
            "clock set back"
        );
    }

    #[test]
    fn microvm_has_no_echoes() {
        assert_eq!(counted(Machine::Microvm, &[(HOST, 0), (GUEST, 48), (GUEST, 49)]), [48, 49]);
    }
}
