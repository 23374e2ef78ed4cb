//! Finds the QEMU of a domain among the host's processes.
//!
//! ```text
//!   the run on record lives ──────────────────────────────► it
//!   -uuid UUID, called as a QEMU, of the user of the domain's QEMU: none ──► no QEMU
//!                                                           one ───► it
//!                                                           more ──► not proven
//! ```
//!
//! Any local user can start a program with any name and any arguments, and the UUID of a domain is
//! public. The user of the process is therefore the proof: libvirt runs each QEMU as the user of
//! the domain's DAC label, and no other user can start a process as that user.

use std::time::Duration;

use uuid::Uuid;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_core::store::ProcessIdentity;
use vmm_host::path::real_name;
use vmm_host::process::{self, Lookup, Process, ProcessMatch, search_by_option};
use vmm_libvirt_wire::{Call, CallFailureKind, CallResult};

use super::LibvirtBackend;
use super::domain::QUICK_CALL_TIMEOUT;

/// A domain whose QEMU is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sought<'a> {
    pub(super) domain: Uuid,
    /// True if another client created the domain. Then only libvirt knows the user of its QEMU.
    pub(super) imported: bool,
    /// The process of the run on record, if there is one.
    pub(super) recorded: Option<&'a ProcessIdentity>,
}

/// The user of a domain's QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    Is(u32),
    /// The domain has no QEMU, so no process can be it.
    NoQemu,
}

impl LibvirtBackend {
    /// Finds the QEMU of a domain. Returns `None` if there is none. Waits for libvirt for at most
    /// `timeout`, and only if another client created the domain.
    ///
    /// # Errors
    /// Returns the reason if a process may be the QEMU and is not proven to be. The caller must not
    /// end any process then.
    pub(super) async fn find_qemu(
        &self,
        sought: Sought<'_>,
        timeout: Duration,
    ) -> Result<Option<Process>, String> {
        // A start time and a pid prove the process on record, whatever its name and arguments are.
        if let Some(Lookup::Alive(process)) = sought.recorded.map(process::adopt) {
            return Ok(Some(process));
        }
        let mut claimants = self.claimants(sought.domain).await?;
        if claimants.is_empty() {
            return Ok(None);
        }
        let user = match self.user_of_qemu(sought, timeout).await {
            Ok(User::NoQemu) => return Ok(None),
            Ok(User::Is(user)) => user,
            Err(why) => {
                let pids: Vec<_> = claimants.iter().map(|found| found.identity.pid.to_string()).collect();
                return Err(format!(
                    "process {} claims to be the domain {}, and nothing proves that: {why}",
                    pids.join(", "),
                    sought.domain
                ));
            }
        };
        claimants.retain(|found| found.uid == user);
        one_of(sought.domain, claimants)
    }

    /// Returns the processes that have the domain's UUID among their arguments, as libvirt puts it
    /// there, and whose programs are called as a QEMU.
    async fn claimants(&self, domain: Uuid) -> Result<Vec<ProcessMatch>, String> {
        let found = search_by_option("-uuid", domain.to_string()).await;
        let mut found = found.map_err(|error| format!("the host's processes cannot be listed: {error}"))?;
        let own = real_name(&self.options.emulator);
        let is_qemu = |name: &str| {
            name.starts_with("qemu-system-")
                || matches!(name, "qemu-kvm" | "kvm")
                || own.as_deref() == Some(name)
        };
        found.retain(|found| found.program_name().and_then(|name| name.to_str()).is_some_and(is_qemu));
        Ok(found)
    }

