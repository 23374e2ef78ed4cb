//! `create` and `validate`: files, standard input, and what is refused.

use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::World;

trials![
    a_yaml_file_a_json_file_and_standard_input_make_the_same_vm,
    a_generated_name_is_printed,
    an_unknown_field_is_named_with_its_line,
    every_violation_has_a_line,
    validate_reports_the_findings_of_create_and_creates_nothing,
    warnings_are_printed_beside_the_answer,
    a_missing_file_is_named,
];

/// Returns the same configuration as YAML and as JSON.
fn both_forms(world: &World) -> [String; 2] {
    let kernel = world.kernel(TinyGuest::Idle).display().to_string();
    let yaml = format!(
        "# A comment.\nvm_id: from-file\nbackend: qemu\nconfig:\n  cpu: {{vcpu_count: 1}}\n  memory:\n    \
         size_bytes: 67108864\n  boot:\n    kernel_path: {kernel}\n  metadata: {{team: web}}\n"
    );
    let json = json!({
        "vmId": "from-file",
        "backend": "qemu",
        "config": {
            "cpu": {"vcpuCount": 1},
            "memory": {"size_bytes": "67108864"},
            "boot": {"kernel_path": kernel},
            "metadata": {"team": "web"}
        }
    });
    [yaml, serde_json::to_string_pretty(&json).unwrap()]
}

fn a_yaml_file_a_json_file_and_standard_input_make_the_same_vm() {
    let world = World::started(&[]);
    let [yaml, json] = both_forms(&world);
    let (yaml_file, json_file) = (world.write("vm.yaml", &yaml), world.write("vm.json", &json));
    let created = |ran: crate::world::Ran| ran.json()["vm_id"].clone();
    assert_eq!(created(world.run(&["create", "-f", &yaml_file, "-o", "json"])), "from-file");
    // The server knows that these are the same request, and answers with the VM that is there.
    assert_eq!(created(world.run(&["create", "-f", &json_file, "-o", "json"])), "from-file");
    for text in [&yaml, &json] {
        let ran = world.run_with_input(&["create", "-f", "-", "-o", "json"], text);
        assert_eq!(created(ran), "from-file");
    }
    assert_eq!(created(world.run(&["create", "mine", "-f", &yaml_file, "-o", "json"])), "mine");
    assert_eq!(world.run(&["list", "-o", "name", "--metadata", "team=web"]).ok(), "from-file\nmine\n");
    let error = world.run(&["create", "from-file", "-f", &yaml_file, "--backend", "firecracker"]);
    assert_eq!(error.code, 16, "another backend is another VM: {error:#?}");
}

fn a_generated_name_is_printed() {
    let world = World::started(&[]);
    let kernel = world.kernel(TinyGuest::Idle).display().to_string();
    let name = world.run(&["create", "--kernel", &kernel, "--memory", "64MiB", "-o", "name"]).ok();
    assert!(name.starts_with("vm-") && name.lines().count() == 1, "{name}");
    assert_eq!(world.run(&["list", "-o", "name"]).ok(), name);
}

fn an_unknown_field_is_named_with_its_line() {
    let world = World::started(&[]);
    let file = world.write("vm.yaml", "vm_id: a\nconfig:\n  cpu:\n    vcpus: 2\n");
    for command in ["create", "validate", "run"] {
        let error = world.run(&[command, "-f", &file]).failed(13);
        assert!(error.contains("vm.yaml: line 4, column 5: config.cpu.vcpus: no such field\n"), "{error}");
        assert!(error.contains("hint: the fields known there are vcpu_count, "), "{error}");
    }
    let error = world.run_with_input(&["create", "-f", "-"], "{\"config\": {\"cpus\": 1}}").failed(13);
    assert!(error.starts_with("error: standard input: line 1, "), "{error}");
    assert_eq!(world.run(&["list", "-o", "name"]).ok(), "");
}

fn every_violation_has_a_line() {
    let world = World::started(&[]);
    let error =
        world.run(&["create", "a", "--cpus", "0", "--memory", "1500000", "--kernel", "/nonexistent/kernel"]);
    let error = error.failed(13);
    let fields: Vec<_> = error.lines().skip(1).map(|line| line.trim().split_once(": ").unwrap().0).collect();
    assert_eq!(
        fields,
        ["config.cpu.vcpu_count", "config.memory.size_bytes", "config.boot.kernel_path"],
        "{error}"
    );
    assert!(error.starts_with("error: 3 fields are wrong (invalid_argument)\n"), "{error}");
}

fn validate_reports_the_findings_of_create_and_creates_nothing() {
    let world = World::started(&[]);
    let kernel = world.kernel(TinyGuest::Idle).display().to_string();
    let valid = ["validate", "--backend", "qemu", "--kernel", &kernel, "--memory", "64MiB"];
    assert_eq!(world.run(&valid).ok(), "the configuration is valid\n");
    let wrong = ["validate", "--kernel", &kernel, "--cpus", "0"];
    let error = world.run(&wrong).failed(13);
    assert!(error.contains("\n  config.cpu.vcpu_count: must be "), "{error}");
    // Programs get the message, and the exit code all the same.
    let ran = world.run(&[&wrong[..], &["-o", "json"]].concat());
    assert_eq!(ran.code, 13, "{ran:#?}");
    let message: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(message["violations"][0]["field"], "config.cpu.vcpu_count");
    assert_eq!(world.run(&["list", "-o", "name"]).ok(), "");
}

fn warnings_are_printed_beside_the_answer() {
    let world = World::started(&[]);
    let kernel = world.kernel(TinyGuest::Idle).display().to_string();
    let ran = world.run(&["create", "a", "--kernel", &kernel, "--memory", "8MiB", "-o", "name"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "a\n"), "{ran:#?}");
    assert!(ran.stderr.starts_with("warning: config.memory.size_bytes: "), "{ran:#?}");
}

fn a_missing_file_is_named() {
    let world = World::started(&[]);
    let error = world.run(&["create", "-f", "/nonexistent/vm.yaml"]).failed(1);
    assert!(error.starts_with("error: /nonexistent/vm.yaml: "), "{error}");
}
