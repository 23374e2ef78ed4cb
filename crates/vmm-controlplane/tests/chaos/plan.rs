//! What a run does: its size and seed, its VMs, and what its clients choose. All choices follow from the seed; what the machine
//! makes of them does not.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::history::Op;
/// VMs of a run.
pub(crate) const VMS: usize = 20;
/// Clients that call side by side.
pub(crate) const CLIENTS: usize = 8;
/// VMs that are called more often than the others, so that calls meet.
const HOT: usize = 4;

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
}

/// The VMs of a run, spread over what is here.
pub(crate) fn vms(backends: &[&'static str], taps: bool) -> Vec<Vm> {
    let vm = |place: usize| Vm {
        name: format!("vm{place:02}"),
        backend: backends[place % backends.len()],
        nic: taps && place.is_multiple_of(2),
        restarts: place % 5 == 1,
    };
    (0..VMS).map(vm).collect()
}

impl Vm {
    /// The body of CreateVm, in one of two configurations that a repeated call tells apart.
    pub(crate) fn create(&self, kernel: &Path, config: u8) -> Value {
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
        0..14 => Op::Create { config: u8::from(random.u8(..8) == 0) },
        14..38 => Op::Boot,
        38..46 => Op::Pause,
        46..54 => Op::Resume,
        54..62 => Op::Reboot { force },
        62..73 => Op::Shutdown { force },
        73..81 => Op::Delete { force },
        81..89 => Op::Read,
        89..93 => return Choice::Stall(vm, stall(random)),
        93..97 => Op::KillVmm,
        _ => return Choice::List,
    };
    Choice::One(vm, op)
}

/// Chooses how long a VMM stands still: mostly for less than the daemon waits for an answer, now and then for longer than it
/// takes to call the VMM unreachable.
fn stall(random: &mut fastrand::Rng) -> Duration {
    let millis = if random.u8(..6) == 0 { random.u64(12_000..25_000) } else { random.u64(50..3_500) };
    Duration::from_millis(millis)
}

/// The body of the call that an operation is.
pub(crate) fn request(vm: &Vm, op: Op, kernel: &Path) -> (&'static str, Value) {
    let name = &vm.name;
    match op {
        Op::Create { config } => ("CreateVm", vm.create(kernel, config)),
        Op::Boot => ("BootVm", json!({"vm_id": name})),
        Op::Pause => ("PauseVm", json!({"vm_id": name})),
        Op::Resume => ("ResumeVm", json!({"vm_id": name})),
        // The guest obeys nobody, so a second is waited and the VMM is told.
        Op::Reboot { force } => ("RebootVm", json!({"vm_id": name, "force": force, "timeout_seconds": 1})),
        Op::Shutdown { force } => {
            ("ShutdownVm", json!({"vm_id": name, "force": force, "timeout_seconds": 1}))
        }
        Op::Delete { force } => ("DeleteVm", json!({"vm_id": name, "force": force})),
        Op::Read | Op::KillVmm => ("GetVmInfo", json!({"vm_id": name})),
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
