//! TAPs that the program makes: there while the VM runs, gone when it is deleted, and never anybody else's.

use vmm_core::backend::{BackendErrorKind, Effect, ExitCause};
use vmm_core::config::VmConfig;
use vmm_core::report::Warning;
use vmm_core::state::{Phase, VmState};
use vmm_core::store::{Intent, IntentKind, VmRecord, VmRequest};
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

use crate::common::*;

/// One interface that the client names, and one that the program names.
fn with_two_taps(bed: &Bed) -> VmConfig {
    let mut config = bed.with_tap("tap-x");
    config.network.push(Default::default());
    config
}

/// What a VM of [`with_two_taps`] has while it exists.
fn both(bed: &Bed, vm_id: &str) -> Vec<String> {
    vec!["tap-x".to_owned(), bed.stored(vm_id).uid.tap_name(1)]
}

#[tokio::test(start_paused = true)]
async fn taps_are_created_at_boot_and_removed_with_the_vm() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", with_two_taps(&bed)).await;
    assert_eq!(bed.taps.names(), Vec::<String>::new(), "CreateVm makes nothing");
    vms.boot("a").await.unwrap();
    let uid = vms.record("a").uid;
    assert_eq!(bed.taps.names(), both(&bed, "a"));
    for name in both(&bed, "a") {
        assert_eq!(bed.taps.owner(&name).unwrap().uid, uid);
    }
    vms.reboot("a").await.unwrap();
    vms.shutdown("a").await.unwrap();
    assert_eq!(bed.taps.names(), both(&bed, "a"), "what was put on them stays until the VM goes");
    vms.boot("a").await.unwrap();
    assert_eq!(vms.force_delete("a").await.unwrap().left_behind, []);
    assert_eq!(bed.taps.names(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_missing_tap_named_by_a_client_is_a_warning() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let warned = vms.try_create("a", with_two_taps(&bed)).await.unwrap().warnings;
    let [warning] = &warned[..] else { panic!("one warning, about the TAP of the client: {warned:?}") };
    assert_eq!(warning.field, "config.network[0].tap_device");
    assert!(
        warning.message.contains("tap-x does not exist") && warning.message.contains("bridge"),
        "{warning}"
    );
    bed.taps.put("tap-x", true);
    assert_eq!(vms.try_create("b", with_two_taps(&bed)).await.unwrap().warnings, []);
}

#[tokio::test(start_paused = true)]
async fn a_tap_that_bootvm_could_not_provide_is_a_warning_of_createvm_and_of_validatevm() {
    let bed = Bed::new();
    let vms = bed.start().await;
    bed.taps.put("tap-x", true);
    bed.taps.deny();
    let reported = |warnings: &[Warning]| {
        warnings.iter().map(|warning| (warning.field.clone(), warning.message.clone())).collect::<Vec<_>>()
    };
    // The first interface has a TAP, and the second one needs a new one.
    let created = reported(&vms.try_create("a", with_two_taps(&bed)).await.unwrap().warnings);
    let [(field, message)] = &created[..] else { panic!("{created:?}") };
    assert_eq!(field, "config.network[1].tap_device");
    assert!(message.starts_with("BootVm will fail: ") && message.contains("CAP_NET_ADMIN"), "{message}");
    let refusal = refused(vms.boot("a").await, "precondition");
    let reason = message.trim_start_matches("BootVm will fail: ");
    assert!(refusal.contains(reason), "the same words: {refusal} / {reason}");

    bed.taps.shut();
    let config = bed.with_tap("tap-x");
    let requested = VmRequest { backend: String::new(), config: config.clone() };
    let validated = vms.service.validate(&requested).await.unwrap();
    let [(field, message)] = &reported(&validated.warnings)[..] else { panic!("{:?}", validated.warnings) };
    assert_eq!(field, "config.network[0].tap_device");
    assert!(message.starts_with("BootVm will fail: TAP tap-x ") && message.ends_with("open it"), "{message}");
    assert_eq!(vms.try_create("b", config).await.unwrap().warnings, validated.warnings);

    bed.taps.put("eth7", false);
    let created = reported(&vms.try_create("c", bed.with_tap("eth7")).await.unwrap().warnings);
    let [(field, message)] = &created[..] else { panic!("{created:?}") };
    assert_eq!(field, "config.network[0].tap_device");
    let refusal = refused(vms.boot("c").await, "precondition");
    assert!(refusal.contains(message.trim_start_matches("BootVm will fail: ")), "{refusal} / {message}");
}

#[tokio::test(start_paused = true)]
async fn an_address_of_another_vm_is_a_warning_while_that_vm_exists() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let with_mac = |mac: &str| {
        let mut config = bed.with_tap("tap-x");
        config.network[0].mac_address = mac.to_owned();
        config
    };
    bed.taps.put("tap-x", true);
    assert_eq!(vms.try_create("a", with_mac("52:54:00:AA:00:01")).await.unwrap().warnings, []);
    assert_eq!(vms.try_create("a", with_mac("52:54:00:AA:00:01")).await.unwrap().warnings, [], "its own");
    let warned = vms.try_create("b", with_mac("52:54:00:aa:00:01")).await.unwrap().warnings;
    let [warning] = &warned[..] else { panic!("one warning: {warned:?}") };
    assert_eq!(warning.field, "config.network[0].mac_address");
    assert!(warning.message.contains("VM \"a\""), "{warning}");
    // The next daemon knows the addresses, too.
    drop(vms);
    let vms = bed.start().await;
    assert_eq!(vms.try_create("c", with_mac("52:54:00:aa:00:01")).await.unwrap().warnings.len(), 1);
    for vm_id in ["a", "b", "c"] {
        vms.delete(vm_id).await.unwrap();
    }
    assert_eq!(vms.try_create("d", with_mac("52:54:00:aa:00:01")).await.unwrap().warnings, []);
}

