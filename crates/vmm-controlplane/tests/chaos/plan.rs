//! What a run does: its size and seed, its VMs, and what its clients choose. All choices follow from the seed; what the machine
//! makes of them does not.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use super::history::{Change, Op};

/// VMs of a run.
pub(crate) const VMS: usize = 20;
/// Clients that call side by side.
pub(crate) const CLIENTS: usize = 8;
/// VMs that are called more often than the others, so that calls meet.
const HOT: usize = 4;

/// The VMs whose guests send back what is typed, each on another hypervisor.
const ECHOING: [usize; 3] = [3, 5, 7];

/// The kernels of the guests.
pub(crate) struct Kernels {
    pub(crate) idle: PathBuf,
    pub(crate) echoes: PathBuf,
}

impl Kernels {
    /// Writes them into a folder.
    pub(crate) fn write_to(folder: &Path) -> Self {
        // The guest obeys letters that no client types, and pauses between two looks for input.
        let (idle, echoes) = (TinyGuest::Idle, TinyGuest::Obey);
        Self { idle: idle.write_to(folder).unwrap(), echoes: echoes.write_to(folder).unwrap() }
    }
}

/// Reads a number from the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

/// The seed of this run: the one given, or a new one.
pub(crate) fn seed() -> u64 {
    number("VMCP_CHAOS_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        u64::from(now.subsec_nanos()) ^ u64::from(std::process::id())
    })
}

/// One VM of the plan; it may be created and deleted many times.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    pub(crate) name: String,
    pub(crate) backend: &'static str,
    /// Whether it has an interface, on a TAP that the program makes.
    pub(crate) nic: bool,
    /// Whether its policy starts it again when its VMM dies.
    pub(crate) restarts: bool,
    /// True if its guest sends back its input. Such a guest keeps a CPU busy, so that there are few.
    pub(crate) echoes: bool,
}

/// The VMs of a run, spread over what is here.
pub(crate) fn vms(backends: &[&'static str], taps: bool) -> Vec<Vm> {
    let vm = |place: usize| Vm {
        name: format!("vm{place:02}"),
        backend: backends[place % backends.len()],
        nic: taps && place.is_multiple_of(2),
        restarts: place % 5 == 1,
        echoes: ECHOING.contains(&place),
    };
    (0..VMS).map(vm).collect()
}

impl Vm {
    /// The body of CreateVm, in one of two configurations that a repeated call tells apart.
    pub(crate) fn create(&self, kernels: &Kernels, config: u8) -> Value {
        let kernel = if self.echoes { &kernels.echoes } else { &kernels.idle };
        let mut body = json!({
            "vm_id": self.name,
            "backend": self.backend,
            "config": {
                "cpu": {"vcpu_count": 1},
                "memory": {"size_bytes": "67108864"},
                "boot": {"kernel_path": kernel},
                "metadata": {"config": config.to_string()},
            },
        });
        if self.backend == "qemu" {
            body["config"]["boot"]["boot_options"] = json!({"qemu.machine": "microvm"});
        }
        if self.nic {
            body["config"]["network"] = json!([{}]);
        }
        if self.restarts {
            body["config"]["restart_policy"] =
                json!({"mode": "RESTART_MODE_ON_FAILURE", "max_restarts": 10_000});
        }
        body
    }
}

/// What a client does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// A call on one VM, or the end of its VMM.
    One(usize, Op),
    /// UpdateVm of one part, with the generation that the client reads before if that is wanted.
    Update(usize, Change, bool),
    /// A token is typed into the VM's console, which is read then.
    Type(usize),
    /// The VM's console is read for so long, on from where the client's last read ended.
    Console(usize, Duration),
    /// The VM's VMM stands still for so long.
    Stall(usize, Duration),
    /// ListVms.
    List,
}

/// Chooses; the weights add up to 100.
pub(crate) fn choose(random: &mut fastrand::Rng) -> Choice {
    let vm = if random.u8(..100) < 40 { random.usize(..HOT) } else { random.usize(..VMS) };
    let force = random.bool();
    let op = match random.u8(..100) {
        0..15 => Op::Create { config: u8::from(random.u8(..8) == 0) },
        15..33 => Op::Boot,
        33..38 => Op::Pause,
        38..44 => Op::Resume,
        44..49 => Op::Reboot { force },
        // Most VMs whose guests answer live on, so that there is somebody to talk to.
        49..62 if ECHOING.contains(&vm) && random.u8(..4) > 0 => Op::Boot,
        49..57 => Op::Shutdown { force },
        57..62 => Op::Delete { force },
        62..67 => Op::Read,
        67..74 => return Choice::Update(vm, change(random), force),
        74..82 => return Choice::Type(talker(random, vm)),
        82..89 => {
            let time = Duration::from_millis(random.u64(20..400));
            return Choice::Console(talker(random, vm), time);
        }
        89..93 => return Choice::Stall(vm, stall(random)),
        93..97 => Op::KillVmm,
        _ => return Choice::List,
    };
    Choice::One(vm, op)
}

