//! A column of the matrix: a hypervisor with a machine model, and what a test does to its processes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use vmm_core::backend::{Backend, Capabilities};
use vmm_core::config::VmConfig;
use vmm_core::state::EndedBy;
use vmm_core::store::VmRecord;
use vmm_host::process::Signal;

use crate::guests::Guest;

/// A hypervisor with a machine model. Its defaults are those of real processes, see [`real`]. Always called in a runtime.
#[async_trait]
pub trait Column: Send + Sync + 'static {
    /// The name in the matrix and of the file of results.
    fn name(&self) -> &'static str;

    /// A backend as a new daemon makes it.
    fn backend(&self) -> Arc<dyn Backend>;

    /// Sets what picks this column in a configuration, such as a machine model.
    fn shape(&self, _config: &mut VmConfig) {}

    /// A guest that ends when it is asked to.
    fn obeying(&self) -> Obeying;

    /// A Linux kernel and initramfs with the arguments that they need here, or why there is none.
    fn linux(&self) -> Result<Linux, String>;

    /// What the VMM itself says of its configuration, as text.
    async fn view(&self, record: &VmRecord) -> String;

    /// What [`Column::view`] must contain where the field of `case` is served; `{dir}` stands for the test's folder,
    /// and `…` for anything in between.
    fn evidence(&self, case: &str) -> &'static [&'static str];

    /// Whether there are real guests, which print again after a reset and use real TAPs.
    fn is_real(&self) -> bool {
        true
    }

    /// Signals the VMM.
    fn signal(&self, record: &VmRecord, signal: Signal) {
        real::signal(record, signal);
    }

    /// Says whether the guest, which is busy, uses no CPU time now.
    async fn stands_still(&self, record: &VmRecord) -> bool {
        real::stands_still(record).await
    }

    /// The processes that use a folder below `runtime_dir`.
    fn processes(&self, runtime_dir: &Path) -> Vec<String> {
        real::processes(runtime_dir)
    }

    /// Kills what a failed case has left.
    fn kill_all(&self, runtime_dir: &Path) {
        real::kill_all(runtime_dir);
    }

    /// The version, or why the column cannot serve here, where its backend cannot tell before a case has begun.
    fn known_version(&self) -> Option<Result<String, String>> {
        None
    }

    /// Starts another VMM on `socket`, as somebody does whose VMM has ended. Only where VMMs are somebody else's.
    fn another(&self, _socket: &Path) {}

    /// Where the VMs are made by somebody else: makes one called `vm_id` that runs the kernel of `config`, and answers with the
    /// name that it will be imported under. `None` where CreateVm makes them.
    fn make(&self, _vm_id: &str, _config: &VmConfig) -> Option<String> {
        None
    }

    /// The name under which a VM was imported that [`Column::make`] has made.
    fn imported(&self, _vm_id: &str) -> Option<String> {
        None
    }

    /// The file of a VM's kept console, where that is not in the run folder.
    fn console(&self, _vm_id: &str) -> Option<PathBuf> {
        None
    }

    /// Whether VMs are imported only.
    fn imports(&self) -> bool {
        false
    }
}

/// A guest that ends when it is asked to.
#[derive(Clone, Copy, Debug)]
pub enum Obeying {
    /// One of the tiny ones.
    Tiny(Guest),
    /// Only Linux does here.
    Linux,
}

/// A Linux guest.
#[derive(Clone, Debug)]
pub struct Linux {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Its arguments.
    pub args: String,
}

