//! Firecrackers that another program started.
//!
//! A waiting VMM is configured and started once. Its process ends with its guest, so each new start
//! of the guest needs another VMM on the same socket. A configuration cannot be undone, so a VMM
//! that holds parts of another VM is refused. The console is a file that [`crate::attached`]
//! copies. The VMM's stdin, stdout and log belong to the program that started it. Its last counters
//! show why it ended.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde_json::Value;
use vmm_core::backend::{
    BackendError, BackendErrorKind, Effect, ExitCause, GuestState, LaunchRequest, NetworkCounters,
    StorageCounters,
};
use vmm_core::capabilities::{
    BackendFacts, ConsoleFact, RebootFact, ResetFact, StateFact, TripleFaultFact, VmmFailureFact,
};
use vmm_core::id::VmUid;
use vmm_core::report::CheckReport;
use vmm_core::spec::{RestartMode, VmSpec};
use vmm_core::state::EndedBy;
use vmm_host::fault::{FaultPoint, point};
use vmm_host::path::shell_word;

use super::Firecracker;
use super::client::FirecrackerClient;
use super::convert::FirecrackerConfig;
use super::describe::configuration;
use super::metrics::{FirecrackerMetrics, METRICS};
use crate::attached::handle::AttachedVmmApi;
use crate::attached::native_config::{contains_values, list, text};
use crate::attached::rest::AttachedRestApi;
use crate::attached::{AttachedVmFacts, GuestPhase, IdentifiedVmm};
use crate::ladder::UnsentCall;
use crate::program::Version;
use crate::rest::client::RestApi as _;
use crate::rest::options::check_taps;

/// The oldest usable Firecracker that another program started. Older versions cannot redirect the
/// serial port of a running VMM (`PUT /serial`).
const OLDEST: Version = Version::new(1, 14, 0);

#[async_trait]
impl AttachedRestApi for Firecracker {
    const SETTING: &'static str = "UNKEY_VMCP_FC_ENDPOINT";

    const OLDEST: Version = OLDEST;

    const NAMES_CONSOLE_AT_START: bool = true;

    fn facts(managed: BackendFacts) -> BackendFacts {
        BackendFacts {
            console: Some(ConsoleFact::OutputUnlessImported),
            guest_reset: Some(ResetFact::EndsVmm),
            guest_triple_fault: Some(TripleFaultFact::EndsVmm),
            reboot: Some(RebootFact::NeedsAnotherVmm),
            state: Some(StateFact::Polled),
            vmm_failure: Some(VmmFailureFact::NeedsAnotherVmm),
            ..managed
        }
    }

    fn how_to_start(socket: &Path) -> String {
        let socket = shell_word(&socket.to_string_lossy());
        // Firecracker refuses to listen on a socket that an ended VMM left behind.
        format!("rm -f {socket} && firecracker --api-sock {socket}")
    }

    fn check_attached(spec: &VmSpec, report: &mut CheckReport) {
        match spec.restart.mode {
            None | Some(RestartMode::Never) => {}
            Some(RestartMode::GuestReboot | RestartMode::OnFailure | RestartMode::Always) => report.reject(
                "config.restart_policy.mode",
                "must be unset or RESTART_MODE_NEVER where Firecracker was started by another program: every new start needs a \
                 VMM that this program may not start; unset UNKEY_VMCP_FC_ENDPOINT to have VMMs started",
            ),
        }
        for warning in
            report.warnings.iter_mut().filter(|warning| warning.field == "config.restart_policy.mode")
        {
            // The advice of the managed backend does not hold here, because no other mode can be
            // set.
            "is RESTART_MODE_NEVER on firecracker, where a reset is how a guest ends"
                .clone_into(&mut warning.message);
        }
    }

    async fn holding(client: &FirecrackerClient) -> Result<Option<AttachedVmFacts>, BackendError> {
        let (state, _) = client.instance().await?;
        Ok(holding(state.into(), client.describe().await?))
    }

