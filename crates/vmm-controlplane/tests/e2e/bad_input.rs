//! Wrong values in every field: each refused by its path, and nothing touched.

use std::fs;
use std::os::unix::fs::symlink;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, hypervisors};

/// Sets the value at a pointer, making what is missing on the way.
fn with(mut config: Value, pointer: &str, value: Value) -> Value {
    let mut place = &mut config;
    for key in pointer.trim_start_matches('/').split('/') {
        place = match key.parse::<usize>() {
            Ok(index) => {
                if place.is_null() {
                    *place = json!([]);
                }
                let list = place.as_array_mut().unwrap();
                list.resize(list.len().max(index + 1), json!({}));
                &mut list[index]
            }
            Err(_) => &mut place[key],
        };
    }
    *place = value;
    config
}

#[test]
fn each_wrong_value_is_reported_by_its_path() {
    let world = World::started(&[]);
    let good = world.tiny(TinyGuest::Idle);
    let dir = world.dir.path();
    let fifo = dir.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let text = dir.join("text");
    fs::write(&text, "no kernel").unwrap();
    let image = |changes: &[(usize, u8)]| {
        let mut image = [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 600]].concat();
        image[103] = 104;
        changes.iter().for_each(|(at, byte)| image[*at] = *byte);
        image
    };
    let qcow2 = dir.join("qcow2");
    fs::write(&qcow2, image(&[])).unwrap();
    let backed = dir.join("backed");
    fs::write(&backed, image(&[(14, 1), (19, 4)])).unwrap();
    let encrypted = dir.join("encrypted");
    fs::write(&encrypted, image(&[(35, 2)])).unwrap();
    let raw = dir.join("raw");
    fs::write(&raw, [0; 4096]).unwrap();
    let link = dir.join("link");
    symlink(&raw, &link).unwrap();
    let disk = |path: &std::path::Path| json!({"path": path});

    let cases: Vec<(&str, Value, &str)> = vec![
        ("/cpu", Value::Null, "config.cpu"),
        ("/cpu/vcpu_count", json!(0), "config.cpu.vcpu_count"),
        ("/cpu/vcpu_count", json!(-1), "config.cpu.vcpu_count"),
        ("/cpu/vcpu_count", json!(100_000), "config.cpu.vcpu_count"),
        ("/cpu", json!({"vcpu_count": 4, "max_vcpu_count": 2}), "config.cpu.max_vcpu_count"),
        (
            "/cpu/topology",
            json!({"sockets": 2, "cores_per_socket": 2, "threads_per_core": 1}),
            "config.cpu.topology",
        ),
        (
            "/cpu/topology",
            json!({"sockets": 0, "cores_per_socket": 1, "threads_per_core": 1}),
            "config.cpu.topology",
        ),
        ("/cpu/features", json!({"warp": "9"}), "config.cpu.features[\"warp\"]"),
        ("/memory", Value::Null, "config.memory"),
        ("/memory/size_bytes", json!(0), "config.memory.size_bytes"),
        ("/memory/size_bytes", json!(-1_048_576), "config.memory.size_bytes"),
        ("/memory/size_bytes", json!(1_048_577), "config.memory.size_bytes"),
        ("/memory/max_size_bytes", json!(1_048_576), "config.memory.max_size_bytes"),
        ("/memory/hotplug_enabled", json!(true), "config.memory.max_size_bytes"),
        ("/memory/backing", json!({"shared": "perhaps"}), "config.memory.backing[\"shared\"]"),
        ("/boot", Value::Null, "config.boot.kernel_path"),
        ("/boot/kernel_path", json!("relative/path"), "config.boot.kernel_path"),
        ("/boot/kernel_path", json!("/nonexistent/kernel"), "config.boot.kernel_path"),
        ("/boot/kernel_path", json!(dir), "config.boot.kernel_path"),
        ("/boot/kernel_path", json!(fifo), "config.boot.kernel_path"),
        ("/boot/kernel_path", json!("/dev/null"), "config.boot.kernel_path"),
        ("/boot/kernel_path", json!(text), "config.boot.kernel_path"),
        ("/boot/kernel_path", json!("/tmp/a\u{0}b"), "config.boot.kernel_path"),
        ("/boot/initrd_path", json!("/nonexistent/initrd"), "config.boot.initrd_path"),
        ("/boot/initrd_path", json!(fifo), "config.boot.initrd_path"),
        ("/boot/kernel_args", json!("a\nb"), "config.boot.kernel_args"),
        ("/boot/kernel_args", json!("x".repeat(4096)), "config.boot.kernel_args"),
        ("/boot/boot_options", json!({"qemu.machine": "pc"}), "config.boot.boot_options[\"qemu.machine\"]"),
        ("/boot/boot_options", json!({"qemu.machina": "q35"}), "config.boot.boot_options[\"qemu.machina\"]"),
        ("/boot/boot_options", json!({"machine": "q35"}), "config.boot.boot_options[\"machine\"]"),
        ("/storage/0", disk(&dir.join("absent")), "config.storage[0].path"),
        ("/storage/0", json!({}), "config.storage[0].path"),
        ("/storage/0", disk(&fifo), "config.storage[0].path"),
        ("/storage/0", disk(&qcow2), "config.storage[0].options[\"format\"]"),
        (
            "/storage/0",
            json!({"path": raw, "options": {"format": "qcow2"}}),
            "config.storage[0].options[\"format\"]",
        ),
        (
            "/storage/0",
            json!({"path": raw, "options": {"format": "vmdk"}}),
            "config.storage[0].options[\"format\"]",
        ),
        (
            "/storage/0",
            json!({"path": backed, "options": {"format": "qcow2"}}),
            "config.storage[0].options[\"backing_files\"]",
        ),
        (
            "/storage/0",
            json!({"path": encrypted, "options": {"format": "qcow2"}}),
            "config.storage[0].options[\"format\"]",
        ),
        ("/storage/0", json!({"path": raw, "interface_type": "ide"}), "config.storage[0].interface_type"),
        ("/storage/0", json!({"path": raw, "id": "a/b"}), "config.storage[0].id"),
        ("/storage", json!([disk(&raw), disk(&link)]), "config.storage[1].path"),
        (
            "/storage",
            json!([{"path": raw, "is_root_device": true, "read_only": true}, {"path": link, "is_root_device": true, "read_only": true}]),
            "config.storage[1].is_root_device",
        ),
        (
            "/storage",
            json!([{"id": "d", "path": raw, "read_only": true}, {"id": "d", "path": link, "read_only": true}]),
            "config.storage[1].id",
        ),
        ("/network/0", json!({"tap_device": "a-name-that-is-too-long"}), "config.network[0].tap_device"),
        ("/network/0", json!({"tap_device": "a/b"}), "config.network[0].tap_device"),
        ("/network", json!([{"tap_device": "t0"}, {"tap_device": "t0"}]), "config.network[1].tap_device"),
        ("/network/0", json!({"mac_address": "nonsense"}), "config.network[0].mac_address"),
        ("/network/0", json!({"mac_address": "01:00:00:00:00:00"}), "config.network[0].mac_address"),
        (
            "/network",
            json!([{"mac_address": "02:00:00:00:00:01"}, {"mac_address": "02:00:00:00:00:01"}]),
            "config.network[1].mac_address",
        ),
        ("/network/0", json!({"interface_type": "e1000"}), "config.network[0].interface_type"),
        ("/console", json!({"enabled": true, "output": "relative"}), "config.console.output"),
        ("/console", json!({"enabled": true, "output": raw}), "config.console.output"),
        (
            "/console",
            json!({"enabled": true, "output": "/nonexistent/folder/console"}),
            "config.console.output",
        ),
        ("/console", json!({"enabled": true, "console_type": "virtio"}), "config.console.console_type"),
        ("/console", json!({"enabled": true, "input": "/dev/tty"}), "config.console.input"),
        ("/metadata", json!({"big": "x".repeat(70_000)}), "config.metadata"),
        ("/restart_policy", json!({"mode": 9}), "config.restart_policy.mode"),
        ("/restart_policy", json!({"max_restarts": -1}), "config.restart_policy.max_restarts"),
    ];
    for (pointer, value, field) in cases {
        let config = with(good.clone(), pointer, value.clone());
        let answer = world.call("CreateVm", &json!({"vm_id": "bad", "config": config}));
        assert_eq!(answer.status, 400, "{pointer} = {value}: {}", answer.body);
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert!(message.contains(&format!("{field}: ")), "{pointer} = {value}: {message}");
        let validated = world.call("ValidateVm", &json!({"config": config})).ok();
        assert!(validated["ok"].is_null(), "ValidateVm agrees on {pointer} = {value}: {validated}");
    }
    assert_eq!(world.call("ListVms", &json!({})).ok()["total_count"], Value::Null);
    world.assert_nothing_left();
    world.create("bad", &good);
}

