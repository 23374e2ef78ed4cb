//! The TAPs that the program makes, and the proof of which are its own.
//!
//! ```text
//!   name is free ──► make (vanishes with its maker) ──► label with owner, set up ──► persist
//!                        a crash up to here leaves nothing               └─ from here it is found by its label
//!   name is taken ─► no TAP, or several queues ──► refused
//!                    no label of ours           ──► brought up, used, and never removed
//!                    ours, of another VM        ──► used, and relabelled: it goes with the VM that ran on it last
//! ```
//!
//! The label is the interface alias (`ip link` shows it). Nothing is recorded elsewhere: a TAP that was made and not labelled
//! cannot exist, and one without our label is somebody else's. Two VMs on one TAP are kept apart by the caller's claims, which
//! are held whenever something here is called.

use std::fmt;
use std::io;
use std::str::FromStr;

use async_trait::async_trait;
use tappers::Interface;
use tappers::linux::Tap;
use vmm_core::id::{InstanceId, VmUid};

use super::netlink::{Link, Netlink};
use super::{is_multi_queue, is_tap};
use crate::process::close_for_good;

/// What the label of every TAP of this program begins with.
const LABEL: &str = "vmm-controlplane";

/// Whose TAP it is; written as its interface alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TapOwner {
    /// The installation.
    pub instance: InstanceId,
    /// The creation of the VM that it was made for, or that ran on it last.
    pub uid: VmUid,
}

impl fmt::Display for TapOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{LABEL} instance {} vm {}", self.instance, self.uid)
    }
}

/// Says that a label is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the label of a TAP of {LABEL}")]
pub struct ForeignLabel;

impl FromStr for TapOwner {
    type Err = ForeignLabel;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let words: Vec<_> = text.split(' ').collect();
        let [LABEL, "instance", instance, "vm", uid] = words[..] else { return Err(ForeignLabel) };
        match (instance.parse(), uid.parse()) {
            (Ok(instance), Ok(uid)) => Ok(Self { instance, uid }),
            (_, _) => Err(ForeignLabel),
        }
    }
}

/// Who thought of a TAP's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBy {
    /// The client: the interface may exist, and belong to anybody.
    Client,
    /// The program, from the VM's uid: what bears the name must be the VM's own.
    Program,
}

/// Where a TAP comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provided {
    /// It was there.
    Found,
    /// It was there and is down, because this process may not bring it up: it takes CAP_NET_ADMIN.
    FoundDown,
    /// It was made now.
    Made,
}

/// A TAP that bears a label of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedTap {
    /// The interface.
    pub name: String,
    /// Who its label says it belongs to.
    pub owner: TapOwner,
    /// Whether a process holds its other end.
    pub attached: bool,
}