    /// Accepts a part of the VM as well, because Firecracker is configured piece by piece and an
    /// interrupted start leaves a part.
    fn equals_request(holds: &AttachedVmFacts, uid: VmUid, spec: &VmSpec, _console: Option<&Path>) -> bool {
        let config = FirecrackerConfig::of(spec, &spec.tap_names(uid));
        let (Ok(drives), Ok(interfaces)) = (to_list(&config.drives), to_list(&config.interfaces)) else {
            return false;
        };
        let known = |ours: &[Value], field: &str, id: &str| {
            list(&holds.native, field).all(|theirs| {
                ours.iter().any(|ours| ours.get(id) == theirs.get(id) && contains_values(ours, theirs))
            })
        };
        let kernel = holds.native.get("boot-source").map(|boot| text(boot, "kernel_image_path"));
        let same_kernel =
            kernel.is_none_or(|kernel| kernel.is_empty() || kernel == config.boot.kernel_image_path);
        // A running VM must have all devices of the specification. A stopped one may have a part,
        // because an interrupted start is continued.
        let all = holds.guest == GuestPhase::AtRest
            || (list(&holds.native, "drives").count() == drives.len()
                && list(&holds.native, "network-interfaces").count() == interfaces.len());
        all && same_kernel
            && holds.unrepresented.is_empty()
            && known(&drives, "drives", "drive_id")
            && known(&interfaces, "network-interfaces", "iface_id")
    }

    async fn start(
        met: &IdentifiedVmm<FirecrackerClient>,
        request: &LaunchRequest,
        console: Option<&Path>,
        _make: bool,
    ) -> Result<(), BackendError> {
        if !request.imported || met.holds.is_none() {
            check_taps(&request.spec, &request.taps)?;
            let metrics = prepare(request).await?;
            if let Some(console) = console {
                met.client.write_console_to(console).await?;
            }
            if let Err(error) = met.client.write_metrics_to(&metrics).await {
                // Another client may use the counters, or the VMM may not write to the run folder.
                // The VM runs without them.
                tracing::warn!(%error, "Firecracker refused the file for its counters; the VM has no device counters");
            }
            met.client.configure(&FirecrackerConfig::of(&request.spec, &request.taps)).await?;
            point(FaultPoint::LaunchConfigured);
        }
        met.client.start().await?;
        point(FaultPoint::LaunchStarted);
        Ok(())
    }

    async fn power_off(client: &FirecrackerClient) -> Result<bool, BackendError> {
        Ok(client.instance().await?.0 == GuestState::Ended)
    }

    async fn forget(_client: &FirecrackerClient) -> Result<bool, BackendError> {
        Ok(false)
    }
}

fn to_list<T: serde::Serialize>(items: &[T]) -> serde_json::Result<Vec<Value>> {
    items.iter().map(serde_json::to_value).collect()
}

/// Removes the counters of an earlier run, and returns the path of the new ones.
async fn prepare(request: &LaunchRequest) -> Result<PathBuf, BackendError> {
    let dir = request.dir.clone();
    let prepared = tokio::task::spawn_blocking(move || {
        FirecrackerMetrics::begin(&dir)?;
        Ok::<_, std::io::Error>(dir.join(METRICS))
    });
    let error = match prepared.await {
        Ok(Ok(path)) => return Ok(path),
        Ok(Err(error)) => error,
        Err(error) => std::io::Error::other(error),
    };
    let message = format!("the run folder cannot be prepared: {error}; look at its room and rights");
    Err(BackendError::new(BackendErrorKind::Host, Effect::NotApplied, message).caused_by(error))
}

#[async_trait]
impl AttachedVmmApi for FirecrackerClient {
    async fn state(&self) -> Result<GuestState, BackendError> {
        Ok(self.instance().await?.0)
    }

    async fn pause(&self) -> Result<(), BackendError> {
        FirecrackerClient::pause(self).await
    }

    async fn resume(&self) -> Result<(), BackendError> {
        FirecrackerClient::resume(self).await
    }

    fn ask(&self) -> Option<(EndedBy, UnsentCall<'_>)> {
        // Only Firecracker on x86-64 has a keyboard controller.
        let call = || -> UnsentCall<'_> { Box::pin(self.ctrl_alt_del()) };
        cfg!(target_arch = "x86_64").then(|| (EndedBy::CtrlAltDel, call()))
    }

