//! Many callers at once, and long random sequences against the state table.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use vmm_core::backend::ExitCause;
use vmm_core::state::{Admission, VmOperation, VmState, admit};
use vmm_service::ListQuery;
use vmm_testkit::fake::ScriptedMethod;

use crate::common::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_concurrent_creations_of_a_name_make_one_vm() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let (vms, config) = (vms.clone(), bed.config());
            tokio::spawn(async move { vms.try_create("a", config).await })
        })
        .collect();
    let mut uids = Vec::new();
    for task in tasks {
        uids.push(task.await.unwrap().expect("all are told of the same VM").record.uid);
    }
    uids.dedup();
    assert_eq!((uids.len(), bed.store.vms().len(), bed.store.log().len()), (1, 1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_different_creations_of_a_name_succeeds() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let tasks: Vec<_> = (0..50)
        .map(|number: usize| {
            let (vms, mut config) = (vms.clone(), bed.config());
            config.metadata.insert("number".into(), number.to_string());
            tokio::spawn(async move { vms.try_create("a", config).await })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => won += 1,
            Err(error) => assert_eq!(kind(&error), "already-exists"),
        }
    }
    assert_eq!((won, bed.store.vms().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_boots_start_one_vmm() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("a", bed.config()).await;
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let vms = vms.clone();
            tokio::spawn(async move { vms.boot("a").await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap().record.state, VmState::Running);
    }
    assert_eq!((vms.world.calls(ScriptedMethod::Launch), vms.world.living()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_vms_pass_their_lifecycle_concurrently() {
    let bed = Arc::new(Bed::new());
    let vms = bed.start().await;
    let tasks: Vec<_> = (0..60)
        .map(|number| {
            let (vms, bed) = (vms.clone(), Arc::clone(&bed));
            tokio::spawn(async move {
                let vm_id = format!("vm-{number}");
                for _ in 0..3 {
                    vms.run(&vm_id, bed.with_disk(&vm_id)).await;
                    vms.pause(&vm_id).await.unwrap();
                    vms.resume(&vm_id).await.unwrap();
                    vms.reboot(&vm_id).await.unwrap();
                    vms.shutdown(&vm_id).await.unwrap();
                    vms.boot(&vm_id).await.unwrap();
                    assert!(vms.force_delete(&vm_id).await.unwrap().left_behind.is_empty());
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!((vms.world.living(), bed.store.vms().len()), (0, 0));
    assert_eq!(vms.service.list(&ListQuery::default()).unwrap().total_count, 0);
    let left = std::fs::read_dir(bed.runtime_dir().join("vms")).unwrap().count();
    assert_eq!(left, 0, "no run folder stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_operations_on_one_name_leave_a_consistent_state() {
    let bed = Arc::new(Bed::new());
    let vms = bed.start().await;
    let tasks: Vec<_> = (0..24_usize)
        .map(|number| {
            let (vms, bed) = (vms.clone(), Arc::clone(&bed));
            tokio::spawn(async move {
                for step in 0..40_usize {
                    let answer = match (number + step * 5) % 8 {
                        0 | 1 => vms.try_create("a", bed.with_disk("d")).await.map(drop),
                        2 | 3 => vms.boot("a").await.map(drop),
                        4 => vms.pause("a").await.map(drop),
                        5 => vms.shutdown("a").await.map(drop),
                        6 => vms.force_shutdown("a").await.map(drop),
                        _ => vms.force_delete("a").await.map(drop),
                    };
                    if let Err(error) = answer {
                        assert_ne!(kind(&error), "internal", "{error}");
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    vms.try_create("a", bed.with_disk("d")).await.unwrap();
    let record = vms.record("a");
    assert_eq!(bed.stored("a"), *record);
    assert_eq!(vms.world.living(), usize::from(record.state.is_live()));
    vms.force_delete("a").await.unwrap();
    assert_eq!(vms.world.living(), 0);
}

/// What happens next in a random life.
#[derive(Clone, Copy, Debug)]
enum Move {
    Create,
    Ask(VmOperation),
    ForceShutdown,
    GuestEnds,
    VmmDies,
    DaemonRestarts,
}

fn any_move() -> impl Strategy<Value = (usize, Move)> {
    let ask = proptest::sample::select(VmOperation::ALL.to_vec()).prop_map(Move::Ask);
    let moves = prop_oneof![
        3 => Just(Move::Create),
        8 => ask,
        1 => Just(Move::ForceShutdown),
        1 => Just(Move::GuestEnds),
        1 => Just(Move::VmmDies),
        1 => Just(Move::DaemonRestarts),
    ];
    (0..3_usize, moves)
}

/// The state table as a model: names, and where they are.
type Model = BTreeMap<&'static str, VmState>;

fn after(state: VmState, request: VmOperation) -> Option<VmState> {
    match request {
        VmOperation::Boot | VmOperation::Resume | VmOperation::Reboot => Some(VmState::Running),
        VmOperation::Shutdown => Some(VmState::Shutdown),
        VmOperation::Pause => Some(VmState::Paused),
        VmOperation::Update => Some(state),
        VmOperation::Delete | VmOperation::ForceDelete => None,
    }
    .filter(|_| state.is_live() || request != VmOperation::Shutdown || state == VmState::Shutdown)
}

async fn step(bed: &Bed, vms: &Vms, model: &mut Model, vm_id: &'static str, next: Move) {
    let state = model.get(vm_id).copied();
    match next {
        Move::Create => {
            vms.create(vm_id, bed.with_disk(vm_id)).await;
            model.entry(vm_id).or_insert(VmState::Created);
        }
        Move::ForceShutdown | Move::Ask(_) => {
            let request = if let Move::Ask(request) = next { request } else { VmOperation::Shutdown };
            let answer = match next {
                Move::Ask(VmOperation::Boot) => vms.boot(vm_id).await,
                Move::Ask(VmOperation::Shutdown) => vms.shutdown(vm_id).await,
                Move::Ask(VmOperation::Pause) => vms.pause(vm_id).await,
                Move::Ask(VmOperation::Resume) => vms.resume(vm_id).await,
                Move::Ask(VmOperation::Reboot) => vms.reboot(vm_id).await,
                Move::Ask(VmOperation::Update) => vms.label(vm_id, "blue").await,
                Move::Ask(VmOperation::Delete) => vms.delete(vm_id).await,
                Move::Ask(VmOperation::ForceDelete) => vms.force_delete(vm_id).await,
                _ => vms.force_shutdown(vm_id).await,
            };
            match state.map(|state| (state, admit(state, request))) {
                None => drop(refused(answer, "not-found")),
                Some((_, Admission::Denied)) => drop(refused(answer, "illegal-state")),
                Some((_, Admission::AlreadyDone)) => drop(answer.unwrap()),
                Some((state, Admission::Do)) => {
                    answer.unwrap();
                    match after(state, request) {
                        Some(state) => drop(model.insert(vm_id, state)),
                        None => drop(model.remove(vm_id)),
                    }
                }
            }
        }
        Move::GuestEnds | Move::VmmDies => {
            let cause =
                if matches!(next, Move::VmmDies) { ExitCause::VmmFailed } else { ExitCause::GuestPowerOff };
            if state.is_some_and(VmState::is_live) {
                vms.machine(vm_id).end(cause);
                vms.until(vm_id, |record| record.state == VmState::Shutdown).await;
                model.insert(vm_id, VmState::Shutdown);
            }
        }
        Move::DaemonRestarts => {}
    }
}

fn hold_against(bed: &Bed, vms: &Vms, model: &Model) {
    let shown: BTreeMap<String, VmState> = vms
        .service
        .list(&ListQuery::default())
        .unwrap()
        .vms
        .iter()
        .map(|vm| (vm.vm_id.to_string(), vm.state))
        .collect();
    let expected: BTreeMap<String, VmState> =
        model.iter().map(|(vm_id, state)| ((*vm_id).to_owned(), *state)).collect();
    assert_eq!(shown, expected);
    assert_eq!(vms.world.living(), model.values().filter(|state| state.is_live()).count());
    for vm_id in model.keys() {
        let mut stored = bed.stored(vm_id);
        // Freshness is shown and not recorded.
        stored.status.observed_at_ms = vms.record(vm_id).status.observed_at_ms;
        assert_eq!(stored, *vms.record(vm_id));
        assert_eq!(stored.intent, None);
        assert_eq!(stored.run.is_some(), stored.state.is_live());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn random_operations_follow_the_state_table(moves in proptest::collection::vec(any_move(), 1..60)) {
        let bed = Bed::new();
        let mut model = Model::new();
        let lives = moves.split(|(_, next)| matches!(next, Move::DaemonRestarts));
        for life in lives {
            bed.life(async |vms| {
                hold_against(&bed, &vms, &model);
                for (name, next) in life {
                    step(&bed, &vms, &mut model, ["a", "b", "c"][*name], *next).await;
                    hold_against(&bed, &vms, &model);
                }
            });
        }
    }
}
