//! The JSON of the contract, as curl sends and sees it.

use serde_json::json;

use vmm_proto::v1 as pb;

use crate::http_client::{get, json_call, post, send};
use crate::server::TestServer;

#[tokio::test]
async fn answers_use_proto_names_enum_names_and_strings_for_int64() {
    let server = TestServer::start().await;
    let reply = send(server.addr, json_call("GetVmInfo", r#"{"vm_id":"a"}"#)).await;
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.json(),
        json!({
            "vm_id": "a",
            "state": "VM_STATE_RUNNING",
            "config": {"memory": {"size_bytes": "2147483648"}},
            "backend_info": {"socket": "/run/x"},
            "generation": "7",
        })
    );
    let reply = send(server.addr, json_call("ListBackends", "{}")).await;
    assert_eq!(reply.json(), json!({"backends": [{"name": "firecracker", "limits": {"vcpus": "32"}}]}));
}

#[tokio::test]
async fn requests_accept_both_spellings_and_numbers_or_strings() {
    let server = TestServer::start().await;
    let snake = r#"{"vm_id":"a","config":{"memory":{"size_bytes":2147483648},"boot":{"kernel_path":"/k"},
        "restart_policy":{"mode":"RESTART_MODE_ALWAYS"},"metadata":{"myKey":"v","my_key":"w"}}}"#;
    let camel = r#"{"vmId":"a","config":{"memory":{"sizeBytes":"2147483648"},"boot":{"kernelPath":"/k"},
        "restartPolicy":{"mode":4},"metadata":{"myKey":"v","my_key":"w"}}}"#;
    let expected = json!([
        {"field": "size_bytes", "message": "2147483648"},
        {"field": "kernel_path", "message": "/k"},
        {"field": "mode", "message": "RESTART_MODE_ALWAYS"},
        {"field": "myKey", "message": "v"},
        {"field": "my_key", "message": "w"},
    ]);
    for body in [snake, camel] {
        let reply = send(server.addr, json_call("CreateVm", body)).await;
        assert_eq!(reply.status, 200, "{:?}", reply.body);
        assert_eq!(reply.json()["vm_id"], "a");
        assert_eq!(reply.json()["state"], "VM_STATE_CREATED");
        assert_eq!(reply.json()["warnings"], expected);
    }
}

