//! UpdateVm and the protection against deletion.

use std::time::Duration;

use vmm_core::backend::ExitCause;
use vmm_core::config::{
    ConsoleConfig, CpuConfig, MemoryConfig, NetworkInterface, RestartPolicyConfig, VmConfig,
};
use vmm_core::event::EventKind;
use vmm_core::state::{Phase, VmState};
use vmm_core::store::VmRecord;
use vmm_service::{ConfigUpdate, EventsQuery, ListQuery, WatchMessage, WatchQuery};

use crate::common::*;
use crate::events::{change, changes, presents, watch};

/// The change to `config` of every part that it has.
fn to(config: VmConfig) -> ConfigUpdate {
    ConfigUpdate { config, ..ConfigUpdate::default() }
}

fn cpus(count: i32) -> ConfigUpdate {
    to(VmConfig { cpu: Some(CpuConfig { vcpu_count: count, ..CpuConfig::default() }), ..VmConfig::default() })
}

fn policy(mode: i32, max_restarts: i32) -> ConfigUpdate {
    to(VmConfig { restart_policy: Some(RestartPolicyConfig { mode, max_restarts }), ..VmConfig::default() })
}

fn protected(on: bool) -> ConfigUpdate {
    ConfigUpdate {
        config: VmConfig { delete_protection: on, ..VmConfig::default() },
        fields: vec!["delete_protection".to_owned()],
        ..ConfigUpdate::default()
    }
}

fn cleared(fields: &[&str]) -> ConfigUpdate {
    let fields = fields.iter().map(|field| (*field).to_owned()).collect();
    ConfigUpdate { fields, ..ConfigUpdate::default() }
}

fn query(team: &str) -> WatchQuery {
    WatchQuery { metadata: [("team".to_owned(), team.to_owned())].into(), ..WatchQuery::default() }
}

fn count_with_label(vms: &Vms, team: &str) -> usize {
    let metadata = [("team".to_owned(), team.to_owned())].into();
    vms.service.list(&ListQuery { metadata, ..ListQuery::default() }).unwrap().total_count
}

