//! The subcommands `backup`, which copies the database beside a running daemon, and `restore`,
//! which replaces it while no daemon runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::bail;
use vmm_core::id::VmUid;
use vmm_core::store::{ProcessIdentity, VmRecord};
use vmm_host::lasting::Danger;
use vmm_host::lock::{LockError, StateLock};
use vmm_host::survey;
use vmm_store::{CopySummary, RestoreSummary};

use super::decide::{ItemDecision, commands, decide};
use super::facts::{gather, programs, running_names};
use super::{CommandOutput, looked_at, refuse_another_user};
use crate::config::DaemonConfig;
use crate::runtime_dir;

/// Copies the database to a new file.
///
/// # Errors
///
/// The file exists already or cannot be written, or there is no sound database.
pub(super) fn backup(config: &DaemonConfig, file: &Path) -> anyhow::Result<CommandOutput> {
    if !vmm_store::has_database(&config.state_dir)? {
        bail!("{}", runtime_dir::advise_without_database(config));
    }
    let CopySummary { instance, vms, bytes } = vmm_store::backup(&config.state_dir, file)?;
    Ok(CommandOutput::success(format!(
        "{}{} holds {vms} VMs of {} (instance {instance}), {bytes} bytes; read back and whole",
        looked_at(config),
        file.display(),
        config.state_dir.display()
    )))
}

/// Replaces the database by a backup.
///
/// # Errors
///
/// A daemon runs, the backup is not valid, or a VMM runs that the backup would disown. Nothing was
/// changed in these cases.
pub(super) async fn restore(config: &DaemonConfig, file: &Path) -> anyhow::Result<CommandOutput> {
    refuse_another_user(&config.state_dir)?;
    let _lock = match StateLock::acquire(&config.state_dir) {
        Ok(lock) => lock,
        Err(error @ LockError::Held { .. }) => {
            bail!("{error}. Nothing was changed; once it is stopped, its VMs go on running")
        }
        Err(error) => return Err(error.into()),
    };
    // The lock is held from here to the end, so no daemon can start VMs in between. The running
    // VMMs are listed before the records change, because each record is compared with them.
    // `vmm_store::restore` calls `amend` for each record of the copy and replaces the database only
    // if no call failed.
    let running = running(config)?;
    let mut relinked = Vec::new();
    let mut amend = |record: &mut VmRecord| {
        let found = running.get(&record.uid).map_or(&[][..], Vec::as_slice);
        let changed = record_found_vmm(record, found)?;
        if changed {
            relinked.push(record.vm_id.to_string());
        }
        Ok(changed)
    };
    let elsewhere = match vmm_store::has_database(&config.state_dir)? {
        true => None,
        false => runtime_dir::elsewhere(config),
    };
    let RestoreSummary { copied, replaced } = vmm_store::restore(file, &config.state_dir, &mut amend)?;

    let mut text = looked_at(config);
    if let Some(Danger { finding, remedy }) = elsewhere {
        text.push_str(&format!("before this restore {finding}; if that one was meant, {remedy}\n"));
    }
    text.push_str(&format!("{} VMs are on record again, as in {}\n", copied.vms, file.display()));
    if let Some(replaced) = replaced {
        text.push_str(&format!("the database that was there is kept as {}\n", replaced.display()));
    }
    for vm in relinked {
        text.push_str(&format!(
            "VM {vm} has been started again since the backup; its record names the VMM that runs now\n"
        ));
    }
    let facts = gather(config, false).await?;
    let open = decide(&facts, false).into_iter().filter(|item| item.decision != ItemDecision::Keep).count();
    if open > 0 {
        text.push_str(&format!(
            "{open} things on this host have no owner in it, as of VMs created since; they were left alone, and \
             `vmm-controlplane reconcile --dry-run` lists them\n"
        ));
    }
    text.push_str("start the daemon, which determines the state of every VM\n");
    Ok(CommandOutput::success(text))
}

/// Returns the running VMMs by VM. A spare VMM that still waits is left out, because it runs no
/// guest.
fn running(config: &DaemonConfig) -> anyhow::Result<BTreeMap<VmUid, Vec<ProcessIdentity>>> {
    let names = running_names(&programs(config));
    let mut running: BTreeMap<VmUid, Vec<ProcessIdentity>> = BTreeMap::new();
    let survey = survey::survey(&config.runtime_dir)?;
    let marked = survey.folders.iter().filter(|folder| folder.mark.is_some());
    let waiting: BTreeSet<VmUid> = marked.filter_map(|folder| folder.uid).collect();
    for user in survey.users {
        let known = user.found.program_name().and_then(|name| name.to_str());
        if known.is_some_and(|name| names.contains(name)) {
            let is_named = |uid: &VmUid| commands(&user, *uid) && !waiting.contains(uid);
            for uid in user.uids().into_iter().filter(is_named) {
                running.entry(uid).or_default().push(user.found.identity.clone());
            }
        }
    }
    Ok(running)
}

/// Changes the record of a VM to name the VMM that runs for it. Without that the daemon would take
/// the VMM for the rest of a broken start and end it. Returns true if the record was changed.
fn record_found_vmm(record: &mut VmRecord, found: &[ProcessIdentity]) -> Result<bool, String> {
    let vm = record.vm_id.clone();
    let refused = |what: &str| {
        let pids: Vec<String> = found.iter().map(|process| process.pid.to_string()).collect();
        Err(format!(
            "VM {} runs (process {}), and {what}; shut it down first, by the daemon or by ending that process",
            vm,
            pids.join(", ")
        ))
    };
    // No VMM runs: the record is restored as it is, and the daemon finds that the run has ended.
    // The VMM on record runs: nothing is to be changed. The record names an ended process and
    // exactly one other VMM runs: the VM was started again since the backup, and the record gets
    // that process. More than one VMM, or a VMM for a VM that was not running in the backup, cannot
    // be recorded truthfully, so a person must shut the VM down first.
    match (&mut record.run, found) {
        (_, []) => Ok(false),
        (Some(run), found) if found.contains(&run.process) => Ok(false),
        (Some(run), [process]) => {
            run.process = process.clone();
            Ok(true)
        }
        (Some(_), _) => refused("by more than one VMM"),
        (None, _) => refused("the backup has it as not running"),
    }
}
