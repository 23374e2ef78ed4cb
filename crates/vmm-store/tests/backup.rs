//! Tests of backups: a copy is of one moment even if the daemon writes, replaces no file, and is
//! put back only where it belongs.

#![allow(clippy::unwrap_used, reason = "helpers of a test fail it, like the test itself")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{block_on, open};
use vmm_core::event::EventSeq;
use vmm_core::idempotency::KeyChange;
use vmm_core::store::{Commit, RecordChange, Snapshot, Store, StoreErrorKind, VmRecord};
use vmm_store::{DATABASE_FILE, backup, peek, restore};
use vmm_testkit::store_suite::{all_events, insert, kept, next, record, update};

/// Makes a store in `dir` with VMs of these names, and closes it.
fn fill(dir: &Path, names: &[&str]) {
    let store = open(dir);
    block_on(async {
        for name in names {
            store.commit(insert(&record(name))).await.unwrap();
        }
    });
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        peek(dir).unwrap().unwrap().vms.iter().map(|vm| vm.vm_id.to_string()).collect();
    names.sort();
    names
}

fn as_it_is(_: &mut VmRecord) -> Result<bool, String> {
    Ok(false)
}

/// Returns the names and contents of the files in a directory, except for locks.
fn content(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_none_or(|extension| extension != "lock"))
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn a_folder_or_a_backup_that_does_not_exist_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (state, missing) = (dir.path().join("state"), dir.path().join("missing"));
    fill(&state, &["vm"]);
    let refused = backup(&state, &missing.join("copy.db")).unwrap_err().to_string();
    assert!(refused.contains(&format!("the folder {} does not exist", missing.display())), "{refused}");
    let refused = restore(&missing, &state, &mut as_it_is).unwrap_err().to_string();
    assert!(refused.contains(&format!("there is no file {}", missing.display())), "{refused}");
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_backup_during_writes_is_consistent() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("state"));
    let mut vm = record("busy");
    block_on(store.commit(insert(&vm))).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Ends the writer also if an assertion ends the test.
        let stopping = Stop(&stop);
        let writer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                vm = next(&vm);
                block_on(store.commit(update(&vm))).unwrap();
            }
        });
        for number in 0..20 {
            let file = dir.path().join(format!("copy-{number}"));
            let copied = backup(&dir.path().join("state"), &file).unwrap();
            assert_eq!((copied.instance, copied.vms), (store.instance(), 1));
            let other = dir.path().join(format!("other-{number}"));
            std::fs::create_dir(&other).unwrap();
            restore(&file, &other, &mut as_it_is).unwrap();
            // A record and its event are committed together, so a copy has both or neither.
            let restored = open(&other);
            let (snapshot, events) =
                block_on(async { (restored.load().await.unwrap(), all_events(&restored).await) });
            assert_eq!(events.len() as u64, snapshot.vms[0].generation);
        }
        drop(stopping);
        writer.join().unwrap();
    });
}

#[test]
fn a_backup_is_one_private_file_and_replaces_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fill(&state, &["a", "b"]);
    let copies = dir.path().join("copies");
    fs::create_dir(&copies).unwrap();
    let file = copies.join("copy");
    let copied = backup(&state, &file).unwrap();
    let facts = fs::metadata(&file).unwrap();
    assert_eq!((facts.permissions().mode() & 0o777, facts.len()), (0o600, copied.bytes));
    let before = content(&copies);
    assert_eq!(before.len(), 1, "no log and no draft beside it: {before:?}");

    let error = backup(&state, &file).unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Conflict, "{error}");
    std::os::unix::fs::symlink("/nowhere/else", copies.join("link")).unwrap();
    assert_eq!(backup(&state, &copies.join("link")).unwrap_err().kind, StoreErrorKind::Conflict);
    fs::remove_file(copies.join("link")).unwrap();
    backup(&dir.path().join("none"), &copies.join("of-nothing")).unwrap_err();
    backup(&state, &copies.join("no/such/folder")).unwrap_err();
    assert_eq!(content(&copies), before);
}

