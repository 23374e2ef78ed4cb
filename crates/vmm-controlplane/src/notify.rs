//! Messages to the service manager that started the daemon: the daemon is ready, is alive, or
//! stops.
//!
//! systemd names a datagram socket in `NOTIFY_SOCKET`, and with `WatchdogSec=` the longest
//! permitted silence in `WATCHDOG_USEC`. Each message is one datagram of text. No message is sent
//! if no socket is named.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The connection to the service manager, if there is one.
pub(crate) struct ServiceManager {
    way: Option<(UnixDatagram, SocketAddr)>,
    watchdog_interval: Option<Duration>,
}

impl ServiceManager {
    /// Reads the variables that the service manager sets. A socket that cannot be used is logged
    /// and ignored.
    #[must_use]
    pub(crate) fn of_this_process() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let way = variable("NOTIFY_SOCKET").and_then(|name| match open_notify_socket(&name) {
            Ok(way) => Some(way),
            Err(error) => {
                tracing::warn!(%error, socket = ?name, "the socket in NOTIFY_SOCKET cannot be used; the service manager gets no messages");
                None
            }
        });
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        let is_for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog_interval = number("WATCHDOG_USEC").filter(|_| is_for_us).map(Duration::from_micros);
        Self { way, watchdog_interval }
    }

    /// Reports that the daemon serves.
    pub(crate) fn ready(&self) {
        self.send("READY=1\nSTATUS=serving");
    }

    /// Reports that the daemon stops, so that the watchdog does not end it during the shutdown.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=stopping; the VMs go on running");
    }

    /// Reports to the watchdog for ever that the daemon is alive, twice in the longest permitted
    /// silence.
    pub(crate) async fn stay_alive(&self) {
        let Some(longest) = self.watchdog_interval.filter(|_| self.way.is_some()) else {
            return std::future::pending().await;
        };
        let mut ticks = tokio::time::interval((longest / 2).max(Duration::from_millis(1)));
        loop {
            ticks.tick().await;
            self.send("WATCHDOG=1");
        }
    }

    fn send(&self, message: &str) {
        let Some((socket, address)) = &self.way else { return };
        if let Err(error) = socket.send_to_addr(message.as_bytes(), address) {
            tracing::warn!(%error, sent = message, "a message to the service manager could not be sent");
        }
    }
}

/// Opens a socket for sending to `name`. A name that begins with `@` is in the abstract namespace.
fn open_notify_socket(name: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A service manager that does not read must not hold the daemon up.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_and_abstract_sockets_are_notified() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let abstract_name = format!("vmcp-test-notify-{}", std::process::id());
        let named = UnixDatagram::bind(&path).unwrap();
        let unnamed =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name).unwrap()).unwrap();
        for (name, socket) in [(path.into_os_string(), named), (format!("@{abstract_name}").into(), unnamed)]
        {
            let way = Some(open_notify_socket(&name).unwrap());
            ServiceManager { way, watchdog_interval: None }.ready();
            let mut received = [0; 100];
            let length = socket.recv(&mut received).unwrap();
            assert_eq!(&received[..length], b"READY=1\nSTATUS=serving");
        }
        // Nobody listens at this name, which is not an error.
        let way = Some(open_notify_socket(OsStr::new("/nonexistent/notify")).unwrap());
        ServiceManager { way, watchdog_interval: None }.stopping();
    }
}
