//! CreateVm + BootVm through the API, against the fastest ways to start the same VMM by hand.
//!
//! ```text
//!   round:  by hand ─► by hand, stepwise ─► CreateVm + BootVm ─► BootVm ─► with a spare VMM ─► …
//!   next:   the same ways, beginning with the second
//! ```
//!
//! All ways start the same tiny guest, in turn and in one run, because machines are noisy and only
//! the ratios inside one run can be compared. `make bench` builds and runs this program.
//!
//! | variable | meaning |
//! |---|---|
//! | `VMCP_BENCH_ROUNDS` | the number of rounds, 50 by default |
//! | `VMCP_BENCH_ONLY` | the only VMM to measure: `firecracker`, `cloudhypervisor`, `microvm` or `q35` |
//! | `VMCP_BENCH_BEFORE` | another build of the daemon, which is measured in the same rounds |
//!
//! `by hand` is the fastest way that is known: a configuration file for Firecracker, the command
//! line for Cloud Hypervisor, and a command line without `-S` for QEMU. `by hand, stepwise` gives
//! the VMM its configuration after its start, as the API does.
//!
//! A row `spare` is of a daemon with `UNKEY_VMCP_SPARE_VMMS=1`. Its VMM was started before the
//! clock, so the row leaves out the start of a process. The process for the next VM is started
//! after the clock, and a client that boots VMs faster than that gets the other rows.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::panic,
    clippy::print_stdout,
    reason = "a program without an executor that prints its measurements"
)]

mod by_hand;
mod daemon;
mod http;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::skip::on_path;

use by_hand::ByHandWay;
use daemon::{Daemon, Measured};

/// Memory of every guest.
const MIB: u64 = 64;
/// The pause before each measurement, so that the end of one VM does not slow down the next.
const QUIET_INTERVAL: Duration = Duration::from_millis(20);
/// The rounds that are not counted. They warm caches and bring the first spare VMM up.
const WARM_UP: usize = 2;

/// A VMM, with the ways to start it by hand.
struct Vmm {
    name: &'static str,
    backend: &'static str,
    program: &'static str,
    options: Value,
    fastest: ByHandWay,
    stepwise: ByHandWay,
}

fn vmms() -> [Vmm; 4] {
    let qemu = |name, fastest, stepwise| Vmm {
        name,
        backend: "qemu",
        program: "qemu-system-x86_64",
        options: json!({"qemu.machine": name}),
        fastest,
        stepwise,
    };
    [
        Vmm {
            name: "firecracker",
            backend: "firecracker",
            program: "firecracker",
            options: json!({}),
            fastest: by_hand::firecracker_by_file,
            stepwise: by_hand::firecracker_by_calls,
        },
        Vmm {
            name: "cloudhypervisor",
            backend: "cloudhypervisor",
            program: "cloud-hypervisor",
            options: json!({}),
            fastest: by_hand::cloud_hypervisor_by_arguments,
            stepwise: by_hand::cloud_hypervisor_by_calls,
        },
        qemu("microvm", by_hand::microvm, by_hand::microvm_stopped),
        qemu("q35", by_hand::q35, by_hand::q35_stopped),
    ]
}

fn main() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let rounds: usize = number("VMCP_BENCH_ROUNDS").unwrap_or(50);
    let only = std::env::var("VMCP_BENCH_ONLY").ok();
    let before = std::env::var_os("VMCP_BENCH_BEFORE").map(PathBuf::from);
    println!("{rounds} rounds, all ways in turn; milliseconds, and the ratios to `by hand`\n");
    println!("| VMM | way | p50 | p95 | ratio of p50 | ratio of p95 | n |");
    println!("|---|---|---|---|---|---|---|");
    for vmm in vmms().into_iter().filter(|vmm| only.as_deref().is_none_or(|only| only == vmm.name)) {
        if !on_path(vmm.program) {
            println!("| {} | SKIPPED: {} is not on PATH | | | | | |", vmm.name, vmm.program);
            continue;
        }
        report(vmm.name, measure(&vmm, rounds, before.as_deref()));
    }
}

/// One way to start a VM.
struct Contestant<'a> {
    name: String,
    /// Starts and ends one VM. The argument is the number of the round.
    run: Box<dyn FnMut(usize) -> Measured + 'a>,
    times: Vec<Duration>,
    /// The number of rounds whose VM found no spare VMM. The times of such rounds count.
    missed: usize,
}

