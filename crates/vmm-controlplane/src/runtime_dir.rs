//! The runtime directory at the daemon's start: whose it is, and that it outlives the daemon.
//!
//! ```text
//!   start ─► sign ─► <runtime_dir>/served     this state directory, and others that use it
//!              └───► <state_dir>/runtime-dir  where it was, for the next start
//! ```
//!
//! A runtime directory that lacks the line of this state directory, though the last start in the
//! same boot of the host wrote one, was removed or replaced in between.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmm_core::id::InstanceId;
use vmm_host::lasting::{self, Danger, REMEDY};
use vmm_host::process::boot_id;
use vmm_host::survey::{self, Signature, Signed};

use crate::config::DaemonConfig;

/// The name of the file in the state directory.
const FILE: &str = "runtime-dir";

/// The runtime directory of the last start.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
struct Last {
    runtime_dir: PathBuf,
    boot_id: String,
}

/// Records that this state directory uses the runtime directory, and logs all that endangers the
/// sockets in it. Without that record `reconcile` removes no run folder of an earlier release.
pub(crate) fn sign(config: &DaemonConfig, instance: InstanceId) {
    let runtime_dir = config.runtime_dir.display();
    let signed = match survey::record_user(&config.runtime_dir, instance, &config.state_dir) {
        Ok(signed) => signed,
        Err(error) => {
            return tracing::warn!(%error, %runtime_dir, "the runtime directory cannot be used; VMs will not boot");
        }
    };
    if let Some(Danger { finding, remedy }) = changed(config, signed.known) {
        tracing::warn!(%runtime_dir, detail = finding, remedy, "the runtime directory is another one than before");
    }
    if let Some(Danger { finding, remedy }) = lasting::danger(&config.runtime_dir, std::process::id()) {
        tracing::warn!(%runtime_dir, detail = finding, remedy, "the runtime directory may vanish while VMs run");
    }
    if let Some(Danger { finding, remedy }) = shared(config, &signed) {
        tracing::warn!(%runtime_dir, detail = finding, remedy, "other state directories use the runtime directory");
    }
    if let Err(error) = remember(config) {
        tracing::warn!(%error, state_dir = %config.state_dir.display(), "the runtime directory's name could not be kept");
    }
}

/// Returns the findings for `doctor`. `daemon` is the process id of the daemon that runs on the
/// state directory. Blocks.
pub(crate) fn dangers(
    config: &DaemonConfig,
    instance: Option<InstanceId>,
    daemon: Option<u32>,
) -> Vec<Danger> {
    let signatures = survey::signatures(&config.runtime_dir).unwrap_or_default();
    let is_ours = |signature: &Signature| instance.is_some() && signature.instance == instance;
    let known = signatures.iter().any(is_ours);
    let others: Vec<Signature> = signatures.into_iter().filter(|signature| !is_ours(signature)).collect();
    let signed = Signed { known, others, unmarked: false };
    let changed = instance.and_then(|_| changed(config, known));
    let danger = lasting::danger(&config.runtime_dir, daemon.unwrap_or_else(std::process::id));
    // A state directory without a database shares nothing: its settings are probably not those of
    // the daemon.
    let has_database = vmm_store::has_database(&config.state_dir).unwrap_or(true);
    let shared = if has_database { shared(config, &signed) } else { elsewhere(config) };
    changed.into_iter().chain(danger).chain(shared).collect()
}

/// Returns the finding that the state directory has no database though the runtime directory
/// belongs to the daemon of another state directory: the settings are probably not those of the
/// daemon. The caller knows that there is no database. Blocks.
pub(crate) fn elsewhere(config: &DaemonConfig) -> Option<Danger> {
    let signatures = survey::signatures(&config.runtime_dir).unwrap_or_default();
    let paths: BTreeSet<PathBuf> =
        signatures.into_iter().filter_map(|signature| signature.state_dir).collect();
    let others: Vec<_> = paths.iter().filter(|path| **path != config.state_dir).collect();
    let first = others.first()?.display();
    let all: Vec<String> = others.iter().map(|path| path.display().to_string()).collect();
    Some(Danger {
        finding: format!(
            "there is no database in {}, and the runtime directory {} is that of the state directory {}",
            config.state_dir.display(),
            config.runtime_dir.display(),
            all.join(" and of ")
        ),
        remedy: format!(
            "run this with UNKEY_VMCP_STATE_DIR={first}, or with the daemon's own settings (--config)"
        ),
    })
}

