//! A log that nobody reads, or that cannot be written, is no matter of the calls.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::process::{Child, ChildStderr, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::Guest;

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
            if entry["fields"]["message"] == "serving" {
                daemon.url = format!("http://{}", entry["fields"]["address"].as_str().unwrap());
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
            let config = world.tiny(Guest::Idle);
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
fn a_log_that_nobody_reads_holds_up_no_call_and_what_was_dropped_is_counted() {
    let world = World::new(&[("RUST_LOG", "trace")]);
    let (daemon, log) = Daemon::logging_to_a_pipe(&world);
    daemon.has_much_to_say();
    daemon.is_served(&world, 200);
    // The reader goes on: what was dropped is told.
    let reader = std::thread::spawn(move || {
        log.lines().map_while(Result::ok).find_map(|line| {
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            entry["fields"]["dropped"].as_u64()
        })
    });
    daemon.call("ListVms", &json!({})).ok();
    eventually("the dropped lines are counted", || reader.is_finished());
    assert!(reader.join().unwrap().is_some_and(|dropped| dropped > 0));
}

#[test]
fn a_log_that_nobody_reads_does_not_hold_up_the_end() {
    let world = World::new(&[("RUST_LOG", "trace")]);
    let (daemon, _unread) = Daemon::logging_to_a_pipe(&world);
    daemon.has_much_to_say();
    daemon.is_served(&world, 5);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_log_whose_reader_has_gone_is_no_defect() {
    let world = World::new(&[]);
    let (daemon, log) = Daemon::logging_to_a_pipe(&world);
    drop(log);
    daemon.is_served(&world, 5);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_log_on_a_full_device_or_without_a_place_is_no_defect() {
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
fn a_failed_start_says_why_behind_the_log() {
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
        .send(json!({"vm_id": "traced", "config": world.tiny(Guest::Idle)}).to_string())
        .unwrap();
    assert_eq!(answer.status(), 200);
    let (_, log) = world.stop(Signal::TERM);
    let traced: Vec<Value> = log
        .iter()
        .filter(|line| line.contains(trace))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        traced.iter().any(|line| line["spans"].as_array().unwrap().iter().any(|span| {
            (&span["trace_id"], &span["parent_id"], &span["vm_id"])
                == (&json!(trace), &json!("00f067aa0ba902b7"), &json!("traced"))
        })),
        "{log:#?}"
    );
}

/// Returns the lines of a log, read.
fn read(log: &[String]) -> Vec<Value> {
    log.iter().map(|line| serde_json::from_str(line).unwrap_or_default()).collect()
}

/// Sends a call that bears a request id.
fn call_as(world: &World, request_id: &str, method: &str, body: &Value) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let answer = agent
        .post(format!("{}/vmm.v1.VmService/{method}", world.url()))
        .header("content-type", "application/json")
        .header("x-request-id", request_id)
        .send(body.to_string());
    answer.unwrap();
}

#[test]
fn a_call_that_fails_or_is_refused_leaves_one_warning_with_its_reason() {
    let mut world = World::started(&[]);
    let without_memory = json!({"vm_id": "wrong", "config": {"cpu": {"vcpu_count": 1}}});
    let cases = [
        ("id-1", "BootVm", json!({"vm_id": "nobody"}), "not_found", "there is no VM"),
        ("id-2", "CreateVm", without_memory, "invalid_argument", "config.memory: is required"),
        ("id-3", "CreateVm", json!({"vm_id": 7}), "invalid_argument", "vm_id: must be text"),
        ("id-4", "GetVmInfo", json!({}), "invalid_argument", "vm_id: is required"),
        ("id-5", "StartVm", json!({}), "unimplemented", "has no method"),
        ("id-6", "WriteConsole", json!({}), "unimplemented", "WriteConsole is not served"),
    ];
    for (id, method, body, ..) in &cases {
        call_as(&world, id, method, body);
    }
    // The library refuses this one before any method sees it.
    let too_long = json!({"vm_id": "x".repeat(5 << 20)});
    call_as(&world, "id-7", "CreateVm", &too_long);
    let (_, log) = world.stop(Signal::TERM);
    let lines = read(&log);
    let of = |id: &str| -> Vec<&Value> {
        lines.iter().filter(|line| line["level"] == "WARN" && line["span"]["request_id"] == id).collect()
    };
    for (id, _, _, code, reason) in cases {
        let [line] = of(id)[..] else { panic!("{id}: {log:#?}") };
        assert_eq!(line["fields"]["code"], code, "{line}");
        assert!(line["fields"]["error"].as_str().unwrap().contains(reason), "{line}");
    }
    assert_eq!(of("id-7").len(), 1, "{log:#?}");
}

#[test]
fn the_end_of_a_run_is_logged_by_itself() {
    crate::needs_qemu!();
    let mut world = World::started(&[]);
    call_as(&world, "creation", "CreateVm", &json!({"vm_id": "vm", "config": world.tiny(Guest::Idle)}));
    call_as(&world, "boot", "BootVm", &json!({"vm_id": "vm"}));
    let pid = crate::harness::vmm_pid(&world.info("vm"));
    signal(pid, Signal::KILL);
    world.wait_for_state("vm", "VM_STATE_SHUTDOWN");

    let mut resets = world.tiny(Guest::Reset);
    resets["restart_policy"] = json!({"mode": "RESTART_MODE_GUEST_REBOOT", "max_restarts": 3});
    call_as(&world, "creation", "CreateVm", &json!({"vm_id": "again", "config": resets}));
    call_as(&world, "boot", "BootVm", &json!({"vm_id": "again"}));
    world.wait_for_state("again", "VM_STATE_SHUTDOWN");
    let (_, log) = world.stop(Signal::TERM);
    for line in &log {
        // A reader of JSON keeps one of two values with the same key.
        assert!(line.matches("\"message\":").count() <= 1, "{line}");
    }
    let lines = read(&log);
    let told = |vm_id: &str, message: &str| -> &Value {
        let is_it = |line: &&Value| {
            line["fields"]["message"] == message
                && line["spans"].as_array().unwrap().iter().any(|span| span["vm_id"] == vm_id)
        };
        lines.iter().find(is_it).unwrap_or_else(|| panic!("{message}: {log:#?}"))
    };
    let killed = told("vm", "the VM's run ended by a failure");
    assert_eq!((&killed["level"], &killed["fields"]["cause"]), (&json!("WARN"), &json!("vmm-failed")));
    assert!(killed["fields"]["detail"].as_str().unwrap().contains("SIGKILL"), "{killed}");
    let looped = told("again", "the VM's run ended by a failure");
    let reset = told("again", "the guest reset itself in place and runs again");
    for line in [killed, looped, reset] {
        let spans = line["spans"].as_array().unwrap();
        assert!(spans.iter().all(|span| span["request_id"].is_null()), "{line}");
    }
}
