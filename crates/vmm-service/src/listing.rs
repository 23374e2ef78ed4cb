//! ListVms: filters, and pages whose tokens stay valid across restarts.
//!
//! A token names the age of the last VM of its page, and the filter of the listing. VMs are ordered
//! by age, so a token names the same position whatever is created or deleted later.
//!
//! The cost of a page does not grow with the number of VMs, because the index keeps the VMs of each
//! state, backend and label in order and counted. There is one exception: with two labels or more,
//! all VMs with the rarest of them are compared, because `total_count` is the number of VMs that
//! have the other labels as well.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmm_core::state::VmState;
use vmm_core::store::VmRecord;

use crate::error::ServiceError;
use crate::index::{Index, ListFilter, ListPosition, VmView};

/// The page size if the client gives none.
const DEFAULT_PAGE: usize = 100;
/// The largest page size.
const MAX_PAGE: usize = 1000;

/// The selection of the VMs to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    /// The states of the VMs to list. Empty means all.
    pub states: Vec<VmState>,
    /// The labels that a VM must bear, all of them.
    pub metadata: BTreeMap<String, String>,
    /// The backend of the VMs to list. Empty means all.
    pub backend: String,
    /// The largest number of VMs: 0 means 100, and more than 1,000 means 1,000.
    pub page_size: i32,
    /// The token of the page before. Empty begins with the oldest VM.
    pub page_token: String,
}

/// One page.
#[derive(Clone, Debug)]
pub struct VmPage {
    /// The VMs, oldest first.
    pub vms: Vec<Arc<VmRecord>>,
    /// The token of the next page. Empty on the last page.
    pub next_page_token: String,
    /// The number of VMs that match on all pages.
    pub total_count: usize,
}

/// Lists the VMs that match `query`.
pub(crate) fn list(index: &Index, query: &ListQuery) -> Result<VmPage, ServiceError> {
    let size = match usize::try_from(query.page_size) {
        Ok(0) => DEFAULT_PAGE,
        Ok(size) => size.min(MAX_PAGE),
        Err(_) => return Err(ServiceError::invalid("page_size", "must be 0 (the default, 100) or more")),
    };
    let after = match query.page_token.as_str() {
        "" => None,
        token => Some(read_token(token, fingerprint(query))?),
    };
    let filter = ListFilter {
        states: VmState::ALL.map(|state| query.states.contains(&state)),
        backend: query.backend.clone(),
        labels: query.metadata.clone(),
    };
    let (mut vms, total_count) = match index.list(&filter, after) {
        (listed, Some(count)) => (listed.take(size + 1).collect(), count),
        (_, None) => walk(index, &filter, after, size + 1),
    };
    let more = vms.len() > size;
    vms.truncate(size);
    let next_page_token = match vms.last() {
        Some(last) if more => page_token(fingerprint(query), ListPosition::of(last)),
        Some(_) | None => String::new(),
    };
    Ok(VmPage { vms, next_page_token, total_count })
}

/// Reads the VMs that are RUNNING or PAUSED, oldest first.
pub(crate) fn live(index: &Index) -> Vec<VmView> {
    let filter = ListFilter { states: VmState::ALL.map(VmState::is_live), ..ListFilter::default() };
    let (records, _) = index.list(&filter, None);
    records.map(|record| VmView { metrics: index.metrics(record.uid), record }).collect()
}

/// Reads every VM that matches, keeps the first `limit` behind `after`, and counts them all.
fn walk(
    index: &Index,
    filter: &ListFilter,
    after: Option<ListPosition>,
    limit: usize,
) -> (Vec<Arc<VmRecord>>, usize) {
    let mut vms = Vec::new();
    let mut count = 0;
    for record in index.list(filter, None).0 {
        count += 1;
        if vms.len() < limit && after.is_none_or(|after| ListPosition::of(&record) > after) {
            vms.push(record);
        }
    }
    (vms, count)
}

/// Returns the token of a page that ends with `last`, for a listing with this filter.
pub(crate) fn page_token(filter: u64, last: ListPosition) -> String {
    format!("{filter:016x}{:016x}{}", last.created_ms, last.uid.as_uuid().simple())
}

