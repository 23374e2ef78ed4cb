//! A writable disk or a TAP serves one running VM.

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause};
use vmm_core::config::{StorageDevice, VmConfig};
use vmm_core::event::EventKind;
use vmm_core::state::{Phase, VmState};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

use crate::common::*;

/// VM `b` cannot boot while `a` holds what both want. The refusal is on record.
async fn b_is_refused(bed: &Bed, vms: &Vms, what: &str) {
    let before = vms.world.calls(ScriptedMethod::Launch);
    let text = refused(vms.boot("b").await, "precondition");
    assert!(text.contains("VM \"a\"") && text.contains(what), "{text} names {what} and its holder");
    assert_eq!((vms.state("b"), vms.world.calls(ScriptedMethod::Launch)), (VmState::Created, before));
    let status = bed.stored("b").status;
    assert_eq!((status.phase, status.reason.as_str()), (Phase::Failed, "boot-failed"));
    assert_eq!(status.message, text);
    let last = bed.store.log().pop().unwrap().event;
    assert_eq!((last.kind, last.cause.as_str(), last.caller), (EventKind::OperationFailed, "BootVm", me()));
    assert_eq!(last.status, status);
}

#[tokio::test(start_paused = true)]
async fn a_refused_reboot_is_recorded_and_the_vm_runs_on() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_disk("d")).await;
    std::fs::remove_file(bed.path("vmlinux")).unwrap();
    let text = refused(vms.reboot("a").await, "precondition");
    let record = bed.stored("a");
    assert_eq!((record.state, record.status.phase), (VmState::Running, Phase::Running));
    assert_eq!((record.status.reason.as_str(), &record.status.message), ("operation-failed", &text));
    let last = bed.store.log().pop().unwrap().event;
    assert_eq!((last.kind, last.cause.as_str()), (EventKind::OperationFailed, "RebootVm"));
}

