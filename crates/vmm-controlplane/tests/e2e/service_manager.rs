//! The daemon under a service manager: the datagrams of systemd's notification protocol.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::process::Signal;

use crate::harness::World;

/// Far longer than a daemon takes to say anything.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

fn next(socket: &UnixDatagram) -> String {
    let mut datagram = [0; 256];
    let length = socket.recv(&mut datagram).unwrap();
    String::from_utf8_lossy(&datagram[..length]).into_owned()
}

#[test]
fn readiness_watchdog_and_stop_are_notified_over_path_and_abstract_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let name = format!("vmcp-e2e-notify-{}", std::process::id());
    let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
    let sockets = [
        (path.display().to_string(), UnixDatagram::bind(&path).unwrap()),
        (format!("@{name}"), UnixDatagram::bind_addr(&abstract_address).unwrap()),
    ];
    for (name, socket) in sockets {
        socket.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        let mut world = World::started(&[("NOTIFY_SOCKET", &name), ("WATCHDOG_USEC", "200000")]);
        assert!(next(&socket).starts_with("READY=1\n"), "{name}");
        for _ in 0..3 {
            assert_eq!(next(&socket), "WATCHDOG=1", "{name}");
        }
        let (code, _) = world.stop(Signal::TERM);
        assert_eq!(code, Some(0));
        socket.set_nonblocking(true).unwrap();
        let mut datagram = [0; 256];
        let mut rest = Vec::new();
        while let Ok(length) = socket.recv(&mut datagram) {
            rest.push(String::from_utf8_lossy(&datagram[..length]).into_owned());
        }
        assert!(rest.iter().any(|reported| reported.starts_with("STOPPING=1\n")), "{name}: {rest:?}");
    }
}

#[test]
fn the_daemon_serves_without_its_service_manager() {
    let mut world = World::started(&[("NOTIFY_SOCKET", "/nonexistent/notify"), ("WATCHDOG_USEC", "1")]);
    assert_eq!(world.get("/health").status, 200);
    assert_eq!(world.stop(Signal::TERM).0, Some(0));
}
