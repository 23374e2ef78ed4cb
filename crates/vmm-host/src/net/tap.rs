//! Makes TAPs, and proves which TAPs are the program's own.
//!
//! ```text
//!   name is free ──► make (vanishes with its maker) ──► label with owner, set up ──► persist
//!                       a crash up to here leaves nothing               └─ then found by its label
//!   name is taken ─► no TAP, or several queues   ──► refused
//!                    no label of this instance   ──► brought up, used, never removed
//!                    label of another of its VMs ──► relabelled, used, removed with this VM
//! ```
//!
//! The label is the interface alias, which `ip link` shows. No other record exists, because none is
//! needed: a TAP of the program cannot exist without its label, so a TAP without the label is
//! foreign. The caller's claims keep two VMs off one TAP, and they are held during every call of
//! this module.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;

use async_trait::async_trait;
use rustix::thread::CapabilitySet;
use tappers::Interface;
use tappers::linux::Tap;
use vmm_core::id::{InstanceId, VmUid};

use super::netlink::{Netlink, NetworkLink};
use super::{is_multi_queue, is_tap};
use crate::device::{self, DeviceFault, DeviceKind};
use crate::process::close_for_good;

/// The beginning of the label of every TAP of this program.
const LABEL: &str = "vmm-controlplane";

/// The owner of a TAP. The text form is the TAP's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TapOwner {
    /// The instance.
    pub instance: InstanceId,
    /// The creation of the VM for which the TAP was made, or that ran on it last.
    pub uid: VmUid,
}

impl fmt::Display for TapOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{LABEL} instance {} vm {}", self.instance, self.uid)
    }
}

/// The error that a label is not one of this program.
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

/// The origin of a TAP's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapNameOrigin {
    /// The client chose the name. The interface may exist and belong to another program.
    Client,
    /// The program derived the name from the VM's uid. An interface with this name must be the VM's
    /// own.
    Program,
}

/// The origin of a provided TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapOrigin {
    /// The TAP existed.
    Found,
    /// The TAP existed and is down. This process lacks CAP_NET_ADMIN to bring it up.
    FoundDown,
    /// The TAP was made.
    Made,
}

/// A TAP that bears a label of this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedTap {
    /// The interface.
    pub name: String,
    /// The owner that the label names.
    pub owner: TapOwner,
    /// True if a process holds the TAP's other end.
    pub attached: bool,
}

