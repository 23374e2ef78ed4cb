//! The columns of real hypervisors, and how each tells what it was configured with.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use vmm_backends::cloud_hypervisor::CloudHypervisorBackend;
use vmm_backends::firecracker::FirecrackerBackend;
use vmm_backends::libvirt::{LibvirtBackend, LibvirtOptions};
use vmm_backends::qemu::{KvmMode, QemuBackend, QemuOptions};
use vmm_core::backend::Backend;
use vmm_core::config::VmConfig;
use vmm_core::store::VmRecord;
use vmm_testkit::backend_suite::{Column, FakeColumn, LinuxGuest, ObeyingGuest};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::libvirtd::{self, Libvirtd};

pub(crate) fn fake() -> Arc<dyn Column> {
    Arc::new(FakeColumn::new())
}

pub(crate) fn qemu_q35() -> Arc<dyn Column> {
    Arc::new(Qemu { machine: "q35" })
}

pub(crate) fn qemu_microvm() -> Arc<dyn Column> {
    Arc::new(Qemu { machine: "microvm" })
}

pub(crate) fn cloud_hypervisor() -> Arc<dyn Column> {
    Arc::new(CloudHypervisorColumn)
}

pub(crate) fn firecracker() -> Arc<dyn Column> {
    Arc::new(FirecrackerColumn)
}

pub(crate) fn libvirt_qemu() -> Arc<dyn Column> {
    Arc::new(LibvirtColumn { libvirtd: OnceLock::new() })
}

/// QEMU in software emulation, which every machine has.
struct Qemu {
    machine: &'static str,
}

#[async_trait]
impl Column for Qemu {
    fn name(&self) -> &'static str {
        if self.machine == "q35" { "qemu-q35" } else { "qemu-microvm" }
    }

    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(QemuBackend::new(QemuOptions { kvm: KvmMode::Off, ..QemuOptions::default() }))
    }

    fn shape(&self, config: &mut VmConfig) {
        let boot = config.boot.get_or_insert_default();
        boot.boot_options.insert("qemu.machine".to_owned(), self.machine.to_owned());
    }

    fn obeying(&self) -> ObeyingGuest {
        // microvm's power button is not where the tiny guest looks for it.
        if self.machine == "q35" { ObeyingGuest::Tiny(TinyGuest::Button) } else { ObeyingGuest::Linux }
    }

    fn linux(&self) -> Result<LinuxGuest, String> {
        let frequency = if self.machine == "microvm" { clock_argument()? } else { String::new() };
        linux(&frequency)
    }

    async fn view(&self, record: &VmRecord) -> String {
        let pid = record.run.as_ref().map_or(0, |run| run.process.pid);
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ")
    }

    fn evidence(&self, case: &str) -> &'static [&'static str] {
        match case {
            "vcpu_count" => &["-smp cpus=2,maxcpus=2"],
            "max_vcpu_count" => &["cpus=1,maxcpus=2"],
            "topology_threads" => &["sockets=1,cores=1,threads=2"],
            "topology_sockets" => &["sockets=2,cores=1,threads=1"],
            "memory_size" | "memory_updated" => &["-m size=96M"],
            "memory_hotplug" => &["maxmem=192M"],
            "memory_shared" => &["\"share\":true"],
            "memory_hugepages" => &["\"hugetlb\":true"],
            "initrd" => &["-initrd {dir}/initrd.img"],
            "kernel_args" => &["-append console=ttyS0 reboot=k note=\"a,b\" -- one"],
            "several_disks" => &["{dir}/a.raw", "{dir}/b.raw", "{dir}/c.raw"],
            "root_device" => &["root=/dev/vda rw", "{dir}/root.raw…{dir}/data.raw"],
            "qcow2_disk" => &["\"driver\":\"qcow2\"", "\"backing\":null"],
            "read_only_disk" => &["\"read-only\":true", "\"read-only\":false"],
            "disk_rate_limits" => &["\"bps-total\":1000000", "\"iops-total\":200"],
            "cache_unsafe" => &["\"no-flush\":true"],
            "direct_io" => &["\"direct\":true"],
            "nics_on_taps" => &["\"mac\":\"02:00:00:00:05:01\"", "\"mac\":\"02:00:00:00:05:02\""],
            "console_off" => &["-serial none"],
            _ => &[],
        }
    }
}

struct CloudHypervisorColumn;

