//! A configuration by flags.

use vmm_proto::v1 as pb;

use super::paths::absolute;
use crate::cli::{Disk, Flags, Pair};
use crate::config::Server;
use crate::failure::Failure;

/// The virtual processors of a VM whose command line names none.
const DEFAULT_CPUS: i32 = 1;
/// The memory in bytes of a VM whose command line names none.
const DEFAULT_MEMORY: i64 = 512 << 20;

/// Returns the request that the flags describe.
///
/// # Errors
///
/// A path is relative, and the server is on another host.
pub(super) fn request(flags: &Flags, server: &Server) -> Result<pb::CreateVmRequest, Failure> {
    let path = |flag: &str, text: Option<&str>| absolute(flag, text.unwrap_or_default(), server);
    let boot = pb::BootConfig {
        kernel_path: path("--kernel", flags.kernel.as_deref())?,
        initrd_path: path("--initrd", flags.initrd.as_deref())?,
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
        storage: flags.disk.iter().map(|it| disk(it, server)).collect::<Result<_, _>>()?,
        network: flags.net.iter().map(|nic| nic.0.clone()).collect(),
        metadata: pairs(&flags.metadata),
        delete_protection: flags.delete_protection,
        ..Default::default()
    };
    // An empty message is left out, so that the request is the one that a person would write.
    if boot != pb::BootConfig::default() {
        config.boot = boot.into();
    }
    if let Some(mode) = flags.restart {
        config.restart_policy = pb::RestartPolicy { mode: mode.into(), ..Default::default() }.into();
    }
    Ok(pb::CreateVmRequest { config: config.into(), ..Default::default() })
}

/// Returns the disk of a flag, with a path that the server can read.
pub(super) fn disk(disk: &Disk, server: &Server) -> Result<pb::StorageDevice, Failure> {
    Ok(pb::StorageDevice { path: absolute("--disk", &disk.0.path, server)?, ..disk.0.clone() })
}

/// Returns pairs as a map. The last value of a repeated key is used, as with other flags.
pub(super) fn pairs(pairs: &[Pair]) -> std::collections::BTreeMap<String, String> {
    pairs.iter().map(|pair| (pair.key.clone(), pair.value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use crate::cli::{Cli, Command};
    use crate::config::{DEFAULT_SERVER, Server, TlsFiles};
    use crate::failure::Failure;
    use crate::input;

    fn request_to(server: &str, arguments: &[&str]) -> Result<serde_json::Value, Failure> {
        let cli = Cli::try_parse_from([&["vmcp", "create"], arguments].concat()).unwrap();
        let Command::Create(create) = cli.command else { panic!("another command") };
        let server = Server::parse(server, "--server", TlsFiles::default()).unwrap();
        let request = input::request(create.name.as_deref(), &create.config, &server)?;
        Ok(serde_json::to_value(request).unwrap())
    }

    fn request(arguments: &[&str]) -> serde_json::Value {
        request_to(DEFAULT_SERVER, arguments).unwrap()
    }

    #[test]
    fn flags_make_the_same_request_as_a_file() {
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
            "--delete-protection",
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
                    "restart_policy": {"mode": "RESTART_MODE_ON_FAILURE"},
                    "delete_protection": true
                }
            })
        );
    }

    #[test]
    fn relative_paths_become_absolute_if_the_server_is_on_this_host() {
        let line = ["--kernel=./vmlinuz", "--initrd=i.gz", "--disk=a.img,root", "--disk=/b.img"];
        let config = &request(&line)["config"];
        let here = std::env::current_dir().unwrap();
        let path = |name: &str| here.join(name).display().to_string();
        assert_eq!(config["boot"]["kernel_path"], path("vmlinuz"));
        assert_eq!(config["boot"]["initrd_path"], path("i.gz"));
        assert_eq!(config["storage"][0], json!({"path": path("a.img"), "is_root_device": true}));
        assert_eq!(config["storage"][1], json!({"path": "/b.img"}));
    }

    #[test]
    fn a_relative_path_is_refused_if_the_server_is_on_another_host() {
        for (flag, fault) in [
            ("--kernel=./vmlinuz", "--kernel: must be an absolute path on the host, not \"./vmlinuz\""),
            ("--initrd=i.gz", "--initrd: must be an absolute path on the host, not \"i.gz\""),
            ("--disk=a.img,root", "--disk: must be an absolute path on the host, not \"a.img\""),
        ] {
            let error = request_to("http://10.0.0.5:8080", &[flag]).unwrap_err();
            let Failure::Input { message, remedy } = error else { panic!("{error:?}") };
            assert_eq!(message, fault);
            let hint = "the server http://10.0.0.5:8080 is on another host; write the path of the file there";
            assert_eq!(remedy.as_deref(), Some(hint));
        }
        assert!(request_to("http://10.0.0.5:8080", &["--kernel=/k", "--disk=/a.img"]).is_ok());
    }

    #[test]
    fn a_flag_beside_a_file_is_refused() {
        let line = ["vmcp", "create", "-f", "x.yaml", "--cpus=2"];
        let error = Cli::try_parse_from(line).unwrap_err().to_string();
        assert!(error.contains("cannot be used with"), "{error}");
        assert!(Cli::try_parse_from(["vmcp", "create", "web", "-f", "x.yaml", "--backend=qemu"]).is_ok());
    }
}