#[tokio::test(start_paused = true)]
async fn a_stopped_vm_accepts_every_part_and_boots_with_it() {
    for state in [VmState::Created, VmState::Shutdown] {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.bring_to("a", bed.config(), state).await;
        let before = vms.record("a");
        let new = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 2, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 256 << 20, ..MemoryConfig::default() }),
            storage: vec![bed.disk("d")],
            metadata: [("team".to_owned(), "blue".to_owned())].into(),
            ..VmConfig::default()
        };
        let outcome = vms.update("a", to(new)).await.unwrap();
        let record = vms.record("a");
        assert_eq!(outcome.record, record);
        assert_eq!((record.state, record.generation), (state, before.generation + 1));
        assert_eq!(record.requested, before.requested, "a repeated CreateVm is still recognised");
        assert_eq!(record.config.storage[0].id, "disk0");
        assert_eq!(record.config.boot, before.config.boot, "a part that is not named stays");
        assert_eq!(bed.stored("a"), *record);
        vms.boot("a").await.unwrap();
        let spec = vms.machine("a").spec().unwrap();
        assert_eq!((spec.cpu.count, spec.memory.size_bytes), (2, 256 << 20));
        assert_eq!(spec.disks.len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_running_vm_accepts_only_the_parts_that_concern_the_program_alone() {
    for state in [VmState::Running, VmState::Paused] {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.bring_to("a", bed.config(), state).await;
        let before = vms.record("a");
        let text = refused(vms.update("a", cpus(2)).await, "precondition");
        assert!(text.contains("its cpu ") && text.contains("ShutdownVm"), "{text}");
        assert_eq!(vms.record("a"), before);
        // A part that equals the stored one is no change.
        let mut update = cpus(1);
        update.config.metadata = labelled("blue").config.metadata;
        update.config.restart_policy = policy(NEVER, 0).config.restart_policy;
        update.config.delete_protection = true;
        vms.update("a", update).await.unwrap();
        let record = vms.record("a");
        assert_eq!((record.state, &record.status, &record.run), (state, &before.status, &before.run));
        assert_eq!(record.config.metadata["team"], "blue");
        assert!(record.config.delete_protection && record.config.restart_policy.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn an_update_without_a_change_keeps_the_generation_and_has_no_event() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.with_disk("d");
    config.network.push(NetworkInterface::default());
    vms.create("a", config.clone()).await;
    let (before, log) = (vms.record("a"), bed.store.log().len());
    for update in [to(config), cpus(1), ConfigUpdate::default(), cleared(&["console", "metadata"])] {
        let outcome = vms.update("a", update).await.unwrap();
        assert_eq!(outcome.record, before);
    }
    assert_eq!(bed.store.log().len(), log);
}

#[tokio::test(start_paused = true)]
async fn an_update_needs_the_current_generation() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    let read = i64::try_from(vms.record("a").generation).unwrap();
    vms.update("a", ConfigUpdate { if_generation: read, ..labelled("blue") }).await.unwrap();
    let late = ConfigUpdate { if_generation: read, ..labelled("red") };
    let text = refused(vms.update("a", late).await, "aborted");
    assert!(text.contains(&format!("generation {}", read + 1)), "{text}");
    assert_eq!(vms.record("a").config.metadata["team"], "blue");
}

#[tokio::test(start_paused = true)]
async fn an_update_refuses_the_values_that_a_creation_refuses() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.with_disk("d")).await;
    let before = vms.record("a");
    let gone = NetworkInterface { tap_device: "x".repeat(16), ..NetworkInterface::default() };
    let mut disk = bed.disk("d");
    disk.path = bed.path("nowhere");
    let wrong = VmConfig {
        cpu: Some(CpuConfig { vcpu_count: -1, ..CpuConfig::default() }),
        storage: vec![disk],
        network: vec![gone],
        ..VmConfig::default()
    };
    let found = violations(vms.update("a", to(wrong)).await);
    let fields: Vec<_> = found.iter().map(|(field, _)| field.as_str()).collect();
    for field in ["config.cpu.vcpu_count", "config.storage[0].path", "config.network[0].tap_device"] {
        assert!(fields.contains(&field), "{field} is among {fields:?}");
    }
    let found = violations(vms.update("a", cleared(&["cpu", "memory", "boot", "storage"])).await);
    let fields: Vec<_> = found.iter().map(|(field, _)| field.as_str()).collect();
    assert_eq!(fields, ["config.cpu", "config.memory", "config.boot.kernel_path"]);
    let found = violations(vms.update("a", cleared(&["kernel"])).await);
    assert_eq!(found[0].0, "fields[0]");
    assert_eq!(vms.record("a"), before);
}

#[tokio::test(start_paused = true)]
async fn a_label_can_change_although_a_file_of_the_vm_is_gone_and_a_guest_has_written_to_its_disk() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let config = VmConfig { storage: vec![bed.disk("d"), bed.disk("e")], ..bed.config() };
    vms.create("a", config).await;
    std::fs::write(bed.path("d"), [b"QFI\xfb".as_slice(), &[0; 4092]].concat()).unwrap();
    std::fs::remove_file(bed.path("vmlinux")).unwrap();
    vms.label("a", "blue").await.unwrap();
    // A disk that stays is not probed again, and a new one is looked at.
    let stored = vms.record("a").config.storage.clone();
    vms.update("a", to(VmConfig { storage: vec![stored[0].clone()], ..VmConfig::default() })).await.unwrap();
    let mut new = bed.disk("f");
    std::fs::copy(bed.path("d"), &new.path).unwrap();
    new.id = "new".to_owned();
    let storage = vec![stored[0].clone(), new];
    let found = violations(vms.update("a", to(VmConfig { storage, ..VmConfig::default() })).await);
    assert!(found.iter().all(|(field, _)| field.starts_with("config.storage[1]")), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn an_update_has_the_warnings_of_a_creation() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut other = bed.with_tap("t");
    other.network[0].mac_address = "02:00:00:00:00:01".to_owned();
    vms.create("other", other.clone()).await;
    vms.create("a", bed.config()).await;
    let network = vec![NetworkInterface { tap_device: "u".to_owned(), ..other.network[0].clone() }];
    let outcome = vms.update("a", to(VmConfig { network, ..VmConfig::default() })).await.unwrap();
    let fields: Vec<_> = outcome.warnings.iter().map(|warning| warning.field.as_str()).collect();
    assert_eq!(fields, ["config.network[0].tap_device", "config.network[0].mac_address"]);
    // The index knows the new address at once.
    other.network[0].tap_device = "v".to_owned();
    vms.delete("other").await.unwrap();
    let warned = vms.try_create("third", other).await.unwrap().warnings;
    assert!(warned.iter().any(|warning| warning.message.contains("VM \"a\"")), "{warned:?}");
}

