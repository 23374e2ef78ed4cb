//! Finds the VMM of a launch that was interrupted before its process was on record.

use std::path::Path;
use vmm_core::reason::Reason;

use vmm_host::process::{ProcessMatch, search_by_argument};

/// The reason for which no process is proven to be the VMM of a run, though one may be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UnprovenVmm {
    /// Machine-readable cause in kebab-case.
    pub(crate) reason: Reason,
    /// The reason as a sentence for people.
    pub(crate) message: String,
}

/// Returns the one process that has the run folder `dir` among its arguments and runs one of the
/// programs `names`, or `None` if there is no such process.
///
/// A VMM with file capabilities hides its executable from a daemon without capabilities of its own.
/// The name in its arguments counts then. [`search_by_argument`] returns processes of the daemon's
/// user only, and no other user can start one of those, so the arguments are not a stranger's.
///
/// # Errors
/// [`UnprovenVmm`] if processes cannot be listed, or if several processes use the folder.
pub(crate) async fn user_of(dir: &Path, names: Vec<String>) -> Result<Option<ProcessMatch>, UnprovenVmm> {
    let users = search_by_argument(dir.to_path_buf()).await.map_err(|error| UnprovenVmm {
        reason: Reason::ProcessesHidden,
        message: format!("the host's processes cannot be listed: {error}"),
    })?;
    one_of(users, &names)
}

fn one_of(users: Vec<ProcessMatch>, names: &[String]) -> Result<Option<ProcessMatch>, UnprovenVmm> {
    let mut ours = users.into_iter().filter(|user| user.runs_one_of(names));
    let Some(found) = ours.next() else { return Ok(None) };
    let pid = found.identity.pid;
    if let Some(other) = ours.next() {
        let message = format!("processes {pid} and {} both use the run folder", other.identity.pid);
        return Err(UnprovenVmm { reason: Reason::SeveralVmms, message });
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use vmm_core::store::ProcessIdentity;

    use super::*;

    fn found(pid: u32, exe: Option<&str>) -> ProcessMatch {
        ProcessMatch {
            identity: ProcessIdentity { pid, start_ticks: 1, boot_id: "boot".to_owned(), namespaces: None },
            uid: 0,
            args: vec!["/usr/bin/vmm".into(), "/run/x/s".into()],
            exe: exe.map(Into::into),
        }
    }

    #[test]
    fn one_matching_vmm_is_found_and_two_are_an_error() {
        let names = ["vmm".to_owned()];
        let pid = |users| one_of(users, &names).unwrap().map(|found| found.identity.pid);
        let ours = || found(5, Some("/usr/bin/vmm"));
        assert_eq!(pid(vec![ours(), found(6, Some("/bin/tail"))]), Some(5));
        assert_eq!(pid(vec![found(6, Some("/bin/tail"))]), None);
        assert_eq!(pid(vec![found(5, None)]), Some(5), "its arguments name the program");
        for other in [Some("/opt/vmm"), None] {
            let error = one_of(vec![ours(), found(7, other)], &names).unwrap_err();
            assert_eq!(error.reason, Reason::SeveralVmms);
        }
    }

    #[test]
    fn a_hidden_executable_with_another_name_is_no_vmm() {
        let mut console = found(5, None);
        console.args[0] = "/usr/bin/socat".into();
        assert_eq!(one_of(vec![console], &["vmm".to_owned()]), Ok(None));
    }
}