#[tokio::test(start_paused = true)]
async fn a_generated_tap_name_is_stored_and_returned() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let created = vms.create("a", with_two_taps(&bed)).await;
    let names: Vec<_> = created.config.network.iter().map(|nic| nic.tap_device.clone()).collect();
    assert_eq!(names, both(&bed, "a"));
    assert_eq!(vms.record("a").config.network[1].tap_device, names[1]);
    assert_eq!(
        created.requested.unpack().config.network[1].tap_device,
        "",
        "a repeated call is compared as sent"
    );
    vms.try_create("a", with_two_taps(&bed)).await.expect("the same call again");
}

#[test]
fn a_record_without_generated_tap_names_works() {
    let bed = Bed::new();
    bed.life(async |vms| drop(vms.create("a", with_two_taps(&bed)).await));
    let mut old = bed.stored("a");
    old.config.network[1].tap_device.clear();
    bed.store.put(old);
    bed.life(async |vms| {
        vms.boot("a").await.unwrap();
        assert_eq!(bed.taps.names(), both(&bed, "a"));
        assert_eq!(vms.force_delete("a").await.unwrap().left_behind, []);
        assert_eq!(bed.taps.names(), Vec::<String>::new());
    });
}

#[tokio::test(start_paused = true)]
async fn every_end_releases_the_tap_and_a_deletion_removes_it() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for end in 0..4 {
        let machine = vms.run("a", bed.with_tap("tap-x")).await;
        vms.create("b", bed.with_tap("tap-x")).await;
        let text = refused(vms.boot("b").await, "precondition");
        assert!(text.contains("VM \"a\"") && text.contains("tap-x"), "{text}");
        match end {
            0 => machine.power_off(),
            1 => machine.end(ExitCause::VmmFailed),
            2 => machine.fail_guest("cannot go on"),
            _ => drop(vms.force_shutdown("a").await.unwrap()),
        }
        vms.until("a", |record| record.state == VmState::Shutdown).await;
        // It passes to the one that runs on it: the first one's deletion must not take it away.
        vms.boot("b").await.expect("it is free");
        vms.delete("a").await.unwrap();
        assert_eq!(bed.taps.names(), ["tap-x"]);
        vms.force_delete("b").await.unwrap();
        assert_eq!(bed.taps.names(), Vec::<String>::new(), "end {end}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_existing_tap_is_used_and_kept() {
    let bed = Bed::new();
    let vms = bed.start().await;
    bed.taps.put("tap-x", true);
    vms.run("a", bed.with_tap("tap-x")).await;
    assert_eq!(bed.taps.owner("tap-x"), None);
    vms.force_delete("a").await.unwrap();
    assert_eq!(bed.taps.names(), ["tap-x"]);
    // Nor does a start that fails remove it.
    vms.create("b", bed.with_tap("tap-x")).await;
    vms.world
        .next(ScriptedMethod::Launch, ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied));
    refused(vms.boot("b").await, "precondition");
    assert_eq!(bed.taps.names(), ["tap-x"]);
}

