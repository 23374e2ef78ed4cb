//! A column of the matrix: a hypervisor with a machine model, and the actions of a test on its
//! processes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use vmm_core::backend::{Backend, Capabilities};
use vmm_core::capabilities::{EndpointMode, PanicFact, PowerOffFact, ShutdownFact, TripleFaultFact};
use vmm_core::config::VmConfig;
use vmm_core::state::EndedBy;
use vmm_core::store::VmRecord;
use vmm_host::process::Signal;

use crate::guests::TinyGuest;

/// A hypervisor with a machine model. The default methods act on real processes, see [`real`]. All
/// methods are called in a runtime.
#[async_trait]
pub trait Column: Send + Sync + 'static {
    /// Returns the name in the matrix and of the file of results.
    fn name(&self) -> &'static str;

    /// Makes a backend like a new daemon does.
    fn backend(&self) -> Arc<dyn Backend>;

    /// Sets the part of a configuration that selects this column, such as a machine model.
    fn shape(&self, _config: &mut VmConfig) {}

    /// Returns a guest that ends when it is asked to.
    fn obeying(&self) -> ObeyingGuest;

    /// Returns a Linux kernel and initramfs with the arguments that they need here.
    ///
    /// # Errors
    /// The reason why there is none on this machine.
    fn linux(&self) -> Result<LinuxGuest, String>;

    /// Returns the VMM's own description of its configuration as text.
    async fn view(&self, record: &VmRecord) -> String;

    /// Returns the texts that [`Column::view`] must contain if the field of `case` is served.
    /// `{dir}` stands for the test's folder, and `…` for any text.
    fn evidence(&self, case: &str) -> &'static [&'static str];

    /// Returns true if the guests are real: they print again after a reset and use real TAPs.
    fn is_real(&self) -> bool {
        true
    }

    /// Sends a signal to the VMM.
    fn signal(&self, record: &VmRecord, signal: Signal) {
        real::signal(record, signal);
    }

    /// Returns true if the guest, which is busy, uses no CPU time now.
    async fn stands_still(&self, record: &VmRecord) -> bool {
        real::stands_still(record).await
    }

    /// Returns the processes that use a folder below `runtime_dir`.
    fn processes(&self, runtime_dir: &Path) -> Vec<String> {
        real::processes(runtime_dir)
    }

    /// Kills every process that a failed case has left.
    fn kill_all(&self, runtime_dir: &Path) {
        real::kill_all(runtime_dir);
    }

    /// Returns the version, or the reason why the column cannot run here, if the backend cannot
    /// answer before a case has begun.
    fn known_version(&self) -> Option<Result<String, String>> {
        None
    }

    /// Starts another VMM on `socket` after an attached VMM has ended. Attached columns only.
    fn another(&self, _socket: &Path) {}

    /// Makes a VM called `vm_id` outside the daemon that runs the kernel of `config`, and returns
    /// the name under which it will be imported. `None` if CreateVm makes the VMs of this column.
    fn make(&self, _vm_id: &str, _config: &VmConfig) -> Option<String> {
        None
    }

    /// Returns the name under which a VM of [`Column::make`] was imported.
    fn imported(&self, _vm_id: &str) -> Option<String> {
        None
    }

    /// Returns the file of a VM's kept console, if the file is not in the run folder.
    fn console(&self, _vm_id: &str) -> Option<PathBuf> {
        None
    }

    /// Returns true if this column only imports VMs.
    fn imports(&self) -> bool {
        false
    }
}

/// A guest that ends when it is asked to.
#[derive(Clone, Copy, Debug)]
pub enum ObeyingGuest {
    /// A tiny guest.
    Tiny(TinyGuest),
    /// Linux, because no tiny guest obeys on this column.
    Linux,
}

/// A Linux guest.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// The path of the kernel.
    pub kernel: PathBuf,
    /// The path of the initramfs.
    pub initrd: PathBuf,
    /// The kernel arguments.
    pub args: String,
}

/// Returns the version that the column's backend reports.
///
/// # Errors
/// The reason why the column cannot run on this machine.
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

