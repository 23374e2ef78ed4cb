//! The store in memory passes the suite that every store passes.

use std::sync::Arc;

use vmm_core::store::Store;
use vmm_testkit::memory_store::MemoryStore;
use vmm_testkit::store_suite::StoreFixture;

struct Memory(Arc<MemoryStore>);

impl StoreFixture for Memory {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::clone(&self.0) as Arc<dyn Store>
    }
}

fn make_place() -> Memory {
    Memory(Arc::new(MemoryStore::new()))
}

vmm_testkit::store_suite!(make_place);
