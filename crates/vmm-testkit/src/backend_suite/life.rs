//! The client's view of a running guest: metrics, and the machine that Linux finds.

use vmm_core::config::{CpuConfig, NetworkInterface, StorageDevice};

use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM, eventually};
use super::tap::TestTap;
use crate::guests::TinyGuest;

/// Samples follow one another, stay within their bounds, and end with the run.
pub(super) async fn metrics_move(vms: DaemonLife) -> CaseVerdict {
    vms.run_tiny(TinyGuest::Echo).await;
    let sample = || vms.get(VM).expect("the VM exists").metrics;
    let what = || format!("a busy guest uses CPU and memory: {:?}", sample());
    let busy = || {
        sample().is_some_and(|sample| sample.cpu_usage_percent > 0.0 && sample.memory_bytes > Some(1 << 20))
    };
    eventually(what, busy).await;
    let first = sample().expect("there is one");
    assert!(first.cpu_usage_percent <= 100.0, "{first:?}");
    let later = || sample().is_some_and(|sample| sample.observed_ms > first.observed_ms);
    eventually(|| "another sample comes".to_owned(), later).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    let paused = sample().map(|sample| sample.observed_ms);
    let sampled = || sample().map(|sample| sample.observed_ms) > paused;
    eventually(|| "a paused VM is sampled too".to_owned(), sampled).await;
    vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
    assert_eq!(sample(), None, "what does not run has no metrics");
    CaseVerdict::Served
}

/// A real kernel finds the requested machine, and its counters move.
pub(super) async fn linux_sees_its_machine(vms: DaemonLife) -> CaseVerdict {
    let (linux, tap) = match (vms.column().linux(), TestTap::new()) {
        (Ok(linux), Ok(tap)) => (linux, tap),
        (Err(why), _) | (_, Err(why)) => return CaseVerdict::NotRun(why),
    };
    let mut config = vms.linux_config(&linux, "vmcp.do=writedisk,readdisk,idle");
    config.cpu = Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() });
    config.storage = disks(&vms);
    config.network = vec![NetworkInterface {
        tap_device: tap.name().to_owned(),
        mac_address: "02:00:00:00:05:07".to_owned(),
        ..NetworkInterface::default()
    }];
    vms.run(VM, config).await;
    let console = vms.console_shows(VM, "vmcp-guest: read vda", 1).await;
    for line in [
        "vcpus=2 mem_kib=2",
        "vmcp-guest: disk vda 2097152 ro=0 root=1",
        "vmcp-guest: disk vdb 1048576 ro=1 root=0",
        "vmcp-guest: net eth0 mac=02:00:00:00:05:07",
    ] {
        assert!(console.contains(line), "{line} is not in {console}");
    }
    let counters = || vms.get(VM).expect("the VM exists").metrics.and_then(|sample| sample.storage);
    let moved = || {
        counters().is_some_and(|disk| {
            disk.bytes_read > 0
                && disk.bytes_written > 0
                && disk.read_operations > 0
                && disk.write_operations > 0
        })
    };
    eventually(|| format!("the disks' counters move: {:?}", counters()), moved).await;
    vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
    let written = std::fs::read(vms.rig.dir().join("root.raw")).expect("the disk is there");
    assert!(written.windows(10).any(|bytes| bytes == b"vmcp-guest"), "what the guest wrote is on the disk");
    CaseVerdict::Served
}

fn disks(vms: &DaemonLife) -> Vec<StorageDevice> {
    let disk = |name: &str, mib: u64| {
        let path = vms.rig.dir().join(name);
        let file = std::fs::File::create(&path).expect("the disk can be made");
        file.set_len(mib << 20).expect("the disk can be made");
        StorageDevice { path: path.display().to_string(), ..StorageDevice::default() }
    };
    // The root device is second in the list, because the guest must find it first all the same.
    vec![
        StorageDevice { read_only: true, ..disk("data.raw", 1) },
        StorageDevice { is_root_device: true, ..disk("root.raw", 2) },
    ]
}
