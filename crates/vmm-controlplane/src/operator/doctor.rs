//! The subcommand `doctor`, which checks this host for the abilities that VMs need and gives a
//! remedy for each fault.

use std::collections::BTreeSet;

use serde::Serialize;
use vmm_core::id::BackendName;
use vmm_host::lock;
use vmm_host::path::find_program;

use super::check::{CheckVerdict, DoctorCheck};
use super::held_qemus::{self, HeldQemu};
use super::{CommandOutput, access, host, looked_at, spares};
use crate::backends;
use crate::config::{self, DaemonConfig, Endpoint, LoadedConfig};
use crate::{runtime_dir, service_unit};

/// The output of `--json`.
#[derive(Serialize)]
struct Diagnosis<'a> {
    version: &'a str,
    state_dir: String,
    runtime_dir: String,
    default_backend: &'a str,
    /// True if the default backend can serve.
    can_serve: bool,
    checks: &'a [DoctorCheck],
}

/// Checks everything. The exit code is 1 if the default backend cannot serve.
///
/// # Errors
///
/// A defect of this program. A fault of the host is part of the answer and no error.
pub(super) async fn run(loaded: &LoadedConfig, json: bool) -> anyhow::Result<CommandOutput> {
    let config = loaded.config.clone();
    let (hypervisors, formats) = hypervisors(&config).await;
    let warnings = loaded.warnings.clone();
    // The checks below read files and directories, which may block, so they run on a thread of
    // their own.
    let (for_host, known) = (config.clone(), formats);
    let mut checks = tokio::task::spawn_blocking(move || {
        let mut checks = vec![daemon_line(&for_host), database(&for_host)];
        checks.extend(warnings.into_iter().map(|warning| {
            DoctorCheck::warn(
                "configuration",
                warning,
                "`vmm-controlplane check-config` shows the origin of each setting",
            )
        }));
        checks.extend(access::listeners(&for_host));
        checks.extend(host::kvm(needs_kvm(&for_host)));
        checks.extend(host::network());
        checks.push(host::cgroups());
        checks.push(host::open_files(daemon_pid(&for_host)));
        checks.extend(host::directory("state directory", "UNKEY_VMCP_STATE_DIR", &for_host.state_dir));
        checks.extend(host::directory("runtime directory", "UNKEY_VMCP_RUNTIME_DIR", &for_host.runtime_dir));
        checks.extend(lasting_lines(&for_host));
        checks.push(host::socket_names(&for_host.runtime_dir));
        checks.push(spares::check_spares(&for_host));
        let defaults = &for_host.defaults;
        checks.extend(host::default_boot(defaults.kernel.as_ref(), defaults.initrd.as_ref(), &known));
        checks
    })
    .await?;
    checks.extend(unit_lines(daemon_pid(&config)).await);
    checks.extend(hypervisors);
    let can_serve = checks.iter().all(|check| check.verdict != CheckVerdict::Fail);
    let default_backend = config.default_backend.as_str();
    let diagnosis = Diagnosis {
        version: crate::VERSION,
        state_dir: config.state_dir.display().to_string(),
        runtime_dir: config.runtime_dir.display().to_string(),
        default_backend,
        can_serve,
        checks: &checks,
    };
    let text = if json {
        serde_json::to_string_pretty(&diagnosis)?
    } else {
        looked_at(&config) + &table(&diagnosis)
    };
    Ok(CommandOutput { text, code: u8::from(!can_serve) })
}

/// Returns true if the daemon's user needs /dev/kvm. An attached VMM has its own user, so it does
/// not count.
fn needs_kvm(config: &DaemonConfig) -> bool {
    if config.hypervisor(config.default_backend).endpoint != Endpoint::Managed {
        return false;
    }
    let default = backends::ALL.iter().find(|registration| registration.name == config.default_backend);
    default.is_some_and(|registration| (registration.needs_kvm)(config))
}

/// Returns the process id of the daemon that runs on this state directory.
fn daemon_pid(config: &DaemonConfig) -> Option<u32> {
    lock::holder(&config.state_dir).ok()??.pid
}