    fn power_off(&self) -> Option<UnsentCall<'_>> {
        None
    }

    async fn reset(&self, socket: &Path) -> Result<(), BackendError> {
        let message = format!(
            "Firecracker starts a guest once, and the one on unix://{} was started by another program: shut the VM down, start \
             another VMM there ({}), and boot the VM",
            socket.display(),
            Firecracker::how_to_start(socket)
        );
        Err(BackendError::new(BackendErrorKind::Unreachable, Effect::NotApplied, message))
    }

    async fn explain(&self, dir: &Path) -> Option<ExitCause> {
        let sums = FirecrackerMetrics::new(dir).sums().await.ok()?;
        if sums.cpu_failed() {
            return Some(ExitCause::GuestCrash);
        }
        sums.guest_reset().then_some(ExitCause::GuestReset)
    }

    async fn counters(&self, dir: Option<&Path>) -> Result<(NetworkCounters, StorageCounters), BackendError> {
        let nothing = || Ok(Default::default());
        let Some(dir) = dir else { return nothing() };
        if !tokio::fs::try_exists(dir.join(METRICS)).await.unwrap_or(false) {
            return nothing();
        }
        self.flush_metrics().await?;
        let sums = FirecrackerMetrics::new(dir).sums().await?;
        Ok((sums.network(), sums.storage()))
    }
}

/// Returns the VM that a VMM holds, or `None` if the VMM has no configuration yet.
fn holding(guest: GuestPhase, native: Value) -> Option<AttachedVmFacts> {
    let (config, unrepresented) = configuration(&native);
    let startable = config.boot.as_ref().is_some_and(|boot| !boot.kernel_path.is_empty());
    let begun =
        startable || !config.storage.is_empty() || !config.network.is_empty() || !unrepresented.is_empty();
    (begun || guest.is_live()).then_some(AttachedVmFacts { guest, config, unrepresented, startable, native })
}

#[cfg(test)]
mod unit_tests {
    use serde_json::json;

    use super::super::describe::unit_tests::{native, spec};
    use super::*;
    use crate::attached::rest::too_old;

    #[test]
    fn a_firecracker_without_a_console_path_setting_is_refused() {
        for (version, refused) in [("1.7.0", true), ("1.13.1", true), ("1.14.0", false), ("1.16.1", false)] {
            assert_eq!(too_old::<Firecracker>(version).is_some(), refused, "{version}");
        }
        assert_eq!(too_old::<Firecracker>("of another kind"), None);
    }

    fn uid() -> VmUid {
        "0190a000-0000-7000-8000-000000000001".parse().unwrap()
    }

    #[test]
    fn an_unconfigured_firecracker_holds_no_vm() {
        let empty = json!({"boot-source": {"kernel_image_path": ""}, "drives": [], "machine-config": {"vcpu_count": 1}});
        assert!(holding(GuestPhase::AtRest, empty.clone()).is_none());
        assert!(holding(GuestPhase::Running, empty).is_some());
        let begun = json!({"boot-source": {"kernel_image_path": ""}, "drives": [{"drive_id": "x", "path_on_host": "/x"}]});
        assert!(!holding(GuestPhase::AtRest, begun).unwrap().startable);
    }

    #[test]
    fn a_partial_configuration_equals_the_request_only_before_the_start() {
        let is_ours = |native: Value, guest| {
            holding(guest, native)
                .is_some_and(|holds| Firecracker::equals_request(&holds, uid(), &spec(), None))
        };
        let whole = native(&spec());
        assert!(is_ours(whole.clone(), GuestPhase::AtRest) && is_ours(whole.clone(), GuestPhase::Running));
        let mut part = whole.clone();
        part["drives"].as_array_mut().unwrap().pop();
        assert!(is_ours(part.clone(), GuestPhase::AtRest), "it was broken off and can go on");
        assert!(!is_ours(part, GuestPhase::Running), "what runs must be all of it");
        for (pointer, other) in [
            ("/drives/0/path_on_host", json!("/other")),
            ("/boot-source/kernel_image_path", json!("/other")),
            ("/network-interfaces/0/host_dev_name", json!("tap1")),
            ("/vsock", json!({"guest_cid": 3})),
        ] {
            let mut changed = whole.clone();
            *changed.pointer_mut(pointer).unwrap() = other;
            assert!(!is_ours(changed, GuestPhase::AtRest), "{pointer}");
        }
    }
}
