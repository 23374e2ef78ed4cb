//! Measures consoles: an echoed key against the VMM's own terminal, the history against a copy of its file, and the cost of a guest
//! that prints without end.
//!
//! `make bench` builds and runs it. `VMCP_BENCH_KEYS` (200) is the number of keys, `VMCP_BENCH_SECONDS` (10) the time of each
//! measurement of the daemon's CPU, and `VMCP_BENCH_DAEMON` names another daemon to measure. The two sides of each comparison
//! take turns in one run, because only their difference and their ratio mean something on a machine that does other work too.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::panic,
    clippy::print_stdout,
    reason = "a program that prints what it measured, and ends where it cannot"
)]

#[allow(dead_code, reason = "shared with the other measurements, which use the rest")]
#[path = "scale/daemon.rs"]
mod daemon;

use std::fs::File;
use std::io::{Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmm_host::console_input::input_terminal;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::skip::on_path;

use daemon::{Daemon, Host};

/// The bytes of the history that is streamed.
const HISTORY: usize = 10 << 20;
/// Streams of the history, and copies of its file.
const STREAMS: usize = 15;
/// Rounds of calls with and without a client that reads the flooded console.
const ROUNDS: usize = 10;
/// Calls of a round.
const CALLS: usize = 100;
/// Keys of one side before the other side takes its turn.
const KEYS: usize = 20;
/// The time between two keys, as a fast person types.
const KEY_INTERVAL: Duration = Duration::from_millis(20);
/// The unit of the times in /proc on x86-64.
const TICKS_PER_SECOND: f64 = 100.0;
/// Longer than a guest takes to start or to answer.
const GUEST_LIMIT: Duration = Duration::from_secs(120);

fn main() {
    println!("\nAn echoed key, through the API and at the VMM's own terminal; milliseconds\n");
    println!("| VMM | API p50 | own terminal p50 | more | API p95 | own terminal p95 |");
    println!("|---|---|---|---|---|---|");
    for vmm in ["firecracker", "cloudhypervisor", "qemu"] {
        keys(vmm, number("VMCP_BENCH_KEYS", 200));
    }
    println!("\n{} MiB of history, streamed over loopback; MB/s, p50 of {STREAMS}\n", HISTORY >> 20);
    history();
    println!("\nA guest that prints without end\n");
    println!(
        "| VMM | kB/s | daemon's CPU, idle guest | unwatched | watched | other VM's call p50, unwatched, ms | watched, ms | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for vmm in ["firecracker", "qemu"] {
        flood(vmm, Duration::from_secs(number("VMCP_BENCH_SECONDS", 10) as u64));
    }
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Returns true if a VMM can run here.
fn is_here(vmm: &str) -> bool {
    match vmm {
        "qemu" => on_path("qemu-system-x86_64"),
        "cloudhypervisor" => on_path("cloud-hypervisor") && Path::new("/dev/kvm").exists(),
        _ => on_path(vmm) && Path::new("/dev/kvm").exists(),
    }
}

/// A daemon with VMs on one VMM.
struct Bench {
    // Ends before the host, which ends the VMMs that are left.
    daemon: Daemon,
    host: Host,
    vmm: &'static str,
}

impl Bench {
    fn start(vmm: &'static str) -> Self {
        let host = Host::new();
        let env = [("UNKEY_VMCP_BACKEND", vmm.to_owned()), ("UNKEY_VMCP_CONSOLE_HISTORY", "32M".to_owned())];
        Self { daemon: Daemon::start(&host, &env), host, vmm }
    }

    fn kernel(&self, guest: TinyGuest) -> PathBuf {
        guest.write_to(self.host.path()).unwrap()
    }

    fn run(&self, vm_id: &str, guest: TinyGuest) {
        let mut config = json!({
            "cpu": {"vcpu_count": 1},
            "memory": {"size_bytes": 64 << 20},
            "boot": {"kernel_path": self.kernel(guest)},
        });
        if self.vmm == "qemu" {
            config["boot"]["boot_options"] = json!({"qemu.machine": "microvm"});
        }
        self.daemon.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
        self.daemon.call("BootVm", &json!({"vm_id": vm_id}));
    }

    /// The kept console of a VM.
    fn console(&self, vm_id: &str) -> PathBuf {
        let info = self.daemon.call("GetVmInfo", &json!({"vm_id": vm_id}));
        let folder = info["uid"].as_str().unwrap().replace('-', "");
        self.host.path().join("run/vms").join(folder).join("console.log")
    }

    fn delete(&self, vm_id: &str) {
        self.daemon.call("DeleteVm", &json!({"vm_id": vm_id, "force": true}));
    }

    /// Opens a stream of a console in protobuf: field 1 of the request is the name, and field 4 is `follow`.
    fn stream(&self, vm_id: &str, follow: bool) -> Box<dyn Read + Send> {
        let mut message = vec![0x0a, u8::try_from(vm_id.len()).unwrap()];
        message.extend(vm_id.bytes());
        message.extend([0x20, u8::from(follow)]);
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        framed.extend(message);
        let url = format!("http://{}/vmm.v1.VmService/StreamConsole", self.daemon.address());
        let answer = ureq::post(&url).header("content-type", "application/connect+proto").send(&framed[..]);
        Box::new(answer.unwrap().into_body().into_reader())
    }
}

/// Reads one message of a stream. Returns `None` at its end.
fn message(stream: &mut dyn Read) -> Option<Vec<u8>> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).ok()?;
    let mut message = vec![0; u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize];
    stream.read_exact(&mut message).ok()?;
    (head[0] & 2 == 0).then_some(message)
}

