//! The lines of the log: one for each operation, with the keys that `docs/operating.md` lists.

use std::collections::BTreeSet;

use rustix::process::Signal;
use serde_json::{Map, Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, signal, vmm_pid};

/// Returns the lines of a log as flat objects.
fn read(log: &[String]) -> Vec<Map<String, Value>> {
    let read = |line: &String| {
        let object: Map<String, Value> = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        for (key, value) in &object {
            assert!(!value.is_object() && !value.is_array(), "{key} is not flat: {line}");
            // A reader of JSON keeps one of two values with the same key.
            assert_eq!(line.matches(&format!(",\"{key}\":")).count().max(1), 1, "{key}: {line}");
        }
        object
    };
    log.iter().map(read).collect()
}

/// Sends a call that bears a request id.
fn call_as(world: &World, request_id: &str, method: &str, body: &Value) -> u16 {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let answer = agent
        .post(format!("{}/vmm.v1.VmService/{method}", world.url()))
        .header("content-type", "application/json")
        .header("x-request-id", request_id)
        .send(body.to_string());
    answer.unwrap().status().as_u16()
}

/// Returns the keys in the first column of the table "Keys of a line" in `docs/operating.md`.
fn documented_keys() -> BTreeSet<String> {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operating.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, table) = page.split_once("### Keys of a line").expect("the page has the table");
    let (table, _) = table.split_once("\n### ").unwrap_or((table, ""));
    let first_column = table.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let keys: BTreeSet<String> = first_column
        .flat_map(|cell| cell.split('`').step_by(2).map(str::to_owned).collect::<Vec<_>>())
        .collect();
    assert!(keys.len() > 20, "{keys:?}");
    keys
}

#[test]
fn each_operation_has_one_log_line_with_caller_operation_and_vm() {
    crate::needs_qemu!();
    let mut world = World::started(&[]);
    let vm = json!({"vm_id": "vm"});
    let forced = json!({"vm_id": "vm", "force": true});
    let calls = [
        ("CreateVm", json!({"vm_id": "vm", "config": world.tiny(TinyGuest::Idle)}), 200),
        ("BootVm", vm.clone(), 200),
        ("PauseVm", vm.clone(), 200),
        ("PauseVm", vm.clone(), 200),
        ("RebootVm", vm.clone(), 400),
        ("ResumeVm", vm.clone(), 200),
        ("RebootVm", forced.clone(), 200),
        ("DeleteVm", vm.clone(), 400),
        ("ShutdownVm", forced, 200),
        ("ResumeVm", vm.clone(), 400),
        ("DeleteVm", vm.clone(), 200),
        ("CreateVm", json!({"vm_id": "vm", "config": world.tiny(TinyGuest::Idle)}), 200),
        ("BootVm", vm, 200),
        ("DeleteVm", json!({"vm_id": "vm", "force": true}), 200),
    ];
    for (number, (method, body, status)) in calls.iter().enumerate() {
        let answered = call_as(&world, &format!("call-{number}"), method, body);
        assert_eq!(answered, *status, "{number}: {method}");
    }
    let (_, log) = world.stop(Signal::TERM);
    let lines = read(&log);
    for (number, (method, body, status)) in calls.iter().enumerate() {
        let id = format!("call-{number}");
        let of_call: Vec<_> =
            lines.iter().filter(|line| line.get("request_id") == Some(&json!(id))).collect();
        let [line] = of_call[..] else { panic!("{id}, {method}: {of_call:#?}") };
        let has_succeeded = *status == 200;
        assert_eq!(line["level"], if has_succeeded { "INFO" } else { "WARN" }, "{line:?}");
        assert_eq!(line["outcome"], if has_succeeded { "done" } else { "failed" }, "{line:?}");
        assert_eq!(line["operation"], *method, "{line:?}");
        assert_eq!(line["actor"], "anonymous@127.0.0.1", "{line:?}");
        assert_eq!((&line["vm_id"], &line["backend"]), (&json!("vm"), &json!("qemu")), "{line:?}");
        assert_eq!(line["uid"].as_str().map(str::len), Some(36), "{line:?}");
        assert!(line["duration_ms"].is_u64(), "{line:?}");
        if has_succeeded {
            assert_eq!(line.get("force"), body.get("force"), "{line:?}");
            assert_eq!(line.contains_key("state"), *method != "DeleteVm", "{line:?}");
        } else {
            assert_eq!(line["reason"], "failed_precondition", "{line:?}");
            assert!(line["detail"].as_str().unwrap().contains("is not legal for VM"), "{line:?}");
        }
    }
    let documented = documented_keys();
    for line in &lines {
        for key in line.keys() {
            assert!(documented.contains(key), "docs/operating.md has no key {key}: {line:?}");
        }
    }
}

