//! VMs that live where somebody else says: places are given out once, and what is found at one is told truly.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_core::backend::{BackendErrorKind, Effect};
use vmm_core::discovery::{DiscoveredVm, DiscoveryEvent, Places};
use vmm_core::event::EventKind;
use vmm_core::kind::VmKind;
use vmm_core::state::{Phase, VmState};
use vmm_service::ShutdownOptions;
use vmm_testkit::fake::{ScriptedMethod, ScriptedResult};

use crate::common::*;
use crate::landlord::{Hooks, fixed, foreign, found, start, start_finding, start_with};

#[test]
fn each_place_is_given_to_one_vm() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let (vms, _tell) = start(&bed, fixed(&["/a", "/b"]), Vec::new()).await;
        let creations = (0..6).map(|number| {
            let (vms, config) = (vms.clone(), bed.config());
            tokio::spawn(async move { vms.try_create(&format!("vm{number}"), config).await })
        });
        let mut places = Vec::new();
        let mut full = 0;
        for creation in creations.collect::<Vec<_>>() {
            match creation.await.unwrap() {
                Ok(created) => places.push(created.record.kind.socket().unwrap().to_owned()),
                refusal => {
                    assert!(refused(refusal, "exhausted").contains("/a, /b"));
                    full += 1;
                }
            }
        }
        places.sort();
        assert_eq!((places, full), (vec!["/a".to_owned(), "/b".to_owned()], 4));
        let first = vms.service.list(&Default::default()).unwrap().vms[0].vm_id.to_string();
        vms.delete(&first).await.unwrap();
        let again = vms.create("again", bed.config()).await;
        assert!(again.kind.socket().is_some());
    });
}

#[test]
fn a_creation_on_an_import_only_backend_is_refused() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let why = "start it yourself".to_owned();
        let places = Places::Imported { places: vec![VmKind::attached("/a")], why };
        let present = vec![found(&bed, "/a", &["found"], VmState::Running).await];
        let (vms, _tell) = start(&bed, places, present).await;
        assert_eq!(refused(vms.try_create("mine", bed.config()).await, "unsupported"), "start it yourself");
        let requested = vmm_core::store::VmRequest { backend: String::new(), config: bed.config() };
        let judged = vms.service.validate(&requested).await.expect("the files answer");
        assert_eq!(judged.violations[0].field, "backend");
        assert_eq!(vms.state("found"), VmState::Running);
    });
}

#[test]
fn a_discovered_vm_is_imported_unchanged() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let present = vec![found(&bed, "/a", &["found"], VmState::Paused).await];
        let (vms, tell) = start(&bed, fixed(&["/a", "/b", "/c"]), present).await;
        assert_eq!(vms.state("found"), VmState::Paused);
        let record = vms.record("found");
        assert!(record.imported && record.run.is_some());
        assert_eq!((record.kind.socket(), record.status.reason.as_str()), (Some("/a"), "imported"));
        vms.resume("found").await.unwrap();
        // A name that is taken leads to the next one.
        let second = found(&bed, "/b", &["found", "found-2"], VmState::Created).await;
        tell.send(DiscoveryEvent::Found(Box::new(second))).await.unwrap();
        eventually("the second is imported", || vms.service.get("found-2").is_ok()).await;
        assert_eq!(vms.state("found-2"), VmState::Created);
        vms.boot("found-2").await.unwrap();
        // And what is found twice is there once.
        let twice = found(&bed, "/a", &["other"], VmState::Created).await;
        tell.send(DiscoveryEvent::Found(Box::new(twice))).await.unwrap();
        vms.create("mine", bed.config()).await;
        assert_eq!(vms.record("mine").kind.socket(), Some("/c"));
        assert_eq!(vms.service.list(&Default::default()).unwrap().total_count, 3);
    });
}

