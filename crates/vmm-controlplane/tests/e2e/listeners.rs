//! The daemon on a unix socket: the caller's name in events, and what a death leaves.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::process::{Signal, geteuid};
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::World;
use crate::needs_qemu;

/// Calls a method over the unix socket.
fn call(socket: &Path, method: &str, body: &Value) -> Value {
    let body = body.to_string();
    let mut stream = UnixStream::connect(socket).unwrap();
    let head = format!(
        "POST /vmm.v1.VmService/{method} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // The body may come in chunks, and the object is in one of them.
    let (from, to) = (answer.find('{').unwrap(), answer.rfind('}').unwrap());
    serde_json::from_str(&answer[from..=to]).unwrap()
}

#[test]
fn the_user_of_the_unix_socket_is_the_actor_and_a_dead_daemons_socket_is_replaced() {
    needs_qemu!();
    let mut world = World::new(&[]);
    let socket = world.dir.path().join("api.sock");
    world.set_env("UNKEY_VMCP_SOCKET", Some(&socket.display().to_string()));
    world.start();
    let config = world.tiny(TinyGuest::Idle);
    call(&socket, "CreateVm", &json!({"vm_id": "vm", "config": config}));
    let events = world.call("ListVmEvents", &json!({"vm_id": "vm"})).ok();
    let actor = format!("uid:{}", geteuid().as_raw());
    assert_eq!(events["events"][0]["actor"], actor, "{events:#}");

    world.stop(Signal::KILL);
    assert!(socket.exists(), "a death removes nothing");
    // Alone, without a TCP port.
    world.set_env("UNKEY_VMCP_ADDRESS", Some("none"));
    world.try_start().unwrap();
    call(&socket, "DeleteVm", &json!({"vm_id": "vm"}));
    world.stop(Signal::TERM);
    assert!(!socket.exists() && !socket.with_extension("sock.lock").exists());
    world.assert_nothing_left();
}
