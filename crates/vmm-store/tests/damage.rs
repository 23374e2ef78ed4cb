//! Tests of databases that are damaged, another program's, or from a newer program: each is refused
//! with a reason, and none is repaired or recreated.

#![allow(clippy::unwrap_used, reason = "helpers of a test fail it, like the test itself")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Random, block_on, open, seed};
use tempfile::TempDir;
use vmm_core::backend::Effect;
use vmm_core::event::{EventKind, EventSeq, VmEvent};
use vmm_core::intent::IntentKind;
use vmm_core::state::VmState;
use vmm_core::store::{
    Commit, EventQuery, HostClaim, RecordChange, Snapshot, Store, StoreError, StoreErrorKind, Tombstone,
    Unreadable, VmRecord,
};
use vmm_store::{DATABASE_FILE, SqliteStore};
use vmm_testkit::store_suite::{all_events, insert, next, record, update};

const PAGE: usize = 4096;

/// Makes a closed database with some VMs and events, and returns its content.
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

/// Reads the whole database as a daemon does at its start.
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
fn a_newer_schema_is_refused_and_unchanged() {
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
fn a_record_of_a_newer_release_hides_no_other_and_is_never_rewritten() {
    let (dir, path, vms, _) = filled();
    tamper(&path, "UPDATE vms SET format = 2 WHERE vm_id = 'vm-3'");
    let before = stored(&path, "vm-3").0;
    let part = only_unreadable(dir.path(), &vms);
    assert!(part.why.contains("format 2") && part.why.contains("newer program"), "{}", part.why);
    let changed = VmRecord { state: VmState::Shutdown, run: None, ..next(&part.record) };
    commit(dir.path(), update(&changed));
    let (after, format) = stored(&path, "vm-3");
    assert_eq!(format, 2, "the program that knows the format reads it again");
    let counted = before.replace("\"generation\":2", "\"generation\":3");
    assert_eq!(json(&after), json(&counted), "nothing but the generation has changed");
}

#[test]
fn a_foreign_database_is_refused() {
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
fn a_truncated_database_is_refused() {
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
fn an_overwritten_page_is_reported_or_held_no_data() {
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
                // The page may hold the text of one record or one event only.
                Ok((snapshot, log)) if snapshot.vms != vms || log != events => {
                    assert!(
                        snapshot.unreadable.len() == 1 || log.len() == events.len(),
                        "page {page} of {fill:#x}"
                    );
                    found += 1;
                }
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
fn an_overwritten_page_is_found_at_the_opening() {
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
fn a_write_ahead_log_without_its_database_is_refused() {
    let (dir, path, ..) = filled();
    let log = dir.path().join(format!("{DATABASE_FILE}-wal"));
    fs::remove_file(&path).unwrap();
    fs::write(&log, [1; 100]).unwrap();
    assert_damaged(&SqliteStore::open(dir.path()).unwrap_err(), &path);
    assert!(!path.exists(), "nothing was made in its place");
    assert_eq!(fs::read(&log).unwrap(), [1; 100]);
}

#[test]
fn an_interrupted_creation_of_the_database_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let draft = dir.path().join(format!("{DATABASE_FILE}.new"));
    fs::write(&draft, b"half a database").unwrap();
    fs::write(dir.path().join(format!("{DATABASE_FILE}.new-journal")), b"and its journal").unwrap();
    assert!(read_all(dir.path()).unwrap().0.vms.is_empty());
    assert!(!draft.exists());
}

/// Returns the one VM that cannot be read, and checks that all others are unchanged.
fn only_unreadable(dir: &Path, vms: &[VmRecord]) -> Unreadable {
    let (snapshot, _) = read_all(dir).unwrap();
    let [part] = <[Unreadable; 1]>::try_from(snapshot.unreadable).unwrap();
    let others: Vec<_> = vms.iter().filter(|vm| vm.uid != part.record.uid).cloned().collect();
    assert_eq!(snapshot.vms, others);
    assert_eq!(others.len() + 1, vms.len());
    part
}

fn commit(dir: &Path, commit: Commit) {
    let store = open(dir);
    block_on(async {
        store.load().await.unwrap();
        store.commit(commit).await.unwrap();
    });
}

/// Returns the stored record of a VM, and its format.
fn stored(path: &Path, vm_id: &str) -> (String, i64) {
    let conn = rusqlite::Connection::open(path).unwrap();
    let sql = "SELECT record, format FROM vms WHERE vm_id = ?1";
    conn.query_row(sql, [vm_id], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_record_with_an_unknown_word_keeps_its_process_its_disks_and_the_word() {
    let words = [
        ("\"phase\":\"created\"", "\"phase\":\"snapshotting\""),
        ("\"request\":\"reboot\"", "\"request\":\"resize\""),
        ("\"tap\":{", "\"address\":{"),
        ("\"ended_by\":\"ctrl-alt-del\"", "\"ended_by\":\"watchdog\""),
    ];
    for (known, newer) in words {
        let (dir, path, vms, _) = filled();
        tamper(
            &path,
            &format!("UPDATE vms SET record = replace(record, '{known}', '{newer}') WHERE vm_id = 'vm-3'"),
        );
        let part = only_unreadable(dir.path(), &vms);
        let (run, whole) = (part.record.run.clone().unwrap(), vms[3].run.clone().unwrap());
        assert_eq!((run.process, &run.claims[0]), (whole.process, &whole.claims[0]), "{newer}");
        assert_eq!((&part.record.config, part.record.generation), (&vms[3].config, 2), "{newer}");
        // A forced shutdown ends the run and leaves everything else to a program that knows more.
        let ended = VmRecord { run: None, ..next(&part.record) };
        commit(dir.path(), update(&ended));
        let after = json(&stored(&path, "vm-3").0);
        assert_eq!((&after["run"], &after["generation"]), (&serde_json::Value::Null, &3.into()), "{newer}");
        if !newer.contains("address") {
            assert!(after.to_string().contains(newer), "{newer} is kept: {after}");
        }
    }
}

#[test]
fn an_intent_of_an_unknown_kind_keeps_its_claims() {
    let (dir, path, vms, _) = filled();
    tamper(
        &path,
        "UPDATE vms SET record = json_set(record, '$.intent.request', 'migrate', '$.intent.claims', \
         json_extract(record, '$.run.claims'), '$.run', NULL) WHERE vm_id = 'vm-3'",
    );
    let part = only_unreadable(dir.path(), &vms);
    let intent = part.record.intent.expect("something is under way");
    assert_eq!(intent.kind, IntentKind::Boot { claims: vms[3].run.clone().unwrap().claims });
    assert_eq!(intent.caller, vms[3].intent.clone().unwrap().caller);
}

#[test]
fn unknown_fields_survive_a_change() {
    let (dir, path, vms, _) = filled();
    let add = "UPDATE vms SET record = json_set(record, '$.color', 'blue', '$.config.cpu.pinning', json('[1,2]')) WHERE vm_id = 'vm-3'";
    tamper(&path, add);
    let (snapshot, _) = read_all(dir.path()).unwrap();
    assert_eq!((snapshot.vms, snapshot.unreadable.len()), (vms.clone(), 0), "they are in nobody's way");
    let changed = VmRecord { state: VmState::Shutdown, run: None, ..next(&vms[3]) };
    commit(dir.path(), update(&changed));
    let after = json(&stored(&path, "vm-3").0);
    assert_eq!(
        (&after["color"], &after["config"]["cpu"]["pinning"]),
        (&"blue".into(), &serde_json::json!([1, 2]))
    );
    assert_eq!((&after["state"], &after["run"]), (&"shutdown".into(), &serde_json::Value::Null));
    let (snapshot, _) = read_all(dir.path()).unwrap();
    assert!(snapshot.vms.contains(&changed));
}

#[test]
fn a_record_of_an_older_release_is_read_and_needs_no_process_namespace() {
    let (dir, path, vms, _) = filled();
    tamper(
        &path,
        "UPDATE vms SET record = json_remove(record, '$.run.process.namespaces', '$.run.claims[0].disk.lies_on', '$.place', \
         '$.imported', '$.untold', '$.intent.patience_ms') WHERE vm_id = 'vm-3'",
    );
    let (snapshot, _) = read_all(dir.path()).unwrap();
    assert!(snapshot.unreadable.is_empty());
    let run = snapshot.vms.iter().find(|vm| vm.uid == vms[3].uid).unwrap().run.clone().unwrap();
    assert_eq!(run.process.namespaces, None);
    assert!(matches!(&run.claims[0], HostClaim::Disk { lies_on, .. } if lies_on.is_empty()));
}

#[test]
fn the_unrepresented_settings_of_earlier_releases_are_read_and_kept_under_their_stored_name() {
    let (dir, path, vms, _) = filled();
    tamper(
        &path,
        r#"UPDATE vms SET record = json_set(record, '$.untold', json('["a vsock device"]')) WHERE vm_id = 'vm-3'"#,
    );
    let (snapshot, _) = read_all(dir.path()).unwrap();
    let record = snapshot.vms.iter().find(|vm| vm.uid == vms[3].uid).unwrap().clone();
    assert_eq!(record.unrepresented, ["a vsock device"]);
    commit(dir.path(), update(&next(&record)));
    assert_eq!(json(&stored(&path, "vm-3").0)["untold"], serde_json::json!(["a vsock device"]));
    // A record that is unreadable otherwise keeps the settings too.
    tamper(&path, "UPDATE vms SET record = json_set(record, '$.backend', 7) WHERE vm_id = 'vm-3'");
    let (snapshot, _) = read_all(dir.path()).unwrap();
    assert_eq!(snapshot.unreadable[0].record.unrepresented, ["a vsock device"]);
}

#[test]
fn an_unreadable_record_is_named_and_hides_no_other() {
    let damage = [
        "UPDATE vms SET record = replace(record, '\"state\":\"created\"', '\"state\":\"hibernated\"')",
        "UPDATE vms SET record = '{'",
        "UPDATE vms SET record = ''",
        "UPDATE vms SET generation = 77",
        "UPDATE vms SET format = 0",
    ];
    for sql in damage {
        let (dir, path, vms, _) = filled();
        tamper(&path, &format!("{sql} WHERE vm_id = 'vm-3'"));
        let part = only_unreadable(dir.path(), &vms);
        assert_eq!((part.record.uid, &part.record.vm_id), (vms[3].uid, &vms[3].vm_id), "{sql}");
        assert!(part.why.starts_with("its record "), "{sql}: {}", part.why);
    }
    let (dir, path, vms, _) = filled();
    tamper(&path, "UPDATE vms SET vm_id = 'another' WHERE vm_id = 'vm-3'");
    assert_eq!(only_unreadable(dir.path(), &vms).record.vm_id.as_str(), "another", "the key counts");
}

#[test]
fn an_unreadable_tombstone_hides_no_vm_and_keeps_its_readable_parts() {
    let bury = |dir: &Path, vms: &[VmRecord]| {
        let claims = vec![HostClaim::Tap { name: "tap0".to_owned() }];
        let grave = Tombstone { vm: vms[3].clone(), claims };
        commit(dir, Commit { change: RecordChange::Bury(Box::new(grave)), event: None });
    };
    for (sql, kept) in [
        ("value = replace(value, '\"state\":\"', '\"state\":\"hibernated-')", true),
        ("value = json_set(value, '$.vm.backend', 7)", true),
        ("value = json_remove(value, '$.vm')", true),
        ("value = '{'", false),
        ("value = ''", false),
    ] {
        let (dir, path, vms, _) = filled();
        bury(dir.path(), &vms);
        tamper(&path, &format!("UPDATE meta SET {sql} WHERE key LIKE 'tombstone:%'"));
        let (snapshot, _) = read_all(dir.path()).unwrap();
        assert_eq!(snapshot.vms.len(), vms.len() - 1, "{sql}");
        let found = snapshot.tombstones.iter().map(|it| (it.vm.uid, it.claims.len())).collect::<Vec<_>>();
        assert_eq!(found, if kept { vec![(vms[3].uid, 1)] } else { vec![] }, "{sql}");
        let rows: i64 = rusqlite::Connection::open(&path)
            .unwrap()
            .query_row("SELECT count(*) FROM meta WHERE key LIKE 'tombstone:%'", [], |row| row.get(0))
            .unwrap();
        assert_eq!(rows, 1, "{sql}: the row stays for the program that understands it");
    }
}

#[test]
fn an_unreadable_event_keeps_its_position() {
    for sql in [
        "SET event = '{}'",
        "SET event = 'x'",
        "SET time_ms = 5",
        "SET vm_id = 'another'",
        "SET format = 2",
        "SET event = replace(event, 'state-changed', 'migrated')",
    ] {
        let (dir, path, _, events) = filled();
        tamper(&path, &format!("UPDATE events {sql} WHERE seq = 4"));
        let (_, log) = read_all(dir.path()).unwrap();
        assert_eq!(
            log.iter().map(|it| it.seq).collect::<Vec<_>>(),
            events.iter().map(|it| it.seq).collect::<Vec<_>>()
        );
        let others = |log: &[VmEvent]| log.iter().filter(|it| it.seq.0 != 4).cloned().collect::<Vec<_>>();
        assert_eq!(others(&log), others(&events), "{sql}");
        assert_eq!(log[3].event.status.reason.as_str(), "unreadable-event", "{sql}");
        if sql.contains("migrated") {
            assert_eq!((log[3].event.kind, log[3].event.uid), (EventKind::Unknown, events[3].event.uid));
        }
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