#[tokio::test(start_paused = true)]
async fn lists_watches_and_events_follow_the_labels() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.config()).await;
    vms.label("a", "blue").await.unwrap();
    let [mut blue, mut red] = [watch(&vms, query("blue")).await, watch(&vms, query("red")).await];
    assert_eq!((presents(&mut blue).await.0.len(), presents(&mut red).await.0.len()), (1, 0));
    vms.label("a", "red").await.unwrap();
    assert_eq!((count_with_label(&vms, "blue"), count_with_label(&vms, "red")), (0, 1));
    for watch in [&mut blue, &mut red] {
        let event = &change(watch).await.event.event.clone();
        assert_eq!((event.kind, event.cause.as_str()), (EventKind::Updated, "UpdateVm"));
        assert_eq!(event.update.as_ref().unwrap().parts, ["metadata"]);
        assert_eq!(event.metadata["team"], "red", "and not the labels that it left");
    }
    vms.pause("a").await.unwrap();
    assert_eq!(changes(&mut blue).len(), 0);
    assert_eq!(changes(&mut red).len(), 2);
    let listed = vms.service.list_events(&EventsQuery::default()).await.unwrap().events;
    let labels: Vec<_> = listed.iter().map(|it| it.event.event.metadata.get("team").cloned()).collect();
    assert_eq!(labels.iter().filter(|label| label.as_deref() == Some("blue")).count(), 1);
    assert_eq!(labels.last().unwrap().as_deref(), Some("red"));
}

#[tokio::test(start_paused = true)]
async fn each_event_has_the_vm_at_its_time() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut live = watch(&vms, WatchQuery::default()).await;
    let token = presents(&mut live).await.1;
    vms.create("a", bed.config()).await;
    vms.update("a", cpus(2)).await.unwrap();
    vms.boot("a").await.unwrap();
    vms.force_delete("a").await.unwrap();
    let live = changes(&mut live);
    let mut replayed = watch(&vms, WatchQuery { resume_token: token, ..WatchQuery::default() }).await;
    assert_eq!(changes(&mut replayed), live, "a replayed event says what it said at first");
    let mut generation = 0;
    for recorded in &live {
        let event = &recorded.event.event;
        if event.kind == EventKind::Deleted {
            assert_eq!(event.summary, None, "no list shows the VM");
            continue;
        }
        let summary = event.summary.as_ref().unwrap();
        assert_eq!(summary.vcpus, if event.kind == EventKind::Created { 1 } else { 2 });
        assert_eq!(summary.backend.as_str(), "fake");
        assert_eq!(summary.generation, generation + 1);
        generation = summary.generation;
    }
    vms.create("b", bed.config()).await;
    let mut new = watch(&vms, WatchQuery::default()).await;
    let WatchMessage::Present(present) = new.next().await.unwrap() else { panic!("the VM comes first") };
    assert_eq!(present.summary.unwrap().generation, 1);
}

