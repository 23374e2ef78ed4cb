//! What is to become of each thing that bears our mark: pure, from the facts alone.
//!
//! ```text
//!                       owner on record   no owner, proven ours    of a spare VMM of ours           not proven
//!   a process             keep              report, while it lives   beside a daemon keep,            report
//!                                                                    else remove
//!   a TAP                 keep              remove, unless in use    (none)                           (not listed: another's)
//!   a folder, a socket    keep              remove, unless in use    beside a daemon keep,            report
//!                                                                    else remove, unless in use
//! ```
//!
//! A VMM that lives may be doing somebody's work though nobody has it on record, as after an older backup was put back. So it
//! is reported, and ended only where a person asks for that by `--kill-orphans`.
//!
//! A spare VMM runs no guest: its folder bears the mark of an installation, which comes off before the VMM is told anything. The
//! daemon that started it ends it, so one without a daemon was left by a daemon that was killed. The folder of one that a VM on
//! record had been promised is that VM's.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;
use vmm_core::id::VmUid;
use vmm_core::state::Phase;
use vmm_core::store::{ProcessIdentity, VmRecord};
use vmm_host::ledger::{RunFolder, Served, User};
use vmm_host::net::tap::{OwnedTap, TapOwner};
use vmm_host::run_dir::SpareMark;

use super::facts::Facts;

/// The sockets by which VMMs are told what to do. A process that names another one's folder for any other reason does not
/// name these.
const CONTROL_SOCKETS: [&str; 2] =
    [vmm_backends::rest::adopt::SOCKET, vmm_backends::qemu::convert::QMP_SOCKET];

/// What kind of thing an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Process,
    Tap,
    Socket,
    Folder,
}

/// What is to become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Decision {
    /// It has an owner, or is none of our business.
    Keep,
    /// It is proven ours and nobody's.
    Remove,
    /// A person should look at it.
    Report,
}

/// How to get at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Process(ProcessIdentity),
    Tap(TapOwner),
    /// Goes with the run folder that holds it.
    Within(PathBuf),
    Folder(PathBuf),
}

/// One thing that bears our mark.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Item {
    pub(super) kind: Kind,
    /// A process id, an interface or a path.
    pub(super) name: String,
    /// The VM on record that it belongs to.
    pub(super) vm_id: Option<String>,
    /// The creation of a VM that its mark names.
    pub(super) uid: Option<String>,
    pub(super) decision: Decision,
    pub(super) reason: String,
    /// What was done: `removed`, or why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) outcome: Option<String>,
    #[serde(skip)]
    pub(super) target: Target,
}

/// Decides on everything, processes first.
pub(super) fn decide(facts: &Facts, kill_orphans: bool) -> Vec<Item> {
    let judge = Judge { facts, kill_orphans };
    let processes: Vec<Item> = facts.survey.users.iter().map(|user| judge.process(user)).collect();
    let doomed = processes.iter().filter(|item| item.decision == Decision::Remove);
    let doomed: BTreeSet<String> = doomed.map(|item| item.name.clone()).collect();
    let taps: Vec<Item> = facts.taps.iter().map(|tap| judge.tap(tap, &doomed)).collect();
    let folders = facts.survey.folders.iter().flat_map(|folder| judge.folder(folder, &doomed));
    processes.into_iter().chain(taps).chain(folders).collect()
}

/// A verdict and its reason.
type Verdict = (Decision, String);

struct Judge<'a> {
    facts: &'a Facts,
    kill_orphans: bool,
}

