//! `vmcp get`.

use vmm_proto::v1 as pb;

use super::Session;
use crate::cli::Get;
use crate::connect::names;
use crate::failure::Failure;
use crate::output::{Table, units, words};

pub(super) async fn run(session: &mut Session, arguments: &Get) -> Result<(), Failure> {
    let answer = names::read(&session.client, &arguments.name).await?;
    session.output.answer(&answer, &[&answer.vm_id], |width| facts(&answer, width))
}

/// Returns the facts of a VM, one a line. A fact without a value has no line.
fn facts(vm: &pb::GetVmInfoResponse, width: Option<u16>) -> String {
    let mut table = Table::facts(width);
    let mut fact = |name: &str, value: String| {
        if !value.is_empty() {
            table.row([name.to_owned(), value]);
        }
    };
    identity(vm, &mut fact);
    configuration(&vm.config, &mut fact);
    run_of(vm, &mut fact);
    table.render()
}

fn identity(vm: &pb::GetVmInfoResponse, fact: &mut impl FnMut(&str, String)) {
    fact("name", vm.vm_id.clone());
    fact("uid", vm.uid.clone());
    fact("state", words::state(&vm.state));
    fact("status", words::status(&vm.state, &vm.status));
    fact("message", vm.status.message.clone());
    if vm.status.restarts > 0 {
        fact("restarts", vm.status.restarts.to_string());
    }
    fact("backend", vm.backend.clone());
    fact("created", units::time(vm.created_timestamp.saturating_mul(1000)));
    fact("changed", units::time(vm.modified_timestamp.saturating_mul(1000)));
    fact("generation", vm.generation.to_string());
}

fn configuration(config: &pb::VmConfig, fact: &mut impl FnMut(&str, String)) {
    fact("vcpus", config.cpu.vcpu_count.to_string());
    fact("memory", units::size(config.memory.size_bytes));
    fact("kernel", config.boot.kernel_path.clone());
    fact("initrd", config.boot.initrd_path.clone());
    fact("kernel args", config.boot.kernel_args.clone());
    for disk in &config.storage {
        let marks = [(disk.is_root_device, " root"), (disk.read_only, " ro")];
        let marks: String = marks.iter().filter(|(is, _)| *is).map(|(_, mark)| *mark).collect();
        fact(&format!("disk {}", disk.id), format!("{}{marks}", disk.path));
    }
    for nic in &config.network {
        fact(&format!("net {}", nic.id), format!("{} on {}", nic.mac_address, nic.tap_device));
    }
    fact("metadata", words::pairs(&config.metadata));
    if let Some(policy) = config.restart_policy.as_option() {
        fact("restart", words::restart(policy));
    }
    if config.delete_protection {
        fact("protection", "against delete, also with --force".to_owned());
    }
}

fn run_of(vm: &pb::GetVmInfoResponse, fact: &mut impl FnMut(&str, String)) {
    for (name, value) in &vm.backend_info {
        if name != "backend" {
            // The row "kernel args" has the arguments of the configuration.
            let name = if name == "kernel_args" { "kernel args in force" } else { name };
            fact(name, value.clone());
        }
    }
    let Some(metrics) = vm.metrics.as_option() else { return };
    let uptime = u64::try_from(metrics.uptime_seconds).unwrap_or_default();
    fact("up", units::span(uptime));
    fact("cpu", format!("{:.1} %", metrics.cpu_usage_percent));
    fact("memory in use", units::size(metrics.memory_usage_bytes));
    let disks = &metrics.storage_stats;
    let moved = |a: i64, b: i64, words: [&str; 2]| {
        format!("{} {}, {} {}", units::size(a), words[0], units::size(b), words[1])
    };
    fact("disks", moved(disks.bytes_read, disks.bytes_written, ["read", "written"]));
    let net = &metrics.network_stats;
    fact("network", moved(net.bytes_received, net.bytes_transmitted, ["received", "sent"]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configured_and_effective_kernel_arguments_have_separate_lines() {
        let boot = pb::BootConfig { kernel_args: "console=ttyS0".into(), ..Default::default() };
        let vm = pb::GetVmInfoResponse {
            config: pb::VmConfig { boot: boot.into(), ..Default::default() }.into(),
            backend_info: [("kernel_args".to_owned(), "console=ttyS0 reboot=k".to_owned())].into(),
            ..Default::default()
        };
        let text = facts(&vm, None);
        assert!(text.contains("kernel args           console=ttyS0\n"), "{text}");
        assert!(text.contains("kernel args in force  console=ttyS0 reboot=k"), "{text}");
    }

    #[test]
    fn only_set_fields_have_a_line_and_control_bytes_are_escaped() {
        let config = pb::VmConfig {
            cpu: pb::CpuConfig { vcpu_count: 2, ..Default::default() }.into(),
            storage: vec![pb::StorageDevice {
                id: "disk0".into(),
                path: "/srv/a".into(),
                is_root_device: true,
                ..Default::default()
            }],
            metadata: [("owner".to_owned(), "\u{1b}[31mme".to_owned())].into(),
            ..Default::default()
        };
        let vm = pb::GetVmInfoResponse {
            vm_id: "web-1".into(),
            state: pb::VmState::Created.into(),
            config: config.into(),
            ..Default::default()
        };
        let text = facts(&vm, None);
        assert!(text.starts_with("name        web-1\n"), "{text}");
        assert!(text.contains("disk disk0  /srv/a root\n"), "{text}");
        assert!(text.contains("metadata    owner=\\u{1b}[31mme"), "{text}");
        assert!(!text.contains("initrd") && !text.contains("memory in use"), "{text}");
    }
}