/// Returns the last VM of the page before. A token has one spelling: that of [`page_token`].
pub(crate) fn read_token(token: &str, expected: u64) -> Result<ListPosition, ServiceError> {
    let bad = |why: &str| {
        ServiceError::invalid(
            "page_token",
            format!("{why}; use next_page_token of the page before, or none to start over"),
        )
    };
    let stranger = || bad("is not a token of this service");
    // The number parser alone would accept signs and capitals.
    let plain = token.len() == 64 && token.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let (filter, age) = token.split_at_checked(16).filter(|_| plain).ok_or_else(stranger)?;
    let (created_ms, uid) = age.split_at_checked(16).ok_or_else(stranger)?;
    let number = |text| u64::from_str_radix(text, 16).map_err(|_| stranger());
    let (filter, created_ms) = (number(filter)?, number(created_ms)?.cast_signed());
    let uid = uid.parse().map_err(|_| stranger())?;
    if filter != expected {
        return Err(bad("belongs to a listing with another filter"));
    }
    Ok(ListPosition { created_ms, uid })
}

/// Returns the FNV-1a hash of a filter. The hashers of std do not promise the same value in the
/// next release, and a token must stay valid.
pub(crate) fn fingerprint(query: &ListQuery) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut feed = |text: &str| {
        for byte in text.bytes().chain([0xff]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for state in VmState::ALL.into_iter().filter(|state| query.states.contains(state)) {
        feed(state.name());
    }
    feed(&query.backend);
    for (key, value) in &query.metadata {
        feed(key);
        feed(value);
    }
    hash
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_core::event::EventSeq;
    use vmm_core::id::{BackendName, VmUid};
    use vmm_testkit::store_suite::record;

    use super::*;
    use crate::index::CHUNK;
    use crate::mailbox::ActorHandle;

    /// Returns an index of `vms` VMs of every state on two backends. Each third has a label.
    fn index_of(vms: usize) -> Index {
        let index = Index::default();
        for number in 0..vms {
            let mut vm = record(&format!("vm-{number}"));
            vm.uid = VmUid::new(Uuid::from_u128(1 + number as u128));
            vm.created_ms = i64::try_from(number).unwrap();
            vm.state = VmState::ALL[number % 4];
            vm.backend = BackendName::new(["fake", "other"][number / 4 % 2]);
            vm.config.metadata = [("third".to_owned(), (number % 3).to_string())].into();
            let actor = ActorHandle::new(vm.uid, Arc::default());
            index.insert(Arc::new(vm), EventSeq::default(), actor);
        }
        index
    }

    #[test]
    fn a_page_of_a_larger_fleet_visits_no_more_vms() {
        let page = ListQuery { page_size: 10, ..ListQuery::default() };
        let queries = [
            page.clone(),
            ListQuery { states: vec![VmState::Running], ..page.clone() },
            ListQuery { backend: "other".to_owned(), ..page.clone() },
            ListQuery { metadata: [("third".to_owned(), "1".to_owned())].into(), ..page },
        ];
        for query in queries {
            let visits = [2_000, 8_000].map(|vms| {
                let index = index_of(vms);
                let first = list(&index, &query).unwrap();
                let of_first = index.visited();
                let next = ListQuery { page_token: first.next_page_token, ..query.clone() };
                let second = list(&index, &next).unwrap();
                assert_eq!((second.vms.len(), second.total_count), (10, first.total_count));
                [of_first, index.visited() - of_first]
            });
            assert_eq!(visits[0], visits[1], "{query:?}");
            // Each of the eight partitions is looked at once more than it is taken from.
            assert!(visits[1].iter().all(|visits| *visits <= CHUNK + 8), "{visits:?} of {query:?}");
        }
    }

    #[test]
    fn a_token_has_one_spelling() {
        let uid = "0192f3a4-b5c6-7d8e-9fa0-b1c2d3e4f5a6".parse().unwrap();
        let age = ListPosition { created_ms: -5, uid };
        let token = page_token(0xab, age);
        assert_eq!(read_token(&token, 0xab).unwrap(), age);
        let signed = format!("+{}", &token[1..]);
        for odd in [signed.as_str(), &token.to_uppercase(), &token[1..], &format!("{token}0"), "ä"] {
            assert!(read_token(odd, 0xab).is_err(), "{odd}");
        }
    }
}
