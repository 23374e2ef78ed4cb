//! `update`: flags, files, generations, and changes that are refused.

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{World, has_qemu};

trials![
    flags_change_single_values_and_leave_the_rest,
    a_file_changes_the_parts_that_it_names,
    the_file_of_a_creation_can_be_edited_and_sent_as_an_update,
    a_wrong_generation_is_refused_and_changes_nothing,
    an_update_without_a_change_is_refused_or_told,
    a_running_vm_takes_labels_at_once_and_refuses_its_machine,
    a_protected_vm_is_deleted_after_the_protection_is_removed,
    an_unknown_field_of_an_update_is_named_with_its_line,
];

fn config(world: &World, vm_id: &str) -> Value {
    world.call("GetVmInfo", &json!({"vm_id": vm_id}))["config"].clone()
}

fn generation(world: &World, vm_id: &str) -> i64 {
    let info = world.call("GetVmInfo", &json!({"vm_id": vm_id}));
    info["generation"].as_str().unwrap().parse().unwrap()
}

/// Makes a VM with a value in most parts.
fn with_a_vm() -> World {
    let world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Idle);
    config["metadata"] = json!({"team": "web", "tier": "1"});
    config["boot"]["kernel_args"] = json!("quiet");
    config["restart_policy"] = json!({"mode": "RESTART_MODE_ALWAYS", "max_restarts": 9});
    world.call("CreateVm", &json!({"vm_id": "web-1", "config": config}));
    world
}

fn flags_change_single_values_and_leave_the_rest() {
    let world = with_a_vm();
    let before = config(&world, "web-1");
    let next = generation(&world, "web-1") + 1;
    let ran = world.run(&[
        "update",
        "web",
        "--memory=128MiB",
        "--cpus=2",
        "--kernel-args=console=ttyS0",
        "--metadata=tier=2",
        "--remove-metadata=team",
        "--restart=never",
        "--delete-protection",
    ]);
    assert_eq!(ran.ok(), format!("web-1: updated, created, generation {next}\n"));
    let mut wanted = before;
    wanted["memory"]["size_bytes"] = json!("134217728");
    wanted["cpu"]["vcpu_count"] = json!(2);
    wanted["boot"]["kernel_args"] = json!("console=ttyS0");
    wanted["metadata"] = json!({"tier": "2"});
    wanted["restart_policy"]["mode"] = json!("RESTART_MODE_NEVER");
    wanted["delete_protection"] = json!(true);
    assert_eq!(config(&world, "web-1"), wanted);
    let facts = world.run(&["get", "web-1"]).ok();
    assert!(facts.contains("never, at most 9 times") && facts.contains("against delete"), "{facts}");
    let words: Vec<_> = facts.split_whitespace().collect();
    assert!(words.windows(2).any(|pair| pair == ["generation", &next.to_string()]), "{facts}");
    // Disks and interfaces are replaced as a whole, and a part can be cleared.
    world.run(&["update", "web-1", "--net=auto", "--net=auto", "--clear=metadata"]).ok();
    assert_eq!(config(&world, "web-1")["network"].as_array().unwrap().len(), 2);
    assert!(config(&world, "web-1").get("metadata").is_none());
    let answer = world.run(&["update", "web-1", "--clear=network", "-o", "json"]).json();
    assert_eq!(answer["generation"], (next + 2).to_string());
    assert_eq!(answer["state"], "VM_STATE_CREATED");
    assert_eq!(world.run(&["update", "web-1", "--cpus=1", "-o", "name"]).ok(), "web-1\n");
}

fn a_file_changes_the_parts_that_it_names() {
    let world = with_a_vm();
    let file = world.write("change.yaml", "config:\n  metadata: {team: db}\n  restart_policy: null\n");
    world.run(&["update", "web-1", "-f", &file]).ok();
    let now = config(&world, "web-1");
    assert_eq!(now["metadata"], json!({"team": "db"}), "a part is replaced as a whole");
    assert!(now.get("restart_policy").is_none_or(|policy| policy["max_restarts"] != 9), "{now}");
    assert_eq!(now["memory"]["size_bytes"], "67108864");
    let body = r#"{"config": {"deleteProtection": true}, "fields": ["delete_protection"]}"#;
    world.run_with_input(&["update", "web-1", "-f", "-"], body).ok();
    assert_eq!(config(&world, "web-1")["delete_protection"], true);
    // A default value that a file names is sent, too.
    world.run_with_input(&["update", "web-1", "-f", "-"], "config: {delete_protection: false}").ok();
    assert!(config(&world, "web-1").get("delete_protection").is_none());
}

