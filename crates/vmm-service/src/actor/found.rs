//! A VM that is found at its place by itself: its VMM came back, or somebody else started it.
//!
//! ```text
//!   found running ──┬─ CREATED, made by this program ──► somebody else's VM has the place: said, not taken
//!                   └─ otherwise ──► RUNNING or PAUSED, as found; the configuration is the one that is found
//!   found at rest ──► a VM that counts as running is looked for once more
//! ```

use vmm_core::backend::Launched;
use vmm_core::config::VmConfig;
use vmm_core::event::EventKind;
use vmm_core::place::Found;
use vmm_core::spec::VmSpec;
use vmm_core::state::{Observation, Phase, VmState, observe};
use vmm_host::fault::{FaultPoint, point};
use vmm_host::process::{Lookup, adopt};

use super::Actor;
use super::persist::Why;
use crate::places;

/// The reason of a status: at this VM's place runs another one.
const PLACE_TAKEN: &str = "place-taken";

impl Actor {
    /// Takes up what was found at this VM's place.
    pub(super) async fn found(&mut self, mut found: Found) {
        if self.live.is_some() {
            // The handle that is held tells more than a look from outside.
            return;
        }
        match found.launched.take() {
            Some(launched) => self.found_running(found, launched).await,
            None if self.record.state.is_live() => self.look_for_it().await,
            None => {}
        }
    }

    async fn found_running(&mut self, found: Found, launched: Launched) {
        let process = &launched.vmm.run().process;
        if let Some(run) = &self.record.run
            && run.process != *process
            && !matches!(adopt(&run.process), Lookup::Gone)
        {
            tracing::warn!(
                pid = process.pid,
                recorded = run.process.pid,
                "another VMM has taken the VM's place, while its own may live; it is left alone"
            );
            return;
        }
        if self.record.state == VmState::Created && !self.record.imported && found.uid.is_none() {
            return self.place_is_taken().await;
        }
        if found.uid.is_none() {
            self.take_configuration(&found);
        }
        let run = places::claimed(&self.spec, &self.backend, launched.vmm.run().clone()).await;
        if let Err(taken) = self.shared.claims.acquire(self.record.uid, &self.record.vm_id, &run.claims) {
            tracing::error!(taken, "a VM found running holds what another one holds");
        }
        self.restart_at = None;
        self.hold(launched, run);
        point(FaultPoint::FoundTaken);
        let standing = found.state == VmState::Paused;
        let observation = if standing { Observation::StandsStill } else { Observation::Runs };
        let was_lost = self.record.status.phase == Phase::Unreachable;
        self.record.state = observe(self.record.state, observation);
        self.record.ended_by = None;
        self.record.status = self
            .plain(Phase::at_rest(self.record.state))
            .because("started-from-outside", "it was found running at its place");
        let kind = if was_lost { EventKind::Reachable } else { EventKind::StateChanged };
        let _ = self.conclude(kind, Why::by_itself("started-from-outside")).await;
    }

    /// What runs at the place of a VM that never ran is another VM.
    async fn place_is_taken(&mut self) {
        if self.record.status.reason == PLACE_TAKEN {
            return;
        }
        let place = &self.record.kind;
        self.record.status = self.plain(Phase::Created).because(
            PLACE_TAKEN,
            format!(
                "somebody else runs a VM in the VMM at {place}, so this one cannot boot there: end that VM, or delete this \
                 one to have that one imported"
            ),
        );
        let _ = self.conclude(EventKind::StateChanged, Why::by_itself(PLACE_TAKEN)).await;
    }

    /// A VM that somebody else started is what its VMM says, not what is on record.
    fn take_configuration(&mut self, found: &Found) {
        if !self.record.imported && is_same_machine(&self.record.config, &found.config) {
            return;
        }
        self.record.imported = true;
        self.record.untold.clone_from(&found.untold);
        self.record.config = VmConfig {
            metadata: std::mem::take(&mut self.record.config.metadata),
            restart_policy: self.record.config.restart_policy.take(),
            ..found.config.clone()
        };
        self.spec = VmSpec::imported(&self.record.config);
    }
}

/// Says whether two configurations describe the same machine, as far as every VMM tells.
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
        // One side may list the root device first.
        disks.sort();
        disks
    };
    size(ours) == size(theirs) && disks(ours) == disks(theirs)
}