/// Why a TAP could not be provided or removed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name would lead elsewhere.
    #[error("{0:?} is not a name that an interface can have; choose another tap_device")]
    BadName(String),
    /// The interface is of another kind.
    #[error(
        "interface {0} exists and is not a TAP: name a TAP in tap_device, or a name that is free, and it is made"
    )]
    NotATap(String),
    /// The interface wants to be opened in a way that no VMM here does.
    #[error(
        "TAP {0} was made with several queues, which cannot be served: make it again without multi_queue, or name another"
    )]
    ManyQueues(String),
    /// The program's own name is taken.
    #[error(
        "interface {0} exists, and nothing proves that it was made for this VM: remove it (`ip link delete {0}`), or name a TAP in tap_device"
    )]
    NotOurs(String),
    /// Making it takes a right that this process has not.
    #[error(
        "TAP {0} does not exist, and this daemon may not make one: make a TAP beforehand and name it in tap_device (`ip tuntap add dev NAME mode tap user USER`), or give the daemon CAP_NET_ADMIN and access to /dev/net/tun"
    )]
    Denied(String),
    /// The host cannot make any.
    #[error(
        "TAP {0} does not exist and cannot be made without /dev/net/tun: load the driver (`modprobe tun`)"
    )]
    NoDriver(String),
    /// The kernel refused otherwise.
    #[error("TAP {name} could not be {done}: {source}")]
    Host {
        /// The interface.
        name: String,
        /// What was to be done.
        done: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// TAPs as the service uses them: the host's, or a test's, since the host's take privileges.
#[async_trait]
pub trait Taps: fmt::Debug + Send + Sync {
    /// Says whether there is an interface of this name.
    fn exists(&self, name: &str) -> bool;

    /// Makes sure that there is a TAP of this name which `owner` may use, and makes it where there is none. A TAP that exists is
    /// brought up, because some hypervisors do so and others do not.
    async fn provide(&self, name: &str, by: NamedBy, owner: TapOwner) -> Result<Provided, TapError>;

    /// Removes the TAP if its label says that it is `owner`'s, and says whether it was. Harmless when repeated.
    async fn remove(&self, name: &str, owner: TapOwner) -> Result<bool, TapError>;

    /// Lists the TAPs whose label names `instance`.
    async fn of_instance(&self, instance: InstanceId) -> io::Result<Vec<OwnedTap>>;
}

/// The TAPs of this host, or rather of this process's network namespace.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostTaps;

#[async_trait]
impl Taps for HostTaps {
    fn exists(&self, name: &str) -> bool {
        super::interface_exists(name)
    }

    async fn provide(&self, name: &str, by: NamedBy, owner: TapOwner) -> Result<Provided, TapError> {
        // The kernel takes '%' for a pattern, and would make an interface of another name.
        if name.contains('%') || super::folder(std::path::Path::new(super::CLASS_NET), name).is_err() {
            return Err(TapError::BadName(name.to_owned()));
        }
        let netlink = Netlink::open().map_err(refused(name, "looked for"))?;
        if let Some(link) = netlink.find(name).await.map_err(refused(name, "looked for"))? {
            return use_found(&netlink, &link, name, by, owner).await;
        }
        match make(&netlink, name, owner).await {
            // Somebody was faster. Whatever it is, it was not made by us.
            Err(TapError::Host { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {}
            made => return made.map(|()| Provided::Made),
        }
        match netlink.find(name).await.map_err(refused(name, "looked for"))? {
            Some(link) => use_found(&netlink, &link, name, by, owner).await,
            None => Err(refused(name, "made")(io::Error::other("an interface of this name comes and goes"))),
        }
    }

    async fn remove(&self, name: &str, owner: TapOwner) -> Result<bool, TapError> {
        let netlink = Netlink::open().map_err(refused(name, "looked for"))?;
        // Label and index come in one answer, so that a namesake made in between is safe.
        let Some(link) = netlink.find(name).await.map_err(refused(name, "looked for"))? else {
            return Ok(false);
        };
        if owner_of(&link) != Some(owner) {
            return Ok(false);
        }
        match netlink.remove(link.index).await {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(false),
            Err(error) => Err(refused(name, "removed")(error)),
        }
    }

    async fn of_instance(&self, instance: InstanceId) -> io::Result<Vec<OwnedTap>> {
        let links = Netlink::open()?.all().await?;
        let owned = |link: Link| {
            let owner = owner_of(&link).filter(|owner| owner.instance == instance)?;
            Some(OwnedTap { name: link.name, owner, attached: link.attached })
        };
        Ok(links.into_iter().filter_map(owned).collect())
    }
}

fn owner_of(link: &Link) -> Option<TapOwner> {
    link.alias.as_deref()?.parse().ok()
}

/// Decides what an interface that exists is good for.
async fn use_found(
    netlink: &Netlink,
    link: &Link,
    name: &str,
    by: NamedBy,
    owner: TapOwner,
) -> Result<Provided, TapError> {
    if !is_tap(name) {
        return Err(TapError::NotATap(name.to_owned()));
    }
    if is_multi_queue(name) {
        return Err(TapError::ManyQueues(name.to_owned()));
    }
    match owner_of(link) {
        Some(found) if found == owner => {}
        _ if by == NamedBy::Program => return Err(TapError::NotOurs(name.to_owned())),
        // No running VM claims it, so the one that it was made for has no use for it.
        Some(found) if found.instance == owner.instance => {
            let relabelled = netlink.label(link.index, owner.to_string(), true).await;
            relabelled.map_err(refused(name, "taken over"))?;
        }
        Some(_) | None => {}
    }
    if link.up {
        return Ok(Provided::Found);
    }
    match netlink.bring_up(link.index).await {
        Ok(()) => Ok(Provided::Found),
        Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EPERM | nix::libc::EACCES)) => {
            Ok(Provided::FoundDown)
        }
        Err(error) => Err(refused(name, "brought up")(error)),
    }
}

/// Makes a TAP that nobody can mistake: until it bears its label, it vanishes with the descriptor that made it.
async fn make(netlink: &Netlink, name: &str, owner: TapOwner) -> Result<(), TapError> {
    let wanted = name.to_owned();
    let tap = blocking(move || Tap::create_named(Interface::new(wanted)?)).await.map_err(not_made(name))?;
    let labelled = match netlink.find(name).await {
        Ok(Some(link)) => netlink.label(link.index, owner.to_string(), true).await,
        Ok(None) => Err(io::Error::other("it vanished as soon as it was made")),
        Err(error) => Err(error),
    };
    // Closing removes what is not persistent, and that takes the kernel a while. What is kept takes one user at a time: a copy
    // of the descriptor in a VMM that is just being started would make it look taken to the one that it is for.
    let keep = move || labelled.and_then(|()| tap.set_persistent(true));
    blocking(move || close_for_good(keep)).await.map_err(not_made(name))
}

fn not_made(name: &str) -> impl FnOnce(io::Error) -> TapError {
    move |error| match error.raw_os_error() {
        Some(nix::libc::EPERM | nix::libc::EACCES) => TapError::Denied(name.to_owned()),
        Some(nix::libc::ENOENT | nix::libc::ENXIO | nix::libc::ENODEV) => TapError::NoDriver(name.to_owned()),
        _ => refused(name, "made")(error),
    }
}

fn refused(name: &str, done: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::Host { name: name.to_owned(), done, source }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|ended| Err(io::Error::other(ended)))
}

#[cfg(test)]
mod tests;
