//! Conversions between messages and the core's types. Configurations are converted in both
//! directions field by field; everything else is only converted into messages.

use buffa::EnumValue;
use vmm_core::backend::BackendHealth;
use vmm_core::config::{
    BootConfig, ConsoleConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface, RestartPolicyConfig,
    StorageDevice, VmConfig,
};
use vmm_core::report::FieldReport;
use vmm_core::state::{Status, VmState};
use vmm_core::store::{RunRecord, VmRecord};
use vmm_proto::v1 as pb;
use vmm_service::{BackendStatus, Metrics, VmView};

use super::capabilities::{endpoint_mode, words};
use super::size;

/// Converts Unix milliseconds to Unix seconds.
pub(super) fn seconds(ms: i64) -> i64 {
    ms.div_euclid(1000)
}

/// Converts a count, which cannot be negative, to the wire's signed type.
pub(super) fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn state_to_pb(state: VmState) -> pb::VmState {
    match state {
        VmState::Created => pb::VmState::Created,
        VmState::Running => pb::VmState::Running,
        VmState::Paused => pb::VmState::Paused,
        VmState::Shutdown => pb::VmState::Shutdown,
    }
}

/// Returns the core's state, or `None` for UNSPECIFIED.
fn state_from_pb(state: pb::VmState) -> Option<VmState> {
    match state {
        pb::VmState::Unspecified => None,
        pb::VmState::Created => Some(VmState::Created),
        pb::VmState::Running => Some(VmState::Running),
        pb::VmState::Paused => Some(VmState::Paused),
        pb::VmState::Shutdown => Some(VmState::Shutdown),
    }
}

/// Reads the states that a request names in `field`. Each state is returned once, even if the
/// request names it several times.
///
/// # Errors
///
/// One violation for each entry that is no state.
pub(crate) fn states_from_pb<'a>(
    field: &str,
    states: impl IntoIterator<Item = &'a EnumValue<pb::VmState>>,
) -> Result<Vec<VmState>, Vec<FieldReport>> {
    let mut named = Vec::new();
    let mut violations = Vec::new();
    for (index, state) in states.into_iter().enumerate() {
        match state.as_known().and_then(state_from_pb) {
            Some(state) if named.contains(&state) => {}
            Some(state) => named.push(state),
            None => violations.push(FieldReport::new(
                format!("{field}[{index}]"),
                format!(
                    "must be one of VM_STATE_CREATED (1), VM_STATE_RUNNING (2), VM_STATE_PAUSED (3) and VM_STATE_SHUTDOWN (4), not {}",
                    state.to_i32()
                ),
            )),
        }
    }
    if violations.is_empty() { Ok(named) } else { Err(violations) }
}

pub(crate) fn config_from_pb(config: pb::VmConfig) -> VmConfig {
    VmConfig {
        cpu: config.cpu.into_option().map(|cpu| CpuConfig {
            vcpu_count: cpu.vcpu_count,
            max_vcpu_count: cpu.max_vcpu_count,
            topology: cpu.topology.into_option().map(|topology| CpuTopology {
                sockets: topology.sockets,
                cores_per_socket: topology.cores_per_socket,
                threads_per_core: topology.threads_per_core,
            }),
            features: cpu.features,
        }),
        memory: config.memory.into_option().map(|memory| MemoryConfig {
            size_bytes: memory.size_bytes,
            hotplug_enabled: memory.hotplug_enabled,
            max_size_bytes: memory.max_size_bytes,
            backing: memory.backing,
        }),
        boot: config.boot.into_option().map(|boot| BootConfig {
            kernel_path: boot.kernel_path,
            initrd_path: boot.initrd_path,
            kernel_args: boot.kernel_args,
            boot_options: boot.boot_options,
        }),
        storage: config.storage.into_iter().map(disk_from_pb).collect(),
        network: config.network.into_iter().map(nic_from_pb).collect(),
        console: config.console.into_option().map(|console| ConsoleConfig {
            enabled: console.enabled,
            output: console.output,
            input: console.input,
            console_type: console.console_type,
        }),
        metadata: config.metadata,
        restart_policy: config.restart_policy.into_option().map(|policy| RestartPolicyConfig {
            mode: policy.mode.to_i32(),
            max_restarts: policy.max_restarts,
        }),
        delete_protection: config.delete_protection,
    }
}

