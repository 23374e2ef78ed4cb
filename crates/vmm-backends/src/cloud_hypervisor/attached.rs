//! Cloud Hypervisors that another program started.
//!
//! A VM is created in a waiting VMM by `vm.create` and `vm.boot`. When the VM ends, the VMM waits
//! again with the VM in it, so the VM can be booted any number of times. If the guest itself powers
//! off, the process ends as well. The console is a file that [`crate::attached`] copies. The VMM's
//! stdout and event monitor belong to the program that started it.

use std::path::Path;

use async_trait::async_trait;
use serde_json::Value;
use vmm_core::backend::{
    BackendError, BackendErrorKind, Effect, GuestState, LaunchRequest, NetworkCounters, StorageCounters,
};
use vmm_core::capabilities::{
    BackendFacts, ConsoleFact, PanicFact, PowerOffFact, ResetFact, StateFact, TripleFaultFact, VmmFailureFact,
};
use vmm_core::id::VmUid;
use vmm_core::report::CheckReport;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_core::state::EndedBy;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::path::shell_word;

use super::client::CloudHypervisorClient;
use super::convert::{CloudHypervisorConfig, path_option};
use super::describe::configuration;
use super::{CloudHypervisor, OLDEST};
use crate::attached::handle::AttachedVmmApi;
use crate::attached::native_config::contains_values;
use crate::attached::rest::AttachedRestApi;
use crate::attached::{AttachedVmFacts, GuestPhase, IdentifiedVmm};
use crate::ladder::UnsentCall;
use crate::program::Version;
use crate::rest::options::check_taps;

#[async_trait]
impl AttachedRestApi for CloudHypervisor {
    const SETTING: &'static str = "UNKEY_VMCP_CH_ENDPOINT";

    const OLDEST: Version = OLDEST;

    const NAMES_CONSOLE_AT_START: bool = false;

    fn facts(managed: BackendFacts) -> BackendFacts {
        BackendFacts {
            console: Some(ConsoleFact::OutputUnlessImported),
            guest_panic: Some(PanicFact::Unseen),
            guest_power_off: Some(PowerOffFact::EndsVmmWithoutCause),
            guest_reset: Some(ResetFact::InPlaceUnseen),
            guest_triple_fault: Some(TripleFaultFact::AsReset),
            state: Some(StateFact::Polled),
            vmm_failure: Some(VmmFailureFact::NeedsAnotherVmm),
            ..managed
        }
    }

    fn how_to_start(socket: &Path) -> String {
        let (left, socket) = (socket.to_string_lossy(), path_option(socket).to_string_lossy().into_owned());
        // Old versions refuse to listen on a socket that an ended VMM left behind.
        format!("rm -f {} && cloud-hypervisor --api-socket {}", shell_word(&left), shell_word(&socket))
    }

    fn check_attached(spec: &VmSpec, report: &mut CheckReport) {
        if let Some(RestartMode::Never | RestartMode::OnFailure | RestartMode::Always) = spec.restart.mode {
            report.reject(
                "config.restart_policy.mode",
                "must be unset or RESTART_MODE_GUEST_REBOOT where Cloud Hypervisor was started by another program: its guest's resets \
                 are not seen there, and no VMM can be started in the place of one that has ended; unset UNKEY_VMCP_CH_ENDPOINT to have \
                 VMMs started",
            );
        }
    }

    async fn holding(client: &CloudHypervisorClient) -> Result<Option<AttachedVmFacts>, BackendError> {
        Ok(client.describe().await?.map(|(state, native)| holding(state.into(), native)))
    }

    fn equals_request(holds: &AttachedVmFacts, uid: VmUid, spec: &VmSpec, console: Option<&Path>) -> bool {
        let config = CloudHypervisorConfig::of(spec, &spec.tap_names(uid));
        let config = match console {
            Some(file) => config.with_console_in(file),
            None => config,
        };
        serde_json::to_value(config).is_ok_and(|ours| contains_values(&ours, &holds.native))
    }