#[test]
fn a_failed_or_refused_call_has_one_warning_with_its_reason() {
    let mut world = World::started(&[]);
    let without_memory = json!({"vm_id": "wrong", "config": {"cpu": {"vcpu_count": 1}}});
    let cases = [
        ("id-1", "BootVm", json!({"vm_id": "nobody"}), "not_found", "there is no VM"),
        ("id-2", "CreateVm", without_memory, "invalid_argument", "config.memory: is required"),
        ("id-3", "CreateVm", json!({"vm_id": 7}), "invalid_argument", "vm_id: must be text"),
        ("id-4", "GetVmInfo", json!({}), "invalid_argument", "vm_id: is required"),
        ("id-5", "StartVm", json!({}), "unimplemented", "has no method"),
        ("id-6", "WriteConsole", json!({}), "invalid_argument", "vm_id: is required"),
    ];
    for (id, method, body, ..) in &cases {
        call_as(&world, id, method, body);
    }
    // The library refuses this one before any method sees it.
    let too_long = json!({"vm_id": "x".repeat(5 << 20)});
    call_as(&world, "id-7", "CreateVm", &too_long);
    let (_, log) = world.stop(Signal::TERM);
    let lines = read(&log);
    let of = |id: &str| -> Vec<&Map<String, Value>> {
        lines.iter().filter(|line| line.get("request_id") == Some(&json!(id))).collect()
    };
    for (id, method, _, reason, detail) in cases {
        let [line] = of(id)[..] else { panic!("{id}: {log:#?}") };
        assert_eq!((&line["level"], &line["outcome"]), (&json!("WARN"), &json!("failed")), "{line:?}");
        assert_eq!(line["reason"], reason, "{line:?}");
        assert!(line["detail"].as_str().unwrap().contains(detail), "{line:?}");
        assert_eq!(line["path"], format!("/vmm.v1.VmService/{method}"), "{line:?}");
        let operation = (method != "StartVm").then(|| json!(method));
        assert_eq!(line.get("operation"), operation.as_ref(), "only a method that exists is one: {line:?}");
    }
    assert_eq!(of("id-7").len(), 1, "{log:#?}");
}

#[test]
fn the_end_of_a_run_has_a_log_line() {
    crate::needs_qemu!();
    let mut world = World::started(&[]);
    call_as(&world, "creation", "CreateVm", &json!({"vm_id": "vm", "config": world.tiny(TinyGuest::Idle)}));
    call_as(&world, "boot", "BootVm", &json!({"vm_id": "vm"}));
    let pid = vmm_pid(&world.info("vm"));
    signal(pid, Signal::KILL);
    world.wait_for_state("vm", "VM_STATE_SHUTDOWN");

    let mut resets = world.tiny(TinyGuest::Reset);
    resets["restart_policy"] = json!({"mode": "RESTART_MODE_GUEST_REBOOT", "max_restarts": 3});
    call_as(&world, "creation", "CreateVm", &json!({"vm_id": "again", "config": resets}));
    call_as(&world, "boot", "BootVm", &json!({"vm_id": "again"}));
    world.wait_for_state("again", "VM_STATE_SHUTDOWN");
    let (_, log) = world.stop(Signal::TERM);
    let lines = read(&log);
    let logged = |vm_id: &str, message: &str| -> &Map<String, Value> {
        let mut of = lines
            .iter()
            .filter(|line| line["message"] == message && line.get("vm_id") == Some(&json!(vm_id)));
        of.next().unwrap_or_else(|| panic!("{message}: {log:#?}"))
    };
    let killed = logged("vm", "the VM's run ended by a failure");
    assert_eq!((&killed["level"], &killed["reason"]), (&json!("WARN"), &json!("vmm-failed")));
    assert_eq!((&killed["operation"], &killed["origin"]), (&json!("vmm-exited"), &json!("vmm")));
    assert!(killed["detail"].as_str().unwrap().contains("SIGKILL"), "{killed:?}");
    let looped = logged("again", "the VM's run ended by a failure");
    let reset = logged("again", "the guest reset itself in place and runs again");
    for line in [looped, reset] {
        assert_eq!(line["origin"], "guest", "{line:?}");
    }
    for line in [killed, looped, reset] {
        assert_eq!(line["actor"], "system", "as the event says: {line:?}");
        assert_eq!(line.get("request_id"), None, "{line:?}");
        assert!(line.contains_key("uid") && line.contains_key("backend"), "{line:?}");
    }
}

#[test]
fn a_start_by_the_restart_policy_has_one_log_line() {
    crate::needs_qemu!();
    let mut world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Idle);
    config["restart_policy"] = json!({"mode": "RESTART_MODE_ON_FAILURE", "max_restarts": 3});
    world.create("vm", &config);
    world.boot("vm");
    let pid = vmm_pid(&world.info("vm"));
    signal(pid, Signal::KILL);
    let runs_again = |info: &Value| {
        info["state"] == "VM_STATE_RUNNING" && info["backend_info"]["pid"].as_str() != Some(&pid.to_string())
    };
    world.wait_for("vm", "started again", |info| runs_again(info) && info["status"]["phase"] == "running");
    let events = world.call("ListVmEvents", &json!({"vm_id": "vm"})).ok()["events"].clone();
    let started = |event: &&Value| event["cause"] == "BootVm" && event["actor"] == "system";
    assert!(events.as_array().unwrap().iter().find(started).is_some(), "{events:#}");
    let (_, log) = world.stop(Signal::TERM);
    // The line names the actor as the event does.
    let is_restart = |line: &Map<String, Value>| {
        line.get("operation") == Some(&json!("BootVm")) && line.get("actor") == Some(&json!("system"))
    };
    let restarts: Vec<_> = read(&log).into_iter().filter(is_restart).collect();
    let [restart] = &restarts[..] else { panic!("{log:#?}") };
    assert_eq!((&restart["level"], &restart["outcome"]), (&json!("INFO"), &json!("done")), "{restart:?}");
    assert_eq!((&restart["operation"], &restart["vm_id"]), (&json!("BootVm"), &json!("vm")), "{restart:?}");
}
