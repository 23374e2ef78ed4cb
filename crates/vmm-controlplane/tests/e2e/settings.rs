//! A refusal that a setting can lift names the setting.

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::World;

/// A refusal, and the setting that lifts it.
struct Refusal {
    /// The settings of the daemon. `DIR` stands for a folder of the test.
    settings: &'static [(&'static str, &'static str)],
    /// The backend of the VM.
    backend: &'static str,
    /// The part of a small configuration that is replaced, and its value.
    replaced: (&'static str, fn() -> Value),
    /// The calls after a first CreateVm that is to succeed, or a CreateVm that is refused.
    then: Then,
    /// The code of the refusal.
    code: &'static str,
    /// The setting that the refusal names.
    names: &'static str,
}

enum Then {
    /// CreateVm is refused.
    Refused,
    /// A second CreateVm is refused.
    AnotherRefused,
    /// BootVm is refused.
    BootRefused,
}

const AS_IT_IS: (&str, fn() -> Value) = ("metadata", || json!({}));

fn refusals() -> Vec<Refusal> {
    let no_kernel: (&str, fn() -> Value) = ("boot", || json!({}));
    let always: (&str, fn() -> Value) = ("restart_policy", || json!({"mode": "RESTART_MODE_ALWAYS"}));
    let host_cpu: (&str, fn() -> Value) =
        ("cpu", || json!({"vcpu_count": 1, "features": {"qemu.model": "host"}}));
    let missing = |binary: &'static [(&'static str, &'static str)], backend| Refusal {
        settings: binary,
        backend,
        replaced: AS_IT_IS,
        then: Then::BootRefused,
        code: "failed_precondition",
        names: binary[0].0,
    };
    let attached = |endpoint: &'static [(&'static str, &'static str)], backend, replaced, then, code| {
        Refusal { settings: endpoint, backend, replaced, then, code, names: endpoint[0].0 }
    };
    let ch = &[("UNKEY_VMCP_CH_ENDPOINT", "unix://DIR/ch.sock")];
    let fc = &[("UNKEY_VMCP_FC_ENDPOINT", "unix://DIR/fc.sock")];
    let qmp = &[("UNKEY_VMCP_QEMU_ENDPOINT", "unix://DIR/qmp.sock")];
    vec![
        Refusal {
            settings: &[],
            backend: "qemu",
            replaced: no_kernel,
            then: Then::Refused,
            code: "invalid_argument",
            names: "UNKEY_VMCP_DEFAULT_KERNEL",
        },
        Refusal {
            settings: &[("UNKEY_VMCP_DEFAULT_KERNEL", "DIR/no-kernel")],
            backend: "qemu",
            replaced: no_kernel,
            then: Then::Refused,
            code: "invalid_argument",
            names: "UNKEY_VMCP_DEFAULT_KERNEL",
        },
        Refusal {
            settings: &[("UNKEY_VMCP_QEMU_KVM", "false")],
            backend: "qemu",
            replaced: host_cpu,
            then: Then::Refused,
            code: "invalid_argument",
            names: "UNKEY_VMCP_QEMU_KVM",
        },
        missing(&[("UNKEY_VMCP_QEMU_BINARY", "DIR/no-qemu")], "qemu"),
        missing(&[("UNKEY_VMCP_CH_BINARY", "DIR/no-ch")], "cloudhypervisor"),
        missing(&[("UNKEY_VMCP_FC_BINARY", "DIR/no-fc")], "firecracker"),
        attached(ch, "cloudhypervisor", always, Then::Refused, "invalid_argument"),
        attached(fc, "firecracker", always, Then::Refused, "invalid_argument"),
        attached(ch, "cloudhypervisor", AS_IT_IS, Then::AnotherRefused, "resource_exhausted"),
        attached(fc, "firecracker", AS_IT_IS, Then::AnotherRefused, "resource_exhausted"),
        attached(qmp, "qemu", AS_IT_IS, Then::Refused, "unimplemented"),
    ]
}

#[test]
fn a_refusal_names_the_setting_that_lifts_it() {
    for refusal in refusals() {
        let Refusal { settings, backend, replaced: (part, value), then, code, names } = refusal;
        let mut world = World::new(&[]);
        let folder = world.dir.path().display().to_string();
        for (key, value) in settings {
            world.set_env(key, Some(&value.replace("DIR", &folder)));
        }
        world.start();
        let mut config = world.tiny(TinyGuest::Idle);
        config[part] = value();
        let create = |vm_id: &str| {
            world.call("CreateVm", &json!({"vm_id": vm_id, "backend": backend, "config": config}))
        };
        let answer = match then {
            Then::Refused => create("vm"),
            Then::AnotherRefused => {
                create("vm").ok();
                create("another")
            }
            Then::BootRefused => {
                create("vm").ok();
                world.call("BootVm", &json!({"vm_id": "vm"}))
            }
        };
        let message = answer.error(code);
        assert!(message.contains(names), "{names} lifts it: {message}");
    }
}
