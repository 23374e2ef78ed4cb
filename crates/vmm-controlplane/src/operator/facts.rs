//! What is there: on the host, and on record.
//!
//! A daemon may be at work meanwhile, so the order matters. The host is looked at before the database: whatever was seen had
//! its record by then, since a record is written before anything is made, or the mark of a spare VMM. And once more after it:
//! what has gone by then was being removed, and what has come was being made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::store::VmRecord;
use vmm_host::ledger::{self, Served, Survey};
use vmm_host::net::tap::{HostTaps, OwnedTap, Taps as _};
use vmm_host::path::{find_program, real_name};

use crate::backends::ALL;
use crate::config::Config;

/// Everything that decisions follow from.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// This state directory; `None` where there is no database.
    pub(super) instance: Option<InstanceId>,
    /// Every VM on record.
    pub(super) records: BTreeMap<VmUid, VmRecord>,
    /// Whether a daemon runs on this state directory.
    pub(super) daemon: bool,
    /// Whose the run folders are.
    pub(super) served: Served,
    /// Folders, sockets and processes.
    pub(super) survey: Survey,
    /// TAPs whose label names this state directory.
    pub(super) taps: Vec<OwnedTap>,
    /// The names under which hypervisors run.
    pub(super) programs: BTreeSet<String>,
    /// What could not be looked at.
    pub(super) notes: Vec<String>,
}

/// Looks at everything, and touches nothing. `daemon` says whether a daemon runs on this state directory.
pub(super) async fn gather(config: &Config, daemon: bool) -> anyhow::Result<Facts> {
    let (runtime_dir, state_dir) = (config.runtime_dir.clone(), config.state_dir.clone());
    let before = survey(&runtime_dir).await?;
    let snapshot = tokio::task::spawn_blocking(move || vmm_store::peek(&state_dir)).await??;
    let mut notes = Vec::new();
    let (instance, records) = match snapshot {
        Some(snapshot) => {
            let unreadable = snapshot.unreadable.into_iter().map(|vm| *vm.record);
            let all = snapshot.vms.into_iter().chain(unreadable);
            let records = all.map(|record| (record.uid, record)).collect();
            (Some(snapshot.instance), records)
        }
        None => {
            notes.push(format!(
                "there is no database in {}: nothing can be proven ours",
                config.state_dir.display()
            ));
            (None, BTreeMap::new())
        }
    };
    let taps = match instance {
        Some(instance) => HostTaps.of_instance(instance).await.unwrap_or_else(|error| {
            notes.push(format!("TAPs could not be listed: {error}"));
            Vec::new()
        }),
        None => Vec::new(),
    };
    let survey = before.lasting(survey(&runtime_dir).await?);
    let served = ledger::served(&runtime_dir).context("whose the run folders are cannot be told")?;
    let names = programs(config);
    let programs = tokio::task::spawn_blocking(move || running_names(&names)).await?;
    Ok(Facts { instance, records, daemon, served, survey, taps, programs, notes })
}

async fn survey(runtime_dir: &Path) -> anyhow::Result<Survey> {
    let dir = runtime_dir.to_path_buf();
    let looked = tokio::task::spawn_blocking(move || ledger::survey(&dir)).await?;
    looked.with_context(|| format!("what lies in {} cannot be listed", runtime_dir.display()))
}

/// The hypervisors' programs: as they are usually called, and as they are configured.
pub(super) fn programs(config: &Config) -> Vec<PathBuf> {
    let configured = ALL.iter().map(|registration| config.hypervisor(registration.name).binary.clone());
    let usual = ALL.iter().map(|registration| PathBuf::from(registration.program));
    configured.chain(usual).collect()
}

/// The names that running programs have: as they are called, and what that leads to.
pub(super) fn running_names(programs: &[PathBuf]) -> BTreeSet<String> {
    let path = std::env::var_os("PATH");
    let called =
        programs.iter().filter_map(|program| Some(program.file_name()?.to_string_lossy().into_owned()));
    let real = programs.iter().filter_map(|program| real_name(&find_program(program, path.as_deref()).ok()?));
    called.chain(real).collect()
}