/// The reason why a TAP could not be provided or removed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be that of an interface.
    #[error("{0:?} is not a name that an interface can have; choose another tap_device")]
    BadName(String),
    /// The interface is no TAP.
    #[error(
        "interface {0} exists and is not a TAP: name a TAP in tap_device, or a name that is free, and it is made"
    )]
    NotATap(String),
    /// The TAP must be opened with several queues, which no VMM of this program does.
    #[error(
        "TAP {0} was made with several queues, which cannot be served: make it again without multi_queue, or name another"
    )]
    ManyQueues(String),
    /// The name that the program derived belongs to another interface.
    #[error(
        "interface {0} exists, and nothing proves that it was made for this VM: remove it (`ip link delete {0}`), or name a TAP in tap_device"
    )]
    NotOurs(String),
    /// This process lacks the right to make a TAP.
    #[error(
        "TAP {0} does not exist, and this daemon may not make one: make a TAP beforehand and name it in tap_device (`ip tuntap add dev NAME mode tap user USER`), or give the daemon CAP_NET_ADMIN (systemd: AmbientCapabilities=CAP_NET_ADMIN)"
    )]
    Denied(String),
    /// `/dev/net/tun` cannot be opened.
    #[error("TAP {name} does not exist and cannot be made, because {fault}")]
    NoDevice {
        /// The interface.
        name: String,
        /// The fault of the device, with its remedy.
        fault: DeviceFault,
    },
    /// The kernel refused for another reason.
    #[error("TAP {name} could not be {done}: {source}")]
    Host {
        /// The interface.
        name: String,
        /// The step that failed.
        done: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// The port to TAPs. Tests have an implementation of their own, because the host's TAPs need
/// privileges.
#[async_trait]
pub trait Taps: fmt::Debug + Send + Sync {
    /// Returns true if there is an interface with this name.
    fn exists(&self, name: &str) -> bool;

    /// Returns the error that [`provide`](Self::provide) is going to meet for a TAP with this name
    /// that does not exist. Makes nothing. Opens `/dev/net/tun`, which takes microseconds.
    ///
    /// # Errors
    ///
    /// `/dev/net/tun` cannot be opened, or this process may not make TAPs.
    fn may_make(&self, name: &str) -> Result<(), TapError>;

    /// Returns the error that [`provide`](Self::provide) is going to meet for an interface with
    /// this name that exists, as far as the interface alone decides.
    ///
    /// # Errors
    ///
    /// The interface is no TAP, or a TAP that no VMM can open.
    fn may_use(&self, name: &str) -> Result<(), TapError>;

    /// Returns the reason for which a VMM of this user can open no TAP at all, not even one that
    /// exists.
    ///
    /// # Errors
    ///
    /// `/dev/net/tun` cannot be opened.
    fn may_open(&self) -> Result<(), DeviceFault>;

    /// Provides a TAP with this name for `owner`, and makes it where there is none. A TAP that
    /// exists is brought up, because only some hypervisors do so themselves.
    async fn provide(&self, name: &str, by: TapNameOrigin, owner: TapOwner) -> Result<TapOrigin, TapError>;

    /// Removes the TAP if its label names `owner`. Returns true if it was removed. May be repeated.
    async fn remove(&self, name: &str, owner: TapOwner) -> Result<bool, TapError>;

    /// Lists the TAPs whose label names `instance`.
    async fn of_instance(&self, instance: InstanceId) -> io::Result<Vec<OwnedTap>>;
}

/// The TAPs of this process's network namespace.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostTaps;

#[async_trait]
impl Taps for HostTaps {
    fn exists(&self, name: &str) -> bool {
        super::interface_exists(name)
    }

    fn may_make(&self, name: &str) -> Result<(), TapError> {
        tun_usable().map_err(|fault| TapError::NoDevice { name: name.to_owned(), fault })?;
        if has_net_admin() { Ok(()) } else { Err(TapError::Denied(name.to_owned())) }
    }

    fn may_use(&self, name: &str) -> Result<(), TapError> {
        if !is_tap(name) {
            return Err(TapError::NotATap(name.to_owned()));
        }
        if is_multi_queue(name) { Err(TapError::ManyQueues(name.to_owned())) } else { Ok(()) }
    }

    fn may_open(&self) -> Result<(), DeviceFault> {
        tun_usable()
    }

    async fn provide(&self, name: &str, by: TapNameOrigin, owner: TapOwner) -> Result<TapOrigin, TapError> {
        // The kernel takes '%' for a pattern and would make an interface with another name.
        if name.contains('%') || super::folder(Path::new(super::CLASS_NET), name).is_err() {
            return Err(TapError::BadName(name.to_owned()));
        }
        let netlink = Netlink::open().map_err(refused(name, "looked for"))?;
        if let Some(link) = netlink.find(name).await.map_err(refused(name, "looked for"))? {
            return use_existing(&netlink, &link, name, by, owner).await;
        }
        match make(&netlink, name, owner).await {
            // Another program has taken the name since the check above. Its interface is treated
            // like any that exists.
            Err(TapError::Host { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {}
            made => return made.map(|()| TapOrigin::Made),
        }
        match netlink.find(name).await.map_err(refused(name, "looked for"))? {
            Some(link) => use_existing(&netlink, &link, name, by, owner).await,
            None => Err(refused(name, "made")(io::Error::other("an interface of this name comes and goes"))),
        }
    }

    async fn remove(&self, name: &str, owner: TapOwner) -> Result<bool, TapError> {
        let netlink = Netlink::open().map_err(refused(name, "looked for"))?;
        // Label and index come in one answer, so an interface that takes the name in between is not
        // removed.
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
        let owned = |link: NetworkLink| {
            let owner = owner_of(&link).filter(|owner| owner.instance == instance)?;
            Some(OwnedTap { name: link.name, owner, attached: link.attached })
        };
        Ok(links.into_iter().filter_map(owned).collect())
    }
}

fn owner_of(link: &NetworkLink) -> Option<TapOwner> {
    link.alias.as_deref()?.parse().ok()
}

/// Decides how an existing interface can serve `owner`.
async fn use_existing(
    netlink: &Netlink,
    link: &NetworkLink,
    name: &str,
    by: TapNameOrigin,
    owner: TapOwner,
) -> Result<TapOrigin, TapError> {
    // The kind of the interface is checked before its owner, because an interface of another kind
    // cannot serve under any owner.
    HostTaps.may_use(name)?;
    match owner_of(link) {
        Some(found) if found == owner => {}
        _ if by == TapNameOrigin::Program => return Err(TapError::NotOurs(name.to_owned())),
        // The caller holds the claim on this TAP, so no running VM uses it and it can pass to this
        // VM.
        Some(found) if found.instance == owner.instance => {
            let relabelled = netlink.label(link.index, owner.to_string(), true).await;
            relabelled.map_err(refused(name, "taken over"))?;
        }
        // A client may name a TAP of another instance or without an owner. The TAP is used and
        // keeps its label, so this instance never removes it.
        Some(_) | None => {}
    }
    if link.up {
        return Ok(TapOrigin::Found);
    }
    match netlink.bring_up(link.index).await {
        Ok(()) => Ok(TapOrigin::Found),
        // A TAP that is down may still serve, because some hypervisors bring it up themselves. The
        // caller warns.
        Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EPERM | nix::libc::EACCES)) => {
            Ok(TapOrigin::FoundDown)
        }
        Err(error) => Err(refused(name, "brought up")(error)),
    }
}

/// Makes a TAP with its label. Until the label is set, the TAP vanishes with the descriptor that
/// made it.
async fn make(netlink: &Netlink, name: &str, owner: TapOwner) -> Result<(), TapError> {
    let wanted = name.to_owned();
    let tap = blocking(move || Tap::create_named(Interface::new(wanted)?)).await.map_err(not_made(name))?;
    let labelled = match netlink.find(name).await {
        Ok(Some(link)) => netlink.label(link.index, owner.to_string(), true).await,
        Ok(None) => Err(io::Error::other("it vanished as soon as it was made")),
        Err(error) => Err(error),
    };
    // Closing the descriptor removes a TAP that is not persistent, and the kernel takes time for
    // that. A persistent TAP serves one user at a time. A VMM that is being started has a copy of
    // the descriptor until its exec, and that copy would make the TAP look taken to its own VMM.
    let keep = move || labelled.and_then(|()| tap.set_persistent(true));
    blocking(move || close_for_good(keep)).await.map_err(not_made(name))
}

fn not_made(name: &str) -> impl FnOnce(io::Error) -> TapError {
    move |error| explain(name, error, tun_usable())
}

/// Explains why a TAP could not be made. `device` is the state of `/dev/net/tun`, because the error
/// alone does not tell a device that cannot be opened from a TAP that may not be made.
fn explain(name: &str, error: io::Error, device: Result<(), DeviceFault>) -> TapError {
    match (device, error.raw_os_error()) {
        (Err(fault), _) => TapError::NoDevice { name: name.to_owned(), fault },
        (Ok(()), Some(nix::libc::EPERM | nix::libc::EACCES)) => TapError::Denied(name.to_owned()),
        (Ok(()), _) => refused(name, "made")(error),
    }
}

/// Opens `/dev/net/tun`, through which TAPs are made and used, and closes it again.
///
/// # Errors
///
/// Returns the fault and its remedy.
pub fn tun_usable() -> Result<(), DeviceFault> {
    let kind = DeviceKind {
        driver: "load the driver (`modprobe tun`)",
        group: None,
        otherwise: "see the kernel log for messages of tun",
    };
    device::usable(Path::new("/dev/net/tun"), kind)
}

/// Returns true if this thread has CAP_NET_ADMIN, which making a TAP takes.
pub fn has_net_admin() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN))
}

fn refused(name: &str, done: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::Host { name: name.to_owned(), done, source }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|ended| Err(io::Error::other(ended)))
}

#[cfg(test)]
mod tests;