#[test]
fn invalid_vm_ids_are_refused() {
    let world = World::started(&[]);
    let good = world.tiny(TinyGuest::Idle);
    for name in ["../x", "a/b", "-a", ".a", "a b", &"x".repeat(64), "ä"] {
        let message =
            world.call("CreateVm", &json!({"vm_id": name, "config": good})).error("invalid_argument");
        assert!(message.contains("vm_id: "), "{name}: {message}");
        world.call("GetVmInfo", &json!({"vm_id": name})).error("not_found");
        world.call("DeleteVm", &json!({"vm_id": name, "force": true})).error("not_found");
    }
    let methods =
        ["BootVm", "ShutdownVm", "PauseVm", "ResumeVm", "RebootVm", "DeleteVm", "GetVmInfo", "WaitVm"];
    for method in methods {
        let states = json!({"states": ["VM_STATE_RUNNING"]});
        let request = if method == "WaitVm" { states } else { json!({}) };
        let message = world.call(method, &request).error("invalid_argument");
        assert!(message.starts_with("vm_id: is required"), "{method}: {message}");
    }
    world.call("CreateVm", &json!({"config": good, "backend": "xen"})).error("invalid_argument");
    world.call("ShutdownVm", &json!({"vm_id": "x", "timeout_seconds": -1})).error("invalid_argument");
    world.call("ListVms", &json!({"page_size": -1})).error("invalid_argument");
    world.call("ListVms", &json!({"state_filter": [0]})).error("invalid_argument");
}

