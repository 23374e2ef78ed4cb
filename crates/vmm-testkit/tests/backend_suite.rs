//! The backend suite fails where a backend does.

use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::backend::Backend;
use vmm_core::store::VmRecord;
use vmm_host::process::Signal;
use vmm_testkit::backend_suite::{Column, FakeColumn, LinuxGuest, ObeyingGuest, run};

/// The fake, with a fault.
struct Faulty {
    fake: FakeColumn,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A process is left at the end.
    Leaves,
    /// What was asked does not arrive at the VMM.
    Drops,
    /// It is not in the document.
    Unknown,
}

#[async_trait]
impl Column for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn backend(&self) -> Arc<dyn Backend> {
        self.fake.backend()
    }

    fn obeying(&self) -> ObeyingGuest {
        self.fake.obeying()
    }

    fn linux(&self) -> Result<LinuxGuest, String> {
        self.fake.linux()
    }

    async fn view(&self, record: &VmRecord) -> String {
        self.fake.view(record).await
    }

    fn evidence(&self, case: &str) -> &'static [&'static str] {
        if self.fault == Fault::Drops { &["cpus=2"] } else { self.fake.evidence(case) }
    }

    fn is_real(&self) -> bool {
        self.fake.is_real()
    }

    fn signal(&self, record: &VmRecord, signal: Signal) {
        self.fake.signal(record, signal);
    }

    async fn stands_still(&self, record: &VmRecord) -> bool {
        self.fake.stands_still(record).await
    }

    fn processes(&self, runtime_dir: &Path) -> Vec<String> {
        if self.fault == Fault::Leaves {
            return vec!["1234 \"faulty\"".to_owned()];
        }
        self.fake.processes(runtime_dir)
    }

    fn kill_all(&self, runtime_dir: &Path) {
        self.fake.kill_all(runtime_dir);
    }
}

#[test]
fn a_faulty_backend_fails_its_case() {
    let fails_with = |fault, words: &str| {
        let column = Arc::new(Faulty { fake: FakeColumn::new(), fault });
        let panic = catch_unwind(move || run(column, "vcpu_count", module_path!())).unwrap_err();
        let text = panic.downcast_ref::<String>().unwrap();
        assert!(text.contains(words), "{text}");
    };
    fails_with(Fault::Leaves, "processes left");
    fails_with(Fault::Drops, "cpus=2 is not in ");
    // Where a new document is being made, nothing is compared.
    if std::env::var_os(vmm_testkit::backend_suite::matrix::UPDATE).is_none() {
        fails_with(Fault::Unknown, "docs/backend-support.md says None");
    }
}