    /// Returns the user of a domain's QEMU.
    async fn user_of_qemu(&self, sought: Sought<'_>, timeout: Duration) -> Result<User, String> {
        // A user's own libvirtd runs every QEMU as that user, and a domain that this program has
        // defined has the label of the daemon's user.
        if self.label.is_none() || !sought.imported {
            return Ok(User::Is(rustix::process::geteuid().as_raw()));
        }
        // The call keeps its usual limit and is dropped from outside, because a call that exceeds
        // its own limit marks the connection as hanging.
        let xml = self.link.call(Call::Xml { uuid: sought.domain }, QUICK_CALL_TIMEOUT.max(timeout));
        match tokio::time::timeout(timeout, xml).await {
            Ok(Ok(CallResult::Xml { xml })) => user_in(&xml),
            Ok(Ok(_)) => Err("libvirt has answered another question".to_owned()),
            Ok(Err(error)) if error.refusal() == Some(CallFailureKind::NoDomain) => Ok(User::NoQemu),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("libvirt has not told the user of its QEMU within {timeout:?}")),
        }
    }
}

/// Reads the user of a running domain's QEMU from the XML of the domain. The label of an active
/// domain has numbers, or the names that the domain's maker chose.
fn user_in(xml: &str) -> Result<User, String> {
    let document = roxmltree::Document::parse(xml).map_err(|error| error.to_string())?;
    let domain = document.root_element();
    // Only an active domain has an id.
    if domain.attribute("id").is_none() {
        return Ok(User::NoQemu);
    }
    let named = |name: &'static str| move |node: &roxmltree::Node<'_, '_>| node.tag_name().name() == name;
    let label = domain
        .children()
        .filter(named("seclabel"))
        .find(|label| label.attribute("model") == Some("dac"))
        .and_then(|label| label.children().find(named("label")))
        .and_then(|label| label.text())
        .ok_or("libvirt does not tell the user of its QEMU")?;
    let user = label.trim().split(':').next().unwrap_or_default();
    // A plus sign marks a number. Without the sign, libvirt takes the text for a name first.
    let number = |text: &str| text.strip_prefix('+').unwrap_or(text).parse().ok();
    let known = if user.starts_with('+') { number(user) } else { uid_of(user).or_else(|| number(user)) };
    known.map(User::Is).ok_or_else(|| format!("this host has no user {user}"))
}

/// Returns the id of a user in `/etc/passwd`.
fn uid_of(name: &str) -> Option<u32> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.split(':').nth(1)?.parse().ok())
}

fn one_of(domain: Uuid, found: Vec<ProcessMatch>) -> Result<Option<Process>, String> {
    let mut found = found.into_iter();
    let Some(qemu) = found.next() else { return Ok(None) };
    // Two processes of one user with one UUID cannot be told apart, so that neither is touched.
    if let Some(other) = found.next() {
        return Err(format!(
            "processes {} and {} both claim to be the domain {domain}",
            qemu.identity.pid, other.identity.pid
        ));
    }
    match process::adopt(&qemu.identity) {
        Lookup::Alive(process) => Ok(Some(process)),
        Lookup::Gone => Ok(None),
        Lookup::Unprovable(why) => Err(why),
    }
}

/// Returns the error for a process that is not proven to be a domain's QEMU.
pub(super) fn unproven(why: String) -> BackendError {
    BackendError::new(
        BackendErrorKind::Host,
        Effect::NotApplied,
        format!("{why}; end it by hand and try again"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(id: &str, label: &str) -> String {
        format!("<domain type='kvm'{id}><name>a</name>{label}</domain>")
    }

    #[test]
    fn the_user_of_qemu_is_read_from_the_label_of_an_active_domain() {
        let label = |label: &str| {
            let other =
                "<seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-1</label></seclabel>";
            let dac = format!(
                "<seclabel type='dynamic' model='dac' relabel='yes'><label>{label}</label><imagelabel>{label}</imagelabel></seclabel>"
            );
            domain(" id='3'", &format!("{other}{dac}"))
        };
        for (text, user) in [("+64055:+107", 64055), ("+0:+0", 0), ("root:root", 0), ("1000:1000", 1000)] {
            assert_eq!(user_in(&label(text)), Ok(User::Is(user)), "{text}");
        }
        assert!(user_in(&label("no-such-user:kvm")).is_err());
        assert!(user_in(&domain(" id='3'", "")).is_err(), "a running QEMU has a user");
        assert_eq!(user_in(&domain("", "")), Ok(User::NoQemu));
    }
}
