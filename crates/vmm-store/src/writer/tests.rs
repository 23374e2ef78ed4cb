//! Tests of the writer thread.

use super::*;
use crate::{codec, open, schema};
use vmm_testkit::store_suite::{insert, next, record, remove, update};

fn waiting(commit: vmm_core::store::Commit) -> WaitingCommit {
    let (reply, _) = oneshot::channel();
    WaitingCommit {
        commit: codec::encode(commit, &crate::foreign::ForeignFields::default()).unwrap(),
        forced: false,
        reply,
    }
}

fn writer(dir: &std::path::Path) -> Writer {
    let opened = open::open(dir, schema::MIGRATIONS).unwrap();
    Writer::new(opened.writer, opened.path, checkpoint::channel().0, opened.reserve).unwrap()
}

#[test]
fn a_refused_commit_fails_no_other_of_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    let (a, rival, b) = (record("a"), record("a"), record("b"));
    let group = [
        insert(&a),
        insert(&rival),
        insert(&b),
        update(&next(&next(&b))),
        update(&next(&b)),
        remove(&a),
        insert(&rival),
    ];
    let outcomes = writer.try_group(&group.map(waiting)).unwrap();
    let reported: Vec<_> =
        outcomes.iter().map(|o| o.as_ref().map(|s| s.unwrap().0).map_err(|e| e.kind)).collect();
    let (taken, conflict) = (Err(StoreErrorKind::NameTaken), Err(StoreErrorKind::Conflict));
    assert_eq!(reported, [Ok(1), taken, Ok(2), conflict, Ok(3), Ok(4), Ok(5)]);
}

/// Commits `count` changes of one VM with `text` in each event, and runs the expiries that
/// these begin.
fn write_events(writer: &mut Writer, vm: &mut vmm_core::store::VmRecord, count: usize, text: &str) {
    for _ in 0..count {
        *vm = next(vm);
        let mut commit = update(vm);
        commit.event.as_mut().unwrap().cause = vmm_core::cause::Cause::Other(text.into());
        writer.commit_group(vec![waiting(commit)]);
        while let Some(expiry) = writer.expiries.pop_front() {
            writer.expire_step(expiry);
        }
    }
}

fn number(writer: &Writer, sql: &str) -> u64 {
    writer.conn.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap().unsigned_abs()
}

#[test]
fn a_log_beyond_its_size_limit_loses_its_oldest_events() {
    const BOUND: u64 = 100_000;
    const SUM: &str = "SELECT sum(octet_length(event)) FROM events";
    let dir = tempfile::tempdir().unwrap();
    let mut vm = record("vm");
    {
        let mut writer = writer(dir.path());
        writer.max_event_bytes = BOUND;
        writer.try_group(&[waiting(insert(&vm))]).unwrap();
        write_events(&mut writer, &mut vm, 400, &"x".repeat(1_000));
        let (first, last, count) = (
            number(&writer, "SELECT min(seq) FROM events"),
            number(&writer, "SELECT max(seq) FROM events"),
            number(&writer, "SELECT count(*) FROM events"),
        );
        assert_eq!((last, count), (401, last - first + 1), "a stretch without holes, up to the last");
        assert!(first > 300 && number(&writer, SUM) <= BOUND, "{first}");
    }
    let writer = writer(dir.path());
    assert_eq!(writer.event_bytes, number(&writer, SUM), "the next daemon goes on counting");
}

#[test]
fn the_file_shrinks_when_many_events_have_expired() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    let mut vm = record("vm");
    writer.try_group(&[waiting(insert(&vm))]).unwrap();
    write_events(&mut writer, &mut vm, 400, &"x".repeat(40_000));
    let pages = |writer: &Writer| number(writer, "SELECT page_count FROM pragma_page_count()");
    let before = pages(&writer);
    for _ in 0..10 {
        writer.remove_events(ExpiryExtent::Time(i64::MAX), 0).unwrap();
    }
    let (after, kept) = (pages(&writer), u64::try_from(FREE_PAGES).unwrap());
    assert!(before > 2 * kept - 1_000 && after < before && after < kept + 100, "{before} → {after}");
}

#[test]
fn settling_distinguishes_applied_from_unapplied_commits() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = writer(dir.path());
    let (vm, other) = (record("vm"), record("other"));
    writer.try_group(&[waiting(insert(&vm))]).unwrap();
    let uid = |vm: &vmm_core::store::VmRecord| vm.uid.to_string();
    let proofs = [
        (CommitProof::Event(EventSeq(1)), true),
        (CommitProof::Event(EventSeq(2)), false),
        (CommitProof::Generation(uid(&vm), 1), true),
        (CommitProof::Generation(uid(&vm), 2), false),
        (CommitProof::Gone(uid(&other)), true),
        (CommitProof::Gone(uid(&vm)), false),
    ];
    for (proof, applied) in &proofs {
        assert_eq!(writer.determine_outcome(Some(proof)).unwrap(), *applied, "{proof:?}");
    }
    let settled: String =
        writer.conn.query_row("SELECT value FROM meta WHERE key = 'settled'", [], |row| row.get(0)).unwrap();
    assert_eq!(settled, proofs.len().to_string());
}
