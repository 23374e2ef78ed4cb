//! Collects the facts from the host and from the database.
//!
//! A daemon may be working at the same time, so the order of the reads matters. The host is read
//! before the database. Everything seen there had its record, or the mark of a spare VMM, by the
//! time the database is read, because a record or a mark is written before anything is made. The
//! host is read once more after the database. Things that have disappeared by then were being
//! removed, and things that have appeared were being made; neither is judged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::store::VmRecord;
use vmm_host::lasting::Danger;
use vmm_host::net::tap::{HostTaps, OwnedTap, Taps as _};
use vmm_host::path::{find_program, real_name};
use vmm_host::survey::{self, RuntimeDirUsers, Signature, Survey};

use crate::backends::ALL;
use crate::config::DaemonConfig;
use crate::runtime_dir;

/// The facts from which decisions follow.
#[derive(Clone, Debug)]
pub(super) struct ReconcileFacts {
    /// The identity of this state directory; `None` if there is no database.
    pub(super) instance: Option<InstanceId>,
    /// Every VM on record.
    pub(super) records: BTreeMap<VmUid, VmRecord>,
    /// True if a daemon runs on this state directory.
    pub(super) daemon: bool,
    /// The state directories that have used the runtime directory.
    pub(super) served: RuntimeDirUsers,
    /// The lines of the runtime directory's list, with the paths of the state directories.
    pub(super) signatures: BTreeSet<Signature>,
    /// The folders, sockets and processes.
    pub(super) survey: Survey,
    /// The TAPs whose label names this state directory.
    pub(super) taps: Vec<OwnedTap>,
    /// The names under which hypervisors run.
    pub(super) programs: BTreeSet<String>,
    /// The things that could not be read.
    pub(super) notes: Vec<String>,
}

/// Reads all facts, and changes nothing. `daemon` is true if a daemon runs on this state directory.
pub(super) async fn gather(config: &DaemonConfig, daemon: bool) -> anyhow::Result<ReconcileFacts> {
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
            notes.push(format!("no owner can be proven: {}", runtime_dir::advise_without_database(config)));
            (None, BTreeMap::new())
        }
    };
    if let Some(Danger { finding, remedy }) = instance.and_then(|_| runtime_dir::moved(config)) {
        notes.push(format!("things are looked for in another folder: {finding}; {remedy}"));
    }
    let taps = match instance {
        Some(instance) => HostTaps.of_instance(instance).await.unwrap_or_else(|error| {
            notes.push(format!("TAPs could not be listed: {error}"));
            Vec::new()
        }),
        None => Vec::new(),
    };
    let survey = before.lasting(survey(&runtime_dir).await?);
    let context = || "the owners of the run folders cannot be determined";
    let served = survey::users_of(&runtime_dir).with_context(context)?;
    let signatures = survey::signatures(&runtime_dir).with_context(context)?;
    let names = programs(config);
    let programs = tokio::task::spawn_blocking(move || running_names(&names)).await?;
    Ok(ReconcileFacts { instance, records, daemon, served, signatures, survey, taps, programs, notes })
}

async fn survey(runtime_dir: &Path) -> anyhow::Result<Survey> {
    let dir = runtime_dir.to_path_buf();
    let looked = tokio::task::spawn_blocking(move || survey::survey(&dir)).await?;
    looked.with_context(|| format!("the contents of {} cannot be listed", runtime_dir.display()))
}

/// Returns the programs of the hypervisors: the usual ones and the configured ones.
pub(super) fn programs(config: &DaemonConfig) -> Vec<PathBuf> {
    let configured = ALL.iter().map(|registration| config.hypervisor(registration.name).binary.clone());
    let usual = ALL.iter().map(|registration| PathBuf::from(registration.program));
    configured.chain(usual).collect()
}

/// Returns the names under which the programs run: their file names, and the names of the files to
/// which links lead.
pub(super) fn running_names(programs: &[PathBuf]) -> BTreeSet<String> {
    let path = std::env::var_os("PATH");
    let called =
        programs.iter().filter_map(|program| Some(program.file_name()?.to_string_lossy().into_owned()));
    let real = programs.iter().filter_map(|program| real_name(&find_program(program, path.as_deref()).ok()?));
    called.chain(real).collect()
}