#[test]
fn an_unknown_enum_number_is_refused_with_the_known_names() {
    let world = World::started(&[]);
    world.create("vm", &world.tiny(TinyGuest::Idle));
    let config = with(world.tiny(TinyGuest::Idle), "/restart_policy", json!({"mode": 99}));
    let states = "must be one of VM_STATE_CREATED (1), VM_STATE_RUNNING (2), VM_STATE_PAUSED (3) and VM_STATE_SHUTDOWN (4), not 99";
    let modes = "must be one of RESTART_MODE_NEVER (1), RESTART_MODE_GUEST_REBOOT (2), RESTART_MODE_ON_FAILURE (3) and \
                 RESTART_MODE_ALWAYS (4), not 99";
    for (method, request, expected) in [
        ("CreateVm", json!({"config": config}), format!("config.restart_policy.mode: {modes}")),
        ("ListVms", json!({"state_filter": [2, 99]}), format!("state_filter[1]: {states}")),
        ("WaitVm", json!({"vm_id": "vm", "states": [99]}), format!("states[0]: {states}")),
    ] {
        assert_eq!(world.call(method, &request).error("invalid_argument"), expected, "{method}");
    }
}

#[test]
fn all_violations_are_in_the_message_and_the_details() {
    let world = World::started(&[]);
    let config = json!({"cpu": {"vcpu_count": 0}, "memory": {"size_bytes": 1}, "boot": {"kernel_path": "/nonexistent"}});
    let answer = world.call("CreateVm", &json!({"vm_id": "a b", "config": config}));
    let fields = ["vm_id", "config.cpu.vcpu_count", "config.memory.size_bytes", "config.boot.kernel_path"];
    for field in fields {
        assert!(answer.body["message"].as_str().unwrap().contains(&format!("{field}: ")), "{}", answer.body);
    }
    let detail = &answer.body["details"][0];
    assert_eq!(detail["type"], "google.rpc.BadRequest");
    assert!(detail["value"].is_string());
}

