//! VMs on record that this program cannot run: shown, their names and disks taken, and ended and removed by force alone.

use std::process::{Child, Command};

use vmm_core::config::CpuConfig;
use vmm_core::id::BackendName;
use vmm_core::state::{Phase, VmState};
use vmm_core::store::{Intent, IntentKind, ProcessIdentity, VmRecord};
use vmm_service::ListQuery;
use vmm_testkit::fake::ScriptedMethod;

use crate::common::*;

/// Leaves VM `a` in `state` with something that the next daemon does not know.
fn left_unknown(bed: &Bed, state: VmState, unknown: impl FnOnce(&mut VmRecord)) -> VmRecord {
    bed.life(async |vms| vms.bring_to("a", bed.with_disk("d"), state).await);
    let mut record = bed.stored("a");
    unknown(&mut record);
    bed.store.put(record.clone());
    record
}

fn no_config(record: &mut VmRecord) {
    record.config.cpu = Some(CpuConfig { vcpu_count: -1, ..CpuConfig::default() });
}

fn no_backend(record: &mut VmRecord) {
    record.backend = BackendName::new("bhyve");
}

#[test]
fn a_quarantined_vm_keeps_its_state_and_its_name() {
    for (unknown, word) in [(no_config as fn(&mut VmRecord), "vcpu_count"), (no_backend, "bhyve")] {
        for state in VmState::ALL {
            let bed = Bed::new();
            let left = left_unknown(&bed, state, unknown);
            bed.life(async |vms| {
                let shown = vms.record("a");
                assert_eq!((shown.state, shown.status.phase), (state, Phase::Unreachable));
                assert_eq!((shown.status.reason.as_str(), shown.uid), ("not-taken-up", left.uid));
                assert!(shown.status.message.contains(word), "{}", shown.status.message);
                assert_eq!(vms.service.list(&ListQuery::default()).unwrap().total_count, 1);
                refused(vms.try_create("a", bed.config()).await, "already-exists");
                let text = refused(vms.boot("a").await, "unavailable");
                assert!(text.contains(word) && text.contains("force"), "{text}");
                for refusal in [vms.pause("a").await, vms.resume("a").await, vms.shutdown("a").await] {
                    refused(refusal, "unavailable");
                }
                refused(vms.reboot("a").await, "unavailable");
                refused(vms.force_reboot("a").await, "unavailable");
                refused(vms.delete("a").await, "unavailable");
                if state.is_live() {
                    vms.create("b", bed.with_disk("d")).await;
                    let text = refused(vms.boot("b").await, "precondition");
                    assert!(text.contains("VM \"a\""), "its disk is taken: {text}");
                }
                assert_eq!(
                    vms.world.calls(ScriptedMethod::Adopt) + vms.world.calls(ScriptedMethod::Sweep),
                    0,
                    "touched by nobody"
                );
            });
            assert_eq!(bed.stored("a"), left, "its record stays as it is");
            if let Some(machine) = bed.world.machine("a") {
                machine.end(vmm_core::backend::ExitCause::Unknown);
            }
        }
    }
}

#[test]
fn a_quarantined_vm_is_adopted_by_a_program_that_knows_it() {
    let bed = Bed::new();
    let left = left_unknown(&bed, VmState::Running, no_config);
    bed.life(async |vms| assert_eq!(vms.reason("a"), "not-taken-up"));
    bed.store.put(VmRecord { config: left.requested.unpack().config, ..left });
    bed.life(async |vms| {
        assert_eq!((vms.state("a"), vms.phase("a")), (VmState::Running, Phase::Running));
        vms.shutdown("a").await.unwrap();
    });
}

#[test]
fn force_ends_and_removes_a_quarantined_vm() {
    for state in VmState::ALL {
        let bed = Bed::new();
        left_unknown(&bed, state, no_config);
        bed.life(async |vms| {
            if state.is_live() {
                vms.force_shutdown("a").await.unwrap();
                assert_eq!((vms.state("a"), bed.stored("a").state), (VmState::Shutdown, VmState::Shutdown));
                assert_eq!(vms.world.living(), 0);
                refused(vms.boot("a").await, "unavailable");
            }
            assert!(vms.force_delete("a").await.unwrap().left_behind.is_empty());
            refused(vms.service.get("a").map(drop), "not-found");
            assert!(bed.store.vms().is_empty());
            vms.create("a", bed.config()).await;
        });
    }
}

