//! The kind of a VM: the origin of its VMM.
//!
//! ```text
//!   CreateVm, import ──► VmKind, on record for the VM's life ──► the backend object of that kind
//!                                                                (regardless of later settings)
//! ```
//!
//! The configuration decides about new VMs only. A record of a release that kept no kinds is
//! [`VmKind::Unrecorded`] until the next start of the daemon has settled the kind and written it.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The origin of a VM's VMM. Constant for the life of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type", from = "StoredKind")]
pub enum VmKind {
    /// The daemon starts a VMM for each run.
    Managed,
    /// The VM lives in a VMM that another program started.
    Attached {
        /// The VMM's control socket, as the endpoint setting names it.
        socket: String,
    },
    /// The VM is a libvirt domain.
    Libvirt {
        /// The URI of the libvirtd that has the domain.
        uri: String,
        /// The domain's UUID.
        domain: Uuid,
    },
    /// The record was written by a release that kept no kinds.
    Unrecorded {
        /// The UUID of an imported libvirt domain, the only one that such a record names.
        domain: Option<Uuid>,
    },
}

impl VmKind {
    /// Makes the kind of a VM in the VMM that listens on `socket`.
    pub fn attached(socket: impl Into<String>) -> Self {
        Self::Attached { socket: socket.into() }
    }

    /// Returns the socket of an attached VM.
    pub fn socket(&self) -> Option<&str> {
        match self {
            Self::Attached { socket } => Some(socket),
            Self::Managed | Self::Libvirt { .. } | Self::Unrecorded { .. } => None,
        }
    }

    /// Returns the UUID of a libvirt domain.
    pub fn domain(&self) -> Option<Uuid> {
        match self {
            Self::Libvirt { domain, .. } => Some(*domain),
            Self::Managed | Self::Attached { .. } | Self::Unrecorded { .. } => None,
        }
    }

    /// Returns the name of the place that only one VM of a backend can have: the socket's path, or
    /// the domain's UUID. The UUID alone identifies a domain, because two URIs may lead to one
    /// libvirtd.
    pub fn place(&self) -> Option<String> {
        match self {
            Self::Attached { socket } => Some(socket.clone()),
            Self::Libvirt { domain, .. } | Self::Unrecorded { domain: Some(domain) } => {
                Some(domain.to_string())
            }
            Self::Managed | Self::Unrecorded { domain: None } => None,
        }
    }

    /// Settles the kind of a record that has none, and returns any other kind unchanged.
    /// `runs_in_folder` is true if the recorded run has its control socket in the VM's run folder,
    /// and `None` where no run is on record. `of_new` is the kind that the VM would get if it were
    /// created now.
    pub fn settled(self, runs_in_folder: Option<bool>, of_new: Self) -> Self {
        let Self::Unrecorded { domain } = self else { return self };
        match (domain, of_new) {
            // A socket in the run folder proves that the daemon started the VMM, even if the
            // endpoint setting has changed since.
            (None, _) if runs_in_folder == Some(true) => Self::Managed,
            // The run has its socket elsewhere, so another program made the VMM. The setting of its
            // socket is gone, and without that the kind stays open.
            (None, Self::Managed) if runs_in_folder == Some(false) => self,
            (None, of_new) => of_new,
            (Some(domain), Self::Libvirt { uri, .. }) => Self::Libvirt { uri, domain },
            (Some(_), Self::Managed | Self::Attached { .. } | Self::Unrecorded { .. }) => self,
        }
    }
}

impl Default for VmKind {
    /// Returns the kind of a record that has neither a kind nor a place.
    fn default() -> Self {
        Self::Unrecorded { domain: None }
    }
}

impl fmt::Display for VmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Managed => f.write_str("a VMM of the daemon's own"),
            Self::Attached { socket } => f.write_str(socket),
            Self::Libvirt { uri, domain } => write!(f, "libvirt domain {domain} at {uri}"),
            Self::Unrecorded { domain: Some(domain) } => write!(f, "libvirt domain {domain}"),
            Self::Unrecorded { domain: None } => f.write_str("a libvirt domain"),
        }
    }
}

