//! Cloud Hypervisors that somebody else started.
//!
//! A VM is made in one that waits (`vm.create`, `vm.boot`), and its end leaves the VMM waiting again with the VM in it, so it can
//! be booted any number of times. Only where the guest itself powers off the process ends too. Its console is a file that is
//! copied ([`super::console`]); nothing of its own stdout or event monitor is ours.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Value, json};
use vmm_core::backend::{
    BackendError, BackendErrorKind, Capabilities, Effect, GuestState, LaunchRequest, Launched,
    NetworkCounters, StorageCounters, SweepRequest,
};
use vmm_core::config::{
    BootConfig, ConsoleConfig, CpuConfig, CpuTopology, MemoryConfig, NetworkInterface, Options,
    StorageDevice, VmConfig,
};
use vmm_core::id::{VmUid, is_name};
use vmm_core::kind::VmKind;
use vmm_core::place::Places;
use vmm_core::report::Report;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_core::state::EndedBy;
use vmm_host::endpoint::{Visit, VisitError};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::path::shell_word;
use vmm_host::process::Process;

use super::handle::{self, Api};
use super::tell::{count, flag, is_in, list, number, others, text};
use super::{Guest, Holding, Hypervisor, Met, Parts, stranger};
use crate::cloud_hypervisor::client::{Client, VmPhase};
use crate::cloud_hypervisor::convert::{Config, path_option};
use crate::cloud_hypervisor::{OLDEST, capabilities};
use crate::ladder::Call;
use crate::program::Version;
use crate::rest::options::check_taps;

/// Cloud Hypervisor, as attached.
#[derive(Debug)]
pub(crate) struct CloudHypervisor {
    capabilities: Capabilities,
}

impl CloudHypervisor {
    /// Makes it.
    pub(crate) fn new() -> Self {
        let mut capabilities = capabilities();
        capabilities.endpoint_mode = "attached";
        for (name, fact) in [
            ("console", "serial, without input; of an imported VM none"),
            ("guest-power-off", "ends the run, and the VMM; why is not told"),
            ("guest-reset", "in place, and not seen"),
            ("guest-triple-fault", "as a reset"),
            ("state", "asked for at the metrics interval"),
            ("vmm-failure", "ends the run; another VMM on the same socket can boot the VM again"),
        ] {
            capabilities.facts.insert(name, fact.to_owned());
        }
        Self { capabilities }
    }
}

#[async_trait]
impl Hypervisor for CloudHypervisor {
    type Client = Client;

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn title(&self) -> &'static str {
        "Cloud Hypervisor"
    }

    fn program(&self) -> &'static str {
        "cloud-hypervisor"
    }

    fn how_to_start(&self, socket: &Path) -> String {
        let (left, socket) = (socket.to_string_lossy(), path_option(socket).to_string_lossy().into_owned());
        // Not every version takes the place of a socket that another one left behind.
        format!("rm -f {} && cloud-hypervisor --api-socket {}", shell_word(&left), shell_word(&socket))
    }

    fn places(&self, sockets: Vec<VmKind>) -> Places {
        Places::Fixed(sockets)
    }

    fn check(&self, spec: &VmSpec, report: &mut Report) {
        if let Some(RestartMode::Never | RestartMode::OnFailure | RestartMode::Always) = spec.restart.mode {
            report.reject(
                "config.restart_policy.mode",
                "must be unset or RESTART_MODE_GUEST_REBOOT where Cloud Hypervisor was started by somebody else: its guest's resets \
                 are not seen there, and no VMM can be started in the place of one that has ended",
            );
        }
    }

    async fn meet(&self, socket: &Path, visit: Visit) -> Result<Met<Client>, VisitError> {
        let pid = visit.process.pid();
        let client =
            Client::over(socket, visit.stream).await.map_err(|error| VisitError::Failed(error.message))?;
        let client = client.of_process(pid);
        let version = match client.version().await {
            Ok(version) => version,
            Err(error) => return Err(not_one(socket, error).await),
        };
        if let Some(found) = Version::find(&format!("v{version}"))
            && found < OLDEST
        {
            return Err(VisitError::Refused(format!(
                "Cloud Hypervisor {version} listens there, and {OLDEST} is the oldest that can be used: start a newer one"
            )));
        }
        let described = client.describe().await.map_err(|error| VisitError::Failed(error.message))?;
        let holds = described.map(|(phase, native)| holding(phase, native));
        Ok(Met {
            client: Arc::new(client),
            process: visit.process,
            version,
            accelerator: "kvm".to_owned(),
            machine: String::new(),
            holds,
        })
    }

    fn is_made_of(&self, holds: &Holding, uid: VmUid, spec: &VmSpec, console: Option<&Path>) -> bool {
        let config = Config::of(spec, &spec.tap_names(uid));
        let config = match console {
            Some(file) => config.with_console_in(file),
            None => config,
        };
        serde_json::to_value(config).is_ok_and(|ours| is_in(&ours, &holds.native))
    }

    async fn start(
        &self,
        met: &Met<Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError> {
        if make {
            check_taps(&request.spec, &request.taps)?;
            let config = Config::of(&request.spec, &request.taps);
            let config = match console {
                Some(file) => config.with_console_in(file),
                None => config,
            };
            met.client.create(&config).await?;
            point(FaultPoint::LaunchConfigured);
        }
        let Err(error) = met.client.boot().await else {
            point(FaultPoint::LaunchStarted);
            return Ok(());
        };
        if make && let Err(left) = met.client.delete().await {
            tracing::warn!(error = %left, "what a start that failed has made is still in the VMM");
            return Err(BackendError { effect: Effect::Unknown, ..error });
        }
        Err(error)
    }

    fn attend(&self, met: Met<Client>, parts: Parts) -> Launched {
        handle::attend(met.client, met.process, self.program(), parts)
    }

    fn silent(&self, socket: &Path, process: &Process) -> Met<Client> {
        Met {
            client: Arc::new(Client::new(socket).of_process(process.pid())),
            process: process.clone(),
            version: String::new(),
            accelerator: "kvm".to_owned(),
            machine: String::new(),
            holds: None,
        }
    }

    async fn power_off(&self, client: &Client) -> Result<bool, BackendError> {
        match client.shutdown().await {
            Ok(()) => Ok(true),
            Err(error) if error.kind == BackendErrorKind::Rejected => {
                Ok(client.state().await? == GuestState::Ended)
            }
            Err(error) => Err(error),
        }
    }

    async fn forget(&self, client: &Client, _request: &SweepRequest) -> Result<bool, BackendError> {
        client.delete().await.map(|()| true)
    }
}

