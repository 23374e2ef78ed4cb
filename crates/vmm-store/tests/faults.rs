//! Tests that an acknowledged commit survives a killed process, a full disk and a failing disk.
//! Each fault is real, in a child process.

#![allow(clippy::unwrap_used, reason = "helpers of a test fail it, like the test itself")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::{Player, Random, block_on, given_dir, open, seed, tell};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm_core::backend::Effect;
use vmm_core::event::EventSeq;
use vmm_core::store::{Store, StoreError, StoreErrorKind, VmRecord};
use vmm_store::{DATABASE_FILE, SqliteStore};
use vmm_testkit::skip::skipped;
use vmm_testkit::store_suite::{all_events, insert, next, record, remove, update};

/// Commits for ever with several VMs at once, and prints each commit that was answered.
#[test]
#[ignore = "a part that another test starts in a child process"]
fn child_commits_forever() {
    let Some(dir) = given_dir() else { return };
    let store = Arc::new(open(&dir));
    block_on(async {
        let known = store.load().await.unwrap().vms;
        let tasks = (0..8).map(|number| {
            let name = format!("vm-{number}");
            let known = known.iter().find(|vm| vm.vm_id.as_str() == name).map(next);
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let (mut vm, mut commit) = match known {
                    Some(known) => (known.clone(), update(&known)),
                    None => {
                        let new = record(&name);
                        (new.clone(), insert(&new))
                    }
                };
                loop {
                    let seq = store.commit(commit).await.unwrap().unwrap();
                    tell(format_args!("ACK {} {} {}", vm.vm_id, vm.generation, seq.0));
                    vm = next(&vm);
                    commit = update(&vm);
                }
            })
        });
        // No task ends by itself. A panic in one ends the child.
        let tasks: Vec<tokio::task::JoinHandle<()>> = tasks.collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn a_killed_process_loses_no_acknowledged_commit() {
    let mut random = Random(seed("a_killed_process"));
    let dir = tempfile::tempdir().unwrap();
    let mut generations: BTreeMap<String, u64> = BTreeMap::new();
    let mut acknowledged: BTreeMap<u64, String> = BTreeMap::new();
    for round in 0..6 {
        let enough = 1 + random.below(400);
        let mut child = Player::start(&[], "child_commits_forever", dir.path()).unwrap();
        let mut seen = 0;
        for line in child.lines() {
            let mut words = line.split(' ').skip_while(|word| *word != "ACK").skip(1);
            let (Some(name), Some(generation), Some(seq)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            generations.insert(name.to_owned(), generation.parse().unwrap());
            acknowledged.insert(seq.parse().unwrap(), name.to_owned());
            seen += 1;
            if seen == enough {
                child.kill();
            }
        }
        assert!(seen >= enough, "round {round}: the child ended by itself after {seen} of {enough}");
        drop(child);

        let store = open(dir.path());
        let (snapshot, log) = block_on(async { (store.load().await.unwrap(), all_events(&store).await) });
        for (name, generation) in &mut generations {
            let stored = snapshot.vms.iter().find(|vm| vm.vm_id.as_str() == name).unwrap().generation;
            let ahead = stored.checked_sub(*generation);
            assert!(ahead.is_some_and(|n| n <= 1), "{name}: told {generation}, stored {stored}");
            *generation = stored;
        }
        let positions: Vec<u64> = log.iter().map(|event| event.seq.0).collect();
        assert_eq!(positions, (1..=snapshot.last_event.0).collect::<Vec<_>>(), "round {round}: no gap");
        for (seq, name) in &acknowledged {
            assert_eq!(log[*seq as usize - 1].event.vm_id.as_str(), name, "round {round}: event {seq}");
        }
    }
}

/// Commits larger and larger VMs until one is refused. Returns the acknowledged VMs, the refused VM
/// and the error.
async fn fill(store: &SqliteStore) -> (Vec<VmRecord>, VmRecord, StoreError) {
    let mut vms = Vec::new();
    loop {
        assert!(vms.len() < 1_000, "the file system ends long before");
        let mut vm = record(&format!("vm-{}", vms.len()));
        vm.config.metadata.insert("ballast".to_owned(), "x".repeat(10_000));
        match store.commit(insert(&vm)).await {
            Ok(_) => vms.push(vm),
            Err(error) => return (vms, vm, error),
        }
    }
}

#[test]
#[ignore = "a part that another test starts in a child process"]
fn child_fills_the_disk() {
    let Some(dir) = given_dir() else { return };
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(&dir).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return tell(format_args!("UNABLE"));
    }
    std::fs::write(dir.join("ballast"), vec![0; 400_000]).unwrap();
    let store = Arc::new(open(&dir));
    block_on(async {
        let (vms, refused, error) = fill(&store).await;
        assert_eq!((error.kind, error.effect), (StoreErrorKind::Full, Effect::NotApplied), "{error:?}");
        assert!(error.message.contains("no room"), "{error}");
        assert!(vms.len() > 10);
        assert_eq!(store.load().await.unwrap().vms, vms);

        // No commit of this group fits, so the group fails as one and each caller gets the error.
        let group = (0..8).map(|number| {
            let store = Arc::clone(&store);
            let mut vm = record(&format!("group-{number}"));
            vm.config.metadata.insert("ballast".to_owned(), "x".repeat(500_000));
            tokio::spawn(async move { store.commit(insert(&vm)).await })
        });
        for task in group.collect::<Vec<_>>() {
            let error = task.await.unwrap().unwrap_err();
            assert_eq!((error.kind, error.effect), (StoreErrorKind::Full, Effect::NotApplied), "{error:?}");
        }
        assert_eq!(all_events(&*store).await.len(), vms.len(), "no event of a refused commit");

        std::fs::remove_file(dir.join("ballast")).unwrap();
        let seq = store.commit(insert(&refused)).await.unwrap();
        assert_eq!(seq, Some(EventSeq(vms.len() as u64 + 1)), "a refused commit took no position");
        store.close().await.unwrap();
        assert_eq!(open(&dir).load().await.unwrap().vms, [vms, vec![refused]].concat());
    });
    tell(format_args!("DONE"));
}

#[test]
fn a_full_disk_refuses_commits_and_keeps_the_earlier_ones() {
    let dir = tempfile::tempdir().unwrap();
    // The mount is in a namespace of the child, so it ends with the child.
    let wrapper = ["unshare", "--mount", "--map-root-user"];
    expect_done(Player::start(&wrapper, "child_fills_the_disk", dir.path()), "a_full_disk");
}

#[test]
#[ignore = "a part that another test starts in a child process"]
fn child_forces_commits_on_a_full_disk() {
    let Some(dir) = given_dir() else { return };
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=12m", "tmpfs"]).arg(&dir).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return tell(format_args!("UNABLE"));
    }
    let (hog, reserve) = (dir.join("hog"), dir.join(format!("{DATABASE_FILE}-reserve")));
    // Takes all the room that is left, as other programs do.
    let fill_up = || {
        let mut file = std::fs::File::options().append(true).create(true).open(&hog).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    };
    let store = open(&dir);
    assert_eq!(size(&reserve), 4 << 20);
    block_on(async {
        let mut vms: Vec<VmRecord> = (0..100).map(|number| record(&format!("old-{number}"))).collect();
        for vm in &vms {
            store.commit(insert(vm)).await.unwrap();
        }
        fill_up();
        let refused = fill(&store).await.2;
        assert_eq!(refused.kind, StoreErrorKind::Full);
        assert_eq!(size(&reserve), 4 << 20, "an ordinary commit does not get that room");

        // Every recorded VM can be ended and removed, and nothing else can be recorded.
        let others = vms.split_off(50);
        for vm in &mut vms {
            *vm = next(vm);
            store.commit_forced(update(vm)).await.unwrap();
            store.commit_forced(remove(vm)).await.unwrap();
        }
        assert!(size(&reserve) < 4 << 20);
        fill_up();
        let log = all_events(&store).await;
        store.close().await.unwrap();
        fill_up();

        // A daemon that starts on the full disk finds all of it, and can go on with it.
        let store = open(&dir);
        let left = store.load().await.unwrap().vms;
        assert!(others.iter().all(|vm| left.contains(vm)));
        assert!(vms.iter().all(|gone| left.iter().all(|vm| vm.uid != gone.uid)));
        assert_eq!(all_events(&store).await, log);

        // The reserve is made again when there is room and no commit comes for a while.
        std::fs::remove_file(&hog).unwrap();
        store.commit(insert(&record("late"))).await.unwrap();
        for _ in 0..1_000 {
            if size(&reserve) == 4 << 20 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(size(&reserve), 4 << 20);
    });
    tell(format_args!("DONE"));
}

#[test]
fn a_forced_commit_succeeds_on_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let wrapper = ["unshare", "--mount", "--map-root-user"];
    expect_done(
        Player::start(&wrapper, "child_forces_commits_on_a_full_disk", dir.path()),
        "forced_on_a_full_disk",
    );
}

