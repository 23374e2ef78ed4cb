//! Databases that are damaged, not ours, or from the future: refused with a reason, never repaired or recreated.

#![allow(clippy::unwrap_used, reason = "helpers of a test fail it, like the test itself")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Random, block_on, open, seed};
use tempfile::TempDir;
use vmm_core::backend::Effect;
use vmm_core::event::{EventSeq, VmEvent};
use vmm_core::store::{EventQuery, Snapshot, Store, StoreError, StoreErrorKind, VmRecord};
use vmm_store::{DATABASE_FILE, SqliteStore};
use vmm_testkit::store_suite::{all_events, insert, next, record, update};

const PAGE: usize = 4096;

/// A closed database with some VMs and events, and what it holds.
fn filled() -> (TempDir, PathBuf, Vec<VmRecord>, Vec<VmEvent>) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (vms, events) = block_on(async {
        let mut vms: Vec<VmRecord> = (0..12).map(|number| record(&format!("vm-{number}"))).collect();
        for vm in &mut vms {
            store.commit(insert(vm)).await.unwrap();
            *vm = next(vm);
            store.commit(update(vm)).await.unwrap();
        }
        (vms, all_events(&store).await)
    });
    drop(store);
    let path = dir.path().join(DATABASE_FILE);
    (dir, path, vms, events)
}

/// Reads everything, as a daemon would.
fn read_all(dir: &Path) -> Result<(Snapshot, Vec<VmEvent>), StoreError> {
    let store = SqliteStore::open(dir)?;
    block_on(async {
        let query = EventQuery { after: EventSeq(0), vm_id: None, limit: 10_000 };
        Ok((store.load().await?, store.events(query).await?))
    })
}

fn assert_damaged(error: &StoreError, path: &Path) {
    assert_eq!((error.kind, error.effect), (StoreErrorKind::Corrupt, Effect::NotApplied), "{error:?}");
    assert!(error.message.contains(&path.display().to_string()), "names the file: {error}");
    assert!(error.message.contains("backup"), "says what to do: {error}");
}

/// Runs one statement on a closed database, as an administrator could.
fn tamper(path: &Path, sql: &str) {
    rusqlite::Connection::open(path).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let (dir, path, ..) = filled();
    tamper(&path, "PRAGMA user_version = 2");
    let before = fs::read(&path).unwrap();
    let error = SqliteStore::open(dir.path()).unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Newer);
    assert!(error.message.contains("version 2") && error.message.contains("newer"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
    tamper(&path, "PRAGMA user_version = 1");
    open(dir.path());
}

#[test]
fn a_newer_record_is_refused() {
    let (dir, path, vms, _) = filled();
    tamper(&path, "UPDATE vms SET format = 2 WHERE vm_id = 'vm-3'");
    let error = read_all(dir.path()).unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Newer);
    assert!(error.message.contains(&vms[3].uid.to_string()), "{error}");
}

#[test]
fn what_is_no_database_of_ours_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(DATABASE_FILE);
    for content in [&b""[..], b"hello", &[0x5a; 3 * PAGE]] {
        fs::write(&path, content).unwrap();
        assert_damaged(&SqliteStore::open(dir.path()).unwrap_err(), &path);
        assert_eq!(fs::read(&path).unwrap(), content, "left as it was");
    }
    fs::remove_file(&path).unwrap();
    tamper(&path, "CREATE TABLE theirs (x)");
    let error = SqliteStore::open(dir.path()).unwrap_err();
    assert_damaged(&error, &path);
    assert!(error.message.contains("another program"), "{error}");
}

#[test]
fn a_database_cut_short_is_refused() {
    let (dir, path, ..) = filled();
    let whole = fs::read(&path).unwrap();
    let pages = whole.len() / PAGE;
    assert!(pages > 10);
    for cut in (0..pages).map(|page| page * PAGE).chain([50, PAGE - 1, whole.len() - 1, whole.len() / 2 + 7])
    {
        fs::write(&path, &whole[..cut]).unwrap();
        assert_damaged(&read_all(dir.path()).unwrap_err(), &path);
        assert_eq!(fs::metadata(&path).unwrap().len(), cut as u64, "left as it was");
    }
    fs::write(&path, &whole).unwrap();
    read_all(dir.path()).unwrap();
}