async fn not_one(socket: &Path, error: BackendError) -> VisitError {
    match stranger::who(socket).await {
        Some(other) if !other.starts_with("Cloud Hypervisor") => {
            VisitError::Refused(format!("what listens there is not Cloud Hypervisor: it is {other}"))
        }
        Some(_) | None => VisitError::Failed(error.message),
    }
}

#[async_trait]
impl Api for Client {
    async fn state(&self) -> Result<GuestState, BackendError> {
        Client::state(self).await
    }

    async fn pause(&self) -> Result<(), BackendError> {
        or_done(self, Client::pause(self).await, GuestState::Paused).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        or_done(self, Client::resume(self).await, GuestState::Running).await
    }

    fn ask(&self) -> Option<(EndedBy, Call<'_>)> {
        Some((EndedBy::Acpi, Box::pin(self.power_button())))
    }

    fn power_off(&self) -> Option<Call<'_>> {
        Some(Box::pin(self.shutdown()))
    }

    async fn reset(&self, _socket: &Path) -> Result<(), BackendError> {
        self.reboot().await
    }

    async fn counters(
        &self,
        _dir: Option<&Path>,
    ) -> Result<(NetworkCounters, StorageCounters), BackendError> {
        let counters = Client::counters(self).await?;
        Ok((counters.network(), counters.storage()))
    }
}

/// To stop what stands still is an error there, and none here.
async fn or_done(
    client: &Client,
    answer: Result<(), BackendError>,
    wanted: GuestState,
) -> Result<(), BackendError> {
    let Err(error) = answer else { return Ok(()) };
    let is_there = error.kind == BackendErrorKind::Rejected
        && matches!(Client::state(client).await, Ok(state) if state == wanted);
    if is_there { Ok(()) } else { Err(error) }
}

fn holding(phase: VmPhase, native: Value) -> Holding {
    let guest = match phase {
        VmPhase::AtRest => Guest::AtRest,
        VmPhase::Running => Guest::Running,
        VmPhase::Paused => Guest::Paused,
    };
    let (config, untold) = configuration(&native);
    Holding { guest, config, untold, startable: true, native }
}

/// What `vm.info` tells of a VM, and what of that a configuration cannot say.
pub(crate) fn configuration(native: &Value) -> (VmConfig, Vec<String>) {
    let mut untold = Vec::new();
    let nothing = Value::Null;
    let part = |name: &str| native.get(name).unwrap_or(&nothing);
    let config = VmConfig {
        cpu: Some(cpus(part("cpus"), &mut untold)),
        memory: Some(memory(part("memory"), &mut untold)),
        boot: Some(boot(part("payload"), &mut untold)),
        storage: list(native, "disks").enumerate().map(|(at, disk)| storage(at, disk, &mut untold)).collect(),
        network: list(native, "net").enumerate().map(|(at, net)| interface(at, net, &mut untold)).collect(),
        console: Some(console(part("serial"))),
        ..VmConfig::default()
    };
    let known = ["cpus", "memory", "payload", "disks", "net", "serial", "console", "debug_console"];
    let defaults =
        [("rng", json!({"pci_segment": 0, "src": "/dev/urandom"})), ("rng", json!({"src": "/dev/urandom"}))];
    others(native, &known, &defaults, &mut untold, "");
    (config, untold)
}

