//! The VMs, read from the index of the service at each scrape.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use vmm_core::id::BackendName;
use vmm_core::state::{Phase, VmState};
use vmm_service::{ListQuery, VmService, VmView};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
    backend: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BackendLabel {
    backend: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VmLabels {
    vm_id: String,
    uid: String,
    backend: String,
}

/// Reads the VMs of a service.
pub(super) struct VmCollector {
    service: VmService,
    /// True if each VM that is RUNNING or PAUSED has samples of its own.
    with_each_vm: bool,
}

/// The samples of one measurement of each VM.
struct VmMeasurement {
    name: &'static str,
    help: &'static str,
    read: fn(&VmView) -> Option<Value>,
}

enum Value {
    Counter(f64),
    Gauge(f64),
}

const EACH_VM: [VmMeasurement; 12] = [
    VmMeasurement {
        name: "vmcp_vm_running",
        help: "1 for a VM that is RUNNING, 0 for a VM that is PAUSED",
        read: |vm| Some(Value::Gauge(if vm.record.state == VmState::Running { 1.0 } else { 0.0 })),
    },
    VmMeasurement {
        name: "vmcp_vm_restarts",
        help: "Restarts since the VM last ran quietly for a minute",
        read: |vm| Some(Value::Gauge(f64::from(vm.record.status.restarts))),
    },
    VmMeasurement {
        name: "vmcp_vm_cpu_seconds",
        help: "CPU time of the vCPUs, or of the VMM's process where only that is known, since the run began",
        read: |vm| vm.metrics?.cpu_time.map(|time| Value::Counter(time.as_secs_f64())),
    },
    VmMeasurement {
        name: "vmcp_vm_memory_rss_bytes",
        help: "Resident memory of the VMM's process",
        read: |vm| vm.metrics?.memory_bytes.map(|bytes| Value::Gauge(bytes as f64)),
    },
    VmMeasurement {
        name: "vmcp_vm_network_receive_bytes",
        help: "Bytes that the guest received since the run began",
        read: |vm| vm.metrics?.network.map(|it| counter(it.bytes_received)),
    },
    VmMeasurement {
        name: "vmcp_vm_network_transmit_bytes",
        help: "Bytes that the guest sent since the run began",
        read: |vm| vm.metrics?.network.map(|it| counter(it.bytes_transmitted)),
    },
    VmMeasurement {
        name: "vmcp_vm_network_receive_packets",
        help: "Packets that the guest received since the run began",
        read: |vm| vm.metrics?.network.map(|it| counter(it.packets_received)),
    },
    VmMeasurement {
        name: "vmcp_vm_network_transmit_packets",
        help: "Packets that the guest sent since the run began",
        read: |vm| vm.metrics?.network.map(|it| counter(it.packets_transmitted)),
    },
    VmMeasurement {
        name: "vmcp_vm_disk_read_bytes",
        help: "Bytes that the guest read since the run began",
        read: |vm| vm.metrics?.storage.map(|it| counter(it.bytes_read)),
    },
    VmMeasurement {
        name: "vmcp_vm_disk_written_bytes",
        help: "Bytes that the guest wrote since the run began",
        read: |vm| vm.metrics?.storage.map(|it| counter(it.bytes_written)),
    },
    VmMeasurement {
        name: "vmcp_vm_disk_reads",
        help: "Read requests of the guest since the run began",
        read: |vm| vm.metrics?.storage.map(|it| counter(it.read_operations)),
    },
    VmMeasurement {
        name: "vmcp_vm_disk_writes",
        help: "Write requests of the guest since the run began",
        read: |vm| vm.metrics?.storage.map(|it| counter(it.write_operations)),
    },
];

fn counter(count: u64) -> Value {
    Value::Counter(count as f64)
}

impl VmCollector {
    pub(super) fn new(service: VmService, with_each_vm: bool) -> Self {
        Self { service, with_each_vm }
    }

    fn backends(&self) -> Vec<BackendName> {
        self.service
            .backends()
            .statuses()
            .into_iter()
            .map(|status| status.capabilities.name.clone())
            .collect()
    }

    /// Returns the number of VMs of a backend in a state, which the index keeps.
    fn count(&self, state: VmState, backend: &BackendName) -> u64 {
        let query = ListQuery {
            states: vec![state],
            backend: backend.to_string(),
            page_size: 1,
            ..ListQuery::default()
        };
        self.service.list(&query).map_or(0, |page| page.total_count as u64)
    }

    fn encode_counts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "VMs on record, by state and backend";
        let mut metric = encoder.encode_descriptor("vmcp_vms", help, None, MetricType::Gauge)?;
        for backend in self.backends() {
            for state in VmState::ALL {
                let labels = StateLabels { state: state.name(), backend: backend.to_string() };
                ConstGauge::new(self.count(state, &backend)).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_unreachable(&self, live: &[VmView], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut counts: BTreeMap<_, u64> =
            self.backends().into_iter().map(|name| (name.to_string(), 0)).collect();
        for vm in live.iter().filter(|vm| vm.record.status.phase == Phase::Unreachable) {
            *counts.entry(vm.record.backend.to_string()).or_default() += 1;
        }
        let help = "VMs whose VMM does not answer, by backend";
        let mut metric = encoder.encode_descriptor("vmcp_unreachable_vms", help, None, MetricType::Gauge)?;
        for (backend, count) in counts {
            ConstGauge::new(count).encode(metric.encode_family(&BackendLabel { backend })?)?;
        }
        Ok(())
    }

    fn encode_backends(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "1 if the hypervisor can start VMs now, otherwise 0";
        let mut metric =
            encoder.encode_descriptor("vmcp_backend_available", help, None, MetricType::Gauge)?;
        for status in self.service.backends().statuses() {
            let backend = BackendLabel { backend: status.capabilities.name.to_string() };
            let available = u64::from(status.health.version.is_ok());
            ConstGauge::new(available).encode(metric.encode_family(&backend)?)?;
        }
        Ok(())
    }
}

fn encode_each(live: &[VmView], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    for VmMeasurement { name, help, read } in &EACH_VM {
        let mut samples = live.iter().filter_map(|vm| Some((vm, read(vm)?))).peekable();
        let kind = match samples.peek() {
            Some((_, Value::Counter(_))) => MetricType::Counter,
            Some((_, Value::Gauge(_))) => MetricType::Gauge,
            None => continue,
        };
        let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
        for (vm, value) in samples {
            let labels = labels(vm);
            let metric = metric.encode_family(&labels)?;
            match value {
                Value::Counter(value) => ConstCounter::new(value).encode(metric)?,
                Value::Gauge(value) => ConstGauge::new(value).encode(metric)?,
            }
        }
    }
    Ok(())
}

fn labels(vm: &VmView) -> VmLabels {
    VmLabels {
        vm_id: vm.record.vm_id.to_string(),
        uid: vm.record.uid.to_string(),
        backend: vm.record.backend.to_string(),
    }
}

impl Collector for VmCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let live = self.service.live();
        self.encode_counts(&mut encoder)?;
        self.encode_unreachable(&live, &mut encoder)?;
        self.encode_backends(&mut encoder)?;
        if self.with_each_vm { encode_each(&live, &mut encoder) } else { Ok(()) }
    }
}

impl fmt::Debug for VmCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmCollector").field("with_each_vm", &self.with_each_vm).finish_non_exhaustive()
    }
}
