//! The daemon under a service manager: the datagrams of systemd's notification protocol.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

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

/// A host with a unit that ends VMs with the daemon. This machine's systemd is not the one that
/// runs the daemon, so that a script answers in its place.
fn world_with_unit(settings: &str) -> World {
    let mut world = World::new(&[]);
    let programs = world.dir.path().join("programs");
    std::fs::create_dir(&programs).unwrap();
    let script = programs.join("systemctl");
    std::fs::write(
        &script,
        format!("#!/bin/sh\n[ \"$2\" = vmm-controlplane.service ] || exit 1\nprintf '{settings}'\n"),
    )
    .unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    world.set_env("PATH", Some(&path));
    world
}

#[test]
fn doctor_warns_of_a_unit_that_ends_vms() {
    let lines = |settings: &str| {
        let world = world_with_unit(settings);
        let output = world.command().args(["doctor", "--json"]).output().unwrap();
        let diagnosis: Value = serde_json::from_slice(&output.stdout).unwrap();
        let checks = diagnosis["checks"].as_array().unwrap().clone();
        checks.into_iter().filter(|check| check["name"] == "systemd unit").collect::<Vec<_>>()
    };
    let found = lines(r"LoadState=loaded\nKillMode=control-group\nOOMPolicy=continue\n");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0]["finding"].as_str().unwrap().contains("KillMode=control-group: every VM ends"),
        "{found:?}"
    );
    assert!(found[0]["remedy"].as_str().unwrap().contains("KillMode=process"), "{found:?}");
    assert!(lines(r"LoadState=loaded\nKillMode=process\nOOMPolicy=continue\n").is_empty());
    assert!(lines(r"LoadState=not-found\nKillMode=control-group\n").is_empty());
}