fn disk_from_pb(disk: pb::StorageDevice) -> StorageDevice {
    StorageDevice {
        id: disk.id,
        path: disk.path,
        read_only: disk.read_only,
        is_root_device: disk.is_root_device,
        interface_type: disk.interface_type,
        options: disk.options,
    }
}

fn nic_from_pb(nic: pb::NetworkInterface) -> NetworkInterface {
    NetworkInterface {
        id: nic.id,
        mac_address: nic.mac_address,
        tap_device: nic.tap_device,
        interface_type: nic.interface_type,
        options: nic.options,
    }
}

pub(crate) fn config_to_pb(config: &VmConfig) -> pb::VmConfig {
    pb::VmConfig {
        cpu: config.cpu.as_ref().map(cpu_to_pb).into(),
        memory: config.memory.as_ref().map(memory_to_pb).into(),
        boot: config.boot.as_ref().map(boot_to_pb).into(),
        storage: config.storage.iter().map(disk_to_pb).collect(),
        network: config.network.iter().map(nic_to_pb).collect(),
        console: config.console.as_ref().map(console_to_pb).into(),
        metadata: config.metadata.clone(),
        restart_policy: config.restart_policy.as_ref().map(restart_to_pb).into(),
        delete_protection: config.delete_protection,
        ..Default::default()
    }
}

fn cpu_to_pb(cpu: &CpuConfig) -> pb::CpuConfig {
    let topology = cpu.topology.as_ref().map(|topology| pb::CpuTopology {
        sockets: topology.sockets,
        cores_per_socket: topology.cores_per_socket,
        threads_per_core: topology.threads_per_core,
        ..Default::default()
    });
    pb::CpuConfig {
        vcpu_count: cpu.vcpu_count,
        max_vcpu_count: cpu.max_vcpu_count,
        topology: topology.into(),
        features: cpu.features.clone(),
        ..Default::default()
    }
}

fn memory_to_pb(memory: &MemoryConfig) -> pb::MemoryConfig {
    pb::MemoryConfig {
        size_bytes: memory.size_bytes,
        hotplug_enabled: memory.hotplug_enabled,
        max_size_bytes: memory.max_size_bytes,
        backing: memory.backing.clone(),
        ..Default::default()
    }
}

fn boot_to_pb(boot: &BootConfig) -> pb::BootConfig {
    pb::BootConfig {
        kernel_path: boot.kernel_path.clone(),
        initrd_path: boot.initrd_path.clone(),
        kernel_args: boot.kernel_args.clone(),
        boot_options: boot.boot_options.clone(),
        ..Default::default()
    }
}

fn disk_to_pb(disk: &StorageDevice) -> pb::StorageDevice {
    pb::StorageDevice {
        id: disk.id.clone(),
        path: disk.path.clone(),
        read_only: disk.read_only,
        is_root_device: disk.is_root_device,
        interface_type: disk.interface_type.clone(),
        options: disk.options.clone(),
        ..Default::default()
    }
}

fn nic_to_pb(nic: &NetworkInterface) -> pb::NetworkInterface {
    pb::NetworkInterface {
        id: nic.id.clone(),
        mac_address: nic.mac_address.clone(),
        tap_device: nic.tap_device.clone(),
        interface_type: nic.interface_type.clone(),
        options: nic.options.clone(),
        ..Default::default()
    }
}

fn console_to_pb(console: &ConsoleConfig) -> pb::ConsoleConfig {
    pb::ConsoleConfig {
        enabled: console.enabled,
        output: console.output.clone(),
        input: console.input.clone(),
        console_type: console.console_type.clone(),
        ..Default::default()
    }
}

fn restart_to_pb(policy: &RestartPolicyConfig) -> pb::RestartPolicy {
    pb::RestartPolicy { mode: policy.mode.into(), max_restarts: policy.max_restarts, ..Default::default() }
}

pub(super) fn reports_to_pb<T: Into<FieldReport>>(reports: Vec<T>) -> Vec<pb::FieldReport> {
    let to_pb = |FieldReport { field, message }| pb::FieldReport { field, message, ..Default::default() };
    size::bounded(reports.into_iter().map(T::into).collect()).into_iter().map(to_pb).collect()
}

pub(super) fn status_to_pb(status: &Status) -> pb::VmStatus {
    pb::VmStatus {
        phase: status.phase.as_str().to_owned(),
        reason: status.reason.as_str().to_owned(),
        message: status.message.clone(),
        observed_at: seconds(status.observed_at_ms),
        restarts: i32::try_from(status.restarts).unwrap_or(i32::MAX),
        ..Default::default()
    }
}

