//! A configuration by flags.

use vmm_proto::v1 as pb;

use crate::cli::{Flags, Pair};

/// The virtual processors of a VM whose command line names none.
const DEFAULT_CPUS: i32 = 1;
/// The memory in bytes of a VM whose command line names none.
const DEFAULT_MEMORY: i64 = 512 << 20;

/// Returns the request that the flags describe.
pub(super) fn request(flags: &Flags) -> pb::CreateVmRequest {
    let boot = pb::BootConfig {
        kernel_path: flags.kernel.clone().unwrap_or_default(),
        initrd_path: flags.initrd.clone().unwrap_or_default(),
        kernel_args: flags.kernel_args.clone().unwrap_or_default(),
        boot_options: pairs(&flags.boot_option),
        ..Default::default()
    };
    let cpu = pb::CpuConfig { vcpu_count: flags.cpus.unwrap_or(DEFAULT_CPUS), ..Default::default() };
    let memory =
        pb::MemoryConfig { size_bytes: flags.memory.unwrap_or(DEFAULT_MEMORY), ..Default::default() };
    let mut config = pb::VmConfig {
        cpu: cpu.into(),
        memory: memory.into(),
        storage: flags.disk.iter().map(|disk| disk.0.clone()).collect(),
        network: flags.net.iter().map(|nic| nic.0.clone()).collect(),
        metadata: pairs(&flags.metadata),
        ..Default::default()
    };
    // An empty message is left out, so that the request is the one that a person would write.
    if boot != pb::BootConfig::default() {
        config.boot = boot.into();
    }
    if let Some(mode) = flags.restart {
        config.restart_policy = pb::RestartPolicy { mode: mode.into(), ..Default::default() }.into();
    }
    pb::CreateVmRequest { config: config.into(), ..Default::default() }
}

/// Returns pairs as a map. Of a key that stands twice the last value counts, as with other flags.
fn pairs(pairs: &[Pair]) -> std::collections::BTreeMap<String, String> {
    pairs.iter().map(|pair| (pair.key.clone(), pair.value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use crate::cli::{Cli, Command};
    use crate::input;

    fn request(arguments: &[&str]) -> serde_json::Value {
        let cli = Cli::try_parse_from([&["vmcp", "create"], arguments].concat()).unwrap();
        let Command::Create(create) = cli.command else { panic!("another command") };
        serde_json::to_value(input::request(create.name.as_deref(), &create.config).unwrap()).unwrap()
    }

    #[test]
    fn flags_make_the_request_that_a_person_would_write() {
        assert_eq!(
            request(&[]),
            json!({"config": {"cpu": {"vcpu_count": 1}, "memory": {"size_bytes": "536870912"}}})
        );
        let all = request(&[
            "web-1",
            "--backend=qemu",
            "--cpus=2",
            "--memory=2GiB",
            "--kernel=/k",
            "--initrd=/i",
            "--kernel-args=-x console=ttyS0",
            "--boot-option=qemu.machine=microvm",
            "--disk=/a,root",
            "--disk=/b,ro,format=qcow2",
            "--net=auto",
            "--net=tap=tap0",
            "--metadata=team=web",
            "--restart=on-failure",
        ]);
        assert_eq!(
            all,
            json!({
                "vm_id": "web-1",
                "backend": "qemu",
                "config": {
                    "cpu": {"vcpu_count": 2},
                    "memory": {"size_bytes": "2147483648"},
                    "boot": {
                        "kernel_path": "/k",
                        "initrd_path": "/i",
                        "kernel_args": "-x console=ttyS0",
                        "boot_options": {"qemu.machine": "microvm"}
                    },
                    "storage": [
                        {"path": "/a", "is_root_device": true},
                        {"path": "/b", "read_only": true, "options": {"format": "qcow2"}}
                    ],
                    "network": [{}, {"tap_device": "tap0"}],
                    "metadata": {"team": "web"},
                    "restart_policy": {"mode": "RESTART_MODE_ON_FAILURE"}
                }
            })
        );
    }

    #[test]
    fn a_flag_beside_a_file_is_refused() {
        let line = ["vmcp", "create", "-f", "x.yaml", "--cpus=2"];
        let error = Cli::try_parse_from(line).unwrap_err().to_string();
        assert!(error.contains("cannot be used with"), "{error}");
        assert!(Cli::try_parse_from(["vmcp", "create", "web", "-f", "x.yaml", "--backend=qemu"]).is_ok());
    }
}