#[async_trait]
impl Column for CloudHypervisorColumn {
    fn name(&self) -> &'static str {
        "cloudhypervisor"
    }

    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(CloudHypervisorBackend::new("cloud-hypervisor"))
    }

    fn obeying(&self) -> ObeyingGuest {
        ObeyingGuest::Linux
    }

    fn linux(&self) -> Result<LinuxGuest, String> {
        fast_kvm()?;
        linux("")
    }

    async fn view(&self, record: &VmRecord) -> String {
        get(record, "/api/v1/vm.info").await
    }

    fn evidence(&self, case: &str) -> &'static [&'static str] {
        match case {
            "vcpu_count" => &["\"boot_vcpus\":2,\"max_vcpus\":2"],
            "max_vcpu_count" => &["\"boot_vcpus\":1,\"max_vcpus\":2"],
            "topology_threads" => &["\"threads_per_core\":2", "\"packages\":1"],
            "topology_sockets" => &["\"threads_per_core\":1", "\"packages\":2"],
            "memory_size" | "memory_updated" => &["\"size\":100663296"],
            "memory_hotplug" => &["\"hotplug_size\":134217728"],
            "memory_shared" => &["\"shared\":true"],
            "memory_hugepages" => &["\"hugepages\":true"],
            "initrd" => &["\"initramfs\":\"{dir}/initrd.img\""],
            "kernel_args" => &["console=ttyS0 reboot=k note=\\\"a,b\\\" -- one"],
            "several_disks" => &["{dir}/a.raw", "{dir}/b.raw", "{dir}/c.raw"],
            "root_device" => &["root=/dev/vda rw", "{dir}/root.raw…{dir}/data.raw"],
            "qcow2_disk" => &["{dir}/a.qcow2"],
            "read_only_disk" => &["\"readonly\":true", "\"readonly\":false"],
            "disk_rate_limits" => &["\"bandwidth\":{\"size\":1000000", "\"ops\":{\"size\":200"],
            "direct_io" => &["\"direct\":true"],
            "nics_on_taps" => &["\"mac\":\"02:00:00:00:05:01\"", "\"mac\":\"02:00:00:00:05:02\""],
            "nic_rate_limits" => &["\"bandwidth\":{\"size\":1000000", "\"ops\":{\"size\":200"],
            "console_off" => &["\"mode\":\"Off\""],
            _ => &[],
        }
    }
}

struct FirecrackerColumn;

#[async_trait]
impl Column for FirecrackerColumn {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(FirecrackerBackend::new("firecracker"))
    }

    fn obeying(&self) -> ObeyingGuest {
        ObeyingGuest::Tiny(TinyGuest::Obey)
    }

    fn linux(&self) -> Result<LinuxGuest, String> {
        Err("the guest's kernel is a bzImage, which Firecracker does not boot".to_owned())
    }

    async fn view(&self, record: &VmRecord) -> String {
        get(record, "/vm/config").await
    }

    fn evidence(&self, case: &str) -> &'static [&'static str] {
        match case {
            "vcpu_count" => &["\"vcpu_count\":2"],
            "topology_threads" => &["\"vcpu_count\":2", "\"smt\":true"],
            "memory_size" | "memory_updated" => &["\"mem_size_mib\":96"],
            "memory_hugepages" => &["\"huge_pages\":\"2M\""],
            "initrd" => &["\"initrd_path\":\"{dir}/initrd.img\""],
            "kernel_args" => &["console=ttyS0 reboot=k note=\\\"a,b\\\" -- one"],
            "several_disks" => &["{dir}/a.raw", "{dir}/b.raw", "{dir}/c.raw"],
            // It lists its drives in no order; the first one that it was given is the guest's first.
            "root_device" => &[
                "root=/dev/vda rw",
                "\"drive_id\":\"disk0\",\"partuuid\":null,\"is_root_device\":false,\"cache_type\":\"Writeback\",\"is_read_only\":false,\"path_on_host\":\"{dir}/root.raw\"",
            ],
            "read_only_disk" => &["\"is_read_only\":true", "\"is_read_only\":false"],
            "disk_rate_limits" => &["\"bandwidth\":{\"size\":1000000", "\"ops\":{\"size\":200"],
            "cache_unsafe" => &["\"cache_type\":\"Unsafe\""],
            "nics_on_taps" => &["02:00:00:00:05:01", "02:00:00:00:05:02"],
            "nic_rate_limits" => {
                &["\"rx_rate_limiter\":{\"bandwidth\":{\"size\":1000000", "\"ops\":{\"size\":200"]
            }
            _ => &[],
        }
    }
}

/// The same QEMU through a libvirtd of the case's own.
struct LibvirtColumn {
    libvirtd: OnceLock<Result<Libvirtd, String>>,
}

impl LibvirtColumn {
    fn libvirtd(&self) -> Option<&Libvirtd> {
        self.libvirtd.get().and_then(|started| started.as_ref().ok())
    }
}