#[tokio::test(start_paused = true)]
async fn the_tap_of_a_removed_interface_is_freed_and_the_others_stay() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let mut config = bed.with_tap("tap-x");
    config.network.extend([NetworkInterface::default(), NetworkInterface::default()]);
    vms.bring_to("a", config, VmState::Shutdown).await;
    let stored = vms.record("a").config.network.clone();
    let (uid, made) = (vms.record("a").uid, bed.taps.names());
    assert_eq!(made, ["tap-x".to_owned(), uid.tap_name(1), uid.tap_name(2)]);
    let network = vec![stored[2].clone()];
    vms.update("a", to(VmConfig { network, ..VmConfig::default() })).await.unwrap();
    assert_eq!(vms.record("a").config.network, [stored[2].clone()]);
    assert_eq!(bed.taps.names(), [uid.tap_name(2)]);
    vms.boot("a").await.unwrap();
    vms.shutdown("a").await.unwrap();
    vms.update("a", cleared(&["network"])).await.unwrap();
    assert_eq!(bed.taps.names(), Vec::<String>::new());
    // Nothing stays claimed.
    vms.run("b", bed.with_tap("tap-x")).await;
}

#[test]
fn a_tap_that_a_killed_daemon_had_to_free_is_freed_by_the_next() {
    let bed = Bed::new();
    let config = VmConfig { network: vec![NetworkInterface::default(); 2], ..bed.config() };
    bed.life(async |vms| vms.bring_to("a", config, VmState::Shutdown).await);
    let before = bed.stored("a");
    let mut config = before.config.clone();
    config.network.truncate(1);
    bed.store.put(VmRecord { config, generation: before.generation + 1, ..before.clone() });
    bed.life(async |_| ());
    assert_eq!(bed.taps.names(), [before.uid.tap_name(0)]);
}

#[tokio::test(start_paused = true)]
async fn a_new_policy_is_in_force_for_the_run_that_lasts() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(NEVER, 0)).await;
    vms.update("a", policy(ON_FAILURE, 0)).await.unwrap();
    vms.machine("a").end(ExitCause::VmmFailed);
    vms.until_phase("a", Phase::Restarting).await;
    vms.until_phase("a", Phase::Running).await;
    vms.update("a", policy(NEVER, 0)).await.unwrap();
    vms.machine("a").reset();
    let record = vms.until("a", |record| record.state == VmState::Shutdown).await;
    assert_eq!(record.status.reason.as_str(), "guest-reset");
    // A policy decides at the end of a run, and this run has ended.
    vms.update("a", policy(ALWAYS, 0)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(vms.state("a"), VmState::Shutdown);
}