#[test]
fn a_vm_started_again_by_another_program_is_running() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let (vms, tell) = start(&bed, fixed(&["/a"]), Vec::new()).await;
        vms.bring_to("vm", bed.config(), VmState::Shutdown).await;
        let back = found(&bed, "/a", &["ignored"], VmState::Running).await;
        tell.send(DiscoveryEvent::Found(Box::new(back))).await.unwrap();
        let record = vms.until("vm", |record| record.state == VmState::Running).await;
        assert_eq!(record.status.reason.as_str(), "started-from-outside");
        assert!(!record.imported, "it is the machine that it was");
        vms.pause("vm").await.unwrap();
        vms.force_delete("vm").await.unwrap();
    });
}

#[test]
fn another_vm_in_the_place_replaces_the_configuration() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let (vms, tell) = start(&bed, fixed(&["/a"]), Vec::new()).await;
        vms.bring_to("vm", bed.config(), VmState::Shutdown).await;
        let mut other = found(&bed, "/a", &["ignored"], VmState::Running).await;
        other.config.cpu.as_mut().unwrap().vcpu_count = 3;
        other.unrepresented = vec!["a vsock device".to_owned()];
        tell.send(DiscoveryEvent::Found(Box::new(other))).await.unwrap();
        let record = vms.until("vm", |record| record.state == VmState::Running).await;
        assert!(record.imported);
        assert_eq!(record.config.cpu.as_ref().unwrap().vcpu_count, 3);
        assert_eq!(record.unrepresented, ["a vsock device"]);
    });
}

#[test]
fn a_vm_that_never_ran_is_not_identified_with_another_in_its_place() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let (vms, tell) = start(&bed, fixed(&["/a"]), Vec::new()).await;
        vms.create("mine", bed.config()).await;
        let other = found(&bed, "/a", &["other"], VmState::Running).await;
        tell.send(DiscoveryEvent::Found(Box::new(other))).await.unwrap();
        let record = vms.until("mine", |record| record.status.reason.as_str() == "place-taken").await;
        assert_eq!((record.state, record.status.phase), (VmState::Created, Phase::Created));
        vms.delete("mine").await.unwrap();
        let other = found(&bed, "/a", &["other"], VmState::Running).await;
        tell.send(DiscoveryEvent::Found(Box::new(other))).await.unwrap();
        eventually("it is imported then", || vms.service.get("other").is_ok()).await;
    });
}

#[test]
fn a_lost_place_removes_its_imported_vm_only() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let present = vec![found(&bed, "/a", &["found"], VmState::Created).await];
        let (vms, tell) = start(&bed, fixed(&["/a", "/b"]), present).await;
        vms.create("mine", bed.config()).await;
        for place in ["/a", "/b"] {
            tell.send(DiscoveryEvent::Lost { place: VmKind::attached(place) }).await.unwrap();
        }
        eventually("the import has left", || vms.service.get("found").is_err()).await;
        assert_eq!(vms.state("mine"), VmState::Created, "what this program made stays");
    });
}

#[test]
fn a_discovered_vm_gets_another_name_if_its_name_is_being_created() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let while_checking = Arc::default();
        let (vms, _tell) =
            start_finding(&bed, fixed(&["/a", "/b", "/c"]), Vec::new(), Arc::clone(&while_checking)).await;
        let other = found(&bed, "/b", &["web", "web-2"], VmState::Created).await;
        *while_checking.lock().unwrap() = Some(DiscoveryEvent::Found(Box::new(other)));
        let creation = tokio::time::timeout(Duration::from_secs(3600), vms.create("web", bed.config()));
        let created =
            creation.await.expect("CreateVm does not wait for the import, which waits for its name");
        assert_eq!(created.kind.socket(), Some("/a"));
        eventually("the other is imported", || vms.service.get("web-2").is_ok()).await;
        assert_eq!(vms.record("web-2").kind.socket(), Some("/b"));
        vms.create("more", bed.config()).await;
    });
}

