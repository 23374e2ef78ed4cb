//! The API's enums and messages in a few words.

use buffa::{EnumValue, Enumeration as _};
use vmm_proto::v1 as pb;

use super::escape;

/// Returns a state as people type it: `running`.
pub(crate) fn state(state: &EnumValue<pb::VmState>) -> String {
    match state.as_known() {
        Some(pb::VmState::VM_STATE_UNSPECIFIED) | None => format!("unknown ({})", state.to_i32()),
        Some(known) => name(known).to_owned(),
    }
}

/// Returns a state's name without its prefix.
pub(crate) fn name(state: pb::VmState) -> &'static str {
    match state {
        pb::VmState::VM_STATE_UNSPECIFIED => "unspecified",
        pb::VmState::VM_STATE_CREATED => "created",
        pb::VmState::VM_STATE_RUNNING => "running",
        pb::VmState::VM_STATE_PAUSED => "paused",
        pb::VmState::VM_STATE_SHUTDOWN => "shutdown",
    }
}

/// Returns what a status says beyond the state: `failed: boot-failed`, or nothing.
pub(crate) fn status(state: &EnumValue<pb::VmState>, status: &pb::VmStatus) -> String {
    // These phases are the names of the states themselves.
    let same = matches!(
        (state.as_known(), status.phase.as_str()),
        (Some(pb::VmState::VM_STATE_CREATED), "created")
            | (Some(pb::VmState::VM_STATE_RUNNING), "running")
            | (Some(pb::VmState::VM_STATE_PAUSED), "paused")
            | (Some(pb::VmState::VM_STATE_SHUTDOWN), "stopped")
    );
    // The reason of a VM that was started again is that of the end before.
    let is_up =
        matches!(state.as_known(), Some(pb::VmState::VM_STATE_RUNNING | pb::VmState::VM_STATE_PAUSED));
    let phase = match same {
        true if is_up && status.restarts > 0 => "restarted",
        true => "",
        false => status.phase.as_str(),
    };
    let parts = [phase, status.reason.as_str()];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ")
}

/// Returns a VM with its state and status on one line, as `web-1: shutdown (guest-power-off)`.
pub(crate) fn vm(vm_id: &str, state: &EnumValue<pb::VmState>, status: &pb::VmStatus) -> String {
    let beyond = self::status(state, status);
    let beyond = if beyond.is_empty() { beyond } else { format!(" ({})", escape::line(&beyond)) };
    format!("{}: {}{beyond}", escape::line(vm_id), self::state(state))
}

/// Returns a restart policy as people type it: `on-failure, at most 3 times`.
pub(crate) fn restart(policy: &pb::RestartPolicy) -> String {
    let mode = match policy.mode.as_known() {
        Some(pb::RestartMode::RESTART_MODE_UNSPECIFIED) => "the backend's default".to_owned(),
        Some(mode) => mode.proto_name().trim_start_matches("RESTART_MODE_").replace('_', "-").to_lowercase(),
        None => format!("unknown ({})", policy.mode.to_i32()),
    };
    match policy.max_restarts {
        0 => mode,
        most => format!("{mode}, at most {most} times"),
    }
}

/// Returns pairs as people type them: `team=web,tier=1`.
pub(crate) fn pairs<'a>(pairs: impl IntoIterator<Item = (&'a String, &'a String)>) -> String {
    let pairs: Vec<_> = pairs.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_repeats_nothing_of_the_state() {
        let say = |state: pb::VmState, phase: &str, reason: &str| {
            let full = pb::VmStatus { phase: phase.into(), reason: reason.into(), ..Default::default() };
            status(&state.into(), &full)
        };
        assert_eq!(say(pb::VmState::VM_STATE_RUNNING, "running", ""), "");
        assert_eq!(say(pb::VmState::VM_STATE_SHUTDOWN, "stopped", "guest-power-off"), "guest-power-off");
        assert_eq!(say(pb::VmState::VM_STATE_SHUTDOWN, "failed", "boot-failed"), "failed: boot-failed");
        assert_eq!(say(pb::VmState::VM_STATE_RUNNING, "stopping", ""), "stopping");
        let again = pb::VmStatus {
            phase: "running".into(),
            reason: "vmm-failed".into(),
            restarts: 1,
            ..Default::default()
        };
        assert_eq!(status(&pb::VmState::VM_STATE_RUNNING.into(), &again), "restarted: vmm-failed");
    }

    #[test]
    fn a_restart_policy_is_shown_with_the_words_of_the_command_line() {
        let policy = |mode: i32, max_restarts: i32| {
            restart(&pb::RestartPolicy { mode: EnumValue::from(mode), max_restarts, ..Default::default() })
        };
        assert_eq!(policy(3, 0), "on-failure");
        assert_eq!(policy(2, 4), "guest-reboot, at most 4 times");
        assert_eq!(policy(0, 0), "the backend's default");
        assert_eq!(policy(9, 0), "unknown (9)");
    }

    #[test]
    fn an_unknown_state_is_shown_by_its_number() {
        assert_eq!(state(&EnumValue::from(9)), "unknown (9)");
        assert_eq!(state(&pb::VmState::VM_STATE_PAUSED.into()), "paused");
    }
}
