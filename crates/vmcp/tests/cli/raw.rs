//! `api`: a call as it is typed.

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{Running, World};

trials![
    a_raw_call_prints_the_answer_of_the_api,
    a_raw_stream_prints_each_message_as_it_arrives,
    a_server_error_keeps_its_code_and_fields,
    an_unknown_method_is_refused,
];

fn a_raw_call_prints_the_answer_of_the_api() {
    let world = World::started(&[]);
    world.create("a", TinyGuest::Idle);
    assert_eq!(world.run(&["api", "ListVms"]).json(), world.call("ListVms", &json!({})));
    let request = r#"{"vm_id": "a"}"#;
    let wanted = world.call("GetVmInfo", &json!({"vm_id": "a"}));
    let file = format!("@{}", world.write("request.json", request));
    assert_eq!(world.run(&["api", "GetVmInfo", request]).json(), wanted);
    assert_eq!(world.run(&["api", "GetVmInfo", &file]).json(), wanted);
    assert_eq!(world.run_with_input(&["api", "GetVmInfo", "-"], request).json(), wanted);
}

fn a_raw_stream_prints_each_message_as_it_arrives() {
    let world = World::started(&[]);
    world.create("a", TinyGuest::Idle);
    let stream = Running::start(world.command(&["api", "WatchVms"]));
    let lines = Running::until(&stream.stdout, "synced");
    let kinds: Vec<Value> =
        lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["type"].clone()).collect();
    assert_eq!(kinds, ["present", "synced"]);
    world.run(&["delete", "a"]).ok();
    Running::until(&stream.stdout, "deleted");
}

fn a_server_error_keeps_its_code_and_fields() {
    let world = World::started(&[]);
    let error = world.run(&["api", "GetVmInfo", r#"{"vm_id": "x"}"#]).failed(15);
    assert!(error.contains("(not_found)"), "{error}");
    let error = world.run(&["api", "CreateVm", r#"{"config": {"cpus": 1}}"#]).failed(13);
    assert!(error.contains("config.cpus"), "{error}");
    let error = world.run(&["api", "WatchVms", r#"{"resume_token": "x"}"#]).failed(13);
    assert!(error.contains("invalid_argument"), "{error}");
    let error = world.run(&["api", "StreamConsole", r#"{"vm_id": "x"}"#]).failed(15);
    assert!(error.contains("(not_found)"), "{error}");
}

fn an_unknown_method_is_refused() {
    let world = World::started(&[]);
    let error = world.run(&["api", "../ListVms"]).failed(13);
    assert!(error.contains("is no method\nhint: "), "{error}");
    let error = world.run(&["api", "ListMvs"]).failed(22);
    assert!(error.contains("ListMvs") || error.contains("ListVms"), "{error}");
}