impl<'a> Contestant<'a> {
    fn new(name: impl Into<String>, run: impl FnMut(usize) -> Measured + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run), times: Vec::new(), missed: 0 }
    }
}

/// Measures all ways in turn. The first of them is the fastest way by hand.
fn measure(vmm: &Vmm, rounds: usize, before: Option<&Path>) -> Vec<Contestant<'static>> {
    let dir = tempfile::Builder::new().prefix("vmcpb").tempdir().unwrap();
    // As on a host, the durable state is on a disk and the run folders are in memory.
    let run = tempfile::Builder::new().prefix("vmcpb").tempdir_in(in_memory()).unwrap();
    let kernel = TinyGuest::Idle.write_to(dir.path()).unwrap();
    let config = json!({
        "cpu": {"vcpu_count": 1},
        "memory": {"size_bytes": MIB << 20},
        "boot": {"kernel_path": kernel, "boot_options": vmm.options},
    });
    let mut ways: Vec<Contestant<'_>> = Vec::new();
    for (name, start) in [("by hand", vmm.fastest), ("by hand, stepwise", vmm.stepwise)] {
        let (base, kernel) = (run.path().join(name.replace([',', ' '], "")), kernel.clone());
        std::fs::create_dir(&base).unwrap();
        ways.push(Contestant::new(name, move |round| by_hand(start, &base.join(round.to_string()), &kernel)));
    }
    let now = Path::new(env!("CARGO_BIN_EXE_vmm-controlplane"));
    for (program, suffix) in before.map(|path| (path, " (before)")).into_iter().chain([(now, "")]) {
        let start = |name: &str, spares| {
            let name = format!("{name}{}", suffix.trim());
            Daemon::start(program, &dir.path().join(&name), &run.path().join(&name), vmm.backend, spares)
        };
        let (mut both, mut boot, mut spare) = (start("both", 0), start("boot", 0), start("spare", 1));
        let of_both = config.clone();
        ways.push(Contestant::new(format!("CreateVm + BootVm{suffix}"), move |round| {
            both.create_and_boot(round, &of_both)
        }));
        let of_boot = config.clone();
        ways.push(Contestant::new(format!("BootVm{suffix}"), move |round| boot.boot(round, &of_boot)));
        let of_spare = config.clone();
        ways.push(Contestant::new(format!("CreateVm + BootVm, spare{suffix}"), move |round| {
            spare.create_and_boot(round, &of_spare)
        }));
    }
    let count = ways.len();
    for round in 0..rounds + WARM_UP {
        for turn in 0..count {
            let way = &mut ways[(round + turn) % count];
            let measured = (way.run)(round);
            if round >= WARM_UP {
                way.times.push(measured.time);
                way.missed += usize::from(measured.missed);
            }
        }
    }
    // The daemons end here, before their folders are removed.
    ways.into_iter()
        .map(|way| {
            let Contestant { name, run, times, missed } = way;
            drop(run);
            Contestant { times, missed, ..Contestant::new(name, |_| Measured::default()) }
        })
        .collect()
}

fn by_hand(start: ByHandWay, folder: &Path, kernel: &Path) -> Measured {
    std::fs::create_dir(folder).unwrap();
    std::thread::sleep(QUIET_INTERVAL);
    let begin = Instant::now();
    let mut child = start(folder, kernel);
    let time = begin.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();
    Measured { time, missed: false }
}

/// Returns a folder that is kept in memory, as /run mostly is.
fn in_memory() -> PathBuf {
    let shared_memory = PathBuf::from("/dev/shm");
    if shared_memory.is_dir() { shared_memory } else { std::env::temp_dir() }
}

fn report(vmm: &str, ways: Vec<Contestant<'_>>) {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let mut fastest = None;
    for Contestant { name, mut times, missed, .. } in ways {
        times.sort_unstable();
        let (p50, p95) = (ms(percentile(&times, 50)), ms(percentile(&times, 95)));
        let (hand50, hand95) = *fastest.get_or_insert((p50, p95));
        let count = times.len();
        let note = if missed == 0 { String::new() } else { format!(" ({missed} of {count} found none)") };
        println!(
            "| {vmm} | {name}{note} | {p50:.2} | {p95:.2} | {:.2} | {:.2} | {count} |",
            p50 / hand50,
            p95 / hand95
        );
    }
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}
