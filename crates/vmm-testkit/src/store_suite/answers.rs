//! The cases about the answers that are kept for calls with an idempotency key.

use vmm_core::idempotency::{KeptAnswer, KeyChange};
use vmm_core::store::{Store, StoreErrorKind};

use super::StoreFixture;
use super::samples::{insert, kept, load, next, record, remove, update};

async fn find(store: &dyn Store, id: &str) -> Option<KeptAnswer> {
    let found = store.kept_answer(id).await.expect("an answer is looked for");
    assert!(found.has_room);
    found.kept
}

fn keep(answer: &KeptAnswer) -> KeyChange {
    KeyChange::Keep(Box::new(answer.clone()))
}

/// An answer is kept in one transaction with its commit, or alone, and both outlive the store
/// object.
pub async fn an_answer_is_kept_with_its_commit_across_openings(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let (vm, with, alone) = (record("vm"), kept("with", 1), kept("alone", 2));
    let seq = store.commit_keyed(Some(insert(&vm)), keep(&with), false).await.expect("an insert");
    assert_eq!(seq.map(|seq| seq.0), Some(1), "its event is logged");
    assert_eq!(store.commit_keyed(None, keep(&alone), true).await.expect("an answer alone"), None);
    assert_eq!(find(&*store, "with").await.as_ref(), Some(&with), "at once");
    drop(store);
    let store = fixture.open().await;
    assert_eq!(load(&*store).await.vms, std::slice::from_ref(&vm), "with the call that is under way");
    for answer in [&with, &alone] {
        assert_eq!(find(&*store, &answer.call.id).await.as_ref(), Some(answer));
    }
    assert_eq!(find(&*store, "other").await, None);
    // The removal may be repeated, and keeps its answer each time.
    for id in ["removed", "removed-again"] {
        store.commit_keyed(Some(remove(&vm)), keep(&kept(id, 3)), false).await.expect("a removal");
        assert!(find(&*store, id).await.is_some(), "{id}");
    }
}

/// A refused commit keeps no answer.
pub async fn an_answer_of_a_refused_commit_is_not_kept(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let vm = record("vm");
    store.commit(insert(&vm)).await.expect("an insert");
    for commit in [insert(&record("vm")), update(&next(&next(&vm)))] {
        let refused = store.commit_keyed(Some(commit), keep(&kept("id", 1)), false).await;
        let kind = refused.expect_err("the rules forbid it").kind;
        assert!(matches!(kind, StoreErrorKind::NameTaken | StoreErrorKind::Conflict), "{kind:?}");
        assert_eq!(find(&*store, "id").await, None);
    }
}

/// A second answer takes the place of the first, and a forgotten answer is gone.
pub async fn an_answer_is_replaced_and_forgotten(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    for answer in [kept("id", 1), kept("id", 2)] {
        store.commit_keyed(None, keep(&answer), false).await.expect("an answer");
        assert_eq!(find(&*store, "id").await, Some(answer));
    }
    for _ in 0..2 {
        store.commit_keyed(None, KeyChange::Forget("id".to_owned()), false).await.expect("harmless");
        assert_eq!(find(&*store, "id").await, None);
    }
}

/// An expiry removes the answers outside its period, and nothing else.
pub async fn expired_answers_are_removed(fixture: &impl StoreFixture) {
    let store = fixture.open().await;
    let vm = record("vm");
    store.commit(insert(&vm)).await.expect("an insert");
    for time_ms in [10, 20, 30, 40] {
        let answer = kept(&time_ms.to_string(), time_ms);
        store.commit_keyed(None, keep(&answer), false).await.expect("an answer");
    }
    assert_eq!(store.expire_answers(20..40).await.expect("an expiry"), 2);
    assert_eq!(store.expire_answers(20..40).await.expect("an expiry"), 0);
    for (id, is_kept) in [("10", false), ("20", true), ("30", true), ("40", false)] {
        assert_eq!(find(&*store, id).await.is_some(), is_kept, "{id}");
    }
    assert_eq!(load(&*store).await.vms, [vm]);
}