/// The facts of a backend from which the suite's expectations follow.
#[derive(Clone, Debug)]
pub(super) struct ExpectedFacts {
    /// True if a guest's power-off ends its run.
    pub(super) power_off_seen: bool,
    /// True if such an end is told from others.
    pub(super) power_off_told: bool,
    /// The effect of a power-off in words, for the report.
    pub(super) power_off: &'static str,
    /// True if a guest's reset can continue in the same process.
    pub(super) reset_in_place: bool,
    /// True if a triple fault may be distinguished from a reset.
    pub(super) triple_fault_fails: bool,
    /// True if a guest's panic is seen, on a machine with a panic device.
    pub(super) panic_seen: bool,
    /// True if a forced reboot keeps the process.
    pub(super) reboot_in_place: bool,
    /// The rung of the ladder on which a guest obeys.
    pub(super) asked: EndedBy,
    /// The rung that ends a guest that does not obey.
    pub(super) ordered: EndedBy,
    /// True if VMMs are attached.
    pub(super) attached: bool,
    /// True if a VM can be powered off without the end of an attached VMM.
    pub(super) powers_off: bool,
    /// True if RebootVm is served.
    pub(super) reboots: bool,
    /// True if a guest's reset is seen.
    pub(super) reset_seen: bool,
    /// The effect of a reset in words, for the report.
    pub(super) reset: &'static str,
}

impl ExpectedFacts {
    pub(super) fn of(capabilities: &Capabilities) -> Self {
        let reported = &capabilities.facts;
        let reset = reported.guest_reset.expect("a backend tells what a reset does");
        let reboot = reported.reboot.expect("a backend tells how it reboots");
        let power_off = reported.guest_power_off.expect("a backend tells what a power-off does");
        // A hypervisor without a power button has no order to power off either: see the ladder in
        // vmm-backends.
        let (asked, ordered) = match reported.shutdown.expect("a backend tells how it asks a guest") {
            ShutdownFact::CtrlAltDel => (EndedBy::CtrlAltDel, EndedBy::Sigterm),
            ShutdownFact::PowerButton => (EndedBy::Acpi, EndedBy::Vmm),
        };
        let attached = capabilities.endpoint_mode == EndpointMode::Attached;
        Self {
            attached,
            powers_off: !attached || capabilities.name.as_str() == "cloudhypervisor",
            reboots: reboot.is_served(),
            reset_seen: reset.is_seen(),
            reset: if reset.is_seen() { "seen" } else { "in place, and not seen" },
            power_off_seen: power_off.is_seen(),
            power_off_told: power_off.is_reported(),
            power_off: match power_off {
                PowerOffFact::EndsRun => "ends the run",
                PowerOffFact::EndsVmmWithoutCause => "ends the run and the VMM; the reason is not known",
                PowerOffFact::UnseenOnX86 => {
                    "not seen on x86: the VM stays RUNNING; let guests end by a reset"
                }
            },
            reset_in_place: reset.is_in_place(),
            triple_fault_fails: reported.guest_triple_fault.is_some_and(TripleFaultFact::is_failure),
            panic_seen: reported.guest_panic.is_some_and(PanicFact::is_seen),
            reboot_in_place: reboot.is_in_place(),
            asked,
            ordered,
        }
    }
}

/// The actions of a column on real processes.
pub mod real {
    use super::{Duration, Path, Signal, VmRecord};
    use vmm_core::store::ProcessIdentity;
    use vmm_host::process::{Lookup, Process, adopt, find_by_argument};

    /// Sends a signal to the VMM of `record`, if it exists.
    pub fn signal(record: &VmRecord, signal: Signal) {
        if let Some(process) = record.run.as_ref().and_then(|run| process(&run.process)) {
            // The process may have ended just now.
            let _ = process.signal(signal);
        }
    }

    /// Returns true if the VMM of `record` uses at most 20 ms of CPU time in 300 ms.
    pub async fn stands_still(record: &VmRecord) -> bool {
        let Some(process) = record.run.as_ref().and_then(|run| process(&run.process)) else { return false };
        let used = || process.usage().map(|usage| usage.cpu_time).unwrap_or_default();
        let before = used();
        tokio::time::sleep(Duration::from_millis(300)).await;
        used().saturating_sub(before) <= Duration::from_millis(20)
    }

    /// Returns the pid and program of every process that uses a folder below `runtime_dir`.
    pub fn processes(runtime_dir: &Path) -> Vec<String> {
        let found = find_by_argument(runtime_dir).expect("/proc can be read");
        let name = |found: &vmm_host::process::ProcessMatch| {
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