#[tokio::test(start_paused = true)]
async fn a_claimed_disk_or_tap_is_refused_to_another_vm() {
    let bed = Bed::new();
    for (config, what) in [(bed.with_disk("d"), bed.path("d")), (bed.with_tap("tap-x"), "tap-x".to_owned())] {
        let vms = bed.start().await;
        vms.create("b", config.clone()).await;
        vms.run("a", config).await;
        b_is_refused(&bed, &vms, &what).await;
        vms.pause("a").await.unwrap();
        b_is_refused(&bed, &vms, &what).await;
        vms.resume("a").await.unwrap();
        vms.reboot("a").await.unwrap();
        b_is_refused(&bed, &vms, &what).await;
        vms.shutdown("a").await.unwrap();
        vms.boot("b").await.expect("it is free");
        refused(vms.boot("a").await, "precondition");
        for vm_id in ["a", "b"] {
            vms.force_delete(vm_id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn the_files_of_a_backing_chain_are_claimed_read_only() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let base = bed.disk("base");
    let middle = bed.qcow2("middle", Some(("base", "raw")));
    let with = |disk: StorageDevice| VmConfig { storage: vec![disk], ..bed.config() };
    vms.run("a", with(bed.qcow2("top", Some(("middle", "qcow2"))))).await;
    for (disk, name) in [(&base, "base"), (&middle, "middle")] {
        vms.create("b", with(disk.clone())).await;
        b_is_refused(&bed, &vms, &bed.path(name)).await;
        vms.delete("b").await.unwrap();
        vms.run("reader", with(StorageDevice { read_only: true, ..disk.clone() })).await;
        vms.force_delete("reader").await.unwrap();
    }
    vms.run("sibling", with(bed.qcow2("sibling", Some(("middle", "qcow2"))))).await;
    vms.shutdown("a").await.unwrap();
    vms.shutdown("sibling").await.unwrap();
    vms.run("b", with(base)).await;
    refused(vms.boot("a").await, "precondition");
}

#[tokio::test]
async fn the_claims_are_held_between_the_halves_of_a_reboot() {
    let mut bed = Bed::new();
    bed.single_use = true;
    let vms = bed.start().await;
    vms.create("b", bed.with_disk("d")).await;
    vms.run("a", bed.with_disk("d")).await;
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let tries = tokio::spawn({
        let (vms, done) = (vms.clone(), done.clone());
        async move {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                b_is_told_of(&vms).await;
            }
        }
    });
    for _ in 0..20 {
        vms.force_reboot("a").await.expect("its disk is still its own");
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    tries.await.unwrap();
    // A second half that fails gives back what the first half held.
    vms.world
        .next(ScriptedMethod::Launch, ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied));
    refused(vms.force_reboot("a").await, "precondition");
    vms.boot("b").await.expect("it is free");
}

async fn b_is_told_of(vms: &Vms) {
    let text = refused(vms.boot("b").await, "precondition");
    assert!(text.contains("VM \"a\""), "{text}");
}

#[tokio::test(start_paused = true)]
async fn every_end_of_a_run_releases_its_claims() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("b", bed.with_disk("d")).await;
    for end in 0..5 {
        let machine = vms.run("a", bed.with_disk("d")).await;
        b_is_refused(&bed, &vms, "d").await;
        match end {
            0 => machine.power_off(),
            1 => machine.end(ExitCause::VmmFailed),
            2 => machine.fail_guest("cannot go on"),
            3 => drop(vms.force_shutdown("a").await.unwrap()),
            _ => drop(vms.force_delete("a").await.unwrap()),
        }
        if end < 4 {
            vms.until("a", |record| record.state == VmState::Shutdown).await;
            vms.force_delete("a").await.unwrap();
        }
        vms.boot("b").await.expect("it is free");
        vms.force_delete("b").await.unwrap();
        vms.create("b", bed.with_disk("d")).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_boot_releases_its_claims() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for vm_id in ["a", "b"] {
        vms.create(vm_id, bed.with_disk("d")).await;
    }
    vms.world.next(ScriptedMethod::Launch, ScriptedResult::do_then_hang());
    refused(vms.boot("a").await, "unavailable");
    vms.boot("b").await.expect("it is free");
}

#[tokio::test(start_paused = true)]
async fn readers_share_a_disk_which_is_the_same_under_another_path() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let read_only = || {
        let mut config = bed.with_disk("d");
        config.storage[0].read_only = true;
        config
    };
    vms.run("a", read_only()).await;
    vms.run("r", read_only()).await;
    std::fs::hard_link(bed.path("d"), bed.path("alias")).unwrap();
    vms.create("b", bed.with_disk("alias")).await;
    let text = refused(vms.boot("b").await, "precondition");
    assert!(text.contains("in use by VM"), "{text}");
    for vm_id in ["a", "r"] {
        vms.shutdown(vm_id).await.unwrap();
    }
    vms.boot("b").await.unwrap();
    refused(vms.boot("r").await, "precondition");
}

#[tokio::test(start_paused = true)]
async fn a_generated_tap_is_the_vms_own() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let config = || VmConfig { network: vec![Default::default()], ..bed.config() };
    vms.run("a", config()).await;
    vms.run("b", config()).await;
}

#[test]
fn a_running_vm_keeps_its_claims_across_restarts_of_the_daemon() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.create("b", bed.with_disk("d")).await;
        vms.run("a", bed.with_disk("d")).await;
    });
    bed.life(async |vms| {
        b_is_refused(&bed, &vms, "d").await;
        vms.machine("a").stop();
    });
    bed.life(async |vms| {
        b_is_refused(&bed, &vms, "d").await;
        vms.force_shutdown("a").await.unwrap();
        vms.boot("b").await.unwrap();
    });
}

#[test]
fn the_claims_of_a_deleted_vm_are_held_until_its_process_ends() {
    let bed = Bed::new();
    let machine = bed.life(async |vms| {
        let machine = vms.run("a", bed.with_disk("d")).await;
        machine.set_unkillable(true);
        assert_eq!(vms.force_delete("a").await.unwrap().left_behind.len(), 1);
        vms.create("a", bed.with_disk("d")).await;
        let text = refused(vms.boot("a").await, "precondition");
        assert!(text.contains(&format!("process {}", machine.pid())), "{text}");
        assert!(text.contains("the deleted VM \"a\""), "{text}");
        machine
    });
    assert_eq!(bed.store.tombstones().len(), 1);
    bed.life(async |vms| {
        refused(vms.boot("a").await, "precondition");
        // A defect of the program costs one look at the process, and no more.
        vms.world.next(ScriptedMethod::Adopt, ScriptedResult::Panic);
        machine.set_unkillable(false);
        eventually("its process has gone", || bed.store.tombstones().is_empty()).await;
        assert_eq!(vms.world.living(), 0, "it was killed once more");
        vms.boot("a").await.expect("the disk is free");
    });
}
