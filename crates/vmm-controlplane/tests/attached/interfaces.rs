//! The network interfaces of a VM that somebody else made in an attached Cloud Hypervisor: its VMM's own doing.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_core::id::VmUid;
use vmm_testkit::by_hand::{ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, able};
use crate::harness::{eventually, skipped};

/// A Cloud Hypervisor that holds a VM with these interfaces, and the daemon's folders. `None`, and a word about it, where there
/// can be none.
fn holding(test: &str, interfaces: &Value) -> Option<(Bench, ByHandVmm)> {
    let kind = able(test, &[ByHandProgram::CloudHypervisor]).pop()?;
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
        skipped(test, "a TAP takes root and /dev/net/tun");
        return None;
    }
    let bench = Bench::new(kind);
    let guest = bench.guest(TinyGuest::Idle);
    let vmm = bench.waits();
    vmm.put(
        "/api/v1/vm.create",
        &json!({
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
            "memory": {"size": 64 << 20, "shared": true},
            "payload": {"kernel": guest.kernel, "cmdline": "from=hand"},
            "serial": {"mode": "File", "file": guest.serial},
            "console": {"mode": "Off"},
            "net": interfaces,
        }),
    );
    Some((bench, vmm))
}

/// Fails if the daemon has made a TAP for the VM of `info`.
fn assert_no_tap_of_ours(info: &Value) {
    let uid: VmUid = info["uid"].as_str().unwrap().parse().unwrap();
    let tap = uid.tap_name(0);
    assert!(!Path::new("/sys/class/net").join(&tap).exists(), "{tap} is nobody's: {info:#}");
}

fn sampled(info: &Value) -> bool {
    info["metrics"]["memory_usage_bytes"].as_str().is_some_and(|bytes| bytes != "0")
}

#[test]
fn a_running_vm_with_a_tap_of_its_vmm_is_adopted_repeatedly() {
    const TEST: &str = "a_running_vm_with_a_tap_of_its_vmm_is_adopted_repeatedly";
    let Some((mut bench, vmm)) = holding(TEST, &json!([{"mac": "02:00:00:00:00:01"}])) else { return };
    vmm.boot();
    bench.world.start();
    let vm = bench.the_vm();
    for _ in 0..2 {
        bench.world.wait_for_state(&vm, "VM_STATE_RUNNING");
        let info = bench.world.wait_for(&vm, "sampled", sampled);
        assert_eq!(info["config"]["network"][0]["mac_address"], "02:00:00:00:00:01", "{info:#}");
        assert_eq!(info["status"]["phase"], "running", "{info:#}");
        bench.op("PauseVm", &vm).ok();
        bench.op("ResumeVm", &vm).ok();
        assert_no_tap_of_ours(&info);
        bench.world.stop(Signal::KILL);
        bench.world.start();
    }
    bench.force("ShutdownVm", &vm).ok();
}

#[test]
fn a_vm_with_a_tap_of_its_vmm_is_booted_unchanged() {
    const TEST: &str = "a_vm_with_a_tap_of_its_vmm_is_booted_unchanged";
    let Some((mut bench, _vmm)) = holding(TEST, &json!([{"mac": "02:00:00:00:00:01"}])) else { return };
    bench.world.start();
    let vm = bench.the_vm();
    assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_CREATED");
    bench.world.boot(&vm);
    eventually("its guest speaks", || bench.serial().contains(&TinyGuest::Idle.banner()));
    assert_no_tap_of_ours(&bench.world.info(&vm));
    bench.force("ShutdownVm", &vm).ok();
}

#[test]
fn a_vm_with_a_vhost_user_interface_is_imported_and_can_be_deleted() {
    const TEST: &str = "a_vm_with_a_vhost_user_interface_is_imported_and_can_be_deleted";
    let socket = json!([{"vhost_user": true, "vhost_socket": "/nowhere/net.sock"}]);
    let Some((mut bench, mut vmm)) = holding(TEST, &socket) else { return };
    bench.world.start();
    let vm = bench.the_vm();
    // Its VMM cannot reach the socket, and says so; no TAP takes its place.
    let refused = bench.op("BootVm", &vm);
    assert_ne!(refused.status, 200, "{}", refused.body);
    assert_no_tap_of_ours(&bench.world.info(&vm));
    assert!(vmm.is_alive());
}

#[test]
fn a_vm_with_a_tap_of_its_vmm_is_not_recreated_with_another_tap() {
    const TEST: &str = "a_vm_with_a_tap_of_its_vmm_is_not_recreated_with_another_tap";
    let Some((mut bench, vmm)) = holding(TEST, &json!([{"mac": "02:00:00:00:00:01"}])) else { return };
    bench.world.start();
    let vm = bench.the_vm();
    drop(vmm);
    let _another = bench.waits();
    eventually("the other VMM is found", || bench.op("BootVm", &vm).status != 503);
    let refused = bench.op("BootVm", &vm).error("failed_precondition");
    assert!(refused.contains("a TAP that the VMM makes"), "{refused}");
    assert_no_tap_of_ours(&bench.world.info(&vm));
}