/// Converts a record to its entry in ListVms.
pub(super) fn summary_to_pb(record: &VmRecord) -> pb::VmInfo {
    pb::VmInfo {
        vm_id: record.vm_id.to_string(),
        state: state_to_pb(record.state).into(),
        vcpu_count: record.config.cpu.as_ref().map_or(0, |cpu| cpu.vcpu_count),
        memory_size_bytes: record.config.memory.as_ref().map_or(0, |memory| memory.size_bytes),
        created_timestamp: seconds(record.created_ms),
        modified_timestamp: seconds(record.modified_ms),
        metadata: record.config.metadata.clone(),
        backend: record.backend.to_string(),
        status: status_to_pb(&record.status).into(),
        generation: count(record.generation),
        uid: record.uid.to_string(),
        ..Default::default()
    }
}

/// Converts everything about one VM, at `now_ms` (Unix milliseconds). `kernel_args` is the kernel
/// command line in force.
pub(super) fn info_to_pb(view: &VmView, kernel_args: String, now_ms: i64) -> pb::GetVmInfoResponse {
    let record = &view.record;
    let metrics = view.metrics.map(|metrics| {
        let uptime_ms = record.run.as_ref().map_or(0, |run| uptime_ms(run, now_ms));
        metrics_to_pb(&metrics, seconds(uptime_ms))
    });
    pb::GetVmInfoResponse {
        vm_id: record.vm_id.to_string(),
        config: config_to_pb(&record.config).into(),
        state: state_to_pb(record.state).into(),
        metrics: metrics.into(),
        backend_info: backend_info(record, kernel_args),
        backend: record.backend.to_string(),
        status: status_to_pb(&record.status).into(),
        generation: count(record.generation),
        created_timestamp: seconds(record.created_ms),
        modified_timestamp: seconds(record.modified_ms),
        uid: record.uid.to_string(),
        metrics_observed_at: view.metrics.map_or(0, |metrics| seconds(metrics.observed_ms)),
        ..Default::default()
    }
}

/// Returns the time that a run has lasted, in milliseconds. The wall clock may have been set since
/// the run began. Therefore the difference of two readings is used only if it is possible: it is
/// not negative, and not greater than the age of the process, which comes from a clock that nobody
/// sets. Otherwise the age of the process is returned.
fn uptime_ms(run: &RunRecord, now_ms: i64) -> i64 {
    let age = vmm_host::process::age(&run.process).unwrap_or_default();
    let age_ms = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
    match now_ms.saturating_sub(run.started_ms) {
        possible @ 0.. if possible <= age_ms => possible,
        _ => age_ms,
    }
}

fn metrics_to_pb(metrics: &Metrics, uptime_seconds: i64) -> pb::VmMetrics {
    let network = metrics.network.map(|network| pb::NetworkStats {
        bytes_received: count(network.bytes_received),
        bytes_transmitted: count(network.bytes_transmitted),
        packets_received: count(network.packets_received),
        packets_transmitted: count(network.packets_transmitted),
        ..Default::default()
    });
    let storage = metrics.storage.map(|storage| pb::StorageStats {
        bytes_read: count(storage.bytes_read),
        bytes_written: count(storage.bytes_written),
        read_operations: count(storage.read_operations),
        write_operations: count(storage.write_operations),
        ..Default::default()
    });
    pb::VmMetrics {
        cpu_usage_percent: metrics.cpu_usage_percent,
        memory_usage_bytes: count(metrics.memory_bytes.unwrap_or_default()),
        network_stats: network.into(),
        storage_stats: storage.into(),
        uptime_seconds,
        ..Default::default()
    }
}