fn cpus(told: &Value, untold: &mut Vec<String>) -> CpuConfig {
    let vcpu_count = count(told, "boot_vcpus");
    let max = count(told, "max_vcpus");
    let topology = told.get("topology").filter(|topology| !topology.is_null()).map(|topology| CpuTopology {
        sockets: count(topology, "packages").saturating_mul(count(topology, "dies_per_package").max(1)),
        cores_per_socket: count(topology, "cores_per_die"),
        threads_per_core: count(topology, "threads_per_core"),
    });
    let known = ["boot_vcpus", "max_vcpus", "topology", "max_phys_bits", "nested", "core_scheduling"];
    let defaults = [("profile", json!("Host"))];
    others(told, &known, &defaults, untold, "cpus");
    CpuConfig {
        vcpu_count,
        max_vcpu_count: if max == vcpu_count { 0 } else { max },
        topology,
        features: Options::new(),
    }
}

fn memory(told: &Value, untold: &mut Vec<String>) -> MemoryConfig {
    let zones: i64 = list(told, "zones").map(|zone| number(zone, "size")).fold(0, i64::saturating_add);
    let size_bytes = number(told, "size").saturating_add(zones);
    let room = number(told, "hotplug_size");
    let mut backing = Options::new();
    for key in ["shared", "hugepages"] {
        if flag(told, key) {
            backing.insert(key.to_owned(), "true".to_owned());
        }
    }
    let known = ["size", "hotplug_size", "shared", "hugepages"];
    let defaults = [("hotplug_method", json!("Acpi")), ("thp", json!(true))];
    others(told, &known, &defaults, untold, "memory");
    MemoryConfig {
        size_bytes,
        hotplug_enabled: room > 0,
        max_size_bytes: if room > 0 { size_bytes.saturating_add(room) } else { 0 },
        backing,
    }
}

fn boot(told: &Value, untold: &mut Vec<String>) -> BootConfig {
    others(told, &["kernel", "initramfs", "cmdline"], &[], untold, "payload");
    BootConfig {
        kernel_path: text(told, "kernel"),
        initrd_path: text(told, "initramfs"),
        kernel_args: text(told, "cmdline"),
        boot_options: Options::new(),
    }
}

/// What the client called a device that this program made, or what its place says.
fn device_id(told: &Value, fields: &[&str], kind: &str, at: usize) -> String {
    let ids = fields.iter().map(|field| text(told, field));
    ids.into_iter().find(|id| is_name(id)).unwrap_or_else(|| format!("{kind}{at}"))
}

fn storage(at: usize, told: &Value, untold: &mut Vec<String>) -> StorageDevice {
    let mut options = Options::new();
    match text(told, "image_type").as_str() {
        "Qcow2" => {
            options.insert("format".to_owned(), "qcow2".to_owned());
        }
        "Raw" | "" | "Unknown" => {}
        other => untold.push(format!("a disk in the format {other}")),
    }
    for (key, field) in [("direct_io", "direct"), ("backing_files", "backing_files")] {
        if flag(told, field) {
            options.insert(key.to_owned(), "true".to_owned());
        }
    }
    let known = ["id", "serial", "path", "readonly", "direct", "image_type", "backing_files", "pci_segment"];
    let defaults = [
        ("num_queues", json!(1)),
        ("queue_size", json!(128)),
        ("sparse", json!(true)),
        ("lock_granularity", json!("ByteRange")),
    ];
    others(told, &known, &defaults, untold, "disk");
    StorageDevice {
        id: device_id(told, &["serial", "id"], "disk", at),
        path: text(told, "path"),
        read_only: flag(told, "readonly"),
        is_root_device: false,
        interface_type: String::new(),
        options,
    }
}

fn interface(at: usize, told: &Value, untold: &mut Vec<String>) -> NetworkInterface {
    let known = ["id", "tap", "mac", "pci_segment", "host_mac"];
    let defaults = [
        ("ip", json!("192.168.249.1")),
        ("mask", json!("255.255.255.0")),
        ("num_queues", json!(2)),
        ("queue_size", json!(256)),
        ("vhost_mode", json!("Client")),
        ("offload_tso", json!(true)),
        ("offload_ufo", json!(true)),
        ("offload_csum", json!(true)),
    ];
    others(told, &known, &defaults, untold, "net");
    NetworkInterface {
        id: device_id(told, &["id"], "net", at),
        mac_address: text(told, "mac"),
        tap_device: text(told, "tap"),
        interface_type: String::new(),
        options: Options::new(),
    }
}

