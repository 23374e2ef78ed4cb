//! Tests that the labels of events are written where they change, and that every event is read with
//! the labels that it had.

#![allow(clippy::unwrap_used, reason = "helpers of a test fail it, like the test itself")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{block_on, open};
use vmm_core::event::VmEvent;
use vmm_core::store::{Commit, Store as _, VmRecord};
use vmm_store::DATABASE_FILE;
use vmm_testkit::store_suite::{all_events, insert, next, record, remove, update};

fn labels(team: &str) -> BTreeMap<String, String> {
    [("team".to_owned(), team.to_owned())].into()
}

/// Commits `commit` with the labels of `vm` in its event, at the time `time_ms`.
fn bearing(mut commit: Commit, vm: &VmRecord, time_ms: i64) -> Commit {
    let event = commit.event.as_mut().unwrap();
    event.metadata.clone_from(&vm.config.metadata);
    event.time_ms = time_ms;
    commit
}

/// Returns the team of each event in the order of the log, empty for an event without labels.
fn teams(events: &[VmEvent]) -> Vec<&str> {
    events.iter().map(|event| event.event.metadata.get("team").map_or("", String::as_str)).collect()
}

fn query<T: rusqlite::types::FromSql>(dir: &Path, sql: &str) -> T {
    let conn = rusqlite::Connection::open(dir.join(DATABASE_FILE)).unwrap();
    conn.query_row(sql, [], |row| row.get(0)).unwrap()
}

const ROWS: &str = "SELECT count(*) FROM meta WHERE key LIKE 'labels:%'";
const INLINE: &str = "SELECT count(*) FROM events WHERE event LIKE '%metadata%'";

/// Writes a VM whose labels change once, and a neighbour without labels. The times of the events
/// are 1 to 8.
async fn write_two_lives(store: &vmm_store::SqliteStore) {
    let (mut vm, mut plain) = (record("vm"), record("plain"));
    plain.config.metadata.clear();
    vm.config.metadata = labels("blue");
    store.commit(bearing(insert(&vm), &vm, 1)).await.unwrap();
    vm = next(&vm);
    store.commit(bearing(update(&vm), &vm, 2)).await.unwrap();
    store.commit(bearing(insert(&plain), &plain, 3)).await.unwrap();
    vm = next(&vm);
    vm.config.metadata = labels("red");
    store.commit(bearing(update(&vm), &vm, 4)).await.unwrap();
    vm = next(&vm);
    store.commit(bearing(update(&vm), &vm, 5)).await.unwrap();
    store.commit(bearing(remove(&vm), &vm, 6)).await.unwrap();
    let mut namesake = record("vm");
    namesake.config.metadata.clear();
    store.commit(bearing(insert(&namesake), &namesake, 7)).await.unwrap();
    namesake = next(&namesake);
    store.commit(bearing(update(&namesake), &namesake, 8)).await.unwrap();
}

#[test]
fn an_event_keeps_its_labels_which_are_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let expected = ["blue", "blue", "", "red", "red", "red", "", ""];
    let store = open(dir.path());
    block_on(async {
        write_two_lives(&store).await;
        assert_eq!(teams(&all_events(&store).await), expected);
    });
    drop(store);
    assert_eq!(query::<i64>(dir.path(), INLINE), 0, "no event holds labels itself");
    assert_eq!(query::<i64>(dir.path(), ROWS), 3, "blue, red, and the end");
    let store = open(dir.path());
    block_on(async { assert_eq!(teams(&all_events(&store).await), expected, "after a restart") });
}

#[test]
fn labels_are_removed_with_the_last_event_that_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let rows = || query::<i64>(dir.path(), ROWS);
    block_on(async {
        write_two_lives(&store).await;
        assert_eq!(store.expire_events(2).await.unwrap(), 1);
        assert_eq!(teams(&all_events(&store).await), ["blue", "", "red", "red", "red", "", ""]);
        assert_eq!(rows(), 3);
        assert_eq!(store.expire_events(5).await.unwrap(), 3);
        assert_eq!(teams(&all_events(&store).await), ["red", "red", "", ""]);
        assert_eq!(rows(), 2, "red, and the end");
        assert_eq!(store.expire_events(7).await.unwrap(), 2);
        assert_eq!(rows(), 0, "no event of that VM is left");
        assert_eq!(store.expire_events(100).await.unwrap(), 2);
    });
}

#[test]
fn the_labels_of_a_vm_remain_after_its_events_expire() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    block_on(async {
        let mut vm = record("vm");
        vm.config.metadata = labels("blue");
        store.commit(bearing(insert(&vm), &vm, 1)).await.unwrap();
        assert_eq!(store.expire_events(100).await.unwrap(), 1);
        vm = next(&vm);
        store.commit(bearing(update(&vm), &vm, 101)).await.unwrap();
        assert_eq!(teams(&all_events(&store).await), ["blue"]);
        assert_eq!(query::<i64>(dir.path(), ROWS), 1, "written once");
    });
}

#[test]
fn events_of_an_earlier_release_have_inline_labels() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = record("vm");
    vm.config.metadata = labels("blue");
    let store = open(dir.path());
    block_on(async { store.commit(bearing(insert(&vm), &vm, 1)).await.unwrap() });
    drop(store);
    let conn = rusqlite::Connection::open(dir.path().join(DATABASE_FILE)).unwrap();
    conn.execute("UPDATE events SET event = json_set(event, '$.metadata', json('{\"team\":\"blue\"}'))", [])
        .unwrap();
    conn.execute("DELETE FROM meta WHERE key LIKE 'labels:%'", []).unwrap();
    drop(conn);
    let store = open(dir.path());
    block_on(async {
        assert_eq!(teams(&all_events(&store).await), ["blue"]);
        vm = next(&vm);
        store.commit(bearing(update(&vm), &vm, 2)).await.unwrap();
        assert_eq!(teams(&all_events(&store).await), ["blue", "blue"]);
    });
    drop(store);
    assert_eq!((query::<i64>(dir.path(), INLINE), query::<i64>(dir.path(), ROWS)), (1, 1));
}