#[test]
fn an_unreadable_record_affects_its_own_vm_only() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.bring_to("a", bed.with_disk("d"), VmState::Running).await;
        vms.bring_to("other", bed.config(), VmState::Running).await;
    });
    bed.store.make_unreadable("a", "its record has a word of a newer release");
    bed.life(async |vms| {
        let shown = vms.record("a");
        assert_eq!((shown.state, shown.status.phase), (VmState::Running, Phase::Unreachable));
        assert_eq!(shown.status.reason.as_str(), "not-taken-up");
        assert!(shown.status.message.contains("newer release"), "{}", shown.status.message);
        refused(vms.try_create("a", bed.config()).await, "already-exists");
        refused(vms.shutdown("a").await, "unavailable");
        vms.create("b", bed.with_disk("d")).await;
        assert!(refused(vms.boot("b").await, "precondition").contains("VM \"a\""), "its disk is taken");
        vms.pause("other").await.unwrap();
        vms.force_shutdown("a").await.unwrap();
        assert_eq!((vms.state("a"), vms.world.living()), (VmState::Shutdown, 1));
        vms.boot("b").await.unwrap();
        assert!(vms.force_delete("a").await.unwrap().left_behind.is_empty());
        refused(vms.service.get("a").map(drop), "not-found");
        assert!(bed.store.vm("a").is_none());
    });
}

/// A process that stands for the VMM of a hypervisor that nobody here knows. It ends with the test.
struct Stranger(Child);

impl Stranger {
    fn start() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn identity(&self) -> ProcessIdentity {
        let pid = self.0.id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        // The 22nd field, counted from behind the name in parentheses.
        let start_ticks =
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        ProcessIdentity { pid, start_ticks, boot_id: vmm_host::process::boot_id().unwrap(), namespaces: None }
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_vmm_of_an_unknown_hypervisor_is_ended_only_if_its_identity_is_proven() {
    for proven in [false, true] {
        let bed = Bed::new();
        let mut stranger = Stranger::start();
        let mut identity = stranger.identity();
        if !proven {
            // The pid is somebody else's by now.
            identity.start_ticks -= 1;
        }
        left_unknown(&bed, VmState::Running, |record| {
            no_backend(record);
            record.run.as_mut().unwrap().process = identity;
        });
        bed.world.host_dies();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let vms = bed.start().await;
            assert!(vms.force_delete("a").await.unwrap().left_behind.is_empty());
        });
        assert_eq!(stranger.has_ended(), proven);
        assert!(bed.store.vms().is_empty());
    }
}

#[test]
fn an_interrupted_deletion_of_a_quarantined_vm_is_completed() {
    for unknown in [no_config as fn(&mut VmRecord), no_backend] {
        let bed = Bed::new();
        left_unknown(&bed, VmState::Created, |record| {
            unknown(record);
            record.intent = Some(Intent { kind: IntentKind::Delete, caller: me(), since_ms: 1, scope: None });
        });
        bed.life(async |vms| {
            refused(vms.service.get("a").map(drop), "not-found");
            assert!(bed.store.vms().is_empty());
        });
    }
}

#[test]
fn the_taps_of_a_quarantined_vm_are_found_by_their_labels() {
    let bed = Bed::new();
    bed.life(async |vms| vms.bring_to("a", bed.with_tap("tap-x"), VmState::Shutdown).await);
    assert_eq!(bed.taps.names(), ["tap-x"]);
    let mut record = bed.stored("a");
    no_config(&mut record);
    bed.store.put(record);
    bed.life(async |vms| {
        vms.force_delete("a").await.unwrap();
        assert!(bed.taps.names().is_empty());
    });
}
