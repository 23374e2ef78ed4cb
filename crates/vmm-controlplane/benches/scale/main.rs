//! Measures the cost of the daemon with many VMs against its cost with few: a page of ListVms, the opening of a watch, memory
//! for each VM, a restart.
//!
//! `make bench` builds and runs it. `VMCP_BENCH_VMS` (100000) is the number of VMs that are defined, against 100;
//! `VMCP_BENCH_RUNNING` (200) of those that run, against 50. `VMCP_BENCH_DAEMON` names another daemon to measure.
//!
//! Only ratios and bytes mean something on a machine that does other work too. VMs are put into the database as copies of one that
//! was created through the API, because 100,000 calls of CreateVm would measure the disk.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::panic,
    clippy::print_stdout,
    reason = "a program that prints what it measured, and ends where it cannot"
)]

mod daemon;
mod fill;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::skip::on_path;

use daemon::{Daemon, Host};

/// The few VMs that the many are compared with.
const FEW: usize = 100;
/// The few VMs that run.
const FEW_RUNNING: usize = 50;
/// Calls of each kind.
const CALLS: usize = 100;
/// Watches that one client opens and does not read.
const UNREAD: usize = 200;

fn main() -> ExitCode {
    if daemon::is_fake_vmm() {
        return vmm_testkit::fake::qemu::main(std::env::args_os());
    }
    let many = number("VMCP_BENCH_VMS", 100_000);
    let running = number("VMCP_BENCH_RUNNING", 200);
    println!("\n{many} VMs defined against {FEW}; p50 of {CALLS} calls in milliseconds\n");
    defined(many);
    println!("\nMemory of the daemon for each running VM, {running} against {FEW_RUNNING}\n");
    println!("| VMM | kB for each VM |");
    println!("|---|---|");
    running_vms("fake", running);
    running_vms("firecracker", running);
    ExitCode::SUCCESS
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The measurements with one number of VMs that are defined.
struct Measured {
    times: Vec<(&'static str, Duration)>,
    start: Duration,
    /// The daemon's memory, in kB: now, and at most since it was started.
    resident: u64,
    peak: u64,
    /// The memory of the watches that nobody reads, in kB.
    unread: u64,
}

fn defined(many: usize) {
    let few = measure(FEW);
    let many_times = measure(many);
    println!("| what | with {FEW} | with {many} | ratio |");
    println!("|---|---|---|---|");
    for ((what, few), (_, many)) in few.times.iter().zip(&many_times.times) {
        let ratio = many.as_secs_f64() / few.as_secs_f64();
        println!("| {what} | {:.2} | {:.2} | {ratio:.1} |", ms(*few), ms(*many));
    }
    println!("| restart until it serves | {:.0} | {:.0} | |", ms(few.start), ms(many_times.start));
    println!("| memory, MB | {:.1} | {:.1} | |", mb(few.resident), mb(many_times.resident));
    println!("| peak of the restart, MB | {:.1} | {:.1} | |", mb(few.peak), mb(many_times.peak));
    println!(
        "| {UNREAD} watches that are not read, MB | {:.1} | {:.1} | |",
        mb(few.unread),
        mb(many_times.unread)
    );
    let each = many_times.resident.saturating_sub(few.resident) as f64 / (many - FEW) as f64;
    println!("\nEach VM that is defined takes {each:.1} kB of the daemon's memory.");
}

fn measure(vms: usize) -> Measured {
    let host = Host::new();
    let kernel = TinyGuest::Idle.write_to(host.path()).unwrap();
    let config = json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": 64 << 20},
        "boot": {"kernel_path": kernel, "kernel_args": "console=ttyS0"},
        "network": [{}],
        "metadata": {"team": "blue", "env": "production"},
    });
    Daemon::start(&host, &[]).call("CreateVm", &json!({"vm_id": "template", "config": config}));
    fill::fill(&host.state(), vms);
    let began = Instant::now();
    let daemon = Daemon::start(&host, &[]);
    let start = began.elapsed();
    let (resident, peak) = (daemon.memory("VmRSS"), daemon.memory("VmHWM"));
    let middle = daemon.token_at(vms / 2);
    let label = |key: &str, value: &str| json!({"metadata_filter": {key: value}});
    let mut times = vec![
        ("ListVms", page(&daemon, &json!({}))),
        ("ListVms, from the middle on", page(&daemon, &json!({"page_token": middle}))),
        (
            "ListVms, a state that most VMs are in",
            page(&daemon, &json!({"state_filter": ["VM_STATE_CREATED"]})),
        ),
        (
            "ListVms, a state that few VMs are in",
            page(&daemon, &json!({"state_filter": ["VM_STATE_SHUTDOWN"]})),
        ),
        ("ListVms, a backend", page(&daemon, &json!({"backend": "qemu"}))),
        ("ListVms, a backend of none", page(&daemon, &json!({"backend": "firecracker"}))),
        ("ListVms, a label that half the VMs bear", page(&daemon, &label("half", "yes"))),
        ("ListVms, a label that few VMs bear", page(&daemon, &label("rare", "yes"))),
    ];
    times.push(("WatchVms of one VM, until `synced`", p50(|| daemon.watch(&json!({"vm_id": "vm-7"})))));
    times.push(("WatchVms, until the first VM is told", p50(|| daemon.watch(&json!({})))));
    let before = daemon.memory("VmRSS");
    let opened: Vec<_> = (0..UNREAD).map(|_| daemon.open_watch(&json!({}))).collect();
    std::thread::sleep(Duration::from_secs(3));
    let unread = daemon.memory("VmRSS").saturating_sub(before);
    drop(opened);
    Measured { times, start, resident, peak, unread }
}

fn page(daemon: &Daemon, request: &Value) -> Duration {
    p50(|| {
        let began = Instant::now();
        daemon.call("ListVms", request);
        began.elapsed()
    })
}

fn p50(mut once: impl FnMut() -> Duration) -> Duration {
    let mut times: Vec<_> = (0..CALLS).map(|_| once()).collect();
    times.sort();
    times[CALLS / 2]
}

/// Boots VMs one after the other, and says what each costs the daemon.
fn running_vms(vmm: &str, many: usize) {
    let host = Host::new();
    let env: Vec<(&str, String)> = match vmm {
        "fake" => vec![("UNKEY_VMCP_QEMU_BINARY", daemon::fake_vmm(&host).display().to_string())],
        _ if on_path("firecracker") && std::path::Path::new("/dev/kvm").exists() => {
            vec![("UNKEY_VMCP_BACKEND", "firecracker".to_owned())]
        }
        _ => return println!("| {vmm} | SKIPPED: the program or /dev/kvm is missing |"),
    };
    let kernel = TinyGuest::Idle.write_to(host.path()).unwrap();
    let config = json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": 64 << 20},
        "boot": {"kernel_path": kernel},
        "metadata": {"team": "blue", "env": "production"},
    });
    let daemon = Daemon::start(&host, &env);
    let boot = |numbers: std::ops::Range<usize>| {
        for number in numbers {
            let vm_id = format!("run-{number}");
            daemon.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
            daemon.call("BootVm", &json!({"vm_id": vm_id}));
        }
        // Each VM has been sampled by then.
        std::thread::sleep(Duration::from_secs(12));
        daemon.memory("VmRSS")
    };
    let before = boot(0..FEW_RUNNING);
    let after = boot(FEW_RUNNING..many);
    println!("| {vmm} | {:.1} |", after.saturating_sub(before) as f64 / (many - FEW_RUNNING) as f64);
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn mb(kb: u64) -> f64 {
    kb as f64 / 1000.0
}