#[tokio::test]
async fn an_unknown_field_is_refused_by_name() {
    let server = TestServer::start().await;
    for (body, path) in [
        (r#"{"vm_id":"a","confg":{}}"#, "confg"),
        (r#"{"config":{"cpu":{"vcpus":2}}}"#, "config.cpu.vcpus"),
        (r#"{"config":{"storage":[{"path":"/d","readonly":true}]}}"#, "config.storage[0].readonly"),
    ] {
        let reply = send(server.addr, json_call("CreateVm", body)).await;
        let (code, message) = reply.error();
        assert_eq!((reply.status.as_u16(), code.as_str()), (400, "invalid_argument"), "{message}");
        assert!(message.starts_with(&format!("{path}: unknown field ")), "{message}");
        assert_eq!(reply.json()["details"][0]["type"], "google.rpc.BadRequest");
    }
    // A message with a proto3 `optional` in it, which is a oneof of one behind the scenes.
    let framed = crate::http_client::envelope(br#"{"vm_id":"a","tailbytes":1}"#);
    let request =
        crate::http_client::post("/vmm.v1.VmService/StreamConsole", "application/connect+json", &framed);
    let reply = send(server.addr, request).await;
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    assert!(text.contains("tailbytes: unknown field") && text.contains("invalid_argument"), "{text}");
}

#[tokio::test]
async fn broken_json_and_wrong_types_are_invalid_arguments() {
    let server = TestServer::start().await;
    for body in [
        "{",
        r#"{"vm_id": a}"#,
        "",
        "[]",
        "{\"vm_id\":1}",
        r#"{"config":{"memory":{"size_bytes":"many"}}}"#,
        r#"{"config":{"memory":{"size_bytes":9223372036854775808}}}"#,
        r#"{"config":{"restart_policy":{"mode":"SOMETIMES"}}}"#,
    ] {
        let reply = send(server.addr, json_call("CreateVm", body)).await;
        let (code, message) = reply.error();
        assert_eq!((reply.status.as_u16(), code.as_str()), (400, "invalid_argument"), "{body}: {message}");
        // Broken JSON is named by its place, a wrong value by its path.
        let starts = [
            "request: is cut off: the body ends after 1 bytes",
            "request: is not JSON at line 1, column 11, ",
            "request: the body is empty",
            "request: is a list",
            "vm_id: must be text",
            "config.memory.size_bytes: must be a whole number",
            "config.restart_policy.mode: must be one of RESTART_MODE_NEVER, ",
        ];
        let named = starts.iter().any(|start| message.starts_with(start));
        assert!(named, "{body}: {message}");
    }
}

#[tokio::test]
async fn a_duplicate_key_is_refused_by_name() {
    let server = TestServer::start().await;
    for (body, path) in [
        (r#"{"vm_id":"a","vmId":"b"}"#, "vm_id"),
        (r#"{"config":{"cpu":{},"cpu":{}}}"#, "config.cpu"),
        (r#"{"config":{"metadata":{"a":"1","b":"2","a":"1"}}}"#, "config.metadata.a"),
        (
            r#"{"config":{"storage":[{"path":"/d","options":{"format":"raw","format":"qcow2"}}]}}"#,
            "config.storage[0].options.format",
        ),
    ] {
        let (code, message) = send(server.addr, json_call("CreateVm", body)).await.error();
        assert_eq!(
            (code.as_str(), message),
            ("invalid_argument", format!("{path}: is given twice; leave one out"))
        );
    }
}

#[tokio::test]
async fn a_request_with_too_many_entries_is_refused_in_both_codecs() {
    let server = TestServer::start().await;
    let refused =
        "config.storage: has too many entries: all lists and maps of a request may have 4096 together";
    let body = format!(r#"{{"config":{{"storage":[{}]}}}}"#, vec!["{}"; 300_000].join(","));
    let reply = send(server.addr, json_call("ValidateVm", &body)).await;
    assert_eq!(reply.error(), ("invalid_argument".to_owned(), refused.to_owned()));

    let config = pb::VmConfig { storage: vec![pb::StorageDevice::default(); 300_000], ..Default::default() };
    let request = pb::ValidateVmRequest { config: config.into(), ..Default::default() };
    let body = buffa::Message::encode_to_vec(&request);
    let reply = send(server.addr, post("/vmm.v1.VmService/ValidateVm", "application/proto", &body)).await;
    assert_eq!(reply.error(), ("invalid_argument".to_owned(), refused.to_owned()));

    let states = vec![pb::VmState::Running.into(); 4_000_000];
    let request = pb::ListVmsRequest { state_filter: states, ..Default::default() };
    let body = buffa::Message::encode_to_vec(&request);
    let reply = send(server.addr, post("/vmm.v1.VmService/ListVms", "application/proto", &body)).await;
    assert!(reply.error().1.starts_with("state_filter: has too many entries"), "{:?}", reply.error());
}

#[tokio::test]
async fn lists_accept_enum_names_in_post_and_get() {
    let server = TestServer::start().await;
    let filter = r#"{"state_filter":["VM_STATE_PAUSED","VM_STATE_RUNNING"],"pageToken":"p"}"#;
    let expected = json!({
        "vms": [
            {"vm_id": "vm-1", "state": "VM_STATE_PAUSED"},
            {"vm_id": "vm-1", "state": "VM_STATE_RUNNING"},
        ],
        "next_page_token": "p",
        "total_count": 2,
    });
    let reply = send(server.addr, json_call("ListVms", filter)).await;
    assert_eq!(reply.json(), expected);

    let message: String = filter.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let uri = format!("/vmm.v1.VmService/ListVms?connect=v1&encoding=json&message={message}");
    let reply = send(server.addr, get(&uri)).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.json(), expected);
}

#[tokio::test]
async fn violations_are_in_the_message_and_in_the_details() {
    let server = TestServer::start().await;
    let reply = send(server.addr, json_call("CreateVm", r#"{"vm_id":"invalid"}"#)).await;
    assert_eq!(reply.status, 400);
    let json = reply.json();
    assert_eq!(json["code"], "invalid_argument");
    assert_eq!(json["message"], "config.cpu.vcpu_count: must be 1 or more; config.memory: is required");
    assert_eq!(json["details"][0]["type"], "google.rpc.BadRequest");
    assert!(json["details"][0]["value"].as_str().unwrap().len() > 40);
}