impl Judge<'_> {
    fn process(&self, user: &User) -> Item {
        let uids = user.uids();
        let commanded = uids.iter().copied().find(|uid| commands(user, *uid));
        let uid = commanded.or_else(|| uids.iter().next().copied());
        let (decision, reason) = self.judge_process(user, uid);
        let identity = user.found.identity.clone();
        self.item(Kind::Process, identity.pid.to_string(), uid, (decision, reason), Target::Process(identity))
    }

    fn judge_process(&self, user: &User, uid: Option<VmUid>) -> Verdict {
        let program = program(user);
        if !self.facts.programs.contains(&program) {
            return (Decision::Keep, format!("runs {program}, which is no hypervisor: left alone"));
        }
        let Some(uid) = uid else {
            return (Decision::Report, format!("runs {program} and names the runtime folder, but no VM"));
        };
        if let Some(record) = self.facts.records.get(&uid) {
            return self.of_known_vm(user, record);
        }
        let mark = self.mark(uid);
        if let Err(why) = self.whose(mark) {
            return (Decision::Report, format!("lives, and no VM on record owns it; {why}"));
        }
        if !commands(user, uid) || user.found.exe.is_none() {
            let why = "names a run folder of ours, but is not proven to be a VMM that this program started";
            return (Decision::Report, why.to_owned());
        }
        if let Some(mark) = mark {
            return self.spare(mark);
        }
        if self.kill_orphans {
            return (Decision::Remove, format!("{program} of a VM that is not on record, ended as asked"));
        }
        (
            Decision::Report,
            format!("{program} lives, and no VM on record owns it; `reconcile --kill-orphans` ends it"),
        )
    }

    fn tap(&self, tap: &OwnedTap, doomed: &BTreeSet<String>) -> Item {
        let uid = tap.owner.uid;
        let verdict = if let Some(record) = self.facts.records.get(&uid) {
            (Decision::Keep, format!("of VM {}", record.vm_id))
        } else if tap.attached && !self.all_end(uid, doomed) {
            (Decision::Report, "no VM on record owns it, yet a process holds it".to_owned())
        } else {
            (Decision::Remove, "labelled by this state directory for a VM that is not on record".to_owned())
        };
        self.item(Kind::Tap, tap.name.clone(), Some(uid), verdict, Target::Tap(tap.owner))
    }

    /// A folder and the sockets in it.
    fn folder(&self, folder: &RunFolder, doomed: &BTreeSet<String>) -> Vec<Item> {
        let (decision, reason) = self.judge_folder(folder, doomed);
        let within = folder.sockets.iter().map(|socket| {
            let state = if socket.held { "held by a process" } else { "held by nobody" };
            let reason = match decision {
                Decision::Keep => format!("{reason}; {state}"),
                Decision::Remove | Decision::Report => format!("as its folder; {state}"),
            };
            let name = socket.path.display().to_string();
            let target = Target::Within(folder.path.clone());
            self.item(Kind::Socket, name, folder.uid, (decision, reason), target)
        });
        let mut items: Vec<Item> = within.collect();
        let name = folder.path.display().to_string();
        let target = Target::Folder(folder.path.clone());
        items.push(self.item(Kind::Folder, name, folder.uid, (decision, reason), target));
        items
    }

    fn judge_folder(&self, folder: &RunFolder, doomed: &BTreeSet<String>) -> Verdict {
        let Some(uid) = folder.uid else {
            let why = "lies among the run folders and is not called as one: not made by this program";
            return (Decision::Report, why.to_owned());
        };
        if let Some(record) = self.facts.records.get(&uid) {
            return (Decision::Keep, format!("of VM {}", record.vm_id));
        }
        if !folder.own {
            let why = "is called as a run folder, but is no folder of this user's: not made by this daemon";
            return (Decision::Report, why.to_owned());
        }
        if let Err(why) = self.whose(folder.mark.as_ref()) {
            return (Decision::Report, format!("no VM on record owns it; {why}"));
        }
        let spare = folder.mark.as_ref().map(|mark| self.spare(mark));
        if let Some(kept @ (Decision::Keep, _)) = spare {
            return kept;
        }
        let mut users = self.facts.survey.users.iter().filter(|user| user.uids().contains(&uid));
        if let Some(user) = users.find(|user| !doomed.contains(&user.found.identity.pid.to_string())) {
            let (pid, program) = (user.found.identity.pid, program(user));
            return (
                Decision::Report,
                format!("no VM on record owns it, yet process {pid} ({program}) uses it"),
            );
        }
        if folder.sockets.iter().any(|socket| socket.held) && !self.all_end(uid, doomed) {
            let why = "no VM on record owns it, yet a process that cannot be found holds a socket in it";
            return (Decision::Report, why.to_owned());
        }
        spare.unwrap_or_else(|| {
            (Decision::Remove, "made for a VM that is not on record, and no process uses it".to_owned())
        })
    }

    /// What is to become of a spare VMM of ours, and of its folder where no VM on record has that.
    fn spare(&self, mark: &SpareMark) -> Verdict {
        let backend = &mark.backend;
        if self.facts.daemon {
            return (Decision::Keep, format!("a spare VMM of backend {backend}, which waits for a VM"));
        }
        let why = format!(
            "a spare VMM of backend {backend} that a daemon left when it was killed; no guest runs in it, and the next start of \
             the daemon ends it"
        );
        (Decision::Remove, why)
    }

    /// A VMM in the folder of a VM that is on record.
    fn of_known_vm(&self, user: &User, record: &VmRecord) -> Verdict {
        let vm = &record.vm_id;
        let on_record = record.run.as_ref().map(|run| &run.process);
        if on_record == Some(&user.found.identity) {
            return (Decision::Keep, format!("the VMM of VM {vm}"));
        }
        if record.intent.is_some() || record.status.phase == Phase::Unreachable {
            return (
                Decision::Keep,
                format!("in the folder of VM {vm}, which the daemon is about to settle"),
            );
        }
        let promised = if on_record.is_none() { self.mark(record.uid) } else { None };
        if let Some(mark) =
            promised.filter(|mark| self.whose(Some(mark)).is_ok() && commands(user, record.uid))
        {
            let waits = || (Decision::Keep, format!("a spare VMM, which waits for the boot of VM {vm}"));
            return if self.facts.daemon { waits() } else { self.spare(mark) };
        }
        let instead =
            on_record.map_or_else(|| "none".to_owned(), |process| format!("process {}", process.pid));
        let why = format!(
            "in the folder of VM {vm}, whose record names {instead}; the VM's next boot ends it, and so does DeleteVm with force"
        );
        (Decision::Report, why)
    }

    /// The mark of a spare VMM on the run folder of `uid`.
    fn mark(&self, uid: VmUid) -> Option<&SpareMark> {
        self.facts.survey.folders.iter().find(|folder| folder.uid == Some(uid))?.mark.as_ref()
    }

    /// Whether a run folder, with this mark, is this state directory's, or why that is not proven.
    fn whose(&self, mark: Option<&SpareMark>) -> Result<(), &'static str> {
        match (self.facts.instance, mark, &self.facts.served) {
            (None, _, _) => Err("without a database nothing proves whose it is"),
            (Some(ours), Some(mark), _) if mark.instance == ours => Ok(()),
            (Some(_), Some(_), _) => Err("it bears the mark of another installation's spare VMM"),
            (Some(ours), None, Served::One(theirs)) if ours == *theirs => Ok(()),
            (Some(_), None, Served::One(_)) => Err("another state directory has used this runtime folder"),
            (Some(_), None, Served::Nobody) => {
                Err("nothing tells which state directory has used this runtime folder")
            }
            (Some(_), None, Served::Many) => Err(
                "more than one state directory has used this runtime folder, and nothing tells whose it is",
            ),
        }
    }

    /// Whether there are processes of this VM, and all of them are to end.
    fn all_end(&self, uid: VmUid, doomed: &BTreeSet<String>) -> bool {
        let mut users = self.facts.survey.users.iter().filter(|user| user.uids().contains(&uid)).peekable();
        users.peek().is_some() && users.all(|user| doomed.contains(&user.found.identity.pid.to_string()))
    }

    fn item(&self, kind: Kind, name: String, uid: Option<VmUid>, verdict: Verdict, target: Target) -> Item {
        let owner = uid.and_then(|uid| self.facts.records.get(&uid));
        let (decision, reason) = verdict;
        Item {
            kind,
            name,
            vm_id: owner.map(|record| record.vm_id.to_string()),
            uid: uid.map(|uid| uid.to_string()),
            decision,
            reason,
            outcome: None,
            target,
        }
    }
}

/// Says whether a process was given the control socket of a VM.
pub(super) fn commands(user: &User, uid: VmUid) -> bool {
    CONTROL_SOCKETS.iter().any(|socket| user.names(uid, socket))
}

fn program(user: &User) -> String {
    user.found
        .program_name()
        .map_or_else(|| "an unknown program".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