#[test]
fn a_discovery_does_not_wait_for_the_shutdown_of_another_vm() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let present = vec![found(&bed, "/a", &["slow"], VmState::Running).await];
        let (vms, tell) = start(&bed, fixed(&["/a", "/b"]), present).await;
        bed.world.machine("foreign").unwrap().ignore_shutdown();
        let hour = ShutdownOptions { force: false, timeout_seconds: 3600 };
        let service = vms.service.clone();
        let ending = vms.begin(async move { service.shutdown("slow", hour, me()).await }).await;
        tell.send(DiscoveryEvent::Lost { place: VmKind::attached("/a") }).await.unwrap();
        let other = found(&bed, "/b", &["other"], VmState::Created).await;
        tell.send(DiscoveryEvent::Found(Box::new(other))).await.unwrap();
        eventually("the other is imported", || vms.service.get("other").is_ok()).await;
        assert!(!ending.is_finished());
        // What is found at the same place waits, so that it is not taken for the VM that leaves.
        let again = found(&bed, "/a", &["again"], VmState::Created).await;
        tell.send(DiscoveryEvent::Found(Box::new(again))).await.unwrap();
        vms.force_shutdown("slow").await.unwrap();
        let _ = ending.await;
        eventually("the next one has its place", || vms.service.get("again").is_ok()).await;
        assert!(vms.service.get("slow").is_err());
    });
}

#[test]
fn a_vm_in_an_unserved_place_is_unchanged() {
    for state in [VmState::Shutdown, VmState::Running] {
        let bed = Bed::new();
        on_a_paused_clock(async {
            let (vms, _tell) = start(&bed, fixed(&["/a"]), Vec::new()).await;
            vms.bring_to("vm", bed.config(), state).await;
        });
        let living = bed.world.living();
        on_a_paused_clock(async {
            let (vms, _tell) = start(&bed, fixed(&["/b"]), Vec::new()).await;
            assert_eq!(vms.state("vm"), state);
            if state == VmState::Running {
                assert_eq!(vms.reason("vm"), "endpoint-not-configured");
                refused(vms.pause("vm").await, "unavailable");
                assert!(refused(vms.force_shutdown("vm").await, "precondition").contains("/a"));
                let deleted = vms.force_delete("vm").await.unwrap();
                assert!(deleted.left_behind[0].message.contains("/a"), "{:?}", deleted.left_behind);
            } else {
                assert!(refused(vms.boot("vm").await, "precondition").contains("/a"));
                let deleted = vms.delete("vm").await.unwrap();
                assert!(deleted.left_behind[0].message.contains("/a"), "{:?}", deleted.left_behind);
            }
            assert_eq!(bed.world.living(), living, "nothing was touched");
        });
    }
}

#[test]
fn a_later_vm_in_the_place_of_a_tombstone_is_not_ended() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let (vms, _tell) = start(&bed, fixed(&["/a"]), Vec::new()).await;
        vms.create("vm", bed.with_disk("d")).await;
        // A start leaves a process that neither its own clean-up nor a forced deletion can end.
        bed.world.next(
            ScriptedMethod::Launch,
            ScriptedResult::DoThenFail(BackendErrorKind::Protocol, Effect::Unknown),
        );
        bed.world
            .always(ScriptedMethod::Sweep, ScriptedResult::Fail(BackendErrorKind::Timeout, Effect::Unknown));
        vms.boot("vm").await.unwrap_err();
        assert_eq!(vms.force_delete("vm").await.unwrap().left_behind.len(), 1);
        let tombstones = bed.store.tombstones();
        assert!(
            matches!(&tombstones[..], [one] if one.vm.run.is_none() && one.vm.kind == VmKind::attached("/a"))
        );
        bed.world.behave();
        // That process ends, and the owner of the place starts a VM of its own there.
        bed.world.host_dies();
        let _theirs = foreign(&bed, &bed.config()).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(bed.world.living(), 1, "what runs there now is not this program's to kill");
        bed.world.host_dies();
        eventually("the tombstone has gone", || bed.store.tombstones().is_empty()).await;
    });
}

