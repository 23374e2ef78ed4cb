//! `list`, `get`, `backends`, `health`, `events`: what they print is what the API says.

use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{World, has_qemu};

trials![
    a_list_is_a_table_for_people_and_the_message_for_programs,
    a_list_has_every_page,
    filters_reach_the_server,
    a_vm_is_shown_by_name_prefix_or_uid,
    an_unknown_name_is_not_found,
    backends_and_health_show_the_available_backends,
    an_unavailable_backend_makes_health_fail,
    the_events_of_a_deleted_vm_are_shown,
    a_word_of_another_tool_is_taken_or_answered_with_a_hint,
    control_bytes_in_names_are_escaped,
    a_closed_output_pipe_is_no_failure,
];

fn a_list_is_a_table_for_people_and_the_message_for_programs() {
    let world = World::started(&[]);
    assert_eq!(world.run(&["list"]).ok(), "NAME  STATE  BACKEND  VCPUS  MEMORY  AGE  STATUS\n");
    world.create("web-1", TinyGuest::Idle);
    world.create("db", TinyGuest::Idle);
    let table = world.run(&["list"]).ok();
    let rows: Vec<_> = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(rows[1][..6], ["web-1", "created", "qemu", "1", "64", "MiB"]);
    assert_eq!(rows[2][0], "db");
    assert_eq!(world.run(&["list", "-o", "name"]).ok(), "web-1\ndb\n");
    let message = world.call("ListVms", &json!({}));
    assert_eq!(world.run(&["list", "-o", "json"]).json(), message);
    let yaml = world.run(&["list", "-o", "yaml"]).ok();
    assert!(yaml.starts_with("vms:\n") && yaml.contains("vm_id: web-1\n"), "{yaml}");
    assert!(yaml.contains("memory_size_bytes: \"67108864\"\n"), "a string in JSON is one in YAML: {yaml}");
}

fn a_list_has_every_page() {
    let world = World::started(&[]);
    let config = world.tiny(TinyGuest::Idle);
    for number in 0..1003 {
        world.call("CreateVm", &json!({"vm_id": format!("vm-{number}"), "config": config}));
    }
    let names = world.run(&["list", "-o", "name"]).ok();
    assert_eq!(names.lines().count(), 1003);
    let message = world.run(&["list", "-o", "json"]).json();
    assert_eq!(message["vms"].as_array().unwrap().len(), 1003);
    assert_eq!(message["total_count"], 1003);
    assert!(message.get("next_page_token").is_none(), "the pages are one answer");
    // A VM of the last page is found by a prefix.
    let shown = world.run(&["get", "vm-1002", "-o", "name"]).ok();
    assert_eq!(shown, "vm-1002\n");
}

fn filters_reach_the_server() {
    let world = World::started(&[]);
    let create = |vm_id: &str, team: &str| {
        let mut config = world.tiny(TinyGuest::Idle);
        config["metadata"] = json!({"team": team});
        world.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
    };
    create("a", "web");
    create("b", "db");
    let names = |arguments: &[&str]| world.run(&[&["list", "-o", "name"], arguments].concat()).ok();
    assert_eq!(names(&["--metadata", "team=web"]), "a\n");
    assert_eq!(names(&["--state", "created"]), "a\nb\n");
    assert_eq!(names(&["--state", "running", "--state", "paused"]), "");
    assert_eq!(names(&["--backend", "firecracker"]), "");
}

fn a_vm_is_shown_by_name_prefix_or_uid() {
    let world = World::started(&[]);
    world.create("web-1", TinyGuest::Idle);
    world.create("web", TinyGuest::Idle);
    world.create("db", TinyGuest::Idle);
    let message = world.call("GetVmInfo", &json!({"vm_id": "db"}));
    assert_eq!(world.run(&["get", "d", "-o", "json"]).json(), message);
    let uid = message["uid"].as_str().unwrap();
    assert_eq!(world.run(&["get", uid, "-o", "name"]).ok(), "db\n");
    let bare = uid.replace('-', "");
    assert_eq!(world.run(&["get", &bare[..28], "-o", "name"]).ok(), "db\n");
    // A whole name wins over a longer one that begins with it.
    assert_eq!(world.run(&["get", "web", "-o", "name"]).ok(), "web\n");
    let error = world.run(&["get", "we"]).failed(13);
    assert_eq!(
        error,
        "error: \"we\" is a prefix of 2 VMs: web-1, web\n\
         hint: type more of the name, or of the uid that `vmcp get` shows\n"
    );
    let facts = world.run(&["get", "db"]).ok();
    for fact in ["name", "uid", "state", "backend", "vcpus", "memory", "kernel"] {
        assert!(facts.lines().any(|line| line.starts_with(fact)), "{fact}: {facts}");
    }
}

fn an_unknown_name_is_not_found() {
    let world = World::started(&[]);
    for arguments in
        [&["get", "x"][..], &["boot", "x"], &["delete", "x"], &["wait", "x", "running"], &["events", "x"]]
    {
        let error = world.run(arguments).failed(15);
        assert!(error.contains("(not_found)\nhint: `vmcp list` shows the VMs"), "{error}");
    }
}

