//! An event in a few words, for `watch` and `events`.

use std::collections::BTreeMap;

use vmm_proto::v1 as pb;

use crate::output::{units, words};

/// The headings of [`cells`].
pub(super) const HEADING: [&str; 6] = ["TIME", "NAME", "EVENT", "STATE", "STATUS", "CAUSE"];

/// Returns true if two VMs of one name occur, which only their uids distinguish.
pub(super) fn has_namesakes(events: &[pb::VmEvent]) -> bool {
    let mut uids = BTreeMap::new();
    events.iter().any(|event| *uids.entry(&event.vm_id).or_insert(&event.uid) != &event.uid)
}

/// Returns the cells of an event.
pub(super) fn cells(event: &pb::VmEvent) -> [String; 6] {
    let cause = match (event.cause.as_str(), event.actor.as_str()) {
        // A method that the daemon calls by itself, as a restart policy does, has a capital.
        (cause, "system") if !cause.starts_with(char::is_uppercase) => cause.to_owned(),
        (cause, "") => cause.to_owned(),
        (cause, actor) => format!("{cause} by {actor}"),
    };
    let cause = match event.ended_by.as_str() {
        "" => cause,
        rung => format!("{cause}, ended by {rung}"),
    };
    [
        units::time(event.time),
        event.vm_id.clone(),
        event.r#type.clone(),
        words::state(&event.state),
        words::status(&event.state, &event.status),
        cause,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namesakes_are_two_uids_of_one_name() {
        let event = |vm_id: &str, uid: &str| pb::VmEvent {
            vm_id: vm_id.into(),
            uid: uid.into(),
            ..Default::default()
        };
        assert!(!has_namesakes(&[event("a", "1"), event("b", "2"), event("a", "1")]));
        assert!(has_namesakes(&[event("a", "1"), event("b", "2"), event("a", "3")]));
    }

    #[test]
    fn an_event_line_has_the_time_the_vm_the_change_and_the_cause() {
        let event = pb::VmEvent {
            time: 1_795_323_329_384,
            vm_id: "web-1".into(),
            r#type: "vmm-exited".into(),
            state: pb::VmState::Shutdown.into(),
            status: pb::VmStatus {
                phase: "stopped".into(),
                reason: "guest-power-off".into(),
                ..Default::default()
            }
            .into(),
            cause: "ShutdownVm".into(),
            actor: "anonymous@127.0.0.1".into(),
            ended_by: "acpi".into(),
            ..Default::default()
        };
        assert_eq!(
            cells(&event),
            [
                "2026-11-22T04:55:29Z",
                "web-1",
                "vmm-exited",
                "shutdown",
                "guest-power-off",
                "ShutdownVm by anonymous@127.0.0.1, ended by acpi"
            ]
        );
        let by_itself = |cause: &str| {
            let event = pb::VmEvent { cause: cause.into(), actor: "system".into(), ..Default::default() };
            cells(&event)[5].clone()
        };
        assert_eq!(by_itself("BootVm"), "BootVm by system");
        assert_eq!(by_itself("vmm-exited"), "vmm-exited");
    }
}
