//! The log of events: what is kept of it, what its tokens mean, and what it says of whom.

use std::collections::BTreeMap;

use vmm_core::cause::Cause;
use vmm_core::config::VmConfig;
use vmm_core::event::{EventKind, NewEvent};
use vmm_core::id::{VmId, VmUid};
use vmm_core::store::{Commit, RecordChange, Store as _, VmRecord};
use vmm_service::{EventsQuery, Watch, WatchMessage, WatchQuery};

use crate::common::*;
use crate::events::{changes, from, life_of, listed, presents, watch};

#[tokio::test(start_paused = true)]
async fn an_expired_token_cannot_be_resumed() {
    let bed = Bed::new();
    let vms = bed.start().await;
    life_of(&vms, "a", bed.config()).await;
    let mut new = watch(&vms, WatchQuery::default()).await;
    let (_, marker) = presents(&mut new).await;
    let all = listed(&vms, "", 1000).await;
    let mut under_way = watch(&vms, from(&all[2].token)).await;
    bed.store.expire_events(i64::MAX).await.unwrap();
    for old in [&all[0], &all[all.len() - 2]] {
        let text = refused(vms.service.watch(from(&old.token)).await.map(|_| ()), "out-of-range");
        assert!(text.contains("without a resume_token"), "{text}");
        assert!(text.contains("UNKEY_VMCP_EVENT_RETENTION"), "the setting that keeps events longer: {text}");
    }
    refused(under_way.next().await, "out-of-range");
    for current in [&all[all.len() - 1].token, &marker] {
        let mut resumed = watch(&vms, from(current)).await;
        assert_eq!(changes(&mut resumed), [], "nothing has happened since, so nothing is lost");
    }
    vms.create("b", bed.config()).await;
    let mut resumed = watch(&vms, from(&marker)).await;
    assert_eq!(changes(&mut resumed).len(), 1);
    assert_eq!(listed(&vms, "", 10).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_gap_in_the_log_ends_the_watch() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("vm", bed.config()).await;
    let reported = bed.store.log().pop().unwrap().event;
    // Five more, of the last seconds; the clock on the wall was put back between the third and the
    // fourth.
    for ago in [5000, 4000, 1000, 3000, 500] {
        let event = NewEvent { time_ms: reported.time_ms - ago, ..reported.clone() };
        log(&bed, event).await;
    }
    vms.create("other", bed.config()).await;
    let all = listed(&vms, "", 10).await;
    let mut under_way = watch(&vms, from(&all[0].token)).await;
    // As an earlier release expired them: by their time, wherever they stood.
    bed.store.lose_events(|event| event.event.time_ms < reported.time_ms - 2000);
    let kept: Vec<_> = bed.store.log().iter().map(|it| it.seq.0).collect();
    assert_eq!(kept, [1, 4, 6, 7]);
    assert_eq!(change_or_refusal(&mut under_way).await, Err("out-of-range"), "2 and 3 are lost to it");
    for (place, expected) in [(1, "out-of-range"), (2, "out-of-range"), (4, "out-of-range")] {
        let mut resumed = match vms.service.watch(from(&all[place - 1].token)).await {
            Ok(resumed) => resumed,
            Err(error) => {
                assert_eq!(kind(&error), expected);
                continue;
            }
        };
        assert_eq!(change_or_refusal(&mut resumed).await, Err(expected), "after {place}");
    }
    for place in [5, 6] {
        let mut resumed = watch(&vms, from(&all[place - 1].token)).await;
        assert_eq!(changes(&mut resumed), all[place..], "after {place} nothing is lost");
    }
    // 3 has expired itself, and what follows it is kept up to the gap.
    let mut resumed = watch(&vms, from(&all[2].token)).await;
    assert_eq!(change_or_refusal(&mut resumed).await, Ok(4));
    assert_eq!(change_or_refusal(&mut resumed).await, Err("out-of-range"));
}

async fn change_or_refusal(watch: &mut Watch) -> Result<u64, &'static str> {
    match watch.next().await {
        Ok(WatchMessage::Change(recorded)) => Ok(recorded.event.seq.0),
        Ok(other) => panic!("not a change: {other:?}"),
        Err(error) => Err(kind(&error)),
    }
}