fn backend_info(record: &VmRecord, kernel_args: String) -> std::collections::BTreeMap<String, String> {
    let mut info = vec![("backend", record.backend.to_string()), ("kernel_args", kernel_args)];
    if let Some(run) = &record.run {
        info.extend([
            ("version", run.version.clone()),
            ("pid", run.process.pid.to_string()),
            ("socket", run.socket.display().to_string()),
            ("accelerator", run.accelerator.clone()),
            ("machine", run.machine.clone()),
        ]);
    }
    if let Some(ended_by) = record.ended_by {
        info.push(("ended_by", ended_by.as_str().to_owned()));
    }
    info.into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

pub(super) fn backend_to_pb(status: BackendStatus) -> pb::Backend {
    // `capabilities` already names the accelerator of a VM that starts now.
    let BackendHealth { version, problems, accelerator: _ } = status.health;
    let capabilities = status.capabilities;
    let (available, version, reason) = match version {
        Ok(version) => (true, version, problems.join("; ")),
        Err(reason) => (false, String::new(), reason),
    };
    pb::Backend {
        name: capabilities.name.to_string(),
        available,
        reason,
        version,
        endpoint_mode: endpoint_mode(capabilities.endpoint_mode).to_owned(),
        capabilities: words(&capabilities.facts),
        limits: capabilities.limits.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a configuration in which every field has a value of its own.
    fn full() -> pb::VmConfig {
        let json = r#"{
            "cpu": {"vcpu_count": 2, "max_vcpu_count": 4, "features": {"a": "b"},
                    "topology": {"sockets": 1, "cores_per_socket": 2, "threads_per_core": 3}},
            "memory": {"size_bytes": "1048576", "hotplug_enabled": true, "max_size_bytes": 2097152, "backing": {"c": "d"}},
            "boot": {"kernel_path": "k", "initrd_path": "i", "kernel_args": "x", "boot_options": {"e": "f"}},
            "storage": [{"id": "d", "path": "p", "read_only": true, "is_root_device": true, "interface_type": "v", "options": {"g": "h"}}],
            "network": [{"id": "n", "mac_address": "m", "tap_device": "t", "interface_type": "w", "options": {"j": "l"}}],
            "console": {"enabled": true, "output": "o", "input": "in", "console_type": "ct"},
            "metadata": {"q": "r"},
            "restart_policy": {"mode": "RESTART_MODE_ALWAYS", "max_restarts": 9},
            "delete_protection": true
        }"#;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_configuration_survives_the_conversion_from_and_to_the_wire() {
        assert_eq!(config_to_pb(&config_from_pb(full())), full());
        assert_eq!(config_to_pb(&config_from_pb(pb::VmConfig::default())), pb::VmConfig::default());
    }

    #[test]
    fn a_state_filter_ignores_duplicates_and_names_each_unknown_state() {
        let [running, paused, unspecified, unknown] = [2, 3, 0, 99].map(EnumValue::<pb::VmState>::from);
        let many = std::iter::repeat_n(&running, 1000).chain([&paused, &running]);
        assert_eq!(states_from_pb("states", many).unwrap(), [VmState::Running, VmState::Paused]);
        let refused = states_from_pb("states", [&unknown, &running, &unspecified]).unwrap_err();
        assert!(refused[0].message.ends_with("VM_STATE_SHUTDOWN (4), not 99"), "{refused:?}");
        let fields: Vec<String> = refused.into_iter().map(|report| report.field).collect();
        assert_eq!(fields, ["states[0]", "states[2]"]);
    }

    #[test]
    fn an_uptime_is_between_zero_and_the_age_of_the_process() {
        let process = vmm_host::process::identify(std::process::id()).unwrap();
        let now_ms = 1_800_000_000_000;
        let uptime = |started_ms| {
            let run = RunRecord {
                process: process.clone(),
                socket: "/s".into(),
                version: String::new(),
                accelerator: String::new(),
                machine: String::new(),
                started_ms,
                claims: Vec::new(),
                taps: Vec::new(),
            };
            uptime_ms(&run, now_ms)
        };
        let age = || i64::try_from(vmm_host::process::age(&process).unwrap().as_millis()).unwrap();
        let youngest = age();
        // The clock was set back by a year since the run began, or forward by 25 years.
        for started_ms in [now_ms + 31_536_000_000, now_ms - 25 * 31_536_000_000] {
            let reported = uptime(started_ms);
            assert!((youngest..=age()).contains(&reported), "{reported}");
        }
        assert_eq!(uptime(now_ms), 0);
        assert_eq!(uptime(now_ms - youngest), youngest, "where the clock can be right it counts");
    }

    #[test]
    fn every_core_state_has_its_own_wire_state() {
        for state in VmState::ALL {
            assert_eq!(state_from_pb(state_to_pb(state)), Some(state));
        }
        assert_eq!(state_from_pb(pb::VmState::Unspecified), None);
    }
}
