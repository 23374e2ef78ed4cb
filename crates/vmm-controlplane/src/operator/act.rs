//! Carries out the decisions. Every proof is repeated at the moment of the removal, because the
//! host may have changed since the decision.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmm_core::store::ProcessIdentity;
use vmm_host::net::tap::{HostTaps, Taps as _};
use vmm_host::process::{Lookup, adopt, program_name_of};
use vmm_host::run_dir;
use vmm_host::survey;

use super::decide::{Item, ItemDecision, ItemKind, ItemTarget};

/// The longest wait for the end of a killed VMM.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// The outcome of a successful removal.
pub(super) const REMOVED: &str = "removed";

/// Removes every item with the decision `Remove`, processes first, and sets the items' outcomes.
pub(super) async fn carry_out(items: &mut [Item], runtime_dir: &Path, programs: &BTreeSet<String>) {
    // A process holds its TAP and its folder, so it must end before they can be removed.
    for kind in [ItemKind::Process, ItemKind::Tap, ItemKind::Folder] {
        let chosen =
            items.iter_mut().filter(|item| item.kind == kind && item.decision == ItemDecision::Remove);
        for item in chosen {
            let done = match &item.target {
                ItemTarget::Process(identity) => end(identity, programs).await,
                ItemTarget::Tap(owner) => match HostTaps.remove(&item.name, *owner).await {
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                },
                ItemTarget::Folder(path) => remove_folder(path, runtime_dir).await,
                ItemTarget::Within(_) => continue,
            };
            item.outcome = Some(match done {
                Ok(()) => REMOVED.to_owned(),
                Err(why) => format!("failed: {why}"),
            });
        }
    }
    copy_outcome_to_sockets(items);
}

/// Copies the outcome of each folder to the sockets in it, because a socket is removed with its
/// folder.
fn copy_outcome_to_sockets(items: &mut [Item]) {
    let folders: BTreeMap<PathBuf, Option<String>> = items
        .iter()
        .filter_map(|item| match &item.target {
            ItemTarget::Folder(path) => Some((path.clone(), item.outcome.clone())),
            ItemTarget::Process(_) | ItemTarget::Tap(_) | ItemTarget::Within(_) => None,
        })
        .collect();
    for item in items {
        if let ItemTarget::Within(folder) = &item.target {
            item.outcome = folders.get(folder).cloned().flatten();
        }
    }
}

async fn end(identity: &ProcessIdentity, programs: &BTreeSet<String>) -> Result<(), String> {
    // The identity has the start time, so a process that took over the id is not killed. The
    // program is checked once more, because a process may have executed another program since.
    let process = match adopt(identity) {
        Lookup::Alive(process) => process,
        Lookup::Gone => return Ok(()),
        Lookup::Unprovable(why) => return Err(why),
    };
    let name = program_name_of(&process).map_err(|error| format!("its program cannot be read: {error}"))?;
    let name = name.to_string_lossy().into_owned();
    if !programs.contains(&name) {
        return Err(format!("it runs {name} now, which is no hypervisor"));
    }
    process.kill_and_wait(KILL_TIMEOUT).await.map(|_| ()).map_err(|error| error.to_string())
}

async fn remove_folder(path: &Path, runtime_dir: &Path) -> Result<(), String> {
    let (path, runtime_dir) = (path.to_path_buf(), runtime_dir.to_path_buf());
    let removing = move || {
        // The runtime directory is read anew, because a process may have begun to use the folder
        // since the decision.
        let now = survey::survey(&runtime_dir).map_err(|error| error.to_string())?;
        let Some(folder) = now.folders.iter().find(|folder| folder.path == path) else { return Ok(()) };
        if let Some(user) =
            now.users.iter().find(|user| folder.uid.is_some_and(|uid| user.uids().contains(&uid)))
        {
            return Err(format!("process {} uses it", user.found.identity.pid));
        }
        if folder.sockets.iter().any(|socket| socket.held) {
            return Err("a process holds a socket in it".to_owned());
        }
        run_dir::remove(&path).map_err(|error| error.to_string())
    };
    tokio::task::spawn_blocking(removing).await.map_err(|error| error.to_string())?
}
