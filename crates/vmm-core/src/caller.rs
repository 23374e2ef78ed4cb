//! The party that asks for a change, as operations, intents and events carry it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The party that asks for a change.
///
/// The JSON form has two parts. `actor` is the text of the wire, which every release has written.
/// `caller` has the fields. A record without `caller` reads as a caller with that text as its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "StoredCaller", into = "StoredCaller")]
pub struct Caller {
    /// The caller's name: `anonymous` where no name is proven, `system` for the program itself.
    pub name: String,
    /// The method by which the name was proven.
    pub method: CallerMethod,
    /// The address that the call came from; `None` where it came from none.
    pub address: Option<String>,
}

/// The method by which a caller's name was proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CallerMethod {
    /// Nothing proves the name.
    Unauthenticated,
    /// The kernel names the user of the process that connected to the unix socket.
    PeerCredentials,
    /// The program itself acts, as its restart policy does.
    System,
    /// A method that this release does not know. A newer release wrote the record.
    #[serde(other)]
    Unknown,
}

impl Caller {
    /// Returns the program itself as the caller.
    pub fn system() -> Self {
        Self { name: "system".to_owned(), method: CallerMethod::System, address: None }
    }

    /// Returns a caller that proved no name and called from `address`.
    pub fn anonymous(address: Option<String>) -> Self {
        let name = if address.is_some() { "anonymous" } else { "unknown" };
        Self { name: name.to_owned(), method: CallerMethod::Unauthenticated, address }
    }

    /// Returns the local user with this id, which the kernel has proven.
    pub fn local_user(uid: u32) -> Self {
        Self { name: format!("uid:{uid}"), method: CallerMethod::PeerCredentials, address: None }
    }

    /// Returns a caller that goes by `name` without a proof and without an address.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), method: CallerMethod::Unauthenticated, address: None }
    }

    /// Returns true if the program itself asks.
    pub fn is_system(&self) -> bool {
        self.method == CallerMethod::System
    }
}

/// The text of the wire: the name, followed by `@` and the address where nothing proves the name.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match &self.address {
            Some(address) if self.method == CallerMethod::Unauthenticated => write!(f, "@{address}"),
            Some(_) | None => Ok(()),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct StoredCaller {
    actor: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    caller: Option<CallerFields>,
}

#[derive(Serialize, Deserialize)]
struct CallerFields {
    name: String,
    method: CallerMethod,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<String>,
}

impl From<StoredCaller> for Caller {
    fn from(stored: StoredCaller) -> Self {
        match stored.caller {
            Some(CallerFields { name, method, address }) => Self { name, method, address },
            // Earlier releases wrote the text alone, and `system` for the program itself.
            None if stored.actor == "system" => Self::system(),
            None => Self::named(stored.actor),
        }
    }
}

impl From<Caller> for StoredCaller {
    fn from(caller: Caller) -> Self {
        let actor = caller.to_string();
        let Caller { name, method, address } = caller;
        Self { actor, caller: Some(CallerFields { name, method, address }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_text_of_a_caller_is_stable() {
        assert_eq!(Caller::system().to_string(), "system");
        assert_eq!(Caller::anonymous(Some("10.0.0.1".to_owned())).to_string(), "anonymous@10.0.0.1");
        assert_eq!(Caller::anonymous(None).to_string(), "unknown");
        assert_eq!(Caller::named("tester").to_string(), "tester");
        assert_eq!(Caller::local_user(1000).to_string(), "uid:1000");
    }
}