/// Measures the time from a key to its echo.
fn keys(vmm: &'static str, count: usize) {
    if !is_here(vmm) {
        return println!("| {vmm} | SKIPPED: the program or /dev/kvm is missing | | | | |");
    }
    let bench = Bench::start(vmm);
    bench.run("echo", TinyGuest::Echo);
    let echoes = echoes(bench.stream("echo", true));
    let mut by_hand = ByHand::start(vmm, &bench);
    let banner = TinyGuest::Echo.banner();
    let mut text = String::new();
    while !text.contains(&banner) {
        let (_, bytes) = echoes.recv_timeout(GUEST_LIMIT).unwrap();
        text.push_str(&String::from_utf8_lossy(&bytes));
    }
    by_hand.until(&banner);
    let (mut api, mut own) = (Vec::new(), Vec::new());
    let letters = || (0..KEYS).map(|key| b'a' + u8::try_from(key % 26).unwrap());
    // Each guest polls for its keys and keeps a CPU busy, so that only one of them runs at a time.
    for _ in 0..count.div_ceil(KEYS) {
        by_hand.signal(Signal::STOP);
        for letter in letters() {
            std::thread::sleep(KEY_INTERVAL);
            while echoes.try_recv().is_ok() {}
            let begun = Instant::now();
            bench.daemon.call("WriteConsole", &json!({"vm_id": "echo", "data": STANDARD.encode([letter])}));
            let (at, bytes) = echoes.recv_timeout(GUEST_LIMIT).unwrap();
            assert!(bytes.contains(&letter), "{bytes:?}");
            api.push(at.duration_since(begun));
        }
        bench.daemon.call("PauseVm", &json!({"vm_id": "echo"}));
        by_hand.signal(Signal::CONT);
        for letter in letters() {
            std::thread::sleep(KEY_INTERVAL);
            own.push(by_hand.key(letter));
        }
        bench.daemon.call("ResumeVm", &json!({"vm_id": "echo"}));
    }
    bench.delete("echo");
    let more = ms(percentile(&mut api, 50)) - ms(percentile(&mut own, 50));
    println!(
        "| {vmm} | {:.2} | {:.2} | {more:.2} | {:.2} | {:.2} |",
        ms(percentile(&mut api, 50)),
        ms(percentile(&mut own, 50)),
        ms(percentile(&mut api, 95)),
        ms(percentile(&mut own, 95)),
    );
}