/// Limits the size of this process's files to `size` bytes. SIGXFSZ is ignored, so a write past the
/// limit fails with EFBIG.
fn limit_files(size: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    setrlimit(Resource::Fsize, Rlimit { current: size.or(maximum), maximum }).unwrap();
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
#[ignore = "a part that another test starts in a child process"]
fn child_writes_to_a_failing_disk() {
    let Some(dir) = given_dir() else { return };
    let log = dir.join(format!("{DATABASE_FILE}-wal"));
    let store = Arc::new(open(&dir));
    block_on(async {
        let mut vm = record("vm");
        store.commit(insert(&vm)).await.unwrap();
        let mut effects = Vec::new();
        // Room for nothing, for the settling only (one page or two), and for a part of the commit.
        for room in [0, 2 * 4120, 3 * 4120] {
            let mut changed = next(&vm);
            changed.config.metadata.insert("ballast".to_owned(), "x".repeat(40_000 + effects.len()));
            limit_files(Some(size(&log) + room));
            let error = store.commit(update(&changed)).await.unwrap_err();
            assert_eq!(error.kind, StoreErrorKind::Io, "{error:?}");
            effects.push(error.effect);
            assert_eq!(store.load().await.unwrap().vms, std::slice::from_ref(&vm));
            limit_files(None);
            store.commit(update(&changed)).await.unwrap();
            vm = changed;
            assert_eq!(store.load().await.unwrap().vms, std::slice::from_ref(&vm));
        }
        assert_eq!(effects, [Effect::Unknown, Effect::NotApplied, Effect::NotApplied]);
        let last = store.load().await.unwrap().last_event;
        assert_eq!(last, EventSeq(4), "a failed commit took no position");
        store.close().await.unwrap();
        assert_eq!(open(&dir).load().await.unwrap().vms, [vm]);
    });
    tell(format_args!("DONE"));
}

#[test]
fn a_failing_disk_is_reported_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let wrapper = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"];
    expect_done(Player::start(&wrapper, "child_writes_to_a_failing_disk", dir.path()), "a_failing_disk");
}

/// Waits for a child that prints DONE when it succeeds, or UNABLE if this machine cannot run it.
fn expect_done(child: std::io::Result<Player>, name: &str) {
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return skipped(name, &format!("the wrapper cannot be started: {error}")),
    };
    let lines: Vec<String> = child.lines().collect();
    if lines.iter().any(|line| line.ends_with("UNABLE")) || lines.is_empty() {
        return skipped(name, "this machine does not let the child set it up");
    }
    assert!(lines.iter().any(|line| line.ends_with("DONE")), "the child failed: {lines:#?}");
    assert!(child.succeeded());
}
