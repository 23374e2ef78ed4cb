//! UpdateVm over the wire, and the VM that each event of a watch carries.

use buffa::Message as _;
use serde_json::{Value, json};
use vmm_proto::v1 as pb;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{WAIT_TIMEOUT, World, hypervisors, skipped};
use crate::shutdown::{NO_LINUX, linux_config};

/// Returns the generation of a VM.
fn generation(world: &World, vm_id: &str) -> i64 {
    world.info(vm_id)["generation"].as_str().unwrap().parse().unwrap()
}

/// Calls UpdateVm with a binary message, and returns the binary answer.
fn update_in_binary(world: &World, request: &pb::UpdateVmRequest) -> pb::UpdateVmResponse {
    let agent: ureq::Agent = ureq::Agent::config_builder().timeout_global(Some(WAIT_TIMEOUT)).build().into();
    let call = agent.post(format!("{}/vmm.v1.VmService/UpdateVm", world.url()));
    let sent = call.header("content-type", "application/proto").send(&request.encode_to_vec()[..]);
    let mut response = sent.unwrap();
    assert_eq!(response.headers()["content-type"], "application/proto");
    pb::UpdateVmResponse::decode_from_slice(&response.body_mut().read_to_vec().unwrap()).unwrap()
}

/// Returns the memory in KiB that the guest told at its boot number `boots`.
fn told_memory(world: &World, vm_id: &str, boots: usize) -> u64 {
    let console = world.wait_for_console(vm_id, "mem_kib=", boots);
    let told = console.rsplit("mem_kib=").next().unwrap();
    let digits: String = told.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number: {console}"))
}

#[test]
fn new_memory_of_a_stopped_vm_is_the_guests_after_the_next_boot() {
    const TEST: &str = "new_memory_of_a_stopped_vm_is_the_guests_after_the_next_boot";
    for backend in hypervisors(TEST) {
        let Some(config) = linux_config(backend, "") else {
            skipped(&format!("{TEST} on {backend}"), NO_LINUX);
            continue;
        };
        let world = World::started(&[]);
        world.call("CreateVm", &json!({"vm_id": "vm", "backend": backend, "config": config})).ok();
        world.boot("vm");
        world.wait_for_console("vm", "vmcp-guest: ready", 1);
        let before = told_memory(&world, "vm", 1);
        world.call("ShutdownVm", &json!({"vm_id": "vm", "force": true})).ok();
        let present = generation(&world, "vm");
        let change = json!({"vm_id": "vm", "config": {"memory": {"size_bytes": 384 << 20}},
            "fields": ["memory"], "if_generation": present});
        let answer = world.call("UpdateVm", &change).ok();
        assert_eq!(answer, json!({"state": "VM_STATE_SHUTDOWN", "generation": (present + 1).to_string()}));
        world.boot("vm");
        world.wait_for_console("vm", "vmcp-guest: ready", 2);
        let after = told_memory(&world, "vm", 2);
        let more = (128 << 10) - (16 << 10);
        assert!(after >= before + more, "{backend}: {before} KiB, then {after} KiB");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}

#[test]
fn a_running_vm_is_updated_in_json_and_in_binary_and_keeps_its_machine() {
    const TEST: &str = "a_running_vm_is_updated_in_json_and_in_binary_and_keeps_its_machine";
    for backend in hypervisors(TEST) {
        let world = World::started(&[]);
        world.create_on(backend, "vm", TinyGuest::Idle);
        world.boot("vm");
        let pid = world.info("vm")["backend_info"]["pid"].clone();
        let stream = world.stream("WatchVms", &json!({"include_info": true}));
        stream.until(|message| message["type"] == "synced");
        let update = |more: Value| {
            let mut request = json!({"vm_id": "vm"});
            request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            world.call("UpdateVm", &request)
        };
        // Labels take effect at once, and the event shows the VM as a list does.
        update(json!({"config": {"metadata": {"team": "web"}}})).ok();
        let listed = world.call("ListVms", &json!({"metadata_filter": {"team": "web"}})).ok();
        let told = stream.until(|message| message["type"] == "updated").pop().unwrap();
        assert_eq!((&told["info"], &told["cause"]), (&listed["vms"][0], &json!("UpdateVm")), "{backend}");
        assert_eq!(told["info"]["metadata"], json!({"team": "web"}));
        // The same method in binary.
        let policy = pb::RestartPolicy { mode: pb::RestartMode::Never.into(), ..Default::default() };
        let binary = pb::UpdateVmRequest {
            vm_id: "vm".into(),
            config: pb::VmConfig { restart_policy: policy.into(), ..Default::default() }.into(),
            fields: vec!["restart_policy".into()],
            if_generation: generation(&world, "vm"),
            ..Default::default()
        };
        let answer = update_in_binary(&world, &binary);
        assert_eq!(answer.state, pb::VmState::Running, "{backend}");
        assert_eq!(answer.generation, generation(&world, "vm"));
        assert_eq!(world.info("vm")["config"]["restart_policy"]["mode"], "RESTART_MODE_NEVER");
        // The machine stays, and a stale generation changes nothing.
        let before = world.info("vm")["config"].clone();
        let text = update(json!({"config": {"cpu": {"vcpu_count": 2}}})).error("failed_precondition");
        assert!(text.contains("its cpu can only change while it does not run"), "{backend}: {text}");
        let stale = generation(&world, "vm") - 1;
        let text =
            update(json!({"config": {"metadata": {"a": "b"}}, "if_generation": stale})).error("aborted");
        assert!(text.contains(&format!("and not {stale}")), "{backend}: {text}");
        update(json!({"config": {"metadata": {"a": "b"}}, "fields": ["labels"]})).error("invalid_argument");
        assert_eq!(world.info("vm")["config"], before, "{backend}");
        // A protected VM is not deleted, also with force, and its VMM lives.
        update(json!({"config": {"delete_protection": true}})).ok();
        let delete = || world.call("DeleteVm", &json!({"vm_id": "vm", "force": true}));
        assert!(delete().error("failed_precondition").contains("is protected against deletion"));
        assert_eq!(world.info("vm")["backend_info"]["pid"], pid, "{backend}");
        update(json!({"config": {}, "fields": ["delete_protection"]})).ok();
        delete().ok();
        let gone = stream.until(|message| message["type"] == "deleted").pop().unwrap();
        assert!(gone["info"].is_null(), "{backend}: a list does not show a deleted VM: {gone}");
        world.assert_nothing_left();
    }
}
