//! Puts many VMs into a database, as copies of the one that is there.

use std::path::Path;
use std::sync::Arc;

use futures::{StreamExt as _, stream};
use uuid::Uuid;
use vmm_core::id::VmUid;
use vmm_core::state::VmState;
use vmm_core::store::{Commit, EventQuery, RecordChange, Store as _};
use vmm_store::SqliteStore;

/// Commits under way at once, which share their syncs.
const AT_ONCE: usize = 256;
/// One VM in so many is of the few.
const RARE: usize = 50;

/// Fills the database of a daemon that does not run, so that it holds `vms` VMs. Every second one bears the label `half`, and
/// two of the first hundred, and as many again of all, bear `rare` and are SHUTDOWN.
pub(crate) fn fill(state_dir: &Path, vms: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Arc::new(SqliteStore::open(state_dir).unwrap());
        let template = store.load().await.unwrap().vms.remove(0);
        let created = store.events(EventQuery { limit: 1, ..EventQuery::default() }).await.unwrap().remove(0);
        let rare_every = (vms / 2).max(RARE);
        let commits = (1..vms).map(|number| {
            let mut record = template.clone();
            record.uid = VmUid::new(Uuid::now_v7());
            record.vm_id = format!("vm-{number}").parse().unwrap();
            record.created_ms += i64::try_from(number).unwrap();
            let mut label = |key: &str| drop(record.config.metadata.insert(key.to_owned(), "yes".to_owned()));
            if number % 2 == 0 {
                label("half");
            }
            if number % RARE == 0 && number <= 2 * RARE || number % rare_every == 0 {
                label("rare");
                record.state = VmState::Shutdown;
            }
            let mut event = created.event.clone();
            event.uid = record.uid;
            event.vm_id = record.vm_id.clone();
            let store = Arc::clone(&store);
            async move {
                store
                    .commit(Commit { change: RecordChange::Insert(Box::new(record)), event: Some(event) })
                    .await
                    .unwrap();
            }
        });
        stream::iter(commits).buffer_unordered(AT_ONCE).for_each(async |()| {}).await;
        store.close().await.unwrap();
    });
}
