//! The calls of rtnetlink that TAPs need: find a link, label it and set it up, remove it.

use std::io;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{Error, Handle, LinkUnspec};
use tokio::task::JoinHandle;

/// The longest wait for an answer of the kernel. The kernel may finish other removals first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection to the kernel's routing sockets, of this process's network namespace.
pub(super) struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

/// A link, as one answer of the kernel describes it.
pub(super) struct NetworkLink {
    /// The number that distinguishes the link from a later one with the same name.
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: Option<String>,
    /// True if a process holds the link's other end.
    pub(super) attached: bool,
    /// True if an administrator or a program has set the link up.
    pub(super) up: bool,
}

impl Netlink {
    /// Opens a socket. Must be called inside a Tokio runtime.
    pub(super) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// Finds a link by name.
    pub(super) async fn find(&self, name: &str) -> io::Result<Option<NetworkLink>> {
        let mut answers = Box::pin(self.handle.link().get().match_name(name).execute());
        match in_time(answers.try_next()).await {
            Ok(found) => Ok(found.map(NetworkLink::of)),
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lists every link.
    pub(super) async fn all(&self) -> io::Result<Vec<NetworkLink>> {
        let links = self.handle.link().get().execute().map(|link| link.map(NetworkLink::of));
        in_time(Box::pin(links).try_collect()).await
    }

    /// Labels a link. The same request also sets it up if `up`.
    pub(super) async fn label(&self, index: u32, alias: String, up: bool) -> io::Result<()> {
        let link = LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::IfAlias(alias));
        let link = if up { link.up() } else { link };
        in_time(self.handle.link().set(link.build()).execute()).await
    }

    /// Sets a link up.
    pub(super) async fn bring_up(&self, index: u32) -> io::Result<()> {
        let link = LinkUnspec::new_with_index(index).up();
        in_time(self.handle.link().set(link.build()).execute()).await
    }

    /// Removes a link.
    pub(super) async fn remove(&self, index: u32) -> io::Result<()> {
        in_time(self.handle.link().del(index).execute()).await
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl NetworkLink {
    fn of(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            alias: None,
            attached: message.header.flags.contains(LinkFlags::LowerUp),
            up: message.header.flags.contains(LinkFlags::Up),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                _ => {}
            }
        }
        link
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Error>>) -> io::Result<T> {
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(answer) => answer.map_err(into_io),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the kernel did not answer within {} s", ANSWER_TIMEOUT.as_secs()),
        )),
    }
}

/// Returns the kernel's own error where there is one.
fn into_io(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(answer) => answer.to_io(),
        other => io::Error::other(other),
    }
}
