//! The systemd unit of the daemon: the settings with which systemd ends VMs or removes their
//! sockets.
//!
//! VMMs are children of the daemon in the control group of the unit. `systemctl show` tells what
//! systemd does to that group, whichever files and drop-ins the settings come from.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use vmm_host::lasting::Danger;

/// The unit of the Debian package, which `doctor` looks at if no daemon runs.
const PACKAGED: &str = "vmm-controlplane.service";
/// The time within which `systemctl` must answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A unit, and the manager that runs it.
#[derive(Debug, PartialEq, Eq)]
struct Unit {
    name: String,
    /// True if the service manager of a user runs the unit.
    of_user: bool,
}

/// A setting with which VMs do not outlive the daemon.
struct BadSetting {
    property: &'static str,
    is_bad: fn(&str) -> bool,
    effect: &'static str,
    wanted: &'static str,
}

const BAD_SETTINGS: [BadSetting; 3] = [
    BadSetting {
        property: "KillMode",
        is_bad: |value| matches!(value, "control-group" | "mixed"),
        effect: "every VM ends when the daemon stops or is restarted",
        wanted: "KillMode=process",
    },
    BadSetting {
        property: "OOMPolicy",
        is_bad: |value| matches!(value, "stop" | "kill"),
        effect: "every VM ends when the kernel's OOM killer ends one VMM",
        wanted: "OOMPolicy=continue",
    },
    BadSetting {
        property: "RuntimeDirectoryPreserve",
        is_bad: |value| matches!(value, "no" | "restart"),
        effect: "the sockets of running VMs are removed when the daemon stops",
        wanted: "RuntimeDirectoryPreserve=yes",
    },
];

/// Logs the settings of this daemon's unit with which VMs do not outlive it.
pub(crate) async fn report_dangers() {
    if let Some(unit) = unit_of(std::process::id()) {
        for Danger { finding, remedy } in dangers_of(&unit).await {
            tracing::warn!(detail = finding, remedy, "systemd does not let VMs outlive the daemon");
        }
    }
}

/// Returns the findings for `doctor`: of the unit that runs `daemon`, or else of the packaged unit.
pub(crate) async fn dangers(daemon: Option<u32>) -> Vec<Danger> {
    let unit = match daemon {
        Some(pid) => unit_of(pid),
        None => Some(Unit { name: PACKAGED.to_owned(), of_user: false }),
    };
    match unit {
        Some(unit) => dangers_of(&unit).await,
        None => Vec::new(),
    }
}

/// Returns the unit in whose control group a process is, or `None` if the process is in none, as in
/// a terminal.
fn unit_of(pid: u32) -> Option<Unit> {
    unit_in(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

fn unit_in(cgroups: &str) -> Option<Unit> {
    // Version 2 of control groups has the line `0::PATH`, and version 1 has `1:name=systemd:PATH`.
    let path = cgroups.lines().find_map(|line| {
        line.strip_prefix("0::").or_else(|| line.split_once(":name=systemd:").map(|it| it.1))
    })?;
    let name = path.split('/').rfind(|part| part.ends_with(".service"))?;
    // A shell of a user is in `user@1000.service` too, which is not a unit of the daemon.
    (!name.starts_with("user@")).then(|| Unit { name: name.to_owned(), of_user: path.contains("/user@") })
}

async fn dangers_of(unit: &Unit) -> Vec<Danger> {
    // A host without systemd, or an answer that does not come, proves nothing.
    show(unit).await.map(|answer| bad_settings(unit, &answer)).unwrap_or_default()
}

fn bad_settings(unit: &Unit, answer: &str) -> Vec<Danger> {
    let value = |property: &str| {
        answer.lines().find_map(|line| line.strip_prefix(property)?.strip_prefix('=')).unwrap_or_default()
    };
    if value("LoadState") != "loaded" {
        return Vec::new();
    }
    let has_directory = !value("RuntimeDirectory").is_empty();
    BAD_SETTINGS
        .iter()
        .filter(|setting| setting.property != "RuntimeDirectoryPreserve" || has_directory)
        .filter(|setting| (setting.is_bad)(value(setting.property)))
        .map(|setting| {
            let BadSetting { property, effect, wanted, .. } = setting;
            let user = if unit.of_user { "--user " } else { "" };
            Danger {
                finding: format!("{} has {property}={}: {effect}", unit.name, value(property)),
                remedy: format!("`systemctl {user}edit {}`, and set {wanted} below [Service]", unit.name),
            }
        })
        .collect()
}

/// Asks systemd for the unit's settings.
async fn show(unit: &Unit) -> Option<String> {
    let mut command = Command::new("systemctl");
    if unit.of_user {
        command.arg("--user");
    }
    command
        .args(["show", &unit.name])
        .arg("--property=LoadState,KillMode,OOMPolicy,RuntimeDirectory,RuntimeDirectoryPreserve")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(ANSWER_TIMEOUT, command.output()).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str, of_user: bool) -> Unit {
        Unit { name: name.to_owned(), of_user }
    }

    #[test]
    fn the_unit_is_the_innermost_service_of_the_control_group() {
        for (cgroups, expected) in [
            ("0::/system.slice/vmm-controlplane.service\n", Some(unit("vmm-controlplane.service", false))),
            (
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vmm.service\n",
                Some(unit("vmm.service", true)),
            ),
            (
                "12:pids:/x\n1:name=systemd:/system.slice/vmm-controlplane.service\n",
                Some(unit("vmm-controlplane.service", false)),
            ),
            ("0::/user.slice/user-1000.slice/session-3.scope\n", None),
            ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/tmux.scope\n", None),
            ("0::/\n", None),
            ("", None),
        ] {
            assert_eq!(unit_in(cgroups), expected, "{cgroups}");
        }
    }

    #[test]
    fn the_defaults_of_systemd_end_vms() {
        let answer = "LoadState=loaded\nKillMode=control-group\nOOMPolicy=stop\n\
                      RuntimeDirectory=vmm-controlplane\nRuntimeDirectoryPreserve=no\n";
        let found = bad_settings(&unit("a.service", true), answer);
        let findings: Vec<_> = found.iter().map(|danger| danger.finding.as_str()).collect();
        assert_eq!(
            findings,
            [
                "a.service has KillMode=control-group: every VM ends when the daemon stops or is restarted",
                "a.service has OOMPolicy=stop: every VM ends when the kernel's OOM killer ends one VMM",
                "a.service has RuntimeDirectoryPreserve=no: the sockets of running VMs are removed when the daemon stops",
            ]
        );
        assert_eq!(
            found[0].remedy,
            "`systemctl --user edit a.service`, and set KillMode=process below [Service]"
        );
    }

    #[test]
    fn the_packaged_unit_keeps_vms() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packaging/vmm-controlplane.service");
        let file = std::fs::read_to_string(path).unwrap();
        let answer = format!("LoadState=loaded\n{file}");
        assert!(bad_settings(&unit(PACKAGED, false), &answer).is_empty());
        for line in ["KillMode=", "OOMPolicy=", "RuntimeDirectoryPreserve="] {
            assert!(file.contains(line), "{line} is missing, so that its default holds");
        }
    }

    #[test]
    fn a_unit_without_a_runtime_directory_or_file_has_no_danger() {
        let other = "LoadState=loaded\nKillMode=process\nOOMPolicy=continue\nRuntimeDirectory=\nRuntimeDirectoryPreserve=no\n";
        assert!(bad_settings(&unit(PACKAGED, false), other).is_empty());
        let missing = "LoadState=not-found\nKillMode=control-group\n";
        assert!(bad_settings(&unit(PACKAGED, false), missing).is_empty());
    }
}
