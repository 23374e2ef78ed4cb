//! Idempotency keys over the wire.

use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use connectrpc::{ErrorCode, Protocol};
use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceClient;
use vmm_testkit::guests::TinyGuest;

use crate::harness::{Answer, World, eventually, hypervisors, try_call_keyed};

const KEY: &str = "8e03978e-40d5-43e8-bc93-6894a57f9324";

impl World {
    /// Calls with a key. Also says whether the answer was given before.
    fn keyed(&self, method: &str, body: &Value, key: &str) -> (Answer, bool) {
        try_call_keyed(self.url(), method, body, key).expect("the daemon answers")
    }
}

/// Runs a call of the generated client, with the key, in each protocol with binary messages.
fn with_client<T>(
    world: &World,
    call: impl AsyncFn(&VmServiceClient<HttpClient>, CallOptions) -> T,
) -> Vec<(Protocol, T)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let one = |protocol| {
        let config = ClientConfig::new(world.url().parse().unwrap()).with_protocol(protocol);
        runtime.block_on(async {
            let client = VmServiceClient::new(HttpClient::plaintext_http2_only(), config);
            (protocol, call(&client, CallOptions::default().with_header("idempotency-key", KEY)).await)
        })
    };
    [Protocol::Connect, Protocol::Grpc, Protocol::GrpcWeb].into_iter().map(one).collect()
}

#[test]
fn a_key_has_one_answer_in_every_protocol_and_across_a_restart() {
    let mut world = World::started(&[]);
    let mut body = json!({"config": world.tiny(TinyGuest::Idle)});
    body["config"]["metadata"] = json!({"a": "1", "b": "2", "c": "3", "d": "4"});
    let (first, replayed) = world.keyed("CreateVm", &body, KEY);
    assert!(!replayed);
    let first = first.ok();
    world.stop(Signal::KILL);
    world.start();
    let (second, replayed) = world.keyed("CreateVm", &body, KEY);
    assert_eq!((second.ok(), replayed), (first.clone(), true));

    let request: pb::CreateVmRequest = serde_json::from_value(body.clone()).unwrap();
    let answers = with_client(&world, async |client, options| {
        let response = client.create_vm_with_options(request.clone(), options).await.unwrap();
        let replayed = response.headers().get("idempotency-replayed").cloned();
        (response.into_owned().uid, replayed)
    });
    for (protocol, (uid, replayed)) in answers {
        assert_eq!(
            (uid.as_str(), replayed.unwrap()),
            (first["uid"].as_str().unwrap(), "true".parse().unwrap()),
            "{protocol}"
        );
    }
    assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], 1);
    body["config"]["metadata"]["a"] = json!("2");
    let message = world.keyed("CreateVm", &body, KEY).0.error("already_exists");
    assert!(message.contains("another CreateVm request"), "{message}");
}

#[test]
fn a_refusal_is_replayed_with_its_code_and_its_details() {
    let world = World::started(&[]);
    let bad = json!({"vm_id": "vm", "config": {"cpu": {"vcpu_count": -1}}});
    let (first, replayed) = world.keyed("CreateVm", &bad, KEY);
    assert!(!replayed && first.body["details"].as_array().is_some_and(|details| !details.is_empty()));
    let (second, replayed) = world.keyed("CreateVm", &bad, KEY);
    assert_eq!((first.status, &first.body), (second.status, &second.body));
    assert!(replayed);
    let (missing, _) = world.keyed("BootVm", &json!({"vm_id": "none"}), KEY);
    let message = missing.error("not_found");
    for (protocol, error) in with_client(&world, async |client, options| {
        let request = pb::BootVmRequest { vm_id: "none".to_owned(), ..Default::default() };
        client.boot_vm_with_options(request, options).await.unwrap_err()
    }) {
        assert_eq!(
            (error.code, error.message.as_deref()),
            (ErrorCode::NotFound, Some(message.as_str())),
            "{protocol}"
        );
        assert_eq!(error.response_headers()["idempotency-replayed"], "true", "{protocol}");
    }
}

#[test]
fn a_malformed_key_is_refused_and_reads_ignore_every_key() {
    let world = World::started(&[]);
    let long = "x".repeat(256);
    for method in [
        "CreateVm",
        "DeleteVm",
        "BootVm",
        "ShutdownVm",
        "PauseVm",
        "ResumeVm",
        "RebootVm",
        "UpdateVm",
        "WriteConsole",
    ] {
        for key in ["", "a b", &long] {
            let message = world.keyed(method, &json!({"vm_id": "vm"}), key).0.error("invalid_argument");
            assert!(message.starts_with("Idempotency-Key: must have 1 to 255"), "{method}: {message}");
        }
        let (answer, replayed) = world.keyed(method, &json!({"vm_id": "vm"}), KEY);
        assert!(answer.status != 200 && !replayed, "{method}");
        let (again, replayed) = world.keyed(method, &json!({"vm_id": "vm"}), KEY);
        assert_eq!((again.body, replayed), (answer.body, true), "{method} keeps its answers");
    }
    for _ in 0..2 {
        let (answer, replayed) = world.keyed("ListVms", &json!({}), "a b");
        assert_eq!((answer.status, replayed), (200, false));
    }
}

#[test]
fn a_reboot_with_a_key_is_carried_out_once_although_the_daemon_is_killed() {
    let test = "a_reboot_with_a_key_is_carried_out_once_although_the_daemon_is_killed";
    for hypervisor in hypervisors(test) {
        let mut world = World::started(&[("UNKEY_VMCP_BACKEND", hypervisor)]);
        let config = world.tiny(TinyGuest::Idle);
        world.create("vm", &config);
        world.boot("vm");
        let body = json!({"vm_id": "vm", "force": true});
        let first = world.keyed("RebootVm", &body, KEY).0.ok();
        let generation = world.info("vm")["generation"].clone();
        world.stop(Signal::KILL);
        world.start();
        eventually("the VM is found", || world.info("vm")["state"] == "VM_STATE_RUNNING");
        let adopted = world.info("vm")["generation"].clone();
        let (second, replayed) = world.keyed("RebootVm", &body, KEY);
        assert_eq!((second.ok(), replayed), (first, true), "{hypervisor}");
        let now = world.info("vm")["generation"].clone();
        assert_eq!(now, adopted, "{hypervisor}: nothing has changed since the start, after {generation}");
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
        world.assert_nothing_left();
    }
}