/// Asks the column's backend for its version.
pub(super) fn version(column: &dyn Column) -> Result<String, String> {
    if let Some(known) = column.known_version() {
        return known;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(async { column.backend().ping().await.version })
}

/// What a backend says of itself, as far as the suite's expectations follow from it.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// Whether a guest's power-off ends its run.
    pub(super) power_off_seen: bool,
    /// The backend's own words about that.
    pub(super) power_off: String,
    /// Whether a guest's reset can go on in the same process.
    pub(super) reset_in_place: bool,
    /// Whether a triple fault may be told from a reset.
    pub(super) triple_fault_fails: bool,
    /// Whether a guest's panic is seen, on the machine that has a device for it.
    pub(super) panic_seen: bool,
    /// Whether a forced reboot keeps the process.
    pub(super) reboot_in_place: bool,
    /// The rung on which a guest obeys.
    pub(super) asked: EndedBy,
    /// The rung that ends a guest that does not.
    pub(super) ordered: EndedBy,
    /// Whether somebody else starts the VMMs.
    pub(super) attached: bool,
    /// Whether a VM can be powered off, where its VMM is somebody else's, without ending that.
    pub(super) powers_off: bool,
    /// Whether RebootVm is served at all.
    pub(super) reboots: bool,
    /// Whether a guest's reset is seen.
    pub(super) reset_seen: bool,
    /// The backend's own words about that.
    pub(super) reset: String,
}

impl Facts {
    pub(super) fn of(capabilities: &Capabilities) -> Self {
        let fact = |name: &str| capabilities.facts.get(name).cloned().unwrap_or_default();
        // Who has no power button has no order to power off either: see the ladder in vmm-backends.
        let (asked, ordered) = if fact("shutdown").starts_with("Ctrl+Alt+Del") {
            (EndedBy::CtrlAltDel, EndedBy::Sigterm)
        } else {
            (EndedBy::Acpi, EndedBy::Vmm)
        };
        let attached = capabilities.endpoint_mode == "attached";
        Self {
            attached,
            powers_off: !attached || capabilities.name.as_str() == "cloudhypervisor",
            reboots: !fact("reboot").starts_with("no"),
            reset_seen: !fact("guest-reset").contains("not seen"),
            reset: fact("guest-reset"),
            power_off_seen: fact("guest-power-off").starts_with("ends the run"),
            power_off: fact("guest-power-off"),
            reset_in_place: fact("guest-reset").starts_with("in place"),
            triple_fault_fails: fact("guest-triple-fault").contains("failure"),
            panic_seen: fact("guest-panic").starts_with("ends the run"),
            reboot_in_place: fact("reboot").starts_with("in place"),
            asked,
            ordered,
        }
    }
}

/// What a column of real processes does.
pub mod real {
    use super::{Duration, Path, Signal, VmRecord};
    use vmm_core::store::ProcessIdentity;
    use vmm_host::process::{Lookup, Process, adopt, find_by_argument};

    /// Signals the VMM of `record`, if it is there.
    pub fn signal(record: &VmRecord, signal: Signal) {
        if let Some(process) = record.run.as_ref().and_then(|run| process(&run.process)) {
            // It may have ended just now.
            let _ = process.signal(signal);
        }
    }

    /// Says whether the VMM of `record` uses next to no CPU time for a moment.
    pub async fn stands_still(record: &VmRecord) -> bool {
        let Some(process) = record.run.as_ref().and_then(|run| process(&run.process)) else { return false };
        let used = || process.usage().map(|usage| usage.cpu_time).unwrap_or_default();
        let before = used();
        tokio::time::sleep(Duration::from_millis(300)).await;
        used().saturating_sub(before) <= Duration::from_millis(20)
    }

    /// The programs that use a folder below `runtime_dir`.
    pub fn processes(runtime_dir: &Path) -> Vec<String> {
        let found = find_by_argument(runtime_dir).expect("/proc can be read");
        let name = |found: &vmm_host::process::Found| {
            format!("{} {:?}", found.identity.pid, found.program_name().unwrap_or_default())
        };
        found.iter().map(name).collect()
    }

    /// Kills every process that uses a folder below `runtime_dir`.
    pub fn kill_all(runtime_dir: &Path) {
        for found in find_by_argument(runtime_dir).unwrap_or_default() {
            if let Some(process) = process(&found.identity) {
                let _ = process.signal(Signal::KILL);
            }
        }
    }

    fn process(identity: &ProcessIdentity) -> Option<Process> {
        match adopt(identity) {
            Lookup::Alive(process) => Some(process),
            Lookup::Gone | Lookup::Unprovable(_) => None,
        }
    }
}