/// Returns the advice for a subcommand that finds no database: the state directory to look at, or
/// the way to name it. Blocks.
pub(crate) fn advise_without_database(config: &DaemonConfig) -> String {
    match elsewhere(config) {
        Some(Danger { finding, remedy }) => format!("{finding}: {remedy}"),
        None => format!(
            "there is no database in {}: where the daemon has another state directory, run this with the daemon's settings (--config, \
             or UNKEY_VMCP_STATE_DIR and UNKEY_VMCP_RUNTIME_DIR)",
            config.state_dir.display()
        ),
    }
}

/// Returns the finding that the daemon last used another runtime directory in the present boot of
/// the host. Blocks.
pub(crate) fn moved(config: &DaemonConfig) -> Option<Danger> {
    let last = read(&config.state_dir)?;
    let is_other = last.runtime_dir != config.runtime_dir && boot_id().ok()? == last.boot_id;
    is_other.then(|| Danger {
        finding: format!(
            "the runtime directory is {} and was {} at the last start of the daemon",
            config.runtime_dir.display(),
            last.runtime_dir.display()
        ),
        remedy: format!(
            "run this with UNKEY_VMCP_RUNTIME_DIR={}, or with the daemon's own settings (--config)",
            last.runtime_dir.display()
        ),
    })
}

/// Returns the finding that the runtime directory is not the one of the last start. `known` is true
/// if the runtime directory had the line of this state directory.
fn changed(config: &DaemonConfig, known: bool) -> Option<Danger> {
    let last = read(&config.state_dir)?;
    // A host that was booted since has no VMM left, and its /run is empty by intent.
    if boot_id().ok()? != last.boot_id {
        return None;
    }
    let now = config.runtime_dir.display();
    if last.runtime_dir != config.runtime_dir {
        let before = last.runtime_dir.display();
        let finding = format!(
            "the runtime directory is {now} and was {before} at the last start: VMs that were running then keep their sockets there"
        );
        let remedy =
            format!("start the daemon with UNKEY_VMCP_RUNTIME_DIR={before} until they are shut down");
        return Some(Danger { finding, remedy });
    }
    (!known).then(|| Danger {
        finding: format!(
            "the runtime directory {now} was removed or replaced since the last start: the sockets of VMs that ran are gone with it"
        ),
        remedy: REMEDY.to_owned(),
    })
}

/// Returns the finding that other state directories may use the runtime directory.
fn shared(config: &DaemonConfig, signed: &Signed) -> Option<Danger> {
    if signed.others.is_empty() {
        return None;
    }
    let runtime_dir = config.runtime_dir.display();
    let others: BTreeSet<String> = signed.others.iter().map(named).collect();
    let others = others.into_iter().collect::<Vec<_>>().join(" and of ");
    let proof = if signed.unmarked {
        "run folders of an earlier release bear no mark, and nothing proves whose those are"
    } else {
        "each keeps its own run folders, which bear its mark"
    };
    let finding = format!(
        "the runtime directory {runtime_dir} is that of the state directory {} and of {others}: {proof}",
        config.state_dir.display()
    );
    let list = config.runtime_dir.join("served");
    let remedy = format!(
        "give each daemon a folder of its own with UNKEY_VMCP_RUNTIME_DIR. After a mistaken start nothing need be done: its line in \
         {} goes at the next start of a daemon that does belong here, once its run folders are gone; a line without a path is of an \
         earlier release, and is removed by hand",
        list.display()
    );
    Some(Danger { finding, remedy })
}

fn named(signature: &Signature) -> String {
    match (&signature.state_dir, signature.instance) {
        (Some(path), _) => format!("the state directory {}", path.display()),
        (None, Some(instance)) => format!("a state directory whose path is not known (instance {instance})"),
        (None, None) => "an unknown state directory".to_owned(),
    }
}

fn read(state_dir: &Path) -> Option<Last> {
    serde_json::from_slice(&fs::read(state_dir.join(FILE)).ok()?).ok()
}

/// Writes the runtime directory's name into the state directory, if it is not there yet. A loss of
/// the file only costs a warning, so it is not forced to the disk.
fn remember(config: &DaemonConfig) -> io::Result<()> {
    let last = Last { runtime_dir: config.runtime_dir.clone(), boot_id: boot_id()? };
    if read(&config.state_dir).as_ref() == Some(&last) {
        return Ok(());
    }
    let (path, next) = (config.state_dir.join(FILE), config.state_dir.join(format!("{FILE}.new")));
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    file.write_all(&serde_json::to_vec(&last)?)?;
    fs::rename(next, path)
}
