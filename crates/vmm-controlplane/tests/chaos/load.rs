//! The clients of a run, and what each of them wrote down.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::client::{Client, Reply, success, understand};
use super::consoles::{ConsoleRead, token};
use super::history::{Answer, Call, Change, Guard, Micros, Op, Said};
use super::plan::{self, Choice, Kernels, Vm};
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

/// The time that a client waits for the echo of its input.
const ECHO_TIMEOUT: Duration = Duration::from_millis(300);
/// The time that a read of a whole console may take.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(20);

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
    /// The bytes that were read of consoles.
    pub(crate) consoles: Vec<ConsoleRead>,
    /// Every token that was typed, with the VM's place among the run's names.
    pub(crate) typed: HashMap<String, usize>,
    /// Calls that no daemon was there for.
    pub(crate) not_sent: u64,
    /// What is wrong by itself, whatever the history.
    pub(crate) violations: Vec<String>,
}

/// One client's way through the run.
pub(crate) struct Caller<'a> {
    shared: &'a Shared,
    kernels: &'a Kernels,
    number: usize,
    client: Client,
    notes: Notes,
    /// The offset up to which each creation's console was read, by uid.
    read_to: HashMap<String, u64>,
}

impl<'a> Caller<'a> {
    pub(crate) fn new(shared: &'a Shared, kernels: &'a Kernels, number: usize) -> Self {
        let client = Client::new(shared.addresses.daemon(), shared.addresses.client(number));
        Self { shared, kernels, number, client, notes: Notes::default(), read_to: HashMap::new() }
    }

    /// Calls until it is told to stop.
    pub(crate) fn run(mut self, mut random: fastrand::Rng) -> Notes {
        while !self.shared.stop.load(Ordering::Relaxed) {
            match plan::choose(&mut random) {
                Choice::List => self.list(),
                Choice::Stall(vm, time) => self.stall(vm, time),
                Choice::Update(vm, change, guarded) => self.update(vm, change, guarded),
                Choice::Type(vm) => self.type_in(vm),
                Choice::Console(vm, time) => self.read_console(vm, Some(time)),
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
        let (method, body) = plan::request(&self.shared.vms[vm], op, self.kernels);
        self.send(vm, op, method, &body)
    }

    fn send(&mut self, vm: usize, op: Op, method: &str, body: &Value) -> Option<Value> {
        let begin = self.shared.clock.now();
        let reply = self.client.call(method, body);
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

    /// Changes a part of a VM's configuration, if wanted only in the generation that was read before.
    fn update(&mut self, vm: usize, change: Change, guarded: bool) {
        // Only a VM that has a policy keeps one, so that its end has one meaning.
        let change = match change {
            Change::Policy(more) if !self.shared.vms[vm].restarts => Change::Label(more + 1),
            other => other,
        };
        let mut guard = None;
        if guarded {
            let Some(info) = self.call(vm, Op::Read) else { return };
            let generation = info["generation"].as_str().and_then(|text| text.parse().ok());
            let Some(generation) = generation else { return };
            guard = Some(Guard { generation, read: self.shared.clock.now() });
        }
        self.call(vm, Op::Update { change, guard });
    }

    /// Types a token of its own.
    fn type_in(&mut self, vm: usize) {
        let token = token(self.number, self.notes.typed.len() as u64);
        let body = json!({"vm_id": self.shared.vms[vm].name, "data": STANDARD.encode(&token)});
        self.notes.typed.insert(token, vm);
        if self.send(vm, Op::Type, "WriteConsole", &body).is_some() {
            self.read_console(vm, Some(ECHO_TIMEOUT));
        }
    }

    /// Reads a console: for `time` from where the last read of this creation ended, or all that is kept.
    pub(crate) fn read_console(&mut self, vm: usize, time: Option<Duration>) {
        let Some(uid) = self.uid(vm) else { return };
        let offset = time.and_then(|_| self.read_to.get(&uid).copied()).unwrap_or_default();
        let request = json!({"vm_id": self.shared.vms[vm].name, "offset": offset.to_string(),
            "follow": time.is_some()});
        let begin = self.shared.clock.now();
        let Some(streamed) = self.client.stream_console(&request, time.unwrap_or(WHOLE_TIMEOUT)) else {
            self.notes.not_sent += 1;
            return;
        };
        let end = self.shared.clock.now();
        let code = streamed.end.as_ref().and_then(|end| end["error"]["code"].as_str()).map(str::to_owned);
        let done = streamed.end.is_some() || !streamed.pieces.is_empty();
        match code.as_deref() {
            Some("not_found") => return self.note(vm, Op::Console, (begin, end), Answer::Absent),
            None if done => self.note(vm, Op::Console, (begin, end), Answer::Done(Said::default())),
            _ => {}
        }
        // The name may have gone to another creation meanwhile, whose output this may be.
        if self.uid_once_served(vm).as_ref() != Some(&uid) {
            return;
        }
        let read_to = streamed.pieces.last().map_or(offset, |(offset, data)| offset + data.len() as u64);
        self.read_to.insert(uid.clone(), read_to);
        let whole = time.is_none() && streamed.end.is_some() && code.is_none();
        let (client, pieces) = (self.number, streamed.pieces);
        self.notes.consoles.push(ConsoleRead { vm, uid, client, offset, pieces, error: code, whole });
    }

    /// Which creation a name is.
    fn uid(&mut self, vm: usize) -> Option<String> {
        self.call(vm, Op::Read)?["uid"].as_str().map(str::to_owned)
    }

    /// The same, when a daemon is there again.
    fn uid_once_served(&mut self, vm: usize) -> Option<String> {
        for _ in 0..100 {
            let before = self.notes.not_sent;
            let uid = self.uid(vm);
            if uid.is_some() || self.notes.not_sent == before || self.shared.stop.load(Ordering::Relaxed) {
                return uid;
            }
        }
        None
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