fn the_file_of_a_creation_can_be_edited_and_sent_as_an_update() {
    let world = World::started(&[]);
    let kernel = world.kernel(TinyGuest::Idle).display().to_string();
    let text = |mib: u64, backend: &str| {
        format!(
            "vm_id: vm\nbackend: {backend}\nconfig:\n  cpu: {{vcpu_count: 1}}\n  memory: {{size_bytes: {}}}\n  \
             boot: {{kernel_path: {kernel}}}\n",
            mib << 20
        )
    };
    let file = world.write("vm.yaml", &text(64, "qemu"));
    world.run(&["create", "-f", &file]).ok();
    let same = world.run(&["update", "vm", "-f", &file]).ok();
    assert!(same.starts_with("vm: has these values already, generation "), "{same}");
    let file = world.write("vm.yaml", &text(96, "qemu"));
    world.run(&["update", "vm", "-f", &file]).ok();
    assert_eq!(config(&world, "vm")["memory"]["size_bytes"], (96 << 20).to_string());
    let file = world.write("vm.yaml", &text(96, "firecracker"));
    let error = world.run(&["update", "vm", "-f", &file]).failed(13);
    assert!(error.contains("VM \"vm\" is on qemu, and the file names firecracker"), "{error}");
}

fn a_wrong_generation_is_refused_and_changes_nothing() {
    let world = with_a_vm();
    let present = generation(&world, "web-1");
    let wrong = (present + 5).to_string();
    // The flag of a whole part is checked by the server, and that of a single value by the read.
    for change in ["--delete-protection", "--memory=128MiB"] {
        let error = world.run(&["update", "web-1", change, "--if-generation", &wrong]).failed(20);
        assert!(error.contains(&format!("has generation {present} and not {wrong}")), "{error}");
        assert!(error.contains("(aborted)"), "{error}");
    }
    let body = json!({"config": {"metadata": {}}, "if_generation": wrong}).to_string();
    world.run_with_input(&["update", "web-1", "-f", "-"], &body).failed(20);
    assert_eq!(generation(&world, "web-1"), present);
    world.run(&["update", "web-1", "--memory=128MiB", "--if-generation", &present.to_string()]).ok();
    assert_eq!(generation(&world, "web-1"), present + 1);
}

fn an_update_without_a_change_is_refused_or_told() {
    let world = with_a_vm();
    for arguments in [&["update", "web-1"][..], &["update", "web-1", "-f", "/dev/null"]] {
        let error = world.run(arguments).failed(13);
        assert!(error.contains("nothing to change") || error.contains("is empty"), "{error}");
    }
    let told = world.run(&["update", "web-1", "--memory=64MiB"]).ok();
    assert!(told.contains("has these values already"), "{told}");
    world.run(&["update", "nobody", "--memory=64MiB"]).failed(15);
    let error = world.run(&["update", "web-1", "--memory=64MiB", "-f", "x"]).failed(2);
    assert!(error.contains("cannot be used with"), "{error}");
}

fn a_running_vm_takes_labels_at_once_and_refuses_its_machine() {
    if !has_qemu("update::a_running_vm_takes_labels_at_once_and_refuses_its_machine") {
        return;
    }
    let world = with_a_vm();
    world.run(&["boot", "web-1"]).ok();
    let told = world.run(&["update", "web-1", "--metadata=tier=9", "--restart=on-failure"]).ok();
    assert!(told.starts_with("web-1: updated, running, generation "), "{told}");
    assert_eq!(world.run(&["list", "--metadata", "tier=9", "-o", "name"]).ok(), "web-1\n");
    let error = world.run(&["update", "web-1", "--memory=128MiB"]).failed(19);
    assert!(error.contains("its memory can only change while it does not run"), "{error}");
}

fn a_protected_vm_is_deleted_after_the_protection_is_removed() {
    let world = World::started(&[]);
    let kernel = world.kernel(TinyGuest::Idle).display().to_string();
    world.run(&["create", "vm", "--memory=64MiB", "--kernel", &kernel, "--delete-protection"]).ok();
    for arguments in [&["delete", "vm"][..], &["delete", "vm", "--force"]] {
        let error = world.run(arguments).failed(19);
        assert!(error.contains("is protected against deletion"), "{error}");
        assert!(error.contains("`vmcp update vm --no-delete-protection`"), "{error}");
    }
    world.run(&["update", "vm", "--no-delete-protection"]).ok();
    assert_eq!(world.run(&["delete", "vm"]).ok(), "vm: deleted\n");
}

fn an_unknown_field_of_an_update_is_named_with_its_line() {
    let world = with_a_vm();
    let file = world.write("change.yaml", "config:\n  memory:\n    size: 1\n");
    let error = world.run(&["update", "web-1", "-f", &file]).failed(13);
    assert!(error.contains("change.yaml: line 3, column 5: config.memory.size: no such field"), "{error}");
    let error = world.run_with_input(&["update", "web-1", "-f", "-"], "memory: {}\n").failed(13);
    assert!(error.contains("line 1, column 1: memory: no such field"), "{error}");
}
