//! Finds the VMM of a launch that was interrupted before its process was on record.

use std::path::Path;
use vmm_core::reason::Reason;

use vmm_host::process::{Found, find_by_argument};

/// The reason for which no process is proven to be the VMM of a run, though one may be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unproven {
    /// Machine-readable cause in kebab-case.
    pub(crate) reason: Reason,
    /// The reason as a sentence for people.
    pub(crate) message: String,
}

/// Returns the one process that has the run folder `dir` among its arguments and runs one of the
/// programs `names`, or `None` if there is no such process.
///
/// # Errors
/// [`Unproven`] if processes cannot be listed, if several processes use the folder, or if the
/// executable of the one process is hidden from the daemon's user. In the last case only the
/// arguments name the process, and every local user can forge arguments.
pub(crate) async fn user_of(dir: &Path, names: Vec<String>) -> Result<Option<Found>, Unproven> {
    let owned = dir.to_path_buf();
    let hidden = |error: &dyn std::fmt::Display| Unproven {
        reason: Reason::ProcessesHidden,
        message: format!("the host's processes cannot be listed: {error}"),
    };
    let users = match tokio::task::spawn_blocking(move || find_by_argument(&owned)).await {
        Ok(users) => users.map_err(|error| hidden(&error))?,
        Err(error) => return Err(hidden(&error)),
    };
    one_of(users, &names)
}

fn one_of(users: Vec<Found>, names: &[String]) -> Result<Option<Found>, Unproven> {
    let mut ours = users.into_iter().filter(|user| user.runs_one_of(names));
    let Some(found) = ours.next() else { return Ok(None) };
    let pid = found.identity.pid;
    if let Some(other) = ours.next() {
        let message = format!("processes {pid} and {} both use the run folder", other.identity.pid);
        return Err(Unproven { reason: Reason::SeveralVmms, message });
    }
    if found.exe.is_none() {
        let message =
            format!("process {pid} uses the run folder, but its program is hidden from the daemon's user");
        return Err(Unproven { reason: Reason::IdentityUnproven, message });
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use vmm_core::store::ProcessIdentity;

    use super::*;

    fn found(pid: u32, exe: Option<&str>) -> Found {
        Found {
            identity: ProcessIdentity { pid, start_ticks: 1, boot_id: "boot".to_owned(), namespaces: None },
            args: vec!["/usr/bin/vmm".into(), "/run/x/s".into()],
            exe: exe.map(Into::into),
        }
    }

    #[test]
    fn only_one_process_whose_program_is_shown_is_taken() {
        let names = ["vmm".to_owned()];
        let reason = |users| one_of(users, &names).map_err(|unproven| unproven.reason);
        let ours = || found(5, Some("/usr/bin/vmm"));
        assert_eq!(reason(vec![ours(), found(6, Some("/bin/tail"))]).unwrap().unwrap().identity.pid, 5);
        assert!(reason(vec![found(6, Some("/bin/tail"))]).unwrap().is_none());
        assert_eq!(reason(vec![ours(), found(7, Some("/opt/vmm"))]).unwrap_err(), Reason::SeveralVmms);
        assert_eq!(reason(vec![found(5, None)]).unwrap_err(), Reason::IdentityUnproven);
    }
}