#[test]
fn a_request_with_hundreds_of_thousands_of_devices_is_refused_by_their_number() {
    let world = World::started(&[]);
    let with_entries = |list: &str, count: usize| {
        let mut config = world.tiny(TinyGuest::Idle);
        config[list] = json!(vec![json!({}); count]);
        json!({"config": config})
    };
    for list in ["storage", "network"] {
        // The first count is refused by the checks, the second before the request is taken apart.
        for count in [4_000, 300_000] {
            let message = world.call("CreateVm", &with_entries(list, count)).error("invalid_argument");
            assert!(message.contains(&format!("config.{list}: ")), "{message}");
        }
        let validated = world.call("ValidateVm", &with_entries(list, 4_000)).ok();
        assert_eq!(validated["violations"].as_array().map(Vec::len), Some(1), "{validated}");
    }
    let keys = (0..100_000).map(|number| (format!("key{number}"), json!("")));
    let options: serde_json::Map<_, _> = keys.collect();
    let config = with(world.tiny(TinyGuest::Idle), "/boot/boot_options", options.into());
    world.call("CreateVm", &json!({"config": config})).error("invalid_argument");
}

#[test]
fn kernel_arguments_of_the_longest_length_boot_and_longer_ones_are_refused() {
    let test = "kernel_arguments_of_the_longest_length_boot_and_longer_ones_are_refused";
    let world = World::started(&[]);
    let disk = world.dir.path().join("root.raw");
    fs::write(&disk, [0; 4096]).unwrap();
    for backend in hypervisors(test) {
        let request = |length: usize| {
            let mut config = world.tiny(TinyGuest::Idle);
            config["boot"]["kernel_args"] = json!("x".repeat(length));
            config["storage"] = json!([{"path": disk, "is_root_device": true}]);
            json!({"vm_id": "vm", "backend": backend, "config": config})
        };
        let is_ok = |length: usize| {
            let request = request(length);
            let body = json!({"backend": backend, "config": request["config"]});
            world.call("ValidateVm", &body).ok()["ok"] == true
        };
        let (mut longest, mut too_long) = (0, 2048);
        while too_long - longest > 1 {
            let length = usize::midpoint(longest, too_long);
            if is_ok(length) { longest = length } else { too_long = length }
        }
        let added = " root=/dev/vda rw".len();
        assert!(longest + added <= 2047, "{backend}: {longest}");
        let message = world.call("CreateVm", &request(too_long)).error("invalid_argument");
        assert!(message.contains("config.boot.kernel_args: "), "{message}");
        world.call("CreateVm", &request(longest)).ok();
        world.boot("vm");
        world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
        world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    }
    world.assert_nothing_left();
}

#[test]
fn firmware_is_refused_as_unimplemented() {
    let world = World::started(&[]);
    let config = with(world.tiny(TinyGuest::Idle), "/boot/boot_options", json!({"firmware": "/ovmf.fd"}));
    let message = world.call("CreateVm", &json!({"vm_id": "vm", "config": config})).error("unimplemented");
    assert!(message.contains("firmware"), "{message}");
}

#[test]
fn a_file_that_changed_after_the_creation_fails_the_boot() {
    let world = World::started(&[]);
    let config = world.tiny(TinyGuest::Idle);
    world.create("vm", &config);
    let kernel = config["boot"]["kernel_path"].as_str().unwrap();
    let aside = format!("{kernel}.aside");
    fs::rename(kernel, &aside).unwrap();
    let message = world.call("BootVm", &json!({"vm_id": "vm"})).error("failed_precondition");
    assert!(message.contains("config.boot.kernel_path"), "{message}");
    assert_eq!(world.info("vm")["state"], "VM_STATE_CREATED");
    fs::rename(&aside, kernel).unwrap();
    assert!(world.vmms().is_empty());
}
