//! Runs the suite that every store must pass, and tests the particulars of this one while nothing
//! is broken.

#![allow(clippy::unwrap_used, reason = "helpers of a test fail it, like the test itself")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use common::{block_on, open};
use tempfile::TempDir;
use vmm_core::backend::Effect;
use vmm_core::event::EventSeq;
use vmm_core::kind::VmKind;
use vmm_core::store::{EventQuery, Store, StoreErrorKind};
use vmm_store::{DATABASE_FILE, MAX_EVENTS, SqliteStore};
use vmm_testkit::store_suite::{StoreFixture, all_events, insert, next, record, remove, update};

/// A state directory that is deleted with the test.
struct StateDir(TempDir);

impl StoreFixture for StateDir {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(open(self.0.path()))
    }
}

fn state_dir() -> StateDir {
    StateDir(tempfile::tempdir().unwrap())
}

vmm_testkit::store_suite!(state_dir);

#[test]
fn the_files_of_the_store_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("a/b");
    let store = open(&state);
    block_on(store.commit(insert(&record("vm")))).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let mut files = 0;
    for file in std::fs::read_dir(&state).unwrap() {
        let path = file.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        files += 1;
    }
    assert!(files >= 3, "database, log and lock at least");
    assert_eq!(store.path(), state.join(DATABASE_FILE));
}

#[test]
fn a_close_empties_the_write_ahead_log_and_ends_all_calls() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let log = dir.path().join(format!("{DATABASE_FILE}-wal"));
    block_on(async {
        store.commit(insert(&record("vm"))).await.unwrap();
        assert!(std::fs::metadata(&log).unwrap().len() > 0);
        store.close().await.unwrap();
        store.close().await.unwrap();
        assert!(!log.exists(), "all of it is in the database");
        let error = store.commit(insert(&record("late"))).await.unwrap_err();
        assert_eq!((error.kind, error.effect), (StoreErrorKind::Closed, Effect::NotApplied));
        assert_eq!(store.load().await.unwrap_err().kind, StoreErrorKind::Closed);
    });
    // The lock is released, although the value still exists.
    assert_eq!(block_on(open(dir.path()).load()).unwrap().vms.len(), 1);
}

#[test]
fn a_second_daemon_cannot_open_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let error = SqliteStore::open(dir.path()).unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Io);
    assert!(error.message.contains("in use"), "{error}");
    drop(store);
    open(dir.path());
}

#[test]
fn an_accepted_commit_completes_without_its_caller() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let vm = record("vm");
    {
        let mut commit = store.commit(insert(&vm));
        // One poll puts the commit into the queue, which has room.
        let poll = commit.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(poll, Poll::Pending | Poll::Ready(Ok(_))));
    }
    drop(store);
    let store = open(dir.path());
    assert_eq!(block_on(store.load()).unwrap().vms, [vm]);
    assert_eq!(block_on(all_events(&store)).len(), 1);
}

#[test]
fn a_query_is_limited_and_an_expiry_is_split() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open(dir.path()));
    block_on(async {
        let total = MAX_EVENTS as u64 + 64;
        let workers = (0..64).map(|worker| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut vm = record(&format!("vm-{worker}"));
                store.commit(insert(&vm)).await.unwrap();
                for _ in 1..total.div_ceil(64) {
                    vm = next(&vm);
                    store.commit(update(&vm)).await.unwrap();
                }
            })
        });
        for worker in workers.collect::<Vec<_>>() {
            worker.await.unwrap();
        }
        let query = EventQuery { limit: usize::MAX, ..EventQuery::default() };
        assert_eq!(store.events(query).await.unwrap().len(), MAX_EVENTS);
        let last = store.load().await.unwrap().last_event;
        assert!(last.0 >= total);

        // Commits run between the steps of an expiry. They are answered before or after its end,
        // and none fails.
        let late = record("late");
        let (expired, inserted) = tokio::join!(store.expire_events(1), store.commit(insert(&late)));
        let inserted = inserted.unwrap().unwrap();
        assert_eq!(inserted, EventSeq(last.0 + 1));
        let left = all_events(&*store).await.len() as u64;
        assert_eq!(expired.unwrap() + left, inserted.0);
        assert!(left <= 1, "only the event of the late one can have come after");
        store.commit(remove(&late)).await.unwrap();
    });
}

#[test]
fn a_record_of_a_release_without_kinds_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    block_on(async {
        for name in ["attached", "imported", "plain"] {
            store.commit(insert(&record(name))).await.unwrap();
        }
        store.close().await.unwrap();
    });
    drop(store);
    let database = rusqlite::Connection::open(dir.path().join(DATABASE_FILE)).unwrap();
    let forms = [
        ("attached", "json_set(json_remove(record, '$.kind'), '$.place', '/run/ch.sock')"),
        (
            "imported",
            "json_set(json_remove(record, '$.kind'), '$.place', '00000000-0000-0000-0000-000000000007')",
        ),
        ("plain", "json_remove(record, '$.kind')"),
    ];
    for (name, old) in forms {
        let changed = database.execute(&format!("UPDATE vms SET record = {old} WHERE vm_id = ?1"), [name]);
        assert_eq!(changed.unwrap(), 1, "{name}");
    }
    drop(database);
    let vms = block_on(open(dir.path()).load()).unwrap().vms;
    let kinds: Vec<_> = vms.iter().map(|vm| (vm.vm_id.as_str(), vm.kind.clone())).collect();
    let domain = Some(uuid::Uuid::from_u128(7));
    assert_eq!(
        kinds,
        [
            ("attached", VmKind::attached("/run/ch.sock")),
            ("imported", VmKind::Unrecorded { domain }),
            ("plain", VmKind::Unrecorded { domain: None }),
        ]
    );
}
