//! What is on the host of a run's VMs: processes, TAPs, folders and sockets, found without asking the daemon.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;
use vmm_core::id::VmUid;
use vmm_host::net::tap::TapOwner;

use crate::harness::{World, eventually, skipped};

/// Everything of a run's VMs, by their uids.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) vmms: BTreeMap<String, Vec<u32>>,
    pub(crate) taps: BTreeMap<String, Vec<String>>,
    pub(crate) folders: Vec<String>,
    pub(crate) sockets: BTreeMap<String, Vec<PathBuf>>,
}

impl Found {
    /// Looks at the host. `instance` is the identity of the run's state directory.
    pub(crate) fn look(world: &World, instance: &str) -> Self {
        let mut found = Self::default();
        for pid in world.vmms() {
            let uid = uid_in_arguments(pid).unwrap_or_else(|| "none".to_owned());
            found.vmms.entry(uid).or_default().push(pid);
        }
        for (name, owner) in taps() {
            if owner.instance.to_string() == instance {
                found.taps.entry(owner.uid.to_string()).or_default().push(name);
            }
        }
        for folder in world.run_folders() {
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            let uid = name.parse::<VmUid>().map_or(name, |uid| uid.to_string());
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                    found.sockets.entry(uid.clone()).or_default().push(entry.path());
                }
            }
            found.folders.push(uid);
        }
        found
    }

    /// Fails unless soon nothing is left.
    #[track_caller]
    pub(crate) fn nothing(world: &World, instance: &str, of: &str) {
        eventually(&format!("nothing is left of {of}: {:#?}", Self::look(world, instance)), || {
            Self::look(world, instance) == Self::default()
        });
    }
}

/// The VM whose run folder a process was started with.
fn uid_in_arguments(pid: u32) -> Option<String> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = String::from_utf8_lossy(&arguments).into_owned();
    let (_, rest) = text.split_once("/run/vms/")?;
    rest.get(..32)?.parse::<VmUid>().ok().map(|uid| uid.to_string())
}

/// Every TAP of this program on the host, whoever's.
fn taps() -> Vec<(String, TapOwner)> {
    let interfaces = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let owned = interfaces.filter_map(|interface| {
        let label = fs::read_to_string(interface.path().join("ifalias")).ok()?;
        Some((interface.file_name().to_string_lossy().into_owned(), label.trim().parse().ok()?))
    });
    owned.collect()
}

/// Whether TAPs can be made here; where not, says that `test` runs without.
pub(crate) fn can_make_taps(test: &str) -> bool {
    // Tried once for all tests of this program: two that try at the same time are in each other's way.
    static CAN: OnceLock<bool> = OnceLock::new();
    let can = *CAN.get_or_init(|| {
        let name = format!("vmcpq{}", std::process::id() % 1_000_000);
        let ip = |arguments: &[&str]| {
            Command::new("ip").args(arguments).output().is_ok_and(|done| done.status.success())
        };
        ip(&["tuntap", "add", &name, "mode", "tap"]) && ip(&["link", "delete", &name])
    });
    if !can {
        skipped(&format!("{test}: TAPs"), "no TAP can be made here; it takes root, /dev/net/tun and ip");
    }
    can
}

/// What a DeleteVm says it left behind for good. The kernel removes a TAP when it gets round to it, on a busy machine after the
/// answer; that it has is seen at the end.
pub(crate) fn left_for_good(deleted: &Value) -> Vec<String> {
    let left = deleted["left_behind"].as_array().into_iter().flatten();
    left.map(ToString::to_string).filter(|item| !item.contains("did not remove it within")).collect()
}

/// Takes away what a run that failed has left: the VMMs end with the world.
pub(crate) struct TapGuard(pub(crate) Option<String>);

impl Drop for TapGuard {
    fn drop(&mut self) {
        let Some(instance) = &self.0 else { return };
        for (name, owner) in taps() {
            if owner.instance.to_string() == *instance {
                let _ = Command::new("ip").args(["link", "delete", &name]).output();
            }
        }
    }
}

/// Runs `reconcile --dry-run --json`: its exit code and its ledger.
pub(crate) fn ledger(world: &World) -> (Option<i32>, Value) {
    let output = world.command().args(["reconcile", "--dry-run", "--json"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let ledger = serde_json::from_str(&text)
        .unwrap_or_else(|_| panic!("no ledger: {text}{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), ledger)
}

/// What one process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
    pub(crate) rss_kib: u64,
}

impl Held {
    pub(crate) fn by(pid: u32) -> Self {
        let of = |what: &str| Path::new("/proc").join(pid.to_string()).join(what);
        let status = fs::read_to_string(of("status")).unwrap();
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        Self {
            descriptors: fs::read_dir(of("fd")).unwrap().count(),
            threads: fs::read_dir(of("task")).unwrap().count(),
            rss_kib: rss.trim().trim_end_matches(" kB").parse().unwrap(),
        }
    }
}