#[tokio::test(start_paused = true)]
async fn a_failed_boot_removes_its_taps() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", with_two_taps(&bed)).await;
    for act in [
        ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied),
        ScriptedResult::DoThenFail(BackendErrorKind::Protocol, Effect::Unknown),
        ScriptedResult::hang(),
    ] {
        vms.world.next(ScriptedMethod::Launch, act);
        vms.boot("a").await.expect_err("the script says so");
        assert_eq!(bed.taps.names(), Vec::<String>::new());
    }
    // But not what an earlier run had: its addresses may matter to somebody.
    vms.boot("a").await.unwrap();
    vms.shutdown("a").await.unwrap();
    vms.world
        .next(ScriptedMethod::Launch, ScriptedResult::Fail(BackendErrorKind::Rejected, Effect::NotApplied));
    refused(vms.boot("a").await, "precondition");
    assert_eq!(bed.taps.names(), both(&bed, "a"));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_launched_without_its_tap() {
    let bed = Bed::new();
    let vms = bed.start().await;
    bed.taps.put("eth7", false);
    vms.create("a", bed.with_tap("eth7")).await;
    let text = refused(vms.boot("a").await, "precondition");
    assert!(text.contains("network[0].tap_device") && text.contains("not a TAP"), "{text}");
    bed.taps.deny();
    vms.create("b", with_two_taps(&bed)).await;
    let text = refused(vms.boot("b").await, "precondition");
    assert!(text.contains("CAP_NET_ADMIN") && text.contains("beforehand"), "{text}");
    assert_eq!((vms.state("a"), vms.state("b")), (VmState::Created, VmState::Created));
    assert_eq!((vms.world.calls(ScriptedMethod::Launch), bed.taps.names()), (0, vec!["eth7".to_owned()]));
    // The second interface of two fails: the first one goes.
    let name = vms.record("b").uid.tap_name(1);
    bed.taps.put("tap-x", true);
    bed.taps.put(&name, true);
    let text = refused(vms.boot("b").await, "precondition");
    assert!(text.contains("network[1].tap_device") && text.contains("nothing proves"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn the_tap_of_a_running_vm_is_refused_to_another() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", VmConfig { network: vec![Default::default()], ..bed.config() }).await;
    let name = vms.record("a").uid.tap_name(0);
    vms.create("b", bed.with_tap(&name)).await;
    let text = refused(vms.boot("b").await, "precondition");
    assert!(text.contains("VM \"a\"") && text.contains(&name), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_tap_that_cannot_be_removed_is_reported_and_removed_later() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.run("a", bed.with_tap("tap-x")).await;
    bed.taps.stick(true);
    let left = vms.force_delete("a").await.unwrap().left_behind;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].field, "tap tap-x");
    assert!(left[0].message.contains("stuck"), "{left:?}");
    bed.taps.stick(false);
    bed.taps.attach("tap-x", true);
    bed.start().await;
    assert_eq!(bed.taps.names(), ["tap-x"], "somebody still holds it");
    bed.taps.attach("tap-x", false);
    bed.start().await;
    assert_eq!(bed.taps.names(), Vec::<String>::new());
}

#[test]
fn a_boot_interrupted_by_a_crash_leaves_no_tap() {
    // Dead between two TAPs, before the VMM was started, and with a VMM that nobody recorded.
    for (hang_once_made, act) in [
        (true, ScriptedResult::hang()),
        (false, ScriptedResult::hang()),
        (false, ScriptedResult::do_then_hang()),
    ] {
        let bed = Bed::new();
        bed.life(async |vms| {
            vms.create("a", with_two_taps(&bed)).await;
            bed.taps.hang_once_made(hang_once_made);
            vms.world.next(ScriptedMethod::Launch, act);
            let boot = {
                let vms = vms.clone();
                async move { vms.boot("a").await }
            };
            let _task = vms.begin(boot).await;
            let made = if hang_once_made { 1 } else { 2 };
            eventually("the TAPs", || {
                bed.taps.names().len() == made
                    && (hang_once_made || vms.world.calls(ScriptedMethod::Launch) == 1)
            })
            .await;
        });
        bed.taps.hang_once_made(false);
        let runs = bed.world.living() == 1;
        bed.life(async |vms| {
            if runs {
                assert_eq!((vms.state("a"), bed.taps.names()), (VmState::Running, both(&bed, "a")));
                vms.create("b", bed.with_tap("tap-x")).await;
                assert!(refused(vms.boot("b").await, "precondition").contains("VM \"a\""));
                vms.force_delete("a").await.unwrap();
            } else {
                // TAPs are made while the intent is on its way to the disk.
                let reason = if hang_once_made { "" } else { "boot-interrupted" };
                assert_eq!((vms.state("a"), vms.reason("a").as_str()), (VmState::Created, reason));
            }
            assert_eq!(bed.taps.names(), Vec::<String>::new());
        });
    }
}

#[test]
fn taps_are_found_by_the_next_daemon() {
    let bed = Bed::new();
    bed.life(async |vms| drop(vms.run("a", with_two_taps(&bed)).await));
    bed.life(async |vms| {
        assert_eq!((vms.phase("a"), bed.taps.names()), (Phase::Running, both(&bed, "a")));
        vms.force_delete("a").await.unwrap();
        assert_eq!(bed.taps.names(), Vec::<String>::new());
    });
}

#[test]
fn a_deletion_interrupted_by_a_crash_removes_the_taps() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("a", with_two_taps(&bed)).await;
        vms.shutdown("a").await.unwrap();
    });
    let before = bed.stored("a");
    bed.store.put(VmRecord {
        intent: Some(Intent { kind: IntentKind::Delete, caller: me(), since_ms: 1, scope: None }),
        generation: before.generation + 1,
        ..before
    });
    bed.life(async |_| assert_eq!(bed.taps.names(), Vec::<String>::new()));
}

#[tokio::test(start_paused = true)]
async fn a_tap_that_times_out_fails_the_boot_and_is_removed() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", with_two_taps(&bed)).await;
    bed.taps.hang_once_made(true);
    let text = refused(vms.boot("a").await, "unavailable");
    assert!(text.contains("tap-x"), "{text}");
    assert_eq!((vms.world.calls(ScriptedMethod::Launch), bed.taps.names()), (0, vec![]));
    bed.taps.hang_once_made(false);
    vms.boot("a").await.unwrap();
}