fn console(told: &Value) -> ConsoleConfig {
    let enabled = !matches!(text(told, "mode").as_str(), "" | "Off" | "Null");
    ConsoleConfig {
        enabled,
        output: if enabled { text(told, "file") } else { String::new() },
        ..ConsoleConfig::default()
    }
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    fn spec(text: &str) -> VmSpec {
        VmSpec::parse(&serde_json::from_str(text).unwrap()).unwrap()
    }

    fn large() -> VmSpec {
        spec(
            r#"{"cpu": {"vcpu_count": 2, "max_vcpu_count": 4, "topology": {"sockets": 2, "cores_per_socket": 1, "threads_per_core": 2}},
                "memory": {"size_bytes": 134217728, "hotplug_enabled": true, "max_size_bytes": 268435456, "backing": {"shared": "true"}},
                "boot": {"kernel_path": "/k", "initrd_path": "/i", "kernel_args": "quiet"},
                "storage": [{"id": "data", "path": "/d", "read_only": true, "options": {"format": "qcow2", "direct_io": "true"}}],
                "network": [{"id": "n", "mac_address": "02:00:00:00:00:01", "tap_device": "tap0"}]}"#,
        )
    }

    fn uid() -> VmUid {
        "0190a000-0000-7000-8000-000000000001".parse().unwrap()
    }

    fn held(native: Value) -> Holding {
        holding(VmPhase::AtRest, native)
    }

    #[test]
    fn what_was_made_is_told_again() {
        let spec = large();
        let native = serde_json::to_value(Config::of(&spec, &["tap0".to_owned()])).unwrap();
        let (told, untold) = configuration(&native);
        assert_eq!(untold, [""; 0]);
        let back = VmSpec::parse(&told).unwrap();
        assert_eq!((&back.cpu, &back.memory, &back.boot), (&spec.cpu, &spec.memory, &spec.boot));
        assert_eq!(
            (&back.disks, back.nics[0].mac, &back.nics[0].tap),
            (&spec.disks, spec.nics[0].mac, &spec.nics[0].tap)
        );
    }

    #[test]
    fn what_cannot_be_said_is_named() {
        let native = json!({
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": true},
            "memory": {"size": 0, "zones": [{"id": "a", "size": 67108864}, {"id": "b", "size": 67108864}]},
            "payload": {"firmware": "/fw"},
            "disks": [{"path": null, "vhost_user": true, "vhost_socket": "/s"}],
            "rng": {"src": "/dev/random"},
            "vsock": {"cid": 3, "socket": "/v"},
            "watchdog": true,
        });
        let (told, untold) = configuration(&native);
        assert_eq!(told.memory.unwrap().size_bytes, 128 << 20);
        for named in [
            "cpus kvm_hyperv",
            "memory zones",
            "payload firmware",
            "disk vhost_user",
            "rng",
            "vsock",
            "watchdog",
        ] {
            assert!(untold.iter().any(|text| text == named), "{named} is not in {untold:?}");
        }
    }

    #[test]
    fn our_own_is_told_from_another_vm() {
        let kind = CloudHypervisor::new();
        let (spec, console) = (large(), Path::new("/run/x/console.boot"));
        let config = Config::of(&spec, &["tap0".to_owned()]).with_console_in(console);
        let mut native = serde_json::to_value(config).unwrap();
        native["rng"] = json!({"src": "/dev/urandom"});
        assert!(kind.is_made_of(&held(native.clone()), uid(), &spec, Some(console)));
        assert!(!kind.is_made_of(&held(native.clone()), uid(), &spec, None), "its console goes elsewhere");
        for (pointer, other) in [
            ("/payload/kernel", json!("/other")),
            ("/disks/0/path", json!("/other")),
            ("/net", json!([])),
            ("/cpus/boot_vcpus", json!(1)),
        ] {
            let mut changed = native.clone();
            *changed.pointer_mut(pointer).unwrap() = other;
            assert!(!kind.is_made_of(&held(changed), uid(), &spec, Some(console)), "{pointer}");
        }
    }

    #[test]
    fn whatever_a_vmm_says_is_no_panic() {
        for odd in
            [json!(null), json!([]), json!({"disks": 5, "cpus": [], "memory": {"size": -1}}), json!("x")]
        {
            let (told, _) = configuration(&odd);
            let _ = VmSpec::imported(&told);
        }
    }
}
