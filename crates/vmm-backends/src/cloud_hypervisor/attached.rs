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
    ConsoleFact, Facts, PanicFact, PowerOffFact, ResetFact, StateFact, TripleFaultFact, VmmFailureFact,
};
use vmm_core::id::VmUid;
use vmm_core::report::Report;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_core::state::EndedBy;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::path::shell_word;

use super::client::Client;
use super::convert::{Config, path_option};
use super::describe::configuration;
use super::{Hypervisor, OLDEST};
use crate::attached::handle::Api;
use crate::attached::native::is_in;
use crate::attached::rest::AttachedRest;
use crate::attached::{Guest, Holding, Met};
use crate::ladder::Call;
use crate::program::Version;
use crate::rest::options::check_taps;

#[async_trait]
impl AttachedRest for Hypervisor {
    const SETTING: &'static str = "UNKEY_VMCP_CH_ENDPOINT";

    const OLDEST: Version = OLDEST;

    const NAMES_CONSOLE_AT_START: bool = false;

    fn facts(managed: Facts) -> Facts {
        Facts {
            console: Some(ConsoleFact::OutputUnlessImported),
            guest_panic: Some(PanicFact::Unseen),
            guest_power_off: Some(PowerOffFact::EndsVmmUntold),
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

    fn check_attached(spec: &VmSpec, report: &mut Report) {
        if let Some(RestartMode::Never | RestartMode::OnFailure | RestartMode::Always) = spec.restart.mode {
            report.reject(
                "config.restart_policy.mode",
                "must be unset or RESTART_MODE_GUEST_REBOOT where Cloud Hypervisor was started by another program: its guest's resets \
                 are not seen there, and no VMM can be started in the place of one that has ended; unset UNKEY_VMCP_CH_ENDPOINT to have \
                 VMMs started",
            );
        }
    }

    async fn holding(client: &Client) -> Result<Option<Holding>, BackendError> {
        Ok(client.describe().await?.map(|(state, native)| holding(state.into(), native)))
    }

    fn is_made_of(holds: &Holding, uid: VmUid, spec: &VmSpec, console: Option<&Path>) -> bool {
        let config = Config::of(spec, &spec.tap_names(uid));
        let config = match console {
            Some(file) => config.with_console_in(file),
            None => config,
        };
        serde_json::to_value(config).is_ok_and(|ours| is_in(&ours, &holds.native))
    }

    async fn start(
        met: &Met<Client>,
        request: &LaunchRequest,
        console: Option<&Path>,
        make: bool,
    ) -> Result<(), BackendError> {
        if make {
            check_taps(&request.spec, &request.taps)?;
            let config = Config::of(&request.spec, &request.taps);
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

    async fn power_off(client: &Client) -> Result<bool, BackendError> {
        match client.shutdown().await {
            Ok(()) => Ok(true),
            Err(error) if error.kind == BackendErrorKind::Rejected => {
                Ok(client.state().await? == GuestState::Ended)
            }
            Err(error) => Err(error),
        }
    }

    async fn forget(client: &Client) -> Result<bool, BackendError> {
        client.delete().await.map(|()| true)
    }
}

#[async_trait]
impl Api for Client {
    async fn state(&self) -> Result<GuestState, BackendError> {
        Client::state(self).await
    }

    async fn pause(&self) -> Result<(), BackendError> {
        or_done(self, Client::pause(self).await, GuestState::Paused).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        or_done(self, Client::resume(self).await, GuestState::Running).await
    }

    fn ask(&self) -> Option<(EndedBy, Call<'_>)> {
        Some((EndedBy::Acpi, Box::pin(self.power_button())))
    }

    fn power_off(&self) -> Option<Call<'_>> {
        Some(Box::pin(self.shutdown()))
    }

    async fn reset(&self, _socket: &Path) -> Result<(), BackendError> {
        self.reboot().await
    }

    async fn counters(
        &self,
        _dir: Option<&Path>,
    ) -> Result<(NetworkCounters, StorageCounters), BackendError> {
        let counters = Client::counters(self).await?;
        Ok((counters.network(), counters.storage()))
    }
}

/// Returns success for an error that means that the guest is already in the state `wanted`, because
/// Cloud Hypervisor refuses to pause a paused guest.
async fn or_done(
    client: &Client,
    answer: Result<(), BackendError>,
    wanted: GuestState,
) -> Result<(), BackendError> {
    let Err(error) = answer else { return Ok(()) };
    let is_there = error.kind == BackendErrorKind::Rejected
        && matches!(Client::state(client).await, Ok(state) if state == wanted);
    if is_there { Ok(()) } else { Err(error) }
}

fn holding(guest: Guest, native: Value) -> Holding {
    let (config, untold) = configuration(&native);
    Holding { guest, config, untold, startable: true, native }
}

#[cfg(test)]
mod unit_tests {
    use serde_json::json;

    use super::super::describe::unit_tests::large;
    use super::*;

    fn uid() -> VmUid {
        "0190a000-0000-7000-8000-000000000001".parse().unwrap()
    }

    fn held(native: Value) -> Holding {
        holding(Guest::AtRest, native)
    }

    #[test]
    fn our_own_is_told_from_another_vm() {
        let (spec, console) = (large(), Path::new("/run/x/console.boot"));
        let config = Config::of(&spec, &["tap0".to_owned()]).with_console_in(console);
        let mut native = serde_json::to_value(config).unwrap();
        native["rng"] = json!({"src": "/dev/urandom"});
        assert!(Hypervisor::is_made_of(&held(native.clone()), uid(), &spec, Some(console)));
        assert!(
            !Hypervisor::is_made_of(&held(native.clone()), uid(), &spec, None),
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
            assert!(!Hypervisor::is_made_of(&held(changed), uid(), &spec, Some(console)), "{pointer}");
        }
    }
}
