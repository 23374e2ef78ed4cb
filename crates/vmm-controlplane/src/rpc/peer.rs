//! The party at the other end of a connection.

use std::fmt;
use std::net::SocketAddr;

use vmm_core::caller::Caller;

/// The party at the other end of a connection, as the kernel or TLS proves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// A program that calls over TCP.
    Network {
        /// The address, which another program may have forged or share.
        address: SocketAddr,
        /// True if the program holds the key of a client certificate that the operator's authority
        /// has signed.
        has_certificate: bool,
    },
    /// A program of this host that calls over the unix socket. The kernel names its user.
    LocalUser {
        /// The effective user id at the time of the connect.
        uid: u32,
        /// The process id at that time, for the log alone, because another process may have it now.
        pid: Option<i32>,
    },
}

impl Peer {
    /// Returns the caller for the audit trail.
    pub(super) fn caller(self) -> Caller {
        match self {
            Self::Network { address, .. } => Caller::anonymous(Some(address.ip().to_string())),
            Self::LocalUser { uid, .. } => Caller::local_user(uid),
        }
    }

    /// Returns true if the peer may be the browser of a person who opened a foreign page.
    ///
    /// A browser cannot connect to a unix socket. A foreign page cannot use a client certificate,
    /// because the server's certificate does not bear the page's name.
    pub(super) fn can_be_foreign_page(self) -> bool {
        matches!(self, Self::Network { has_certificate: false, .. })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network { address, .. } => address.fmt(f),
            Self::LocalUser { uid, pid: Some(pid) } => write!(f, "uid:{uid} pid:{pid}"),
            Self::LocalUser { uid, pid: None } => write!(f, "uid:{uid}"),
        }
    }
}
