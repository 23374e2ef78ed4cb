//! Too few descriptors, too little memory, too many clients, too large requests: a caller that asks for too much is told, and
//! nobody else notices.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, call, eventually, hypervisors, is_alive, post, vmm_pid};
use crate::needs_qemu;

/// A world whose daemons have these limits on descriptors.
fn limited(soft: u64, hard: u64, env: &[(&str, &str)]) -> World {
    let mut world = World::new(env);
    let script = format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$0\" \"$@\"");
    world.wrapper = ["sh", "-c", &script].map(str::to_owned).into();
    world.start();
    world
}

/// The soft and the hard limit of a process.
fn limits_of(pid: u32) -> (u64, u64) {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

/// Connections that each wait for something that does not come, until they are dropped.
fn waiting(world: &World, vm_id: &str, count: usize) -> Vec<TcpStream> {
    let address = world.url().strip_prefix("http://").unwrap().to_owned();
    let body = json!({"vm_id": vm_id, "states": ["VM_STATE_PAUSED"], "timeout_seconds": 3600}).to_string();
    let request = format!(
        "POST /vmm.v1.VmService/WaitVm HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            stream
        })
        .collect()
}

#[test]
fn the_soft_limit_on_descriptors_is_raised() {
    let world = limited(64, 512, &[]);
    assert_eq!(limits_of(world.pid()), (512, 512));
    // More clients than the soft limit had room for.
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let _clients = waiting(&world, "vm", 60);
    assert_eq!(world.get("/_/health").status, 200);
    assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 1);
}

#[test]
fn at_the_hard_limit_boots_are_refused_and_running_vms_run_on() {
    const HARD: u64 = 104;
    for backend in hypervisors("at_the_hard_limit_boots_are_refused_and_running_vms_run_on") {
        let world = limited(64, HARD, &[("UNKEY_VMCP_METRICS_INTERVAL", "1")]);
        let mut running = Vec::new();
        let refusal = loop {
            let vm_id = format!("vm-{}", running.len());
            world.create_on(backend, &vm_id, TinyGuest::Idle);
            let answer = world.call("BootVm", &json!({"vm_id": vm_id}));
            if answer.status != 200 {
                break answer.error("resource_exhausted");
            }
            running.push(vm_id);
            assert!(running.len() < usize::try_from(HARD).unwrap(), "no limit was reached");
        };
        assert!(refusal.contains("may have 104 open files") && refusal.contains("LimitNOFILE="), "{refusal}");
        assert!(running.len() >= 3, "{backend}: only {} VMs fit", running.len());

        // As many clients as there may be, and more, keep nobody from health and force.
        let clients = waiting(&world, "vm-1", 60);
        assert_eq!(world.get("/_/health").status, 200);
        world.call("ShutdownVm", &json!({"vm_id": "vm-0", "force": true})).ok();
        drop(clients);
        eventually("others are served again", || world.call("ListVms", &json!({})).status == 200);

        for vm_id in &running[1..] {
            let before = world.info(vm_id)["metrics_observed_at"].clone();
            let info = world.wait_for(vm_id, "sampled again", |info| info["metrics_observed_at"] != before);
            assert_eq!(
                (&info["state"], &info["status"]["phase"]),
                (&json!("VM_STATE_RUNNING"), &json!("running"))
            );
        }
        let events = world.call("ListVmEvents", &json!({"page_size": 1000})).ok();
        assert!(!events.to_string().contains("unreachable"), "{events:#}");
        // What was freed serves another VM.
        world.boot("vm-0");
    }
}

#[test]
fn exhausted_descriptors_of_a_vmm_are_reported_like_those_of_the_daemon() {
    needs_qemu!();
    // Each of these disks has as many backing files as may be, and QEMU opens every one of them.
    let world = limited(64, 104, &[]);
    let folder = world.dir.path();
    std::fs::write(folder.join("link0"), vec![0; 1 << 20]).unwrap();
    let make = |base: &str, format: &str, name: &str| {
        let arguments = ["create", "-q", "-f", "qcow2", "-b", base, "-F", format, name];
        let made =
            std::process::Command::new("qemu-img").args(arguments).current_dir(folder).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    };
    for link in 1..=31 {
        let format = if link == 1 { "raw" } else { "qcow2" };
        make(&format!("link{}", link - 1), format, &format!("link{link}"));
    }
    let mut config = world.tiny(TinyGuest::Idle);
    let disks = ["a", "b", "c", "d"].map(|name| {
        make("link31", "qcow2", name);
        json!({"path": folder.join(name), "options": {"format": "qcow2", "backing_files": "true"}})
    });
    config["storage"] = json!(disks);
    world.create("vm", &config);
    let said = world.call("BootVm", &json!({"vm_id": "vm"})).error("resource_exhausted");
    assert!(said.contains("Too many open files") && said.contains("LimitNOFILE="), "{said}");
    assert_eq!(world.info("vm")["state"], "VM_STATE_CREATED");
    world.call("DeleteVm", &json!({"vm_id": "vm"})).ok();
    world.assert_nothing_left();
}