#[test]
fn endless_resets_of_an_imported_guest_are_recorded_once_a_minute() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let present = vec![found(&bed, "/a", &["found"], VmState::Running).await];
        let (vms, _tell) = start(&bed, fixed(&["/a"]), present).await;
        let machine = vms.machine("foreign");
        let hours = 3;
        for _ in 0..hours * 3600 {
            machine.reset();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(vms.state("found"), VmState::Running, "its owner decides when it ends");
        let record = vms.until("found", |record| record.status.restarts == hours * 3600).await;
        assert_eq!(record.status.reason.as_str(), "guest-reset");
        let resets = bed.store.log().into_iter().filter(|it| it.event.kind == EventKind::GuestReset).count();
        assert!((100..=100 + 60 * 3 + 2).contains(&resets), "{resets} events");
    });
}

#[test]
fn a_discovery_pre_empted_by_force_leaves_the_configuration_unchanged() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let on_look = Arc::new(Mutex::new(None));
        let (vms, tell) = start_with(
            &bed,
            fixed(&["/a"]),
            Vec::new(),
            Hooks { on_capabilities: Arc::clone(&on_look), ..Hooks::default() },
        )
        .await;
        vms.bring_to("vm", bed.config(), VmState::Shutdown).await;
        let before = vms.record("vm");
        // A forced operation comes at each question for the capabilities. The last question before
        // the files are looked at is that of the look itself.
        let forcing = {
            let vms = vms.clone();
            move || {
                drop(tokio::spawn({
                    let vms = vms.clone();
                    async move { vms.force_shutdown("vm").await }
                }))
            }
        };
        let asked = Arc::new(Mutex::new(0));
        let forcing = {
            let asked = Arc::clone(&asked);
            move || {
                *asked.lock().unwrap() += 1;
                forcing()
            }
        };
        *on_look.lock().unwrap() = Some(Box::new(forcing) as Box<dyn Fn() + Send>);
        tell.send(DiscoveryEvent::Found(Box::new(another_machine(&bed).await))).await.unwrap();
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(on_look.lock().unwrap().take().is_some() && *asked.lock().unwrap() > 0);
        assert_eq!(vms.state("vm"), VmState::Shutdown, "force came before the VM was taken up");
        // An unrelated change is recorded without the configuration that was found.
        vms.boot("vm").await.unwrap();
        let record = vms.record("vm");
        assert_eq!((record.imported, &record.config), (false, &before.config));
        vms.shutdown("vm").await.unwrap();
        tell.send(DiscoveryEvent::Found(Box::new(another_machine(&bed).await))).await.unwrap();
        let record = vms.until("vm", |record| record.state == VmState::Running).await;
        assert!(record.imported, "found again, it is taken up");
        assert_eq!(record.config.cpu.as_ref().unwrap().vcpu_count, 3);
    });
}

/// A machine that runs at `/a` and that this program has not made.
async fn another_machine(bed: &Bed) -> DiscoveredVm {
    let mut other = found(bed, "/a", &["ignored"], VmState::Running).await;
    other.config.cpu.as_mut().unwrap().vcpu_count = 3;
    other
}

#[test]
fn a_panic_in_the_discovery_loses_one_finding_only() {
    let bed = Bed::new();
    on_a_paused_clock(async {
        let (vms, tell) = start(&bed, fixed(&["/a"]), Vec::new()).await;
        bed.world.next(ScriptedMethod::Ping, ScriptedResult::Panic);
        tell.send(DiscoveryEvent::Health).await.unwrap();
        let after = found(&bed, "/a", &["found"], VmState::Running).await;
        tell.send(DiscoveryEvent::Found(Box::new(after))).await.unwrap();
        eventually("the next finding is followed", || vms.service.get("found").is_ok()).await;
    });
}