#[tokio::test(start_paused = true)]
async fn old_events_expire_without_a_request() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("vm", bed.config()).await;
    let reported = bed.store.log().pop().unwrap().event;
    bed.store.lose_events(|_| true);
    let age = i64::try_from(RETENTION_LIMIT.as_millis()).unwrap();
    for ago in [age + 1000, age - 60_000, age + 500, 0] {
        let event = NewEvent { time_ms: reported.time_ms - ago, ..reported.clone() };
        log(&bed, event).await;
    }
    let kept = || bed.store.log().iter().map(|it| it.seq.0).collect::<Vec<_>>();
    assert_eq!(kept(), [2, 3, 4, 5]);
    // The clock on the wall does not move meanwhile, so the others stay young. Place 4 is behind a
    // younger one.
    tokio::time::sleep(RETENTION_LIMIT).await;
    assert_eq!(kept(), [3, 4, 5]);
}

/// Puts an event into the log, as one of a VM that is gone.
async fn log(bed: &Bed, event: NewEvent) {
    let uid = other_uid();
    bed.store.put(VmRecord { uid, vm_id: VmId::generated(uid), ..bed.stored("vm") });
    bed.store.commit(Commit { change: RecordChange::Remove(uid), event: Some(event) }).await.unwrap();
}

fn other_uid() -> VmUid {
    "00000000-0000-7000-8000-000000000001".parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_invalid_token_differs_from_a_token_of_another_log() {
    let bed = Bed::new();
    let vms = bed.start().await;
    life_of(&vms, "vm", bed.config()).await;
    let first = EventsQuery { page_size: 1, ..EventsQuery::default() };
    let page = vms.service.list_events(&first).await.unwrap();
    let (token, page_token) = (page.events[0].token.clone(), page.next_page_token);
    let try_watch = async |token: &str| vms.service.watch(from(token)).await.map(|_| ());

    let long = "e".repeat(100_000);
    for bad in ["x", &token[1..], &format!("{token}0"), &token.to_uppercase(), &long, "ä\0", &page_token] {
        assert_eq!(violations(try_watch(bad).await)[0].0, "resume_token", "{bad:.50}");
        if bad != page_token {
            let query = EventsQuery { page_token: bad.to_owned(), ..EventsQuery::default() };
            assert_eq!(violations(vms.service.list_events(&query).await)[0].0, "page_token", "{bad:.50}");
        }
    }
    let as_page = EventsQuery { page_token: token.clone(), ..EventsQuery::default() };
    assert!(violations(vms.service.list_events(&as_page).await)[0].1.contains("resume_token"));
    let other_filter = EventsQuery { page_token, vm_id: "vm".to_owned(), ..EventsQuery::default() };
    assert!(violations(vms.service.list_events(&other_filter).await)[0].1.contains("another vm_id"));

    let stranger = Bed::new();
    let strangers = stranger.start().await;
    life_of(&strangers, "vm", stranger.config()).await;
    let text = refused(strangers.service.watch(from(&token)).await.map(|_| ()), "out-of-range");
    assert!(text.contains("another"), "{text}");
    // A restored backup: the same places, other events; or places that are not there yet.
    let (head, check) = token.split_at(33);
    let other_event = format!("{head}{:08x}", u32::from_str_radix(check, 16).unwrap() ^ 2);
    let ahead = format!("{}{:016x}{check}", &token[..17], 1_000_000);
    for restored in [other_event, ahead] {
        let text = refused(try_watch(&restored).await, "out-of-range");
        assert!(text.contains("restored backup"), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn filters_select_by_name_and_by_the_labels_of_the_event() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let with = |pairs: &[(&str, &str)]| VmConfig { metadata: labels(pairs), ..bed.config() };
    let start = {
        vms.create("zero", with(&[("team", "x")])).await;
        let mut watch = watch(&vms, WatchQuery::default()).await;
        presents(&mut watch).await.1
    };
    life_of(&vms, "a", with(&[("team", "x"), ("env", "prod")])).await;
    life_of(&vms, "b", with(&[("team", "x")])).await;
    vms.create("c", with(&[("team", "y")])).await;
    let reported = async |vm_id: &str, pairs: &[(&str, &str)]| {
        let query =
            WatchQuery { resume_token: start.clone(), vm_id: vm_id.to_owned(), metadata: labels(pairs) };
        let mut names: Vec<_> = changes(&mut watch(&vms, query).await)
            .iter()
            .map(|it| it.event.event.vm_id.as_str().to_owned())
            .collect();
        names.dedup();
        names
    };
    assert_eq!(reported("", &[]).await, ["a", "b", "c"]);
    assert_eq!(reported("", &[("team", "x")]).await, ["a", "b"], "the dead bear what they bore");
    assert_eq!(reported("", &[("team", "x"), ("env", "prod")]).await, ["a"]);
    assert_eq!(reported("b", &[("team", "x")]).await, ["b"]);
    assert_eq!(reported("b", &[("team", "y")]).await, [""; 0]);
    assert_eq!(reported("unknown", &[]).await, [""; 0]);
    let query = WatchQuery { metadata: labels(&[("team", "x")]), ..WatchQuery::default() };
    let present = presents(&mut watch(&vms, query).await).await.0;
    assert_eq!(present.iter().map(|vm| vm.vm_id.as_str()).collect::<Vec<_>>(), ["zero"]);
    let bad = WatchQuery { vm_id: "not/a name".to_owned(), ..WatchQuery::default() };
    assert_eq!(violations(vms.service.watch(bad).await.map(|_| ()))[0].0, "vm_id");
    assert_eq!(listed(&vms, "b", 3).await.len(), 11);
    assert!(listed(&vms, "unknown", 3).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_events_name_caller_operation_and_outcome() {
    let bed = Bed::new();
    let vms = bed.start().await;
    life_of(&vms, "vm", bed.config()).await;
    let trail: Vec<_> = listed(&vms, "vm", 100)
        .await
        .into_iter()
        .map(|it| {
            let event = it.event.event.clone();
            assert_eq!(event.caller, me());
            (
                event.kind.as_str(),
                event.cause.to_string(),
                event.state.name(),
                event.ended_by.map(|rung| rung.as_str()),
            )
        })
        .collect();
    let started = |cause: &str, state| ("operation-started", cause.to_owned(), state, None);
    let changed = |cause: &str, state| ("state-changed", cause.to_owned(), state, None);
    let ended = trail[8].3;
    assert!(ended.is_some(), "the rung that ended it is told");
    assert_eq!(
        trail,
        [
            ("created", "CreateVm".to_owned(), "CREATED", None),
            started("BootVm", "CREATED"),
            changed("BootVm", "RUNNING"),
            started("PauseVm", "RUNNING"),
            changed("PauseVm", "PAUSED"),
            started("ResumeVm", "PAUSED"),
            changed("ResumeVm", "RUNNING"),
            started("ShutdownVm", "RUNNING"),
            ("state-changed", "ShutdownVm".to_owned(), "SHUTDOWN", ended),
            started("DeleteVm", "SHUTDOWN"),
            ("deleted", "DeleteVm".to_owned(), "SHUTDOWN", None),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_reboot_names_the_rung_in_its_answer_and_its_event() {
    let bed = Bed::new();
    let vms = bed.start().await;
    vms.create("vm", bed.config()).await;
    vms.boot("vm").await.unwrap();
    for answer in [vms.reboot("vm").await.unwrap(), vms.force_reboot("vm").await.unwrap()] {
        assert!(answer.ended_by.is_some(), "the answer tells what ended the guest");
    }
    let reported: Vec<_> = listed(&vms, "vm", 100)
        .await
        .into_iter()
        .filter(|it| {
            it.event.event.cause == Cause::RebootVm && it.event.event.kind == EventKind::StateChanged
        })
        .map(|it| it.event.event.ended_by)
        .collect();
    assert_eq!(reported.len(), 2);
    assert!(reported.iter().all(Option::is_some), "{reported:?}");
}