#[async_trait]
impl Column for LibvirtColumn {
    fn name(&self) -> &'static str {
        "libvirt-qemu"
    }

    fn backend(&self) -> Arc<dyn Backend> {
        let helper = libvirtd::helper();
        let started = self.libvirtd.get_or_init(|| match &helper {
            Ok(_) => Libvirtd::start(),
            Err(why) => Err(why.clone()),
        });
        let uri = match started {
            Ok(libvirtd) => libvirtd.uri(),
            // Which its `ping` will tell.
            Err(why) => format!("qemu+unix:///system?socket=/nowhere/{why}"),
        };
        Arc::new(LibvirtBackend::new(LibvirtOptions {
            helper: helper.unwrap_or_else(|_| "vmm-libvirt-helper".into()),
            kvm: KvmMode::Off,
            ..LibvirtOptions::new(uri)
        }))
    }

    fn obeying(&self) -> ObeyingGuest {
        ObeyingGuest::Tiny(TinyGuest::Button)
    }

    fn linux(&self) -> Result<LinuxGuest, String> {
        linux("")
    }

    async fn view(&self, record: &VmRecord) -> String {
        let pid = record.run.as_ref().map_or(0, |run| run.process.pid);
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let libvirtd = self.libvirtd().expect("libvirtd runs");
        // Limits are set after the start, and TAPs handed over: only libvirt tells of them.
        format!("{line} {}", libvirtd.virsh(&["dumpxml", &record.uid.to_string()]))
    }

    fn evidence(&self, case: &str) -> &'static [&'static str] {
        match case {
            "vcpu_count" => &["-smp 2,"],
            "max_vcpu_count" => &["-smp 1,maxcpus=2"],
            "topology_threads" => &["sockets=1,dies=1,cores=1,threads=2"],
            "topology_sockets" => &["sockets=2,dies=1,cores=1,threads=1"],
            "memory_size" | "memory_updated" => &["\"size\":100663296"],
            "memory_hotplug" => &["maxmem=196608k"],
            "memory_shared" => &["\"share\":true"],
            "memory_hugepages" => &["\"hugetlb\":true"],
            "initrd" => &["-initrd {dir}/initrd.img"],
            "kernel_args" => &["-append console=ttyS0 reboot=k note=\"a,b\" -- one"],
            "several_disks" => &["{dir}/a.raw", "{dir}/b.raw", "{dir}/c.raw"],
            "root_device" => &["root=/dev/vda rw", "{dir}/root.raw…{dir}/data.raw"],
            "qcow2_disk" => &["\"driver\":\"qcow2\""],
            "read_only_disk" => &["\"read-only\":true", "\"read-only\":false"],
            "disk_rate_limits" => {
                &["<total_bytes_sec>1000000</total_bytes_sec>", "<total_iops_sec>200</total_iops_sec>"]
            }
            "cache_unsafe" => &["\"no-flush\":true"],
            "direct_io" => &["\"direct\":true"],
            "nics_on_taps" => &["\"mac\":\"02:00:00:00:05:01\"", "\"mac\":\"02:00:00:00:05:02\""],
            _ => &[],
        }
    }

    /// libvirt's QEMUs name no folder of the daemon's.
    fn processes(&self, _runtime_dir: &Path) -> Vec<String> {
        let qemus = self.libvirtd().map(Libvirtd::qemus).unwrap_or_default();
        qemus.iter().map(|pid| format!("{pid} qemu")).collect()
    }

    fn kill_all(&self, _runtime_dir: &Path) {
        if let Some(libvirtd) = self.libvirtd() {
            libvirtd.kill_qemus();
        }
    }
}

/// Gets a page from the VMM's own socket, as whoever looks into a problem by hand does.
async fn get(record: &VmRecord, page: &str) -> String {
    let socket = &record.run.as_ref().expect("the VM runs").socket;
    let mut stream = UnixStream::connect(socket).await.expect("the VMM listens");
    let request = format!("GET {page} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    loop {
        let mut bytes = [0; 8192];
        let count = stream.read(&mut bytes).await.unwrap();
        answer.extend_from_slice(&bytes[..count]);
        let text = String::from_utf8_lossy(&answer);
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            assert_ne!(count, 0, "the answer to {page} ends early: {text}");
            continue;
        };
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok()
        });
        if count == 0 || length.is_some_and(|length| body.len() >= length) {
            return body.to_owned();
        }
    }
}

/// The guest that `make setup` makes.
fn linux(more: &str) -> Result<LinuxGuest, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest");
    let file = |name: &str| {
        folder.join(name).canonicalize().map_err(|_| format!("no {name}; `make setup` makes it"))
    };
    let args = format!("console=ttyS0 cryptomgr.notests no_timer_check {more}").trim_end().to_owned();
    Ok(LinuxGuest { kernel: file("vmlinuz")?, initrd: file("initramfs.cpio.gz")?, args })
}

/// What an emulated microvm needs to be told, because it has no clock to measure its CPU by.
fn clock_argument() -> Result<String, String> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").map_err(|error| error.to_string())?;
    let mhz = cpus
        .lines()
        .find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
    mhz.map(|mhz| format!("tsc_early_khz={:.0}", mhz * 1000.0))
        .ok_or_else(|| "the host's clock is unknown".to_owned())
}

/// A KVM in software runs an unmodified Linux far too slowly.
fn fast_kvm() -> Result<(), String> {
    if vmm_host::kvm::hardware_virtualisation() {
        return Ok(());
    }
    Err("this host's KVM is one in software, which runs Linux too slowly".to_owned())
}