/// Reads a stream on a thread of its own, and tells the time at which each message came.
fn echoes(mut stream: Box<dyn Read + Send>) -> Receiver<(Instant, Vec<u8>)> {
    let (tell, echoes) = channel();
    std::thread::spawn(move || {
        while let Some(message) = message(&mut *stream) {
            if tell.send((Instant::now(), message)).is_err() {
                return;
            }
        }
    });
    echoes
}

/// A VMM whose serial port is a terminal that this program holds. It ends when dropped.
struct ByHand {
    child: Child,
    terminal: File,
}

impl ByHand {
    fn start(vmm: &str, bench: &Bench) -> Self {
        let dir = bench.host.path();
        let kernel = bench.kernel(TinyGuest::Echo);
        let (kernel, socket) = (kernel.to_str().unwrap().to_owned(), dir.join("hand.sock"));
        let api = socket.to_str().unwrap();
        let (program, arguments): (&str, Vec<&str>) = match vmm {
            "firecracker" => ("firecracker", vec!["--api-sock", api]),
            "cloudhypervisor" => {
                let arguments = ["--api-socket", api, "--cpus", "boot=1", "--memory", "size=64M"];
                let more = ["--serial", "tty", "--console", "off", "--kernel", &kernel];
                ("cloud-hypervisor", [&arguments[..], &more[..]].concat())
            }
            _ => {
                let machine =
                    ["-machine", "microvm,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"];
                let more = ["-no-user-config", "-serial", "stdio", "-kernel", &kernel];
                ("qemu-system-x86_64", [&machine[..], &more[..]].concat())
            }
        };
        let pair = input_terminal().unwrap();
        let log = File::create(dir.join("hand.log")).unwrap();
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::from(pair.kept.try_clone().unwrap()))
            .stdout(Stdio::from(pair.kept))
            .stderr(log)
            .spawn()
            .unwrap();
        let hand = Self { child, terminal: File::from(pair.stdin) };
        if vmm == "firecracker" {
            put(&socket, "/boot-source", &json!({"kernel_image_path": kernel, "boot_args": "reboot=k"}));
            put(&socket, "/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64}));
            put(&socket, "/actions", &json!({"action_type": "InstanceStart"}));
        }
        hand
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Reads until the terminal has shown `text`.
    fn until(&mut self, text: &str) {
        let mut seen = String::new();
        let mut room = [0; 4096];
        while !seen.contains(text) {
            let count = self.terminal.read(&mut room).unwrap();
            seen.push_str(&String::from_utf8_lossy(&room[..count]));
        }
    }

    /// Types a key, and returns the time until its echo.
    fn key(&mut self, letter: u8) -> Duration {
        let begun = Instant::now();
        self.terminal.write_all(&[letter]).unwrap();
        let mut room = [0; 64];
        loop {
            let count = self.terminal.read(&mut room).unwrap();
            if room[..count].contains(&letter) {
                return begun.elapsed();
            }
        }
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One call of Firecracker's API.
fn put(socket: &Path, path: &str, body: &Value) {
    let begun = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(begun.elapsed() < GUEST_LIMIT, "{}: {error}", socket.display()),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let body = body.to_string();
    write!(stream, "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    let mut answer = [0; 4096];
    let count = stream.read(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 204"), "{path}: {}", String::from_utf8_lossy(&answer[..count]));
}

/// Measures the streaming of a history, against the copy of its file through a socket.
fn history() {
    if !is_here("qemu") {
        return println!("SKIPPED: qemu-system-x86_64 is not on PATH");
    }
    let bench = Bench::start("qemu");
    bench.run("vm", TinyGuest::Idle);
    let path = bench.console("vm");
    let begun = Instant::now();
    while std::fs::metadata(&path).unwrap().len() == 0 {
        assert!(begun.elapsed() < GUEST_LIMIT, "the guest prints nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    // A guest would need minutes for it.
    let line = b"a line of a console, as long as many are, and so on\r\n";
    let text: Vec<u8> = line.iter().copied().cycle().take(HISTORY).collect();
    File::options().append(true).open(&path).unwrap().write_all(&text).unwrap();
    let (mut streamed, mut copied) = (Vec::new(), Vec::new());
    for _ in 0..=STREAMS {
        let begun = Instant::now();
        let mut stream = bench.stream("vm", false);
        let mut bytes = 0;
        while let Some(message) = message(&mut *stream) {
            bytes += message.len();
        }
        streamed.push(begun.elapsed());
        assert!(bytes >= HISTORY, "{bytes}");
        copied.push(copy(&path));
    }
    // The first of each warms caches.
    streamed.remove(0);
    copied.remove(0);
    let rate = |times: &mut Vec<Duration>| HISTORY as f64 / percentile(times, 50).as_secs_f64() / 1e6;
    let (streamed, copied) = (rate(&mut streamed), rate(&mut copied));
    println!("| StreamConsole | copy of the file | ratio |\n|---|---|---|");
    println!("| {streamed:.0} | {copied:.0} | {:.2} |", streamed / copied);
    bench.delete("vm");
}

/// Copies a file over a loopback connection, and returns how long that took.
fn copy(path: &Path) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let begun = Instant::now();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut file = File::open(path).unwrap();
    let sender = std::thread::spawn(move || std::io::copy(&mut file, &mut server).unwrap());
    let mut room = vec![0; 64 << 10];
    while client.read(&mut room).unwrap() > 0 {}
    sender.join().unwrap();
    begun.elapsed()
}

/// Measures the cost of a guest that prints without end.
fn flood(vmm: &'static str, time: Duration) {
    if !is_here(vmm) {
        return println!("| {vmm} | SKIPPED: the program or /dev/kvm is missing | | | | | | |");
    }
    let bench = Bench::start(vmm);
    bench.run("other", TinyGuest::Idle);
    let idle = cpu(&bench.daemon, time);
    bench.run("flood", TinyGuest::Flood);
    let path = bench.console("flood");
    let length = || std::fs::metadata(&path).unwrap().len();
    let (before, begun) = (length(), Instant::now());
    let unwatched = cpu(&bench.daemon, time);
    let rate = (length() - before) as f64 / begun.elapsed().as_secs_f64() / 1000.0;
    let watched = {
        let _reader = echoes(bench.stream("flood", true));
        cpu(&bench.daemon, time)
    };
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        calls(&bench, &mut alone);
        let reader = echoes(bench.stream("flood", true));
        calls(&bench, &mut beside);
        drop(reader);
    }
    let (alone, beside) = (percentile(&mut alone, 50), percentile(&mut beside, 50));
    println!(
        "| {vmm} | {rate:.0} | {idle:.2} % | {unwatched:.2} % | {watched:.2} % | {:.2} | {:.2} | {:.2} |",
        ms(alone),
        ms(beside),
        beside.as_secs_f64() / alone.as_secs_f64(),
    );
    bench.delete("flood");
    bench.delete("other");
}

/// Calls a method of another VM time and again.
fn calls(bench: &Bench, times: &mut Vec<Duration>) {
    for _ in 0..CALLS {
        let begun = Instant::now();
        bench.daemon.call("GetVmInfo", &json!({"vm_id": "other"}));
        times.push(begun.elapsed());
    }
}

/// The share of one CPU that the daemon takes for so long, in percent.
fn cpu(daemon: &Daemon, time: Duration) -> f64 {
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields = fields.split_whitespace().skip(11).take(2);
        fields.map(|field| field.parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = ticks();
    std::thread::sleep(time);
    let used = (ticks() - before) as f64 / TICKS_PER_SECOND;
    100.0 * used / time.as_secs_f64()
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
