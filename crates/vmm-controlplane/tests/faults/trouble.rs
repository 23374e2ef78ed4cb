//! What befalls the VMMs of others: they are killed, stand still or cannot be found any more, with a daemon and without.
//!
//! Those that the daemon starts itself have this in tests/e2e (signals, trouble, adoption).

use std::rc::Rc;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::case::Case;
use crate::harness::{eventually, is_alive, signal, skipped, vmm_pid};
use crate::hypervisor::Backend;
use crate::inspect;
use crate::scenario::{RUNNING, SHUT_DOWN};
use crate::stage::Stage;

/// Something that befalls a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// SIGKILL.
    Killed,
    /// SIGSTOP, and later SIGCONT.
    StandsStill,
    /// Its socket is taken away, or its domain's definition.
    Vanishes,
}

impl Trouble {
    pub(crate) const ALL: [Self; 3] = [Self::Killed, Self::StandsStill, Self::Vanishes];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Killed => "a VMM is killed",
            Self::StandsStill => "a VMM stands still",
            Self::Vanishes => "a VMM vanishes",
        }
    }
}

/// Whether a daemon is there when it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Daemon {
    Watches,
    IsAway,
}

/// Has it happen to a VM that runs, with the daemon watching and with the daemon away.
pub(crate) fn run(test: &str, hypervisor: Backend, trouble: Trouble) {
    let stage = match Stage::set(hypervisor) {
        Ok(stage) => stage,
        Err(why) => return skipped(test, &why),
    };
    for daemon in [Daemon::Watches, Daemon::IsAway] {
        let case = Case::running(&stage);
        let pid = vmm_pid(&case.world.info(&case.vm));
        match trouble {
            Trouble::Killed => killed(case, pid, daemon),
            Trouble::StandsStill => stands_still(case, pid, daemon),
            Trouble::Vanishes if hypervisor == Backend::Libvirt => loses_its_definition(case, pid, daemon),
            Trouble::Vanishes => loses_its_socket(case, pid, daemon),
        }
    }
    stage.leave();
}

/// Does `what`, with the daemon away or there.
fn happen(case: &mut Case, daemon: Daemon, what: impl FnOnce(&Case)) {
    if daemon == Daemon::IsAway {
        case.world.stop(Signal::KILL);
    }
    what(case);
    if daemon == Daemon::IsAway {
        case.world.start();
    }
}

fn killed(mut case: Case, pid: u32, daemon: Daemon) {
    happen(&mut case, daemon, |_| {
        signal(pid, Signal::KILL);
        eventually("it has gone", || !is_alive(pid));
    });
    let info = case.world.wait_for_state(&case.vm, "VM_STATE_SHUTDOWN");
    assert_ne!(info["status"]["reason"], Value::Null, "{info:#}");
    inspect::settled(&case, &[SHUT_DOWN]);
    inspect::acknowledged(&case);
    case.witness_goes_on();
    case.end();
}

fn stands_still(mut case: Case, pid: u32, daemon: Daemon) {
    happen(&mut case, daemon, |_| signal(pid, Signal::STOP));
    is_unreachable(&case, pid);
    case.witness_goes_on();
    signal(pid, Signal::CONT);
    is_reached_again(&case, pid);
    case.end();
}

/// The VM is shown as it was last proven, is not touched, and holds up nobody.
#[track_caller]
fn is_unreachable(case: &Case, pid: u32) {
    case.world.wait_for(&case.vm, "unreachable", |info| info["status"]["phase"] == "unreachable");
    let info = case.world.info(&case.vm);
    assert_eq!(info["state"], "VM_STATE_RUNNING", "the last proven state: {info:#}");
    for method in ["PauseVm", "ShutdownVm", "DeleteVm"] {
        let answer = case.world.call(method, &json!({"vm_id": case.vm}));
        assert!(["unavailable", "failed_precondition"].contains(&answer.body["code"].as_str().unwrap_or("")));
    }
    assert!(is_alive(pid), "it is touched by nobody");
    for method in ["PauseVm", "ResumeVm"] {
        case.world.call(method, &json!({"vm_id": case.witness_vm})).ok();
    }
}

/// The VM is what it was before, and can be used.
#[track_caller]
fn is_reached_again(case: &Case, pid: u32) {
    case.world.wait_for(&case.vm, "reached again", |info| info["status"]["phase"] == "running");
    can_be_used(case);
    inspect::settled(case, &[RUNNING]);
    assert_eq!(vmm_pid(&case.world.info(&case.vm)), pid);
    inspect::acknowledged(case);
    case.witness_goes_on();
}

#[track_caller]
fn can_be_used(case: &Case) {
    for method in ["PauseVm", "ResumeVm"] {
        case.world.call(method, &json!({"vm_id": case.vm})).ok();
    }
}

/// The socket is renamed: its VMM lives and listens, and nobody finds it.
fn loses_its_socket(mut case: Case, pid: u32, daemon: Daemon) {
    let socket = case.hand.as_ref().unwrap().socket.clone();
    let away = socket.with_extension("away");
    happen(&mut case, daemon, |_| std::fs::rename(&socket, &away).unwrap());
    match daemon {
        // It has its connection still.
        Daemon::Watches => can_be_used(&case),
        Daemon::IsAway => {
            is_unreachable(&case, pid);
            // What cannot be proven is ended by nobody, not even by force.
            let refused = case.world.call("ShutdownVm", &json!({"vm_id": case.vm, "force": true}));
            refused.error("failed_precondition");
            assert!(is_alive(pid));
        }
    }
    std::fs::rename(&away, &socket).unwrap();
    is_reached_again(&case, pid);
    // Gone for good, its end is seen all the same.
    std::fs::remove_file(&socket).unwrap();
    signal(pid, Signal::KILL);
    case.world.wait_for_state(&case.vm, "VM_STATE_SHUTDOWN");
    case.end();
}

/// The domain is undefined by virsh: it goes on until its QEMU ends, and then there is none any more.
fn loses_its_definition(mut case: Case, pid: u32, daemon: Daemon) {
    let stage = Rc::clone(&case.stage);
    let virsh = |command: &str| drop(stage.libvirtd.as_ref().unwrap().virsh(&[command, "vm"]));
    happen(&mut case, daemon, |_| virsh("undefine"));
    is_reached_again(&case, pid);
    happen(&mut case, daemon, |_| virsh("destroy"));
    case.world.wait_for_state(&case.vm, "VM_STATE_SHUTDOWN");
    inspect::settled(&case, &[SHUT_DOWN]);
    case.end();
}