fn daemon_line(config: &DaemonConfig) -> DoctorCheck {
    match lock::holder(&config.state_dir) {
        Ok(Some(holder)) => {
            let pid = holder.pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
            DoctorCheck::ok("daemon", format!("runs on this state directory, process id {pid}"))
        }
        Ok(None) => DoctorCheck::ok("daemon", "does not run on this state directory"),
        Err(error) => DoctorCheck::warn(
            "daemon",
            format!("cannot be looked for: {error}"),
            "run doctor as the daemon's user",
        ),
    }
}

/// Returns a line for each reason for which VMs may lose their sockets in the runtime directory.
fn lasting_lines(config: &DaemonConfig) -> Vec<DoctorCheck> {
    // A database that cannot be read has a line of its own.
    let instance = vmm_store::peek(&config.state_dir).ok().flatten().map(|snapshot| snapshot.instance);
    let dangers = runtime_dir::dangers(config, instance, daemon_pid(config)).into_iter();
    dangers.map(|danger| DoctorCheck::warn("runtime directory", danger.finding, danger.remedy)).collect()
}

/// Returns a line for each setting of the systemd unit with which VMs do not outlive the daemon.
async fn unit_lines(daemon: Option<u32>) -> impl Iterator<Item = DoctorCheck> {
    let dangers = service_unit::dangers(daemon).await.into_iter();
    dangers.map(|danger| DoctorCheck::warn("systemd unit", danger.finding, danger.remedy))
}

fn database(config: &DaemonConfig) -> DoctorCheck {
    match vmm_store::peek(&config.state_dir) {
        Ok(Some(snapshot)) => DoctorCheck::ok(
            "database",
            format!(
                "whole, with {} VMs on record (instance {})",
                snapshot.vms.len() + snapshot.unreadable.len(),
                snapshot.instance
            ),
        ),
        Ok(None) => DoctorCheck::ok("database", "none yet; the first start makes it"),
        Err(error) => DoctorCheck::fail(
            "database",
            error.to_string(),
            "`vmm-controlplane restore FILE` puts a backup back, with the daemon stopped",
        ),
    }
}

/// Returns the lines of each hypervisor, and the kernel formats that the default one boots.
async fn hypervisors(config: &DaemonConfig) -> (Vec<DoctorCheck>, Vec<vmm_core::backend::KernelFormat>) {
    let held = held_qemus::held_by_daemon(config);
    let (asked, asks_qemu) = without_held_sockets(config, &held);
    let backends = backends::backends(&asked, &backends::undecorated());
    backends.refresh().await;
    let default = backends.default_name().clone();
    let mut checks = Vec::new();
    for status in backends.statuses() {
        let is_qemu = status.capabilities.name.as_str() == config::BackendChoice::Qemu.as_str();
        let held: &[HeldQemu] = if is_qemu { &held } else { &[] };
        let is_default = status.capabilities.name == default;
        let others_serve = held.iter().any(|held| held.found.is_ok());
        checks.extend(held.iter().map(|held| held_line(held, is_default && !others_serve)));
        if !is_qemu || asks_qemu {
            checks.extend(backend_lines(&asked, is_default && !others_serve, &status));
        }
    }
    match backends.status(&default) {
        Some(status) => (checks, status.capabilities.kernel_formats.to_vec()),
        None => {
            let finding = "this version does not serve it";
            checks.push(DoctorCheck::fail(
                default.to_string(),
                finding,
                "set UNKEY_VMCP_BACKEND to one of those listed",
            ));
            (checks, Vec::new())
        }
    }
}

/// Returns the configuration without the sockets that must not be asked, and true if a QEMU is left
/// to ask.
fn without_held_sockets(config: &DaemonConfig, held: &[HeldQemu]) -> (DaemonConfig, bool) {
    let mut asked = config.clone();
    if let Endpoint::Unix(sockets) = &mut asked.qemu.endpoint {
        sockets.retain(|socket| held.iter().all(|held| held.socket != *socket));
        if sockets.is_empty() {
            asked.qemu.endpoint = Endpoint::Managed;
            return (asked, false);
        }
    }
    (asked, true)
}

