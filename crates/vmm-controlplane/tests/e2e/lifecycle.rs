//! A VM's life, as the documents describe it.

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::{World, is_alive, linux, skipped, vmm_pid};
use crate::needs_qemu;

#[test]
fn a_linux_guest_lives_from_creation_to_deletion() {
    needs_qemu!();
    let Some((kernel, initrd)) = linux() else {
        return skipped(
            "a_linux_guest_lives_from_creation_to_deletion",
            "no guest kernel; `make setup` makes it",
        );
    };
    let world = World::started(&[]);
    let config = json!({
        "cpu": {"vcpu_count": 2, "max_vcpu_count": 2},
        "memory": {"size_bytes": 268435456},
        "boot": {"kernel_path": kernel, "initrd_path": initrd, "kernel_args": "console=ttyS0 cryptomgr.notests no_timer_check"},
        "metadata": {"team": "ci"},
    });

    let created = world.create("linux", &config);
    assert_eq!(created["state"], "VM_STATE_CREATED");
    assert!(world.vmms().is_empty(), "CreateVm starts nothing");

    let booted = world.boot("linux");
    assert_eq!((&booted["success"], &booted["state"]), (&json!(true), &json!("VM_STATE_RUNNING")));
    let console = world.wait_for_console("linux", "vmcp-guest: ready", 1);
    assert!(console.contains("vcpus=2"), "{console}");
    assert!(console.contains("Linux version"), "the first boot message is there: {console}");

    let info = world.wait_for("linux", "sampled", |info| info["metrics"]["memory_usage_bytes"].is_string());
    assert_eq!(info["backend"], "qemu");
    assert_eq!(info["backend_info"]["accelerator"], "tcg");
    assert_eq!(info["backend_info"]["machine"], "q35");
    let cpu = info["metrics"]["cpu_usage_percent"].as_f64().unwrap_or(0.0);
    assert!((0.0..=100.0).contains(&cpu), "{cpu}");
    let first_pid = vmm_pid(&info);

    assert_eq!(world.call("PauseVm", &json!({"vm_id": "linux"})).ok()["state"], "VM_STATE_PAUSED");
    assert_eq!(world.call("ResumeVm", &json!({"vm_id": "linux"})).ok()["state"], "VM_STATE_RUNNING");

    let rebooted = world.call("RebootVm", &json!({"vm_id": "linux"})).ok();
    assert_eq!(rebooted["state"], "VM_STATE_RUNNING");
    world.wait_for_console("linux", "vmcp-guest: poweroff cause=power-button", 1);
    world.wait_for_console("linux", "vmcp-guest: ready", 2);

    let ended = world.call("ShutdownVm", &json!({"vm_id": "linux"})).ok();
    assert_eq!((&ended["state"], &ended["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("acpi")));
    assert!(!is_alive(first_pid) && world.vmms().is_empty(), "success means that the VMM has gone");

    assert_eq!(world.boot("linux")["state"], "VM_STATE_RUNNING");
    world.wait_for_console("linux", "vmcp-guest: ready", 3);
    assert_eq!(
        world.call("ShutdownVm", &json!({"vm_id": "linux", "force": true})).ok()["ended_by"],
        "vmm",
        "force starts at the last rung"
    );
    assert_eq!(world.call("DeleteVm", &json!({"vm_id": "linux"})).ok()["success"], true);
    world.call("GetVmInfo", &json!({"vm_id": "linux"})).error("not_found");
    world.assert_nothing_left();
}

#[test]
fn every_entry_of_the_state_table() {
    needs_qemu!();
    let world = World::started(&[]);
    let config = world.tiny(TinyGuest::Idle);
    world.create("vm", &config);
    let call = |method: &str| world.call(method, &json!({"vm_id": "vm"}));
    let denied = |method: &str, state: &str| {
        let message = call(method).error("failed_precondition");
        assert!(message.contains(state) && message.contains("legal now: "), "{message}");
    };
    let reaches = |method: &str, state: &str| assert_eq!(call(method).ok()["state"], state, "{method}");

    for method in ["ShutdownVm", "PauseVm", "ResumeVm", "RebootVm"] {
        denied(method, "CREATED");
    }
    reaches("BootVm", "VM_STATE_RUNNING");
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 1);
    reaches("BootVm", "VM_STATE_RUNNING");
    reaches("ResumeVm", "VM_STATE_RUNNING");
    denied("DeleteVm", "RUNNING");
    reaches("PauseVm", "VM_STATE_PAUSED");
    reaches("PauseVm", "VM_STATE_PAUSED");
    for method in ["BootVm", "RebootVm", "DeleteVm"] {
        denied(method, "PAUSED");
    }
    reaches("ResumeVm", "VM_STATE_RUNNING");
    reaches("PauseVm", "VM_STATE_PAUSED");
    let shut = world.call("ShutdownVm", &json!({"vm_id": "vm", "timeout_seconds": 1})).ok();
    assert_eq!((&shut["state"], &shut["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("vmm")));
    assert_eq!(call("ShutdownVm").ok()["ended_by"], "already-stopped");
    for method in ["PauseVm", "ResumeVm", "RebootVm"] {
        denied(method, "SHUTDOWN");
    }
    reaches("BootVm", "VM_STATE_RUNNING");
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2);
    let pid = vmm_pid(&world.info("vm"));
    assert_eq!(
        world.call("RebootVm", &json!({"vm_id": "vm", "force": true})).ok()["state"],
        "VM_STATE_RUNNING"
    );
    assert_eq!(vmm_pid(&world.info("vm")), pid, "QEMU resets in place");
    world.wait_for_console("vm", &TinyGuest::Idle.banner(), 3);
    assert_eq!(world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok()["success"], true);
    for method in ["BootVm", "ShutdownVm", "PauseVm", "ResumeVm", "RebootVm", "DeleteVm", "GetVmInfo"] {
        call(method).error("not_found");
    }
    world.assert_nothing_left();
}

#[test]
fn the_effective_kernel_arguments_are_shown_beside_the_given_ones() {
    needs_qemu!();
    let world = World::started(&[]);
    let disk = world.dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut config = world.tiny(TinyGuest::Idle);
    config["boot"]["kernel_args"] = json!("console=ttyS0 -- single");
    config["storage"] = json!([{"path": disk, "is_root_device": true}]);
    for (backend, in_force) in [
        ("qemu", "console=ttyS0 root=/dev/vda rw -- single"),
        ("cloudhypervisor", "console=ttyS0 root=/dev/vda rw -- single"),
        ("firecracker", "reboot=k console=ttyS0 root=/dev/vda rw -- single"),
    ] {
        let request = json!({"vm_id": backend, "backend": backend, "config": config});
        world.call("CreateVm", &request).ok();
        let info = world.info(backend);
        assert_eq!(info["config"]["boot"]["kernel_args"], "console=ttyS0 -- single");
        assert_eq!(info["backend_info"]["kernel_args"], in_force, "{backend}");
    }
    world.boot("qemu");
    let info = world.info("qemu");
    let command = std::fs::read_to_string(format!("/proc/{}/cmdline", vmm_pid(&info))).unwrap();
    let line = info["backend_info"]["kernel_args"].as_str().unwrap();
    assert!(command.split('\0').any(|argument| argument == line), "{command:?} has {line}");
    world.call("DeleteVm", &json!({"vm_id": "qemu", "force": true})).ok();
    world.assert_nothing_left();
}

#[test]
fn a_microvm_passes_the_same_lifecycle() {
    needs_qemu!();
    let world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Idle);
    config["boot"]["boot_options"] = json!({"qemu.machine": "microvm"});
    world.create("micro", &config);
    world.boot("micro");
    world.wait_for_console("micro", &TinyGuest::Idle.banner(), 1);
    assert_eq!(world.info("micro")["backend_info"]["machine"], "microvm");
    world.call("PauseVm", &json!({"vm_id": "micro"})).ok();
    world.call("ResumeVm", &json!({"vm_id": "micro"})).ok();
    world.call("RebootVm", &json!({"vm_id": "micro", "force": true})).ok();
    world.wait_for_console("micro", &TinyGuest::Idle.banner(), 2);
    world.call("ShutdownVm", &json!({"vm_id": "micro", "force": true})).ok();
    world.call("DeleteVm", &json!({"vm_id": "micro"})).ok();
    world.assert_nothing_left();
}

#[test]
fn a_repeated_creation_returns_the_vm_or_is_refused() {
    let world = World::started(&[]);
    let config = world.tiny(TinyGuest::Idle);
    let first = world.create("vm", &config);
    assert_eq!(world.create("vm", &config)["uid"], first["uid"]);
    let mut other = config.clone();
    other["cpu"]["vcpu_count"] = json!(2);
    let message = world.call("CreateVm", &json!({"vm_id": "vm", "config": other})).error("already_exists");
    assert!(message.contains("delete it first"), "{message}");
    let generated = world.call("CreateVm", &json!({"config": config})).ok();
    assert!(generated["vm_id"].as_str().unwrap().starts_with("vm-"), "{generated}");
    assert_ne!(generated["uid"], first["uid"]);
}

#[test]
fn the_list_filters_and_pages() {
    let world = World::started(&[]);
    for number in 0..5 {
        let mut config = world.tiny(TinyGuest::Idle);
        config["metadata"] = json!({"parity": (number % 2).to_string()});
        world.create(&format!("vm{number}"), &config);
    }
    let names = |page: &Value| -> Vec<String> {
        page["vms"].as_array().unwrap().iter().map(|vm| vm["vm_id"].as_str().unwrap().to_owned()).collect()
    };
    let first = world.call("ListVms", &json!({"page_size": 2})).ok();
    assert_eq!((names(&first), &first["total_count"]), (vec!["vm0".into(), "vm1".into()], &json!(5)));
    let next = world.call("ListVms", &json!({"page_size": 2, "page_token": first["next_page_token"]})).ok();
    assert_eq!(names(&next), ["vm2", "vm3"]);
    let odd = world.call("ListVms", &json!({"metadata_filter": {"parity": "1"}})).ok();
    assert_eq!(names(&odd), ["vm1", "vm3"]);
    let none = world.call("ListVms", &json!({"state_filter": ["VM_STATE_RUNNING"]})).ok();
    assert!(none["vms"].is_null() && none["next_page_token"].is_null(), "{none}");
    world.call("ListVms", &json!({"page_token": "nonsense"})).error("invalid_argument");
}

#[test]
fn the_answers_have_the_completed_values() {
    let world = World::new(&[]);
    let kernel = TinyGuest::Idle.write_to(world.dir.path()).unwrap();
    let kernel = kernel.to_str().unwrap();
    let mut world = World::new(&[
        ("UNKEY_VMCP_DEFAULT_KERNEL", kernel),
        ("UNKEY_VMCP_DEFAULT_KERNEL_ARGS", "console=ttyS0"),
    ]);
    world.start();
    // The guide's Python example, which names no kernel.
    let created = world
        .call(
            "CreateVm",
            &json!({"config": {"cpu": {"vcpu_count": 2}, "memory": {"size_bytes": 2147483648_i64}}}),
        )
        .ok();
    let info = world.info(created["vm_id"].as_str().unwrap());
    assert_eq!(info["config"]["boot"]["kernel_path"], kernel);
    assert_eq!(info["config"]["boot"]["kernel_args"], "console=ttyS0");
    assert_eq!(info["uid"], created["uid"]);
    assert_eq!(info["generation"], "1");
    assert_eq!(info["status"]["phase"], "created");
}