/// Chooses a change. A protection does not last long, because VMs are to be deleted.
fn change(random: &mut fastrand::Rng) -> Change {
    match random.u8(..8) {
        0..3 => Change::Label(random.u8(1..4)),
        3..5 => Change::Memory(random.u8(..3)),
        5 => Change::Policy(random.u8(..3)),
        _ => Change::Protection(random.u8(..4) == 0),
    }
}

/// Chooses a VM to talk to: one whose guest answers, as often as any other.
fn talker(random: &mut fastrand::Rng, other: usize) -> usize {
    if random.bool() { ECHOING[random.usize(..ECHOING.len())] } else { other }
}

/// Chooses how long a VMM stands still: mostly for less than the daemon waits for an answer, now and then for longer than it
/// takes to call the VMM unreachable.
fn stall(random: &mut fastrand::Rng) -> Duration {
    let millis = if random.u8(..6) == 0 { random.u64(12_000..25_000) } else { random.u64(50..3_500) };
    Duration::from_millis(millis)
}

/// The body of the call that an operation is.
pub(crate) fn request(vm: &Vm, op: Op, kernels: &Kernels) -> (&'static str, Value) {
    let name = &vm.name;
    match op {
        Op::Create { config } => ("CreateVm", vm.create(kernels, config)),
        Op::Boot => ("BootVm", json!({"vm_id": name})),
        Op::Pause => ("PauseVm", json!({"vm_id": name})),
        Op::Resume => ("ResumeVm", json!({"vm_id": name})),
        // The guest obeys nobody, so a second is waited and the VMM is told.
        Op::Reboot { force } => ("RebootVm", json!({"vm_id": name, "force": force, "timeout_seconds": 1})),
        Op::Shutdown { force } => {
            ("ShutdownVm", json!({"vm_id": name, "force": force, "timeout_seconds": 1}))
        }
        Op::Delete { force } => ("DeleteVm", json!({"vm_id": name, "force": force})),
        Op::Update { change, guard } => {
            let (part, config) = part(change);
            let generation = guard.map_or(0, |guard| guard.generation);
            let update =
                json!({"vm_id": name, "fields": [part], "config": config, "if_generation": generation});
            ("UpdateVm", update)
        }
        // Their requests are made where they are called.
        Op::Type | Op::Console | Op::Read | Op::KillVmm => ("GetVmInfo", json!({"vm_id": name})),
    }
}

/// The part that a change replaces, and the configuration to send.
fn part(change: Change) -> (&'static str, Value) {
    match change {
        Change::Label(label) => ("metadata", json!({"metadata": {"mark": label.to_string()}})),
        Change::Memory(more) => {
            let bytes = (64 + u64::from(more)) << 20;
            ("memory", json!({"memory": {"size_bytes": bytes.to_string()}}))
        }
        Change::Policy(more) => {
            let policy = json!({"mode": "RESTART_MODE_ON_FAILURE", "max_restarts": 10_000 + u64::from(more)});
            ("restart_policy", json!({"restart_policy": policy}))
        }
        Change::Protection(on) => ("delete_protection", json!({"delete_protection": on})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_choices() {
        let choices = |seed| {
            let mut random = fastrand::Rng::with_seed(seed);
            (0..1000).map(|_| choose(&mut random)).collect::<Vec<_>>()
        };
        assert_eq!(choices(7), choices(7));
        assert_ne!(choices(7), choices(8));
        let has = |wanted: fn(&Choice) -> bool| choices(7).iter().any(wanted);
        assert!(has(|choice| matches!(choice, Choice::List)));
        assert!(!has(|choice| matches!(choice, Choice::One(VMS.., _))));
        assert!(has(|choice| matches!(choice, Choice::One(_, Op::KillVmm))));
        assert!(has(|choice| matches!(choice, Choice::Update(_, Change::Memory(_), true))));
        assert!(has(|choice| matches!(choice, Choice::Type(_))));
        assert!(has(|choice| matches!(choice, Choice::Console(..))));
        assert!(
            has(|choice| matches!(choice, Choice::Stall(_, time) if *time < Duration::from_secs(4))),
            "slow"
        );
        assert!(
            has(|choice| matches!(choice, Choice::Stall(_, time) if *time > Duration::from_secs(10))),
            "silent"
        );
    }
}
