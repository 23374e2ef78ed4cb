//! The QEMU backend with a real Linux in it: what the guest sees of its devices, and what the counters see of the guest.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

mod qemu_support;

use std::time::Duration;

use qemu_support::{Bench, GUEST_REBOOT, Tap, ask_for, linux, make_image, qemu, skipped};
use vmm_core::backend::{ExitCause, VmmEvent};
use vmm_core::config::{NetworkInterface, StorageDevice};
use vmm_core::state::EndedBy;
use vmm_testkit::guests::TinyGuest;

#[tokio::test]
async fn linux_finds_its_disks_and_its_writes_are_counted() {
    let test = "linux_finds_its_disks_and_its_writes_are_counted";
    let Some(files) = linux(test) else { return };
    let Some(backend) = qemu(test).await else { return };
    let mut bench = Bench::new(backend, "q35", TinyGuest::Idle, GUEST_REBOOT)
        .with_linux(&files, "vmcp.do=writedisk,readdisk,idle");
    for (name, size, format, read_only, root) in [
        ("data,1", 8, "raw", true, false),
        ("root", 16, "qcow2", false, true),
        ("more", 24, "raw", false, false),
    ] {
        let path = bench.dir().join(name);
        make_image(&path, format, size << 20);
        let mut options = vmm_core::config::Options::from([("format".to_owned(), format.to_owned())]);
        if name == "more" {
            options.insert("rate_limit.bytes_per_second".to_owned(), "10000000".to_owned());
            options.insert("cache".to_owned(), "unsafe".to_owned());
        }
        bench.add_disk(StorageDevice {
            id: format!("id-{}", &name[..4]),
            path: path.to_str().unwrap().to_owned(),
            read_only,
            is_root_device: root,
            options,
            ..StorageDevice::default()
        });
    }
    let mut run = bench.launch().await;
    bench.console_shows("vmcp-guest: ready", 1).await;
    for line in [
        "vmcp-guest: disk vda 16777216 ro=0 root=1",
        "vmcp-guest: disk vdb 8388608 ro=1 root=0",
        "vmcp-guest: disk vdc 25165824 ro=0 root=0",
    ] {
        bench.console_shows(line, 1).await;
    }
    bench.console_shows("vmcp-guest: wrote vda", 1).await;
    bench.console_shows("vmcp-guest: read vda", 1).await;
    let sample = run.vmm.sample().await;
    let storage = sample.storage.unwrap();
    assert!(storage.bytes_read >= 4096 && storage.read_operations > 0, "{sample:?}");
    assert!(storage.bytes_written > 0 && storage.write_operations > 0, "{sample:?}");
    assert!(sample.cpu_time.unwrap() > Duration::ZERO);
    assert_eq!(run.vmm.shutdown(ask_for(60)).await.unwrap(), EndedBy::Acpi);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn linux_obeys_the_power_button_of_microvm() {
    let test = "linux_obeys_the_power_button_of_microvm";
    let Some(files) = linux(test) else { return };
    let Some(backend) = qemu(test).await else { return };
    let mhz = std::fs::read_to_string("/proc/cpuinfo")
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok())
        .unwrap();
    let mut bench = Bench::new(backend, "microvm", TinyGuest::Idle, GUEST_REBOOT)
        .with_linux(&files, &format!("tsc_early_khz={:.0}", mhz * 1000.0));
    for (name, size) in [("a", 8), ("b", 16)] {
        let path = bench.dir().join(name);
        make_image(&path, "raw", size << 20);
        bench.add_disk(StorageDevice {
            id: name.to_owned(),
            path: path.to_str().unwrap().to_owned(),
            ..StorageDevice::default()
        });
    }
    let mut run = bench.launch().await;
    bench.console_shows("vmcp-guest: disk vda 8388608", 1).await;
    bench.console_shows("vmcp-guest: disk vdb 16777216", 1).await;
    bench.console_shows("vmcp-guest: ready", 1).await;
    assert_eq!(run.vmm.shutdown(ask_for(60)).await.unwrap(), EndedBy::Acpi);
    assert_eq!(run.gone().await.cause, ExitCause::Requested);
}

#[tokio::test]
async fn network_counters_count_from_the_guests_side() {
    let test = "network_counters_count_from_the_guests_side";
    let Some(files) = linux(test) else { return };
    let Some(backend) = qemu(test).await else { return };
    let Some(tap) = Tap::new("vmtest").filter(Tap::set_up) else {
        return skipped(test, "no TAP can be made here (needs CAP_NET_ADMIN and the program ip)");
    };
    let mut bench = Bench::new(backend, "q35", TinyGuest::Idle, GUEST_REBOOT)
        .with_linux(&files, "vmcp.ip=192.0.2.2/24 vmcp.peer=192.0.2.1 vmcp.do=ping,idle");
    bench.config.network.push(NetworkInterface {
        id: "n".to_owned(),
        mac_address: "02:00:00:00:12:34".to_owned(),
        ..NetworkInterface::default()
    });
    bench.taps = vec![tap.0.clone()];
    let run = bench.launch().await;
    bench.console_shows("vmcp-guest: net eth0 mac=02:00:00:00:12:34 ip=192.0.2.2/24", 1).await;
    bench.console_shows("vmcp-guest: ping 192.0.2.1", 1).await;
    let network = run.vmm.sample().await.network.unwrap();
    assert!(network.packets_transmitted > 0 && network.bytes_transmitted > 0, "{network:?}");
    run.vmm.kill().await.unwrap();
}

/// A kernel that panics stops there, unless it is told to reset itself: then it tells nobody else.
#[tokio::test]
async fn a_panic_of_linux_ends_the_run_or_resets_the_guest() {
    let test = "a_panic_of_linux_ends_the_run_or_resets_the_guest";
    let Some(files) = linux(test) else { return };
    let Some(backend) = qemu(test).await else { return };
    let bench = Bench::new(backend, "q35", TinyGuest::Idle, GUEST_REBOOT).with_linux(&files, "vmcp.do=panic");
    let mut run = bench.launch().await;
    bench.console_shows("vmcp-guest: panic", 1).await;
    let exit = run.gone().await;
    assert_eq!(exit.cause, ExitCause::GuestCrash, "{exit:?}");

    let Some(backend) = qemu(test).await else { return };
    let resetting = Bench::new(backend, "q35", TinyGuest::Idle, GUEST_REBOOT)
        .with_linux(&files, "panic=-1 vmcp.do=panic");
    let mut run = resetting.launch().await;
    assert_eq!(run.event().await, VmmEvent::GuestReset);
    resetting.console_shows("vmcp-guest: panic", 2).await;
    run.vmm.kill().await.unwrap();
}
