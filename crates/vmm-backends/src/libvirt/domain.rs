//! Reads libvirt's answers about domains: the owner and the state.

use std::time::Duration;

use uuid::Uuid;
use vmm_core::backend::GuestState;
use vmm_core::id::InstanceId;
use vmm_libvirt_wire::{Call, CallResult, Domain, DomainState, MARK_NAMESPACE};

use super::link::{CallError, LibvirtLink};

/// The time limit of a libvirt call that needs no QEMU.
pub(super) const QUICK_CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval at which libvirt is asked whether it has noticed the end of a QEMU.
pub(super) const END_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The owner of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DomainOwner {
    /// An instance of this program created the domain for the VM whose uid is the domain's UUID.
    Instance(InstanceId),
    /// Another client of libvirt.
    OtherClient,
}

/// Returns the owner of a domain, from the mark in its metadata.
pub(super) fn owner(domain: &Domain) -> DomainOwner {
    let Some(mark) = &domain.mark else { return DomainOwner::OtherClient };
    let Ok(document) = roxmltree::Document::parse(mark) else { return DomainOwner::OtherClient };
    let root = document.root_element();
    // libvirt may return the mark without the namespace by which it was found.
    let is_ours = root.tag_name().namespace().is_none_or(|namespace| namespace == MARK_NAMESPACE);
    let instance = root.attribute("instance").and_then(|text| text.parse().ok());
    match instance {
        Some(instance) if is_ours && root.tag_name().name() == "vm" => DomainOwner::Instance(instance),
        Some(_) | None => DomainOwner::OtherClient,
    }
}

/// Returns true if a domain has a QEMU.
pub(super) const fn is_active(state: DomainState) -> bool {
    !matches!(state, DomainState::Off)
}

/// Returns the state of a domain's guest.
pub(super) const fn guest_state(state: DomainState) -> GuestState {
    match state {
        DomainState::Running => GuestState::Running,
        DomainState::Paused | DomainState::Busy => GuestState::Paused,
        DomainState::IoError
        | DomainState::Watchdog
        | DomainState::Crashed
        | DomainState::ShuttingDown
        | DomainState::Off => GuestState::Ended,
    }
}

/// Returns the reason for which a guest in this state cannot continue, or `None` if it can or has
/// ended in order.
pub(super) const fn failure(state: DomainState) -> Option<&'static str> {
    match state {
        DomainState::IoError => Some("a disk of the guest failed, and libvirt stopped it"),
        DomainState::Watchdog => Some("the guest's watchdog fired, and libvirt stopped it"),
        DomainState::Crashed => Some("the guest crashed"),
        DomainState::Running
        | DomainState::Paused
        | DomainState::Busy
        | DomainState::ShuttingDown
        | DomainState::Off => None,
    }
}

impl LibvirtLink {
    /// Reads one domain, or returns `None` if there is none.
    pub(super) async fn look_up(&self, uuid: Uuid, timeout: Duration) -> Result<Option<Domain>, CallError> {
        domain_in_answer(self.call(Call::LookUp { uuid }, timeout).await?)
    }

    /// Reads the domain with a name.
    pub(super) async fn look_by_name(&self, name: &str) -> Result<Option<Domain>, CallError> {
        domain_in_answer(self.call(Call::LookUpByName { name: name.to_owned() }, QUICK_CALL_TIMEOUT).await?)
    }

    /// Makes a call that returns nothing but success.
    pub(super) async fn order(&self, call: Call, timeout: Duration) -> Result<(), CallError> {
        match self.call(call, timeout).await? {
            CallResult::Done => Ok(()),
            other => Err(unexpected_answer(&other)),
        }
    }
}

fn domain_in_answer(got: CallResult) -> Result<Option<Domain>, CallError> {
    match got {
        CallResult::Domains { mut domains } if domains.len() <= 1 => Ok(domains.pop()),
        other => Err(unexpected_answer(&other)),
    }
}

/// Returns the error for an answer to another question.
pub(super) fn unexpected_answer(got: &CallResult) -> CallError {
    CallError::Malformed(format!("an answer to another question: {got:?}").chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(mark: Option<&str>) -> DomainOwner {
        owner(&Domain {
            uuid: Uuid::nil(),
            name: "a".to_owned(),
            mark: mark.map(str::to_owned),
            state: DomainState::Off,
            persistent: true,
        })
    }

    #[test]
    fn only_a_complete_mark_proves_ownership() {
        let id = "0193f0de-0000-7000-8000-000000000001";
        let ours = DomainOwner::Instance(id.parse().unwrap());
        assert_eq!(marked(Some(&format!("<vm instance='{id}'/>"))), ours);
        let spelled = format!("<v:vm xmlns:v='{MARK_NAMESPACE}' instance='{id}'/>");
        assert_eq!(marked(Some(&spelled)), ours);
        for other in
            ["", "<vm/>", "<vm instance='x'/>", "vm", "<!DOCTYPE vm [<!ENTITY a 'b'>]><vm instance='&a;'/>"]
        {
            assert_eq!(marked(Some(other)), DomainOwner::OtherClient, "{other}");
        }
        let foreign = format!("<v:vm xmlns:v='urn:x' instance='{id}'/>");
        assert_eq!(marked(Some(&foreign)), DomainOwner::OtherClient);
        assert_eq!(marked(None), DomainOwner::OtherClient);
    }
}