#[test]
fn a_page_overwritten_is_found_or_held_nothing() {
    let (dir, path, vms, events) = filled();
    let mut random = Random(seed("a_page_overwritten"));
    let whole = fs::read(&path).unwrap();
    let mut found = 0;
    for page in 0..whole.len() / PAGE {
        for fill in [0x00, 0xff, 0x20, random.below(256) as u8] {
            let mut damaged = whole.clone();
            damaged[page * PAGE..(page + 1) * PAGE].fill(fill);
            fs::write(&path, &damaged).unwrap();
            match read_all(dir.path()) {
                Ok((snapshot, log)) => {
                    assert_eq!(snapshot.vms, vms, "page {page} of {fill:#x}");
                    assert_eq!(log, events, "page {page} of {fill:#x}");
                }
                Err(error) => {
                    assert_damaged(&error, &path);
                    found += 1;
                }
            }
        }
    }
    assert!(found > 20, "most pages hold something");
}

#[test]
fn a_page_overwritten_is_found_when_opening() {
    let (dir, path, ..) = filled();
    let whole = fs::read(&path).unwrap();
    for page in 0..whole.len() / PAGE {
        let mut damaged = whole.clone();
        damaged[page * PAGE..(page + 1) * PAGE].fill(0xff);
        fs::write(&path, &damaged).unwrap();
        let error = SqliteStore::open(dir.path()).err();
        assert_damaged(&error.unwrap_or_else(|| panic!("page {page} was not missed")), &path);
        assert_eq!(fs::read(&path).unwrap(), damaged, "left as it was");
    }
}

#[test]
fn a_log_without_its_database_is_refused() {
    let (dir, path, ..) = filled();
    let log = dir.path().join(format!("{DATABASE_FILE}-wal"));
    fs::remove_file(&path).unwrap();
    fs::write(&log, [1; 100]).unwrap();
    assert_damaged(&SqliteStore::open(dir.path()).unwrap_err(), &path);
    assert!(!path.exists(), "nothing was made in its place");
    assert_eq!(fs::read(&log).unwrap(), [1; 100]);
}

#[test]
fn a_making_that_broke_off_is_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    let draft = dir.path().join(format!("{DATABASE_FILE}.new"));
    fs::write(&draft, b"half a database").unwrap();
    fs::write(dir.path().join(format!("{DATABASE_FILE}.new-journal")), b"and its journal").unwrap();
    assert!(read_all(dir.path()).unwrap().0.vms.is_empty());
    assert!(!draft.exists());
}

#[test]
fn a_record_that_makes_no_sense_is_named() {
    let damage = [
        "UPDATE vms SET record = replace(record, '\"state\":\"created\"', '\"state\":\"hibernated\"')",
        "UPDATE vms SET record = '{'",
        "UPDATE vms SET record = ''",
        "UPDATE vms SET generation = 77",
        "UPDATE vms SET vm_id = 'another'",
        "UPDATE vms SET format = 0",
    ];
    for sql in damage {
        let (dir, path, vms, _) = filled();
        tamper(&path, &format!("{sql} WHERE vm_id = 'vm-3'"));
        let error = read_all(dir.path()).unwrap_err();
        assert_damaged(&error, &path);
        assert!(error.message.contains(&vms[3].uid.to_string()), "{sql}: {error}");
    }
}

#[test]
fn an_event_that_makes_no_sense_is_named() {
    for sql in ["SET event = '{}'", "SET time_ms = 5", "SET vm_id = 'another'"] {
        let (dir, path, ..) = filled();
        tamper(&path, &format!("UPDATE events {sql} WHERE seq = 4"));
        let error = read_all(dir.path()).unwrap_err();
        assert_damaged(&error, &path);
        assert!(error.message.contains("event 4"), "{sql}: {error}");
    }
}

#[test]
fn a_lost_identity_is_not_replaced() {
    for sql in
        ["DELETE FROM meta WHERE key = 'instance'", "UPDATE meta SET value = 'x' WHERE key = 'instance'"]
    {
        let (dir, path, ..) = filled();
        tamper(&path, sql);
        let error = SqliteStore::open(dir.path()).unwrap_err();
        assert_damaged(&error, &path);
        assert!(error.message.contains("identity"), "{error}");
    }
}