fn backends_and_health_show_the_available_backends() {
    if !has_qemu("queries::backends_and_health_show_the_available_backends") {
        return;
    }
    let world = World::started(&[]);
    let table = world.run(&["backends"]).ok();
    let row = table.lines().find(|line| line.starts_with("qemu ")).unwrap();
    assert!(row.split_whitespace().nth(1) == Some("yes") && row.contains("managed"), "{table}");
    assert_eq!(world.run(&["backends", "-o", "name"]).ok(), "cloudhypervisor\nfirecracker\nqemu\n");
    assert_eq!(world.run(&["backends", "-o", "json"]).json(), world.call("ListBackends", &json!({})));
    let facts = world.run(&["backends", "qemu"]).ok();
    assert!(facts.contains("max-vcpus"), "{facts}");
    let health = world.run(&["health"]).ok();
    assert!(health.starts_with("status ") && health.contains("healthy"), "{health}");
    assert_eq!(world.run(&["health", "-o", "json"]).json()["status"], "healthy");
}

fn an_unavailable_backend_makes_health_fail() {
    let world = World::started(&[("UNKEY_VMCP_QEMU_BINARY", "/nonexistent/qemu")]);
    let ran = world.run(&["health"]);
    assert_eq!(ran.code, 24, "{ran:#?}");
    assert!(ran.stdout.contains("unhealthy") && ran.stdout.contains("/nonexistent/qemu"), "{ran:#?}");
    let table = world.run(&["backends"]).ok();
    assert!(table.lines().any(|line| line.starts_with("qemu ") && line.contains(" no ")), "{table}");
}

fn the_events_of_a_deleted_vm_are_shown() {
    let world = World::started(&[]);
    world.create("gone", TinyGuest::Idle);
    world.run(&["delete", "gone"]).ok();
    let table = world.run(&["events", "gone"]).ok();
    let kinds: Vec<_> = table.lines().map(|line| line.split_whitespace().nth(2).unwrap()).collect();
    assert_eq!((kinds[0], kinds[1], *kinds.last().unwrap()), ("EVENT", "created", "deleted"));
    assert!(table.contains("CreateVm by anonymous@127.0.0.1"), "{table}");
    let message = world.run(&["events", "gone", "-o", "json"]).json();
    assert_eq!(message, world.call("ListVmEvents", &json!({"vm_id": "gone"})));
    let last = world.run(&["events", "--last", "1", "-o", "json"]).json();
    assert_eq!(last["events"].as_array().unwrap().len(), 1);
    assert_eq!(last["events"][0]["type"], "deleted");

    // A later VM of the same name is another one.
    world.create("gone", TinyGuest::Idle);
    let table = world.run(&["events", "gone"]).ok();
    assert!(table.starts_with("TIME ") && table.lines().next().unwrap().contains(" UID "), "{table}");
    let uids: std::collections::BTreeSet<_> =
        table.lines().skip(1).map(|line| line.split_whitespace().nth(2).unwrap()).collect();
    let shown = world.call("ListVmEvents", &json!({"vm_id": "gone"}));
    let expected = shown["events"].as_array().unwrap().iter().map(|event| event["uid"].as_str().unwrap());
    assert_eq!(uids, expected.collect(), "{table}");
    assert_eq!(uids.len(), 2, "{table}");
}

fn a_word_of_another_tool_is_taken_or_answered_with_a_hint() {
    let world = World::started(&[]);
    world.create("a", TinyGuest::Idle);
    for word in ["ls", "ps"] {
        assert_eq!(world.run(&[word, "-o", "name"]).ok(), "a\n");
    }
    let error = world.run(&["logs", "a"]).failed(2);
    assert!(
        error.contains("unrecognized subcommand 'logs'")
            && error.contains("hint: `vmcp console NAME --no-follow`"),
        "{error}"
    );
    world.run(&["rm", "a"]).ok();
    assert_eq!(world.run(&["ls", "-o", "name"]).ok(), "");
}

fn control_bytes_in_names_are_escaped() {
    let world = World::started(&[]);
    let nasty = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}\r\n";
    let mut config = world.tiny(TinyGuest::Idle);
    config["metadata"] = json!({"note": nasty});
    world.call("CreateVm", &json!({"vm_id": "a", "config": config}));
    for form in ["table", "json", "yaml", "name"] {
        for arguments in [&["get", "a"][..], &["list"]] {
            let text = world.run(&[arguments, &["-o", form]].concat()).ok();
            let obeyed = |letter: char| letter != '\n' && (letter.is_control() || letter == '\u{202e}');
            assert!(!text.contains(obeyed), "{arguments:?} -o {form}: {text:?}");
        }
    }
    let message = world.run(&["get", "a", "-o", "json"]).json();
    assert_eq!(message["config"]["metadata"]["note"], nasty, "the message is not changed by that");
    assert!(world.run(&["get", "a"]).ok().contains("note=\\u{1b}[2J"), "people see it");
    // The same in an error, where the word of the user comes back.
    let error = world.run(&["get", "\u{1b}[31mx"]);
    assert!(error.code != 0 && !error.stderr.contains('\u{1b}'), "{error:?}");
}

fn a_closed_output_pipe_is_no_failure() {
    let world = World::started(&[]);
    for arguments in [&["list"][..], &["list", "-o", "json"], &["man"], &["completion", "bash"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = world.command(arguments).stdout(writer).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
    }
}