#[test]
fn a_damaged_database_is_not_backed_up() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fill(&state, &["a", "b", "c"]);
    damage(&state.join(DATABASE_FILE));
    let file = dir.path().join("copy");
    assert_eq!(backup(&state, &file).unwrap_err().kind, StoreErrorKind::Corrupt);
    assert!(!file.exists());
}

/// Overwrites all but the first page.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[4096..].fill(0xa5);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_peek_reads_all_commits_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    assert!(peek(&state).unwrap().is_none());
    assert!(!state.exists());
    let store = open(&state);
    block_on(store.commit(insert(&record("a")))).unwrap();
    assert_eq!(names(&state), ["a"], "beside the daemon, from the log");
    let Snapshot { instance, .. } = peek(&state).unwrap().unwrap();
    assert_eq!(instance, store.instance());
    drop(store);
    let database = fs::read(state.join(DATABASE_FILE)).unwrap();
    assert_eq!(names(&state), ["a"]);
    assert_eq!(fs::read(state.join(DATABASE_FILE)).unwrap(), database);
    open(&state);
}

#[test]
fn a_restored_backup_replaces_the_database_and_keeps_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("copy"));
    fill(&state, &["a"]);
    backup(&state, &file).unwrap();
    let store = open(&state);
    let last = block_on(async {
        store.commit(insert(&record("b"))).await.unwrap();
        store.load().await.unwrap().last_event
    });
    drop(store);
    let restored = restore(&file, &state, &mut as_it_is).unwrap();
    assert_eq!(restored.copied.vms, 1);
    assert_eq!(names(&state), ["a"]);

    let kept = restored.replaced.unwrap();
    assert!(kept.display().to_string().contains(".replaced-2"), "{}", kept.display());
    let again = dir.path().join("again");
    fs::create_dir(&again).unwrap();
    fs::copy(&kept, again.join(DATABASE_FILE)).unwrap();
    assert_eq!(names(&again), ["a", "b"], "what was replaced is whole");

    let store = open(&state);
    let position = block_on(store.commit(insert(&record("c")))).unwrap().unwrap();
    assert!(position > last, "no position of the event log is given twice: {position:?} after {last:?}");
}

#[test]
fn a_restore_keeps_the_write_ahead_log_of_a_killed_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let (state, killed, file) =
        (dir.path().join("state"), dir.path().join("killed"), dir.path().join("copy"));
    fill(&state, &["a"]);
    backup(&state, &file).unwrap();
    let store = open(&state);
    block_on(store.commit(insert(&record("b")))).unwrap();
    // SIGKILL leaves the last commits in the log alone.
    fs::create_dir(&killed).unwrap();
    for suffix in ["", "-wal"] {
        let name = format!("{DATABASE_FILE}{suffix}");
        fs::copy(state.join(&name), killed.join(&name)).unwrap();
    }
    drop(store);
    let kept = restore(&file, &killed, &mut as_it_is).unwrap().replaced.unwrap();
    assert_eq!(names(&killed), ["a"], "nothing of the old log gets into the backup");
    let again = dir.path().join("again");
    fs::create_dir(&again).unwrap();
    fs::copy(&kept, again.join(DATABASE_FILE)).unwrap();
    assert_eq!(names(&again), ["a", "b"]);
    open(&killed);
}

#[test]
fn a_backup_replaces_a_damaged_or_missing_database() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("copy"));
    fill(&state, &["a", "b"]);
    backup(&state, &file).unwrap();
    let last = EventSeq(2);

    damage(&state.join(DATABASE_FILE));
    fs::write(state.join(format!("{DATABASE_FILE}-wal")), b"a log that goes with it").unwrap();
    let damaged = fs::read(state.join(DATABASE_FILE)).unwrap();
    let kept = restore(&file, &state, &mut as_it_is).unwrap().replaced.unwrap();
    assert_eq!(fs::read(&kept).unwrap(), damaged);
    assert!(PathBuf::from(format!("{}-wal", kept.display())).exists());
    assert_eq!(names(&state), ["a", "b"]);

    fs::remove_file(state.join(DATABASE_FILE)).unwrap();
    assert_eq!(restore(&file, &state, &mut as_it_is).unwrap().replaced, None);
    let store = open(&state);
    let position = block_on(store.commit(insert(&record("c")))).unwrap().unwrap();
    assert!(position > last);
}