#[test]
fn a_thousand_idle_connections_delay_no_call() {
    // The connections are this process's too.
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, maximum: limits.maximum }).unwrap();
    let world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let address = world.url().strip_prefix("http://").unwrap();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let mut idle = Vec::new();
    for _ in 0..1100 {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.write_all(&settings).unwrap();
        // The server's own settings: the connection is being served.
        let _ = stream.read(&mut [0; 64]).unwrap();
        idle.push(stream);
    }
    assert_eq!(world.get("/_/health").status, 200);
    assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 1);
    world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).error("failed_precondition");
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
}

#[test]
fn a_request_with_too_many_entries_is_refused_and_delays_no_call() {
    let world = World::started(&[]);
    let url = world.url().to_owned();
    let body = json!({"config": {"storage": vec![json!({}); 300_000]}});
    thread::scope(|scope| {
        let refused: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| call(&url, "ValidateVm", &body).error("invalid_argument")))
            .collect();
        for _ in 0..20 {
            assert_eq!(world.get("/_/health").status, 200);
            world.call("ListVms", &json!({})).ok();
        }
        for refused in refused {
            let message = refused.join().unwrap();
            assert!(message.starts_with("config.storage: has too many entries"), "{message}");
        }
    });
    let states: Vec<Value> = vec![json!("VM_STATE_RUNNING"); 200_000];
    let listed = post(&format!("{url}/vmm.v1.VmService/ListVms"), &json!({"state_filter": states}));
    assert!(listed.error("invalid_argument").starts_with("state_filter: has too many entries"));
}

/// Bytes of address space that the daemon and each of its VMMs may have, in the tests of memory.
const ADDRESS_SPACE: u64 = 6 << 30;

/// Returns a world whose daemon, and so each VMM, may have [`ADDRESS_SPACE`].
fn short_of_memory() -> World {
    let mut world = World::new(&[]);
    let script = format!("ulimit -v {} && exec \"$0\" \"$@\"", ADDRESS_SPACE >> 10);
    world.wrapper = ["sh", "-c", &script].map(str::to_owned).into();
    world.start();
    world
}

#[test]
fn a_vmm_without_memory_fails_its_own_boot_only() {
    for backend in hypervisors("a_vmm_without_memory_fails_its_own_boot_only") {
        let world = short_of_memory();
        world.create_on(backend, "small", TinyGuest::Idle);
        world.boot("small");
        let before = world.vmms();
        let mut large = world.tiny(TinyGuest::Idle);
        large["memory"]["size_bytes"] = json!((2 * ADDRESS_SPACE).to_string());
        world.call("CreateVm", &json!({"vm_id": "large", "backend": backend, "config": large})).ok();
        let said = world.call("BootVm", &json!({"vm_id": "large"})).error("failed_precondition");
        assert!(said.contains("annot allocate memory") || said.contains("os error 12"), "{backend}: {said}");
        let status = world.info("large")["status"].clone();
        assert_eq!((&status["phase"], &status["reason"]), (&json!("failed"), &json!("boot-failed")));
        assert_eq!(world.vmms(), before, "{backend}: a process was left");
        let small = world.info("small");
        assert_eq!(
            (&small["state"], &small["status"]["phase"]),
            (&json!("VM_STATE_RUNNING"), &json!("running"))
        );
        for vm_id in ["large", "small"] {
            world.call("DeleteVm", &json!({"vm_id": vm_id, "force": true})).ok();
        }
        world.assert_nothing_left();
    }
}

#[test]
fn a_running_vmm_without_memory_is_shown_in_its_proven_state() {
    for backend in hypervisors("a_running_vmm_without_memory_is_shown_in_its_proven_state") {
        let world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Idle);
        world.boot("vm");
        let pid = vmm_pid(&world.info("vm"));
        let limit =
            std::process::Command::new("prlimit").args([&format!("--pid={pid}"), "--as=4096"]).status();
        assert!(limit.unwrap().success());
        // A VMM may answer, refuse or die. Either way the daemon shows the state that is proven.
        for (method, done) in [("PauseVm", "VM_STATE_PAUSED"), ("ResumeVm", "VM_STATE_RUNNING")] {
            let answer = world.call(method, &json!({"vm_id": "vm"}));
            let info = world.info("vm");
            match answer.status {
                200 => assert_eq!(info["state"], done, "{backend}: {info:#}"),
                _ if is_alive(pid) => assert_ne!(info["state"], "VM_STATE_SHUTDOWN", "{backend}: {info:#}"),
                _ => drop(world.wait_for_state("vm", "VM_STATE_SHUTDOWN")),
            }
        }
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}
