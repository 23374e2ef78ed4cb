//! A VM that is found at its place without an operation: its VMM came back, or another program
//! started it.
//!
//! ```text
//!   found running ──┬─ CREATED, made by this program ──► another VM has the place: reported
//!                   └─ otherwise ──► RUNNING or PAUSED, with the configuration that is found
//!   found at rest ──► a VM that counts as running is searched for again
//! ```

use std::sync::Arc;

use vmm_core::backend::LaunchedVmm;
use vmm_core::cause::Cause;
use vmm_core::config::VmConfig;
use vmm_core::discovery::DiscoveredVm;
use vmm_core::event::EventKind;
use vmm_core::reason::Reason;
use vmm_core::spec::VmSpec;
use vmm_core::state::{Observation, Phase, VmState, observe};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Lookup, adopt};

use super::Actor;
use super::budget::Budget;
use super::hold::Hold;
use super::record_update::{ChangeReason, FoundConfig, RecordUpdate};
use crate::check::FILE_CHECK_TIMEOUT;
use crate::places;

impl Actor {
    /// Takes up a VM that was found at this VM's place.
    pub(super) async fn found(&mut self, mut found: DiscoveredVm) {
        if self.hold.vmm().is_some() {
            // The handle that is held knows more than a look from outside.
            return;
        }
        match found.launched.take() {
            Some(launched) => self.found_running(found, launched).await,
            None if self.record.state.is_live() => self.search_process().await,
            None => {}
        }
    }

    async fn found_running(&mut self, found: DiscoveredVm, launched: LaunchedVmm) {
        let process = &launched.vmm.run().process;
        if let Some(run) = &self.record.run
            && run.process != *process
            && !matches!(adopt(&run.process), Lookup::Gone)
        {
            tracing::warn!(
                pid = process.pid,
                recorded = run.process.pid,
                "another VMM runs at the VM's place, and the VM's own VMM may live; the other VMM is left alone"
            );
            return;
        }
        // A VM without this program's mark that runs at the place of a VM which never ran cannot be
        // that VM.
        if self.record.state == VmState::Created && !self.record.imported && found.uid.is_none() {
            return self.record_taken_place().await;
        }
        let taken = self.configuration_of(&found);
        let spec = taken.as_ref().map_or_else(|| self.spec(), |found| VmSpec::imported(&found.config));
        let vcpus = spec.cpu.count;
        let backend = Arc::clone(&self.backend);
        let found_run = launched.vmm.run().clone();
        let shared = Arc::clone(&self.shared);
        let claiming = async move { places::claimed(&shared, &spec, &backend, found_run).await };
        let budget = Budget::of_own_step();
        // The files may be on a server that does not answer, and a forced operation must not wait
        // for that. A VM that runs is found again later.
        let Ok(run) =
            self.interruptible(budget, 2 * FILE_CHECK_TIMEOUT, async move { Ok(claiming.await) }).await
        else {
            tracing::warn!(
                "the files of a VM that was found do not answer; the VM is taken up when it is found again"
            );
            return;
        };
        if let Err(taken) = self.shared.claims.acquire(self.record.uid, &self.record.vm_id, &run.claims) {
            tracing::error!(detail = %taken, "a running VM uses a disk or TAP that another VM has claimed");
        }
        let was_lost = self.hold.is_out_of_reach();
        let live = self.live_with(launched, run, vcpus);
        self.take_hold(Hold::Vmm(live));
        point(FaultPoint::FoundTaken);
        let standing = found.state == VmState::Paused;
        let observation = if standing { Observation::StandsStill } else { Observation::Runs };
        let status = self
            .status(Phase::at_rest(observe(self.record.state, observation)))
            .because(Reason::StartedFromOutside, "the VM was found running at its place");
        let kind = if was_lost { EventKind::Reachable } else { EventKind::StateChanged };
        let update = RecordUpdate::new(kind, ChangeReason::by_itself(Cause::StartedFromOutside), status)
            .observing(observation)
            .ending(None)
            .configured(taken);
        let _ = self.conclude(budget, update).await;
    }

    /// Records that another VM runs at the place of a VM that never ran.
    async fn record_taken_place(&mut self) {
        let place = &self.record.kind;
        let status = self.status(Phase::Created).because(
            Reason::PlaceTaken,
            format!(
                "another program runs a VM in the VMM at {place}, so this one cannot boot there: end that VM, or delete this \
                 one to have that one imported"
            ),
        );
        let update =
            RecordUpdate::new(EventKind::StateChanged, ChangeReason::by_itself(Cause::PlaceTaken), status);
        self.conclude_once(Budget::of_own_step(), update).await;
    }

    /// Returns the configuration that replaces the one on record, because another program started
    /// the VM, or `None` if the one on record stays. A VM that this program made keeps its
    /// configuration if the machine is the same.
    fn configuration_of(&self, found: &DiscoveredVm) -> Option<FoundConfig> {
        let ours = found.uid.is_some()
            || (!self.record.imported && is_same_machine(&self.record.config, &found.config));
        (!ours).then(|| FoundConfig {
            config: VmConfig {
                metadata: self.record.config.metadata.clone(),
                restart_policy: self.record.config.restart_policy.clone(),
                delete_protection: self.record.config.delete_protection,
                ..found.config.clone()
            },
            unrepresented: found.unrepresented.clone(),
        })
    }
}

/// Returns true if two configurations describe the same machine, as far as every VMM reports it.
fn is_same_machine(ours: &VmConfig, theirs: &VmConfig) -> bool {
    let size = |config: &VmConfig| {
        let cpus = config.cpu.as_ref().map(|cpu| cpu.vcpu_count);
        let memory = config.memory.as_ref().map(|memory| memory.size_bytes);
        let kernel = config.boot.as_ref().map(|boot| boot.kernel_path.clone());
        (cpus, memory, kernel, config.network.len())
    };
    let disks = |config: &VmConfig| {
        let mut disks: Vec<_> =
            config.storage.iter().map(|disk| (disk.path.clone(), disk.read_only)).collect();
        // One of the two may list the root device first.
        disks.sort();
        disks
    };
    size(ours) == size(theirs) && disks(ours) == disks(theirs)
}
