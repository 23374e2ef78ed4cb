//! The daemon's own process, by the names that every Prometheus client library uses, and its log.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use vmm_host::{descriptors, process};

use crate::telemetry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
    commit: &'static str,
}

/// Reads the use of the host by this process.
#[derive(Debug)]
pub(super) struct ProcessCollector {
    /// The start of the process, in Unix seconds.
    started: f64,
}

impl ProcessCollector {
    /// Makes the collector. The caller is at the start of the process.
    pub(super) fn of_this_process() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        Self { started }
    }
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut metric = encoder.encode_descriptor(
            "vmcp_build_info",
            "1, with the version and the commit of the daemon as labels",
            None,
            MetricType::Gauge,
        )?;
        let labels = BuildLabels { version: crate::VERSION, commit: crate::COMMIT };
        ConstGauge::new(1_u64).encode(metric.encode_family(&labels)?)?;
        counter(
            &mut encoder,
            "vmcp_log_lines_dropped",
            "Log lines that were dropped, because stderr did not take them in time",
            telemetry::dropped_lines() as f64,
        )?;
        if let Ok(usage) = process::usage(std::process::id()) {
            let cpu = usage.cpu_time.as_secs_f64();
            counter(&mut encoder, "process_cpu_seconds", "CPU time of the daemon", cpu)?;
            let memory = usage.resident_bytes as f64;
            gauge(&mut encoder, "process_resident_memory_bytes", "Resident memory of the daemon", memory)?;
        }
        if let Ok(open) = descriptors::in_use("self") {
            gauge(&mut encoder, "process_open_fds", "Open file descriptors of the daemon", open as f64)?;
        }
        let limit = descriptors::limit() as f64;
        gauge(&mut encoder, "process_max_fds", "Largest number of open file descriptors", limit)?;
        let help = "Start of the daemon in Unix seconds";
        gauge(&mut encoder, "process_start_time_seconds", help, self.started)
    }
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    ConstCounter::new(value).encode(metric)
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value).encode(metric)
}
