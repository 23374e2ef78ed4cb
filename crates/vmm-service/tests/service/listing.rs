//! ListVms: pages, filters and tokens.

use std::collections::BTreeMap;

use vmm_core::config::VmConfig;
use vmm_core::state::VmState;
use vmm_core::store::VmRecord;
use vmm_service::{ListQuery, VmPage};

use crate::common::*;

fn names(page: &VmPage) -> Vec<&str> {
    page.vms.iter().map(|vm| vm.vm_id.as_str()).collect()
}

fn page(vms: &Vms, size: i32, token: &str) -> VmPage {
    let query = ListQuery { page_size: size, page_token: token.to_owned(), ..ListQuery::default() };
    vms.service.list(&query).unwrap()
}

/// All names, page by page.
fn walk(vms: &Vms, query: ListQuery) -> Vec<String> {
    let mut all = Vec::new();
    let mut query = query;
    loop {
        let page = vms.service.list(&query).unwrap();
        all.extend(names(&page).into_iter().map(str::to_owned));
        if page.next_page_token.is_empty() {
            assert_eq!(all.len(), page.total_count);
            return all;
        }
        query.page_token = page.next_page_token;
    }
}

#[test]
fn a_vm_created_after_the_clock_was_set_back_is_the_youngest() {
    const YEARS: i64 = 9 * 365 * 86_400_000;
    let bed = Bed::new();
    bed.life(async |vms| vms.create("older", bed.config()).await);
    let mut record = bed.stored("older");
    record.created_ms += YEARS;
    bed.store.put(record.clone());
    bed.life(async |vms| {
        for name in ["second", "third"] {
            vms.create(name, bed.config()).await;
        }
        assert_eq!(names(&page(&vms, 0, "")), ["older", "second", "third"]);
    });
    assert!(bed.stored("second").created_ms > record.created_ms);
}

#[tokio::test(start_paused = true)]
async fn pages_are_complete_stable_and_oldest_first() {
    let bed = Bed::new();
    let vms = bed.start().await;
    assert_eq!(page(&vms, 0, "").total_count, 0);
    let created: Vec<String> = (0..25).map(|n| format!("vm-{}", (n * 7) % 25)).collect();
    for vm_id in &created {
        vms.create(vm_id, bed.config()).await;
    }
    for size in [1, 7, 24, 25, 26, 1000, i32::MAX] {
        assert_eq!(walk(&vms, ListQuery { page_size: size, ..ListQuery::default() }), created, "{size}");
    }
    assert_eq!(page(&vms, 25, "").next_page_token, "", "a full last page is the last");
    let negative = ListQuery { page_size: -1, ..ListQuery::default() };
    assert_eq!(violations(vms.service.list(&negative))[0].0, "page_size");
}

#[tokio::test(start_paused = true)]
async fn the_page_size_has_a_default_and_a_limit() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for number in 0..1001 {
        vms.create(&format!("vm-{number}"), bed.config()).await;
    }
    assert_eq!(page(&vms, 0, "").vms.len(), 100);
    let largest = page(&vms, 5000, "");
    assert_eq!((largest.vms.len(), largest.total_count), (1000, 1001));
    assert_eq!(names(&page(&vms, 0, &largest.next_page_token)), ["vm-1000"]);
}

#[test]
fn a_token_outlives_deletions_creations_and_restarts() {
    let bed = Bed::new();
    let token = bed.life(async |vms| {
        for vm_id in ["a", "b", "c", "d", "e"] {
            vms.create(vm_id, bed.config()).await;
        }
        let first = page(&vms, 2, "");
        assert_eq!((names(&first), first.total_count), (vec!["a", "b"], 5));
        first.next_page_token
    });
    bed.life(async |vms| {
        assert_eq!(names(&page(&vms, 2, &token)), ["c", "d"]);
        for vm_id in ["a", "b", "c"] {
            vms.delete(vm_id).await.unwrap();
        }
        vms.create("b", bed.config()).await;
        let rest = page(&vms, 0, &token);
        assert_eq!((names(&rest), rest.total_count), (vec!["d", "e", "b"], 3), "a namesake is another VM");
    });
}

#[tokio::test(start_paused = true)]
async fn all_filters_must_match_and_the_total_counts_the_matches() {
    let bed = Bed::new();
    let vms = bed.start().await;
    let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let with = |pairs: &[(&str, &str)]| VmConfig { metadata: labels(pairs), ..bed.config() };
    vms.bring_to("a", with(&[("team", "x"), ("env", "prod")]), VmState::Running).await;
    vms.bring_to("b", with(&[("team", "x")]), VmState::Paused).await;
    vms.bring_to("c", with(&[("team", "y")]), VmState::Shutdown).await;
    vms.try_create_on("other", "d", with(&[("team", "x")])).await.unwrap();
    let list = |states: &[VmState], pairs: &[(&str, &str)], backend: &str| {
        let query = ListQuery {
            states: states.to_vec(),
            metadata: labels(pairs),
            backend: backend.to_owned(),
            page_size: 1,
            page_token: String::new(),
        };
        walk(&vms, query)
    };
    assert_eq!(list(&[], &[], ""), ["a", "b", "c", "d"]);
    assert_eq!(list(&[VmState::Running, VmState::Paused], &[], ""), ["a", "b"]);
    assert_eq!(list(&[], &[("team", "x")], ""), ["a", "b", "d"]);
    assert_eq!(list(&[], &[("team", "x"), ("env", "prod")], ""), ["a"]);
    assert_eq!(list(&[], &[("team", "")], ""), Vec::<String>::new());
    assert_eq!(list(&[], &[], "other"), ["d"]);
    assert_eq!(list(&[], &[], "nothing"), Vec::<String>::new());
    assert_eq!(list(&[VmState::Created], &[("team", "x")], "fake"), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_bad_token_is_refused() {
    let bed = Bed::new();
    let vms = bed.start().await;
    for vm_id in ["a", "b"] {
        vms.create(vm_id, bed.config()).await;
    }
    let token = page(&vms, 1, "").next_page_token;
    let other_filter =
        ListQuery { states: vec![VmState::Created], page_token: token.clone(), ..ListQuery::default() };
    assert!(violations(vms.service.list(&other_filter))[0].1.contains("another filter"));
    let long = "0".repeat(100_000);
    for bad in
        ["x", "0", &token[1..], &format!("{token}0"), &long, "ää ääääääääääääääääääääääääääääääää", "\0"]
    {
        let query = ListQuery { page_token: bad.to_owned(), ..ListQuery::default() };
        assert_eq!(violations(vms.service.list(&query))[0].0, "page_token", "{bad:.50}");
    }
}

#[test]
fn a_new_vm_is_the_youngest_under_a_clock_that_was_set_back() {
    let bed = Bed::new();
    bed.life(async |vms| {
        for vm_id in ["a", "b"] {
            vms.create(vm_id, bed.config()).await;
        }
    });
    let year_ms = 365 * 86_400_000;
    for vm_id in ["a", "b"] {
        let stored = bed.stored(vm_id);
        bed.store.put(VmRecord { created_ms: stored.created_ms + year_ms, ..stored });
    }
    let created = ["c", "d", "e"];
    bed.life(async |vms| {
        for vm_id in created {
            vms.create(vm_id, bed.config()).await;
        }
        assert_eq!(names(&page(&vms, 0, "")), ["a", "b", "c", "d", "e"]);
    });
    bed.life(async |vms| assert_eq!(names(&page(&vms, 0, "")), ["a", "b", "c", "d", "e"]));
}