/// The forms of a kind on disk.
#[derive(Deserialize)]
#[serde(untagged)]
enum StoredKind {
    /// The form of early releases: the path of a socket, or the UUID of an imported libvirt domain.
    Place(String),
    /// The present form.
    Kind(TaggedKind),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
enum TaggedKind {
    Managed,
    Attached { socket: String },
    Libvirt { uri: String, domain: Uuid },
    Unrecorded { domain: Option<Uuid> },
}

impl From<StoredKind> for VmKind {
    fn from(stored: StoredKind) -> Self {
        match stored {
            StoredKind::Place(place) => match place.parse() {
                Ok(domain) => Self::Unrecorded { domain: Some(domain) },
                Err(_) => Self::Attached { socket: place },
            },
            StoredKind::Kind(TaggedKind::Managed) => Self::Managed,
            StoredKind::Kind(TaggedKind::Attached { socket }) => Self::Attached { socket },
            StoredKind::Kind(TaggedKind::Libvirt { uri, domain }) => Self::Libvirt { uri, domain },
            StoredKind::Kind(TaggedKind::Unrecorded { domain }) => Self::Unrecorded { domain },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn libvirt(domain: u128) -> VmKind {
        VmKind::Libvirt { uri: "qemu:///system".to_owned(), domain: Uuid::from_u128(domain) }
    }

    #[test]
    fn every_kind_is_read_back() {
        let kinds = [
            VmKind::Managed,
            VmKind::attached("/run/ch.sock"),
            libvirt(1),
            VmKind::Unrecorded { domain: None },
            VmKind::Unrecorded { domain: Some(Uuid::from_u128(1)) },
        ];
        for kind in kinds {
            let text = serde_json::to_string(&kind).unwrap();
            assert_eq!(serde_json::from_str::<VmKind>(&text).unwrap(), kind, "{text}");
        }
        let written = serde_json::to_value(VmKind::attached("/a")).unwrap();
        assert_eq!(written, serde_json::json!({"type": "attached", "socket": "/a"}));
    }

    #[test]
    fn a_record_without_a_kind_is_given_one() {
        let (none, domain) = (VmKind::default(), Uuid::from_u128(7));
        let imported = VmKind::Unrecorded { domain: Some(domain) };
        let table = [
            (none.clone(), Some(true), libvirt(1), VmKind::Managed),
            (none.clone(), Some(true), VmKind::Managed, VmKind::Managed),
            (none.clone(), Some(false), libvirt(1), libvirt(1)),
            (none.clone(), Some(false), VmKind::Managed, none.clone()),
            (none.clone(), None, libvirt(1), libvirt(1)),
            (none, None, VmKind::Managed, VmKind::Managed),
            (imported.clone(), None, libvirt(1), libvirt(7)),
            (imported.clone(), None, VmKind::Managed, imported),
            (VmKind::Managed, None, libvirt(1), VmKind::Managed),
            (libvirt(1), Some(true), VmKind::Managed, libvirt(1)),
        ];
        for (kind, runs_in_folder, of_new, expected) in table {
            let shown = format!("{kind:?} {runs_in_folder:?} {of_new:?}");
            assert_eq!(kind.settled(runs_in_folder, of_new), expected, "{shown}");
        }
    }

    #[test]
    fn a_domain_has_one_place_under_every_uri() {
        let other = VmKind::Libvirt { uri: "qemu+unix:///system".to_owned(), domain: Uuid::from_u128(1) };
        assert_eq!(libvirt(1).place(), other.place());
        assert_ne!(libvirt(1).place(), libvirt(2).place());
        assert_eq!(VmKind::attached("/a").place().as_deref(), Some("/a"));
        assert_eq!(VmKind::Managed.place(), None);
    }
}
