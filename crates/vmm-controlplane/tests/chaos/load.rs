//! The clients of a run, and what each of them wrote down.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::client::{Client, Reply, success, understand};
use super::history::{Answer, Call, Micros, Op};
use super::plan::{self, Choice, Vm};
use super::stall::{Stalls, VmmProcess};

/// Unix time that never steps.
#[derive(Clone, Copy)]
pub(crate) struct Clock {
    unix: Duration,
    since: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { unix: SystemTime::now().duration_since(UNIX_EPOCH).unwrap(), since: Instant::now() }
    }

    pub(crate) fn now(self) -> Micros {
        (self.unix + self.since.elapsed()).as_micros().try_into().unwrap()
    }
}

/// Addresses that this run has for itself: loopback is a whole network.
#[derive(Clone, Copy)]
pub(crate) struct Addresses(u16);

impl Addresses {
    pub(crate) fn new() -> Self {
        Self((std::process::id() % 50_000).try_into().unwrap())
    }

    fn at(self, last: usize) -> IpAddr {
        let [high, low] = (self.0 + 256).to_be_bytes();
        IpAddr::V4(Ipv4Addr::new(127, high, low, last.try_into().unwrap()))
    }

    pub(crate) fn daemon(self) -> SocketAddr {
        SocketAddr::new(self.at(1), 8080)
    }

    pub(crate) fn client(self, client: usize) -> IpAddr {
        self.at(10 + client)
    }

    /// The client whom an event's actor names.
    pub(crate) fn client_of(self, actor: &str) -> Option<usize> {
        let address: IpAddr = actor.strip_prefix("anonymous@")?.parse().ok()?;
        (0..=plan::CLIENTS).find(|client| self.client(*client) == address)
    }
}

/// What the clients of a run share.
pub(crate) struct Shared {
    pub(crate) clock: Clock,
    pub(crate) addresses: Addresses,
    pub(crate) vms: Vec<Vm>,
    pub(crate) stop: AtomicBool,
    pub(crate) stalls: Stalls,
}

/// What one client saw.
#[derive(Default)]
pub(crate) struct Notes {
    pub(crate) calls: Vec<Call>,
    /// Calls that no daemon was there for.
    pub(crate) not_sent: u64,
    /// What is wrong by itself, whatever the history.
    pub(crate) violations: Vec<String>,
}

/// One client's way through the run.
pub(crate) struct Caller<'a> {
    shared: &'a Shared,
    kernel: &'a Path,
    number: usize,
    client: Client,
    notes: Notes,
}

impl<'a> Caller<'a> {
    pub(crate) fn new(shared: &'a Shared, kernel: &'a Path, number: usize) -> Self {
        let client = Client::new(shared.addresses.daemon(), shared.addresses.client(number));
        Self { shared, kernel, number, client, notes: Notes::default() }
    }

    /// Calls until it is told to stop.
    pub(crate) fn run(mut self, mut random: fastrand::Rng) -> Notes {
        while !self.shared.stop.load(Ordering::Relaxed) {
            match plan::choose(&mut random) {
                Choice::List => self.list(),
                Choice::Stall(vm, time) => self.stall(vm, time),
                Choice::One(vm, Op::KillVmm) => self.kill_vmm(vm),
                Choice::One(vm, op) => {
                    self.call(vm, op);
                }
            }
            rest(Duration::from_millis(random.u64(..25)));
        }
        self.notes
    }

    /// Makes one call, and answers what a success said.
    pub(crate) fn call(&mut self, vm: usize, op: Op) -> Option<Value> {
        let (method, body) = plan::request(&self.shared.vms[vm], op, self.kernel);
        let begin = self.shared.clock.now();
        let reply = self.client.call(method, &body);
        let end = self.shared.clock.now();
        let said = match &reply {
            Reply::Json(status, body) if status.is_success() => Some(body.clone()),
            _ => None,
        };
        match understand(reply) {
            Some(answer) => self.note(vm, op, (begin, end), answer),
            None => {
                self.notes.not_sent += 1;
                rest(Duration::from_millis(20));
            }
        }
        said
    }

    /// ListVms: one read of every VM.
    pub(crate) fn list(&mut self) {
        let begin = self.shared.clock.now();
        let reply = self.client.call("ListVms", &json!({"page_size": 1000}));
        let end = self.shared.clock.now();
        let Reply::Json(status, body) = reply else { return };
        if !status.is_success() {
            return self.notes.violations.push(format!("ListVms answered {status} {body}"));
        }
        let listed = body["vms"].as_array().cloned().unwrap_or_default();
        let mut places = Vec::new();
        for vm in &listed {
            match self.shared.vms.iter().position(|known| vm["vm_id"] == known.name.as_str()) {
                Some(place) if !places.contains(&place) => places.push(place),
                Some(_) => self.notes.violations.push(format!("ListVms names {} twice", vm["vm_id"])),
                None => {
                    self.notes.violations.push(format!("ListVms names {}, which is nobody's", vm["vm_id"]))
                }
            }
        }
        for vm in 0..self.shared.vms.len() {
            let line = listed.iter().find(|line| line["vm_id"] == self.shared.vms[vm].name.as_str());
            self.note(vm, Op::Read, (begin, end), line.map_or(Answer::Absent, success));
        }
    }

    /// Kills the VMM of a VM, as the kernel does when memory runs out.
    fn kill_vmm(&mut self, vm: usize) {
        let Some(process) = self.vmm(vm) else { return };
        let begin = self.shared.clock.now();
        if process.send(Signal::KILL) {
            let end = self.shared.clock.now();
            self.note(vm, Op::KillVmm, (begin, end), Answer::Lost);
        }
    }

    /// Has the VMM of a VM stand still, as one does whose disk or host is overloaded.
    fn stall(&mut self, vm: usize, time: Duration) {
        let Some(process) = self.vmm(vm) else { return };
        self.shared.stalls.stop(vm, process, self.shared.clock.now(), time);
    }

    /// The process that GetVmInfo names.
    fn vmm(&mut self, vm: usize) -> Option<VmmProcess> {
        let info = self.call(vm, Op::Read)?;
        let pid = info["backend_info"]["pid"].as_str()?.parse().ok()?;
        let folder = info["uid"].as_str()?.replace('-', "");
        Some(VmmProcess { pid, folder })
    }

    fn note(&mut self, vm: usize, op: Op, (begin, end): (Micros, Micros), answer: Answer) {
        self.notes.calls.push(Call { client: self.number, vm, op, begin, end, settled: end, answer });
    }

    /// What was seen so far.
    pub(crate) fn into_notes(self) -> Notes {
        self.notes
    }
}

/// Waits.
#[expect(clippy::disallowed_methods, reason = "a test's own thread waits for other processes")]
pub(crate) fn rest(time: Duration) {
    std::thread::sleep(time);
}