    async fn start(
        met: &IdentifiedVmm<CloudHypervisorClient>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError> {
        if make {
            check_taps(&request.spec, &request.taps)?;
            let config = CloudHypervisorConfig::of(&request.spec, &request.taps);
            let config = match console {
                Some(file) => config.with_console_in(file),
                None => config,
            };
            met.client.create(&config).await?;
            point(FaultPoint::LaunchConfigured);
        }
        let Err(error) = met.client.boot().await else {
            point(FaultPoint::LaunchStarted);
            return Ok(());
        };
        // The VM that this start created must not stay in the VMM, because the next scan would
        // report it as found.
        if make && let Err(left) = met.client.delete().await {
            tracing::warn!(error = %left, "a VM that failed to start could not be deleted from its VMM");
            return Err(BackendError { effect: Effect::Unknown, ..error });
        }
        Err(error)
    }

    async fn power_off(client: &CloudHypervisorClient) -> Result<bool, BackendError> {
        match client.shutdown().await {
            Ok(()) => Ok(true),
            Err(error) if error.kind == BackendErrorKind::Rejected => {
                Ok(client.state().await? == GuestState::Ended)
            }
            Err(error) => Err(error),
        }
    }

    async fn forget(client: &CloudHypervisorClient) -> Result<bool, BackendError> {
        client.delete().await.map(|()| true)
    }
}

#[async_trait]
impl AttachedVmmApi for CloudHypervisorClient {
    async fn state(&self) -> Result<GuestState, BackendError> {
        CloudHypervisorClient::state(self).await
    }

    async fn pause(&self) -> Result<(), BackendError> {
        accept_if_already(self, CloudHypervisorClient::pause(self).await, GuestState::Paused).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        accept_if_already(self, CloudHypervisorClient::resume(self).await, GuestState::Running).await
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        Some((EndedBy::Acpi, Box::pin(self.power_button())))
    }

    fn power_off(&self) -> Option<UnsentCall<'_>> {
        Some(Box::pin(self.shutdown()))
    }

    async fn reset(&self, _socket: &Path) -> Result<(), BackendError> {
        self.reboot().await
    }

    async fn counters(
        &self,
        _dir: Option<&Path>,
    ) -> Result<(NetworkCounters, StorageCounters), BackendError> {
        let counters = CloudHypervisorClient::counters(self).await?;
        Ok((counters.network(), counters.storage()))
    }
}

/// Returns success for an error that means that the guest is already in the state `wanted`, because
/// Cloud Hypervisor refuses to pause a paused guest.
async fn accept_if_already(
    client: &CloudHypervisorClient,
    answer: Result<(), BackendError>,
    wanted: GuestState,
) -> Result<(), BackendError> {
    let Err(error) = answer else { return Ok(()) };
    let is_there = error.kind == BackendErrorKind::Rejected
        && matches!(CloudHypervisorClient::state(client).await, Ok(state) if state == wanted);
    if is_there { Ok(()) } else { Err(error) }
}

fn holding(guest: GuestPhase, native: Value) -> AttachedVmFacts {
    let (config, unrepresented) = configuration(&native);
    AttachedVmFacts { guest, config, unrepresented, startable: true, native }
}

#[cfg(test)]
mod unit_tests {
    use serde_json::json;

    use super::super::describe::unit_tests::large;
    use super::*;

    fn uid() -> VmUid {
        "0190a000-0000-7000-8000-000000000001".parse().unwrap()
    }

    fn held(native: Value) -> AttachedVmFacts {
        holding(GuestPhase::AtRest, native)
    }

    #[test]
    fn a_reported_configuration_equals_the_request_only_in_full() {
        let (spec, console) = (large(), Path::new("/run/x/console.boot"));
        let config = CloudHypervisorConfig::of(&spec, &["tap0".to_owned()]).with_console_in(console);
        let mut native = serde_json::to_value(config).unwrap();
        native["rng"] = json!({"src": "/dev/urandom"});
        assert!(CloudHypervisor::equals_request(&held(native.clone()), uid(), &spec, Some(console)));
        assert!(
            !CloudHypervisor::equals_request(&held(native.clone()), uid(), &spec, None),
            "its console goes elsewhere"
        );
        for (pointer, other) in [
            ("/payload/kernel", json!("/other")),
            ("/disks/0/path", json!("/other")),
            ("/net", json!([])),
            ("/cpus/boot_vcpus", json!(1)),
        ] {
            let mut changed = native.clone();
            *changed.pointer_mut(pointer).unwrap() = other;
            assert!(
                !CloudHypervisor::equals_request(&held(changed), uid(), &spec, Some(console)),
                "{pointer}"
            );
        }
    }
}
