//! A log that nobody reads, or that cannot be written, is no matter of the calls.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::process::{Child, ChildStderr, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{Answer, World, call, eventually, on_path, signal};

/// A daemon whose log the test reads, or does not. Killed with the test.
struct Daemon {
    child: Child,
    url: String,
}

impl Daemon {
    /// Starts a daemon that logs to a pipe, and reads the pipe until the daemon serves.
    fn logging_to_a_pipe(world: &World) -> (Self, BufReader<ChildStderr>) {
        let mut child = world.command().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let mut daemon = Self { child, url: String::new() };
        // The smallest pipe there is, so that it is soon full.
        rustix::pipe::fcntl_setpipe_size(stderr.as_fd(), 4096).unwrap();
        let mut log = BufReader::new(stderr);
        let mut line = String::new();
        while daemon.url.is_empty() {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the daemon did not come up");
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            if entry["message"] == "serving" {
                daemon.url = format!("http://{}", entry["address"].as_str().unwrap());
            }
        }
        (daemon, log)
    }

    /// Starts a daemon whose log cannot be written, and waits until it serves.
    fn logging_to(world: &mut World, stderr: Stdio) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        world.set_env("UNKEY_VMCP_PORT", Some(&port.to_string()));
        let child = world.command().stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let mut daemon = Self { child, url: format!("http://127.0.0.1:{port}") };
        eventually("the daemon serves", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        assert!(daemon.child.try_wait().unwrap().is_none());
        daemon
    }

    fn call(&self, method: &str, body: &Value) -> Answer {
        call(&self.url, method, body)
    }

    /// Creates, looks, boots where QEMU is there, and ends by force.
    fn is_served(&self, world: &World, vms: usize) {
        for number in 0..vms {
            let vm_id = format!("vm-{number}");
            let config = world.tiny(TinyGuest::Idle);
            self.call("CreateVm", &json!({"vm_id": vm_id, "config": config})).ok();
        }
        assert_eq!(self.call("ListVms", &json!({})).ok()["total_count"], vms);
        if on_path("qemu-system-x86_64") {
            self.call("BootVm", &json!({"vm_id": "vm-0"})).ok();
            self.call("ShutdownVm", &json!({"vm_id": "vm-0", "force": true})).ok();
        }
        self.call("DeleteVm", &json!({"vm_id": "vm-0", "force": true})).ok();
        self.call("GetVmInfo", &json!({"vm_id": "vm-0"})).error("not_found");
    }

    /// Makes the daemon log more than it keeps for a reader who does not come.
    fn has_much_to_say(&self) {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let page = format!("{}/vmm.v1.VmService/ListVms", self.url);
        for _ in 0..600 {
            // The name is refused and logged.
            let answer = agent.get(&page).header("host", "x".repeat(6000)).call().unwrap();
            assert_eq!(answer.status(), 403);
        }
    }

    /// Tells the daemon to end, and answers its exit code.
    fn end(mut self) -> Option<i32> {
        signal(self.child.id(), Signal::TERM);
        let mut code = None;
        // Waiting is bounded: a daemon that hangs in its end fails the test.
        let child = std::cell::RefCell::new(&mut self.child);
        eventually("the daemon has ended", || child.borrow_mut().try_wait().unwrap().is_some());
        if let Ok(Some(status)) = self.child.try_wait() {
            code = status.code();
        }
        code
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_unread_log_delays_no_call_and_dropped_lines_are_counted() {
    let world = World::new(&[("RUST_LOG", "trace")]);
    let (daemon, log) = Daemon::logging_to_a_pipe(&world);
    daemon.has_much_to_say();
    daemon.is_served(&world, 200);
    // The reader goes on: what was dropped is told.
    let reader = std::thread::spawn(move || {
        log.lines().map_while(Result::ok).find_map(|line| {
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            entry["dropped"].as_u64()
        })
    });
    daemon.call("ListVms", &json!({})).ok();
    eventually("the dropped lines are counted", || reader.is_finished());
    assert!(reader.join().unwrap().is_some_and(|dropped| dropped > 0));
}

#[test]
fn an_unread_log_does_not_delay_the_exit() {
    let world = World::new(&[("RUST_LOG", "trace")]);
    let (daemon, _unread) = Daemon::logging_to_a_pipe(&world);
    daemon.has_much_to_say();
    daemon.is_served(&world, 5);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_log_with_a_closed_reader_does_not_disturb_the_daemon() {
    let world = World::new(&[]);
    let (daemon, log) = Daemon::logging_to_a_pipe(&world);
    drop(log);
    daemon.is_served(&world, 5);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_log_on_a_full_or_closed_output_does_not_disturb_the_daemon() {
    let mut world = World::new(&[]);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let daemon = Daemon::logging_to(&mut world, full.into());
    daemon.is_served(&world, 5);
    assert_eq!(daemon.end(), Some(0));

    let mut world = World::new(&[]);
    world.wrapper = ["sh", "-c", "exec \"$0\" 2>&-"].map(str::to_owned).into();
    let daemon = Daemon::logging_to(&mut world, Stdio::null());
    daemon.is_served(&world, 5);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_failed_daemon_start_prints_its_error_after_the_log() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let world = World::new(&[("UNKEY_VMCP_PORT", &port)]);
    let output = world.command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.lines().last().unwrap().starts_with("vmm-controlplane: cannot listen on"), "{text}");
}

#[test]
fn the_trace_of_the_caller_is_in_the_log() {
    let mut world = World::started(&[]);
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let answer = agent
        .post(format!("{}/vmm.v1.VmService/CreateVm", world.url()))
        .header("content-type", "application/json")
        .header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01"))
        .send(json!({"vm_id": "traced", "config": world.tiny(TinyGuest::Idle)}).to_string())
        .unwrap();
    assert_eq!(answer.status(), 200);
    let (_, log) = world.stop(Signal::TERM);
    let traced: Vec<Value> = log
        .iter()
        .filter(|line| line.contains(trace))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        traced.iter().any(|line| {
            (&line["trace_id"], &line["parent_id"], &line["vm_id"])
                == (&json!(trace), &json!("00f067aa0ba902b7"), &json!("traced"))
        }),
        "{log:#?}"
    );
}