#[tokio::test(start_paused = true)]
async fn a_new_policy_cancels_a_waiting_restart_that_it_does_not_allow() {
    let cases = [
        (policy(NEVER, 0), Phase::Failed, "vmm-failed"),
        (policy(GUEST_REBOOT, 0), Phase::Failed, "vmm-failed"),
        (cleared(&["restart_policy"]), Phase::Failed, "vmm-failed"),
        (policy(ON_FAILURE, 0), Phase::Running, ""),
        (policy(ALWAYS, 1), Phase::Running, ""),
    ];
    for (update, phase, reason) in cases {
        let bed = Bed::new();
        let vms = bed.start().await;
        vms.run("a", bed.with_policy(ON_FAILURE, 3)).await;
        vms.machine("a").end(ExitCause::VmmFailed);
        vms.until_phase("a", Phase::Restarting).await;
        vms.update("a", update.clone()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        let record = vms.record("a");
        assert_eq!(record.status.phase, phase, "{update:?}");
        assert!(record.status.reason.as_str() == reason || phase == Phase::Running, "{record:?}");
        assert_eq!(vms.world.living(), usize::from(phase == Phase::Running), "{update:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiting_restart_uses_the_new_machine_and_the_new_limit() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_policy(ON_FAILURE, 9)).await;
    vms.machine("a").end(ExitCause::VmmFailed);
    vms.until_phase("a", Phase::Restarting).await;
    vms.update("a", cpus(2)).await.unwrap();
    assert_eq!(vms.phase("a"), Phase::Restarting);
    vms.until_phase("a", Phase::Running).await;
    assert_eq!(vms.machine("a").spec().unwrap().cpu.count, 2);
    vms.machine("a").end(ExitCause::VmmFailed);
    let record = vms.until_phase("a", Phase::Restarting).await;
    assert_eq!(record.status.restarts, 2);
    vms.update("a", policy(ON_FAILURE, 1)).await.unwrap();
    let record = vms.record("a");
    assert_eq!((record.status.phase, record.status.reason.as_str()), (Phase::Failed, "restart-loop"));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(vms.world.living(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_protected_vm_cannot_be_deleted_until_the_protection_is_cleared() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for state in VmState::ALL {
        let vm_id = state.name().to_lowercase();
        let config = VmConfig { delete_protection: true, ..bed.config() };
        vms.bring_to(&vm_id, config.clone(), state).await;
        let before = vms.record(&vm_id);
        for refusal in [vms.delete(&vm_id).await, vms.force_delete(&vm_id).await] {
            let text = refused(refusal, "precondition");
            assert!(text.contains("delete_protection") && text.contains("UpdateVm"), "{text}");
        }
        assert_eq!(vms.record(&vm_id), before);
        vms.create(&vm_id, config).await;
        refused(vms.try_create(&vm_id, bed.config()).await, "already-exists");
        vms.update(&vm_id, protected(false)).await.unwrap();
        vms.force_delete(&vm_id).await.unwrap();
    }
    assert_eq!(vms.world.living(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_forced_deletion_that_is_refused_pre_empts_nothing() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", VmConfig { delete_protection: true, ..bed.config() }).await;
    machine.ignore_shutdown();
    let other = vms.clone();
    let shutdown = vms.begin(async move { other.shutdown("a").await }).await;
    refused(vms.force_delete("a").await, "precondition");
    assert_eq!(shutdown.await.unwrap().unwrap().record.state, VmState::Shutdown);
}

#[tokio::test(start_paused = true)]
async fn a_new_console_file_must_not_exist_and_is_not_the_vms_until_it_is_made() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let console = |name: &str| {
        let output = bed.path(name);
        Some(ConsoleConfig { enabled: true, output, ..ConsoleConfig::default() })
    };
    vms.bring_to("a", VmConfig { console: console("one"), ..bed.config() }, VmState::Shutdown).await;
    assert!(vms.record("a").owns_console_output);
    std::fs::write(bed.path("foreign"), "").unwrap();
    let found = violations(
        vms.update("a", to(VmConfig { console: console("foreign"), ..VmConfig::default() })).await,
    );
    assert_eq!(found[0].0, "config.console.output");
    vms.update("a", to(VmConfig { console: console("two"), ..VmConfig::default() })).await.unwrap();
    assert!(!vms.record("a").owns_console_output);
    // Another program makes the file before the boot, which must not write to it.
    std::fs::write(bed.path("two"), "").unwrap();
    refused(vms.boot("a").await, "precondition");
}

#[tokio::test(start_paused = true)]
async fn an_update_keeps_the_intent_of_a_shutdown_that_has_not_ended_its_vm_yet() {
    use vmm_core::backend::{BackendErrorKind, Effect};
    use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};
    let bed = Bed::new();
    let vms = bed.start().await;
    let machine = vms.run("a", bed.with_policy(ALWAYS, 0)).await;
    vms.world
        .next(ScriptedMethod::Shutdown, ScriptedResult::Fail(BackendErrorKind::StillRuns, Effect::Unknown));
    vms.shutdown("a").await.unwrap_err();
    let intent = vms.record("a").intent.clone();
    assert!(intent.is_some(), "the shutdown may still come about");
    vms.label("a", "blue").await.unwrap();
    assert_eq!(vms.record("a").intent, intent);
    machine.end(ExitCause::GuestPowerOff);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(vms.state("a"), VmState::Shutdown, "a client's ShutdownVm is never undone");
}