#[test]
fn an_unexpected_file_refuses_the_restore_without_a_change() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("copy"));
    fill(&state, &["a", "b", "c"]);
    backup(&state, &file).unwrap();
    let before = content(&state);
    let refused = |file: &Path| restore(file, &state, &mut as_it_is).unwrap_err();
    let altered = |name: &str, sql: &str| {
        let other = dir.path().join(name);
        fs::copy(&file, &other).unwrap();
        rusqlite::Connection::open(&other).unwrap().execute_batch(sql).unwrap();
        other
    };

    let broken = dir.path().join("broken");
    fs::copy(&file, &broken).unwrap();
    damage(&broken);
    assert_eq!(refused(&broken).kind, StoreErrorKind::Corrupt);
    let short = dir.path().join("short");
    fs::write(&short, &fs::read(&file).unwrap()[..5000]).unwrap();
    assert_eq!(refused(&short).kind, StoreErrorKind::Corrupt);
    fs::write(&short, "no database at all, though long enough to look at").unwrap();
    assert_eq!(refused(&short).kind, StoreErrorKind::Corrupt);
    assert_eq!(refused(&altered("newer", "PRAGMA user_version = 99")).kind, StoreErrorKind::Newer);
    assert_eq!(refused(&altered("foreign", "PRAGMA application_id = 1")).kind, StoreErrorKind::Corrupt);
    let row = altered("row", "UPDATE vms SET record = '{}' WHERE vm_id = 'b'");
    assert_eq!(refused(&row).kind, StoreErrorKind::Corrupt);
    let another = altered(
        "another",
        "UPDATE meta SET value = '01920000-0000-7000-8000-000000000001' WHERE key = 'instance'",
    );
    let error = refused(&another);
    assert_eq!(error.kind, StoreErrorKind::Conflict);
    assert!(error.message.contains("another state directory"), "{error}");
    refused(&dir.path().join("none"));
    refused(dir.path());
    assert_eq!(refused(&state.join(DATABASE_FILE)).kind, StoreErrorKind::Conflict);
    let error = restore(&file, &state, &mut |record| Err(format!("{} runs", record.vm_id))).unwrap_err();
    assert!(error.message.contains("a runs; b runs; c runs"), "{error}");
    assert_eq!(content(&state), before);

    let store = open(&state);
    assert_eq!(refused(&file).kind, StoreErrorKind::Io, "a daemon has it");
    drop(store);
    assert_eq!(names(&state), ["a", "b", "c"]);
}

#[test]
fn a_record_can_be_corrected_during_a_restore() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("copy"));
    fill(&state, &["a", "b"]);
    backup(&state, &file).unwrap();
    let mut amend = |record: &mut VmRecord| {
        record.modified_ms = 42;
        Ok(record.vm_id.as_str() == "b")
    };
    restore(&file, &state, &mut amend).unwrap();
    let store = open(&state);
    let vms = block_on(store.load()).unwrap().vms;
    for vm in &vms {
        assert_eq!(vm.modified_ms == 42, vm.vm_id.as_str() == "b");
    }
    block_on(store.commit(Commit { change: RecordChange::Remove(vms[0].uid), event: None })).unwrap();
}

#[test]
fn kept_answers_are_copied_and_put_back() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("copy"));
    let answer = kept("key", 1);
    {
        let store = open(&state);
        let keep = KeyChange::Keep(Box::new(answer.clone()));
        block_on(store.commit_keyed(Some(insert(&record("a"))), keep, false)).unwrap();
    }
    backup(&state, &file).unwrap();
    {
        let store = open(&state);
        block_on(store.commit_keyed(None, KeyChange::Forget("key".to_owned()), false)).unwrap();
        assert_eq!(block_on(store.kept_answer("key")).unwrap().kept, None);
    }
    restore(&file, &state, &mut as_it_is).unwrap();
    assert_eq!(block_on(open(&state).kept_answer("key")).unwrap().kept, Some(answer));
}