fn held_line(held: &HeldQemu, is_needed: bool) -> DoctorCheck {
    let name = format!("backend {}", config::BackendChoice::Qemu.as_str());
    match &held.found {
        Ok(shown) => DoctorCheck::ok(name, shown.as_str()),
        Err(why) => {
            failing(is_needed)(name, why.clone(), "look at that process, or end its VM with force".to_owned())
        }
    }
}

/// Returns the constructor of a line about something that cannot be used: a failure if it is
/// needed, else a warning.
fn failing(is_needed: bool) -> fn(String, String, String) -> DoctorCheck {
    if is_needed { DoctorCheck::fail } else { DoctorCheck::warn }
}

fn backend_lines(
    config: &DaemonConfig,
    is_needed: bool,
    status: &vmm_service::BackendStatus,
) -> Vec<DoctorCheck> {
    let name = &status.capabilities.name;
    let shown = format!("backend {name}");
    let endpoint = hypervisor(config, name).map(|hypervisor| &hypervisor.endpoint);
    let program = || {
        let path = std::env::var_os("PATH");
        hypervisor(config, name).and_then(|hypervisor| find_program(&hypervisor.binary, path.as_deref()).ok())
    };
    let remedy = || match endpoint {
        Some(Endpoint::Unix(_) | Endpoint::Libvirt(_)) => "do as the finding says",
        Some(Endpoint::Managed) | None if program().is_none() => {
            backends::find(name).map_or("do as the finding says", |registration| registration.install)
        }
        Some(Endpoint::Managed) | None => "do as the finding says, or see /dev/kvm above",
    };
    let mut checks = vec![match &status.health.version {
        Ok(version) => {
            let reached = match endpoint {
                Some(Endpoint::Unix(sockets)) => {
                    let sockets = sockets.iter().map(|socket| format!("unix://{}", socket.display()));
                    format!(" at {}", sockets.collect::<Vec<_>>().join(", "))
                }
                Some(Endpoint::Libvirt(uri)) => format!(" through {uri}"),
                Some(Endpoint::Managed) | None => {
                    program().map(|program| format!(" at {}", program.display())).unwrap_or_default()
                }
            };
            DoctorCheck::ok(shown.clone(), format!("version {version}{reached}"))
        }
        Err(why) => failing(is_needed)(shown.clone(), why.clone(), remedy().to_owned()),
    }];
    checks.extend(
        status.health.problems.iter().map(|why| DoctorCheck::warn(shown.clone(), why.as_str(), remedy())),
    );
    checks
}

fn hypervisor<'a>(config: &'a DaemonConfig, name: &BackendName) -> Option<&'a config::HypervisorConfig> {
    Some(config.hypervisor(backends::find(name)?.name))
}

fn table(diagnosis: &Diagnosis<'_>) -> String {
    let width = diagnosis.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for check in diagnosis.checks {
        let word = match check.verdict {
            CheckVerdict::Ok => "ok  ",
            CheckVerdict::Warn => "warn",
            CheckVerdict::Fail => "FAIL",
        };
        text.push_str(&format!("{word}  {:width$}  {}\n", check.name, check.finding));
        if let Some(remedy) = &check.remedy {
            text.push_str(&format!("      {:width$}  remedy: {remedy}\n", ""));
        }
    }
    let default = diagnosis.default_backend;
    if diagnosis.can_serve {
        text.push_str(&format!("\nThe default backend, {default}, can serve on this host.\n"));
        return text;
    }
    let failed: BTreeSet<&str> = diagnosis
        .checks
        .iter()
        .filter(|check| check.verdict == CheckVerdict::Fail)
        .map(|check| check.name.as_str())
        .collect();
    let failed = failed.into_iter().collect::<Vec<_>>().join(", ");
    text.push_str(&format!(
        "\nThe default backend, {default}, CANNOT serve on this host, because of: {failed}.\n"
    ));
    text
}
