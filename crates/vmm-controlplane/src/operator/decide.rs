//! Decides about each thing that bears our mark. The functions are pure and use the facts alone.
//!
//! ```text
//!                      owner on   no owner,              a spare VMM           not proven ours
//!                      record     proven ours            of ours
//!   process            keep       report while alive     beside a daemon       report
//!                                                        keep, else remove
//!   TAP                keep       remove unless in use   (none)                (not listed)
//!   folder, socket     keep       remove unless in use   beside a daemon       report
//!                                                        keep, else remove
//!                                                        unless in use
//! ```
//!
//! A live VMM may be running somebody's guest though no VM on record owns it, as after an older
//! backup was restored. Therefore it is reported, and it is ended only if a person asks for that
//! with `--kill-orphans`.
//!
//! A spare VMM runs no guest. Its folder bears the mark of an instance, and the daemon removes
//! the mark before it gives the VMM a guest. The daemon that started a spare VMM ends it, so a
//! spare VMM without a daemon was left by a daemon that was killed. The folder of a spare VMM that
//! was reserved for a VM on record belongs to that VM.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::store::{PendingProcess, ProcessIdentity, VmRecord};
use vmm_host::net::tap::{OwnedTap, TapOwner};
use vmm_host::run_dir::SpareMark;
use vmm_host::survey::{FolderUser, RunFolder, RuntimeDirUsers};

use super::facts::ReconcileFacts;

/// The names of the sockets by which VMMs are controlled. A process that names a run folder for
/// another reason, such as a console client, does not name these.
const CONTROL_SOCKETS: [&str; 2] =
    [vmm_backends::rest::adopt::SOCKET, vmm_backends::qemu::convert::QMP_SOCKET];

/// The kind of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ItemKind {
    Process,
    Tap,
    Socket,
    Folder,
}

/// The decision about an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ItemDecision {
    /// The item has an owner, or is no concern of this program.
    Keep,
    /// The item is proven to be of this state directory, and no VM on record owns it.
    Remove,
    /// A person should look at the item.
    Report,
}

/// The handle by which an item is removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ItemTarget {
    Process(ProcessIdentity),
    Tap(TapOwner),
    /// A socket, which is removed with the run folder that holds it.
    Within(PathBuf),
    Folder(PathBuf),
}

/// One thing that bears our mark.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Item {
    pub(super) kind: ItemKind,
    /// A process id, an interface or a path.
    pub(super) name: String,
    /// The VM on record that owns the item.
    pub(super) vm_id: Option<String>,
    /// The `uid` of the VM that the item's mark names.
    pub(super) uid: Option<String>,
    pub(super) decision: ItemDecision,
    pub(super) reason: String,
    /// The result of the removal: `removed`, or the reason of the failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) outcome: Option<String>,
    #[serde(skip)]
    pub(super) target: ItemTarget,
}

/// Decides about every item, processes first.
pub(super) fn decide(facts: &ReconcileFacts, kill_orphans: bool) -> Vec<Item> {
    // Processes are judged first, because the other verdicts depend on them: a TAP or a folder that
    // a process uses can be removed only if that process is to end. `doomed` has the process ids of
    // those. `act::carry_out` works in the same order.
    let judge = DecisionRules { facts, kill_orphans };
    let processes: Vec<Item> = facts.survey.users.iter().map(|user| judge.process(user)).collect();
    let doomed = processes.iter().filter(|item| item.decision == ItemDecision::Remove);
    let doomed: BTreeSet<String> = doomed.map(|item| item.name.clone()).collect();
    let taps: Vec<Item> = facts.taps.iter().map(|tap| judge.tap(tap, &doomed)).collect();
    let folders = facts.survey.folders.iter().flat_map(|folder| judge.folder(folder, &doomed));
    processes.into_iter().chain(taps).chain(folders).collect()
}

/// A verdict and its reason.
type ReasonedDecision = (ItemDecision, String);

struct DecisionRules<'a> {
    facts: &'a ReconcileFacts,
    kill_orphans: bool,
}

impl DecisionRules<'_> {
    fn process(&self, user: &FolderUser) -> Item {
        let uids = user.uids();
        // A process may name the folders of several VMs in its arguments. The VM whose control
        // socket it was given is the one that it runs, so that VM is preferred.
        let commanded = uids.iter().copied().find(|uid| commands(user, *uid));
        let uid = commanded.or_else(|| uids.iter().next().copied());
        let (decision, reason) = self.judge_process(user, uid);
        let identity = user.found.identity.clone();
        self.item(
            ItemKind::Process,
            identity.pid.to_string(),
            uid,
            (decision, reason),
            ItemTarget::Process(identity),
        )
    }

    fn judge_process(&self, user: &FolderUser, uid: Option<VmUid>) -> ReasonedDecision {
        // The questions go from the harmless to the final. (1) A program that is no hypervisor,
        // such as an editor or a console client, is never touched. (2) Without a `uid` nothing
        // connects the process to a VM. (3) A VM on record owns its processes, so its own rules
        // apply. (4) The folder must be proven to be of this state directory. (5) The process must
        // have been given the control socket, because a hypervisor that another program started may
        // name a folder of ours too. Only then is it a spare VMM or an orphan. An orphan may be
        // running a guest, so a person must ask for its end.
        let program = program(user);
        if !self.facts.programs.contains(&program) {
            return (ItemDecision::Keep, format!("runs {program}, which is no hypervisor: left alone"));
        }
        let Some(uid) = uid else {
            return (ItemDecision::Report, format!("runs {program} and names the runtime folder, but no VM"));
        };
        if let Some(record) = self.facts.records.get(&uid) {
            return self.of_known_vm(user, record);
        }
        if let Err(why) = self.check_mark_owner(self.folder_of(uid)) {
            return (ItemDecision::Report, format!("lives, and no VM on record owns it; {why}"));
        }
        if !commands(user, uid) {
            let why = "names a run folder of ours, but is not proven to be a VMM that this program started";
            return (ItemDecision::Report, why.to_owned());
        }
        if let Some(mark) = self.mark(uid) {
            return self.spare(mark);
        }
        if self.kill_orphans {
            return (
                ItemDecision::Remove,
                format!("{program} of a VM that is not on record, ended as asked"),
            );
        }
        (
            ItemDecision::Report,
            format!("{program} lives, and no VM on record owns it; `reconcile --kill-orphans` ends it"),
        )
    }

    fn tap(&self, tap: &OwnedTap, doomed: &BTreeSet<String>) -> Item {
        let uid = tap.owner.uid;
        // Only TAPs whose label names this state directory are listed, so no further proof is
        // needed here. A TAP that a process holds is removed only if all processes of that VM are
        // to end.
        let verdict = if let Some(record) = self.facts.records.get(&uid) {
            (ItemDecision::Keep, format!("of VM {}", record.vm_id))
        } else if tap.attached && !self.all_end(uid, doomed) {
            (ItemDecision::Report, "no VM on record owns it, yet a process holds it".to_owned())
        } else {
            (
                ItemDecision::Remove,
                "labelled by this state directory for a VM that is not on record".to_owned(),
            )
        };
        self.item(ItemKind::Tap, tap.name.clone(), Some(uid), verdict, ItemTarget::Tap(tap.owner))
    }

    /// Returns the items of a folder and of the sockets in it. The sockets share the folder's
    /// decision.
    fn folder(&self, folder: &RunFolder, doomed: &BTreeSet<String>) -> Vec<Item> {
        let (decision, reason) = self.judge_folder(folder, doomed);
        let within = folder.sockets.iter().map(|socket| {
            let state = if socket.held { "held by a process" } else { "held by nobody" };
            let reason = match decision {
                ItemDecision::Keep => format!("{reason}; {state}"),
                ItemDecision::Remove | ItemDecision::Report => format!("as its folder; {state}"),
            };
            let name = socket.path.display().to_string();
            let target = ItemTarget::Within(folder.path.clone());
            self.item(ItemKind::Socket, name, folder.uid, (decision, reason), target)
        });
        let mut items: Vec<Item> = within.collect();
        let name = folder.path.display().to_string();
        let target = ItemTarget::Folder(folder.path.clone());
        items.push(self.item(ItemKind::Folder, name, folder.uid, (decision, reason), target));
        items
    }

    fn judge_folder(&self, folder: &RunFolder, doomed: &BTreeSet<String>) -> ReasonedDecision {
        // A folder is removed only if five things hold: its name is that of a run folder, no VM on
        // record has that name, this user owns it, the whole runtime directory or the mark in the
        // folder is proven to be of this state directory, and no process uses it or a socket in it.
        // The use is checked twice, because a process is found by its arguments, while a socket may
        // be held by a process whose arguments name no folder. A process that is to end does not
        // count as a user.
        let Some(uid) = folder.uid else {
            let why = "lies among the run folders without the name of one: not made by this program";
            return (ItemDecision::Report, why.to_owned());
        };
        if let Some(record) = self.facts.records.get(&uid) {
            return (ItemDecision::Keep, format!("of VM {}", record.vm_id));
        }
        if !folder.own {
            let why = "has the name of a run folder, but is no folder of this user: not made by this daemon";
            return (ItemDecision::Report, why.to_owned());
        }
        if let Err(why) = self.check_mark_owner(Some(folder)) {
            return (ItemDecision::Report, format!("no VM on record owns it; {why}"));
        }
        let spare = folder.mark.as_ref().map(|mark| self.spare(mark));
        if let Some(kept @ (ItemDecision::Keep, _)) = spare {
            return kept;
        }
        let mut users = self.facts.survey.users.iter().filter(|user| user.uids().contains(&uid));
        if let Some(user) = users.find(|user| !doomed.contains(&user.found.identity.pid.to_string())) {
            let (pid, program) = (user.found.identity.pid, program(user));
            return (
                ItemDecision::Report,
                format!("no VM on record owns it, yet process {pid} ({program}) uses it"),
            );
        }
        if folder.sockets.iter().any(|socket| socket.held) && !self.all_end(uid, doomed) {
            let why = "no VM on record owns it, yet a process that cannot be found holds a socket in it";
            return (ItemDecision::Report, why.to_owned());
        }
        spare.unwrap_or_else(|| {
            (ItemDecision::Remove, "made for a VM that is not on record, and no process uses it".to_owned())
        })
    }

    /// Returns the verdict on a spare VMM of this state directory, and on its folder if no VM on
    /// record owns that.
    fn spare(&self, mark: &SpareMark) -> ReasonedDecision {
        let backend = &mark.backend;
        if self.facts.daemon {
            return (ItemDecision::Keep, format!("a spare VMM of backend {backend}, which waits for a VM"));
        }
        let why = format!(
            "a spare VMM of backend {backend} that a daemon left when it was killed; no guest runs in it, and the next start of \
             the daemon ends it"
        );
        (ItemDecision::Remove, why)
    }

    /// Returns the verdict on a VMM in the folder of a VM that is on record.
    fn of_known_vm(&self, user: &FolderUser, record: &VmRecord) -> ReasonedDecision {
        // The VMM that the record names is kept. If an operation is under way or the VM is
        // unreachable, the record is about to change, and the daemon will settle it. A VM without a
        // run may have reserved a spare VMM; that one waits beside a daemon, and without a
        // daemon the same rules hold as for every spare VMM. Any other VMM in the folder
        // contradicts the record. It is reported and not removed, because the daemon ends it at the
        // VM's next boot.
        let vm = &record.vm_id;
        let on_record = record.run.as_ref().map(|run| &run.process);
        if on_record == Some(&user.found.identity) {
            return (ItemDecision::Keep, format!("the VMM of VM {vm}"));
        }
        if record.intent.is_some() || record.pending_work().process == PendingProcess::OutOfReach {
            return (
                ItemDecision::Keep,
                format!("in the folder of VM {vm}, which the daemon is about to settle"),
            );
        }
        let reserved = if on_record.is_none() { self.mark(record.uid) } else { None };
        if let Some(mark) =
            reserved.filter(|mark| Some(mark.instance) == self.facts.instance && commands(user, record.uid))
        {
            let waits = || (ItemDecision::Keep, format!("a spare VMM, which waits for the boot of VM {vm}"));
            return if self.facts.daemon { waits() } else { self.spare(mark) };
        }
        let instead =
            on_record.map_or_else(|| "none".to_owned(), |process| format!("process {}", process.pid));
        let why = format!(
            "in the folder of VM {vm}, whose record names {instead}; the VM's next boot ends it, and so does DeleteVm with force"
        );
        (ItemDecision::Report, why)
    }

    fn folder_of(&self, uid: VmUid) -> Option<&RunFolder> {
        self.facts.survey.folders.iter().find(|folder| folder.uid == Some(uid))
    }

    /// Returns the mark of a spare VMM on the run folder of `uid`.
    fn mark(&self, uid: VmUid) -> Option<&SpareMark> {
        self.folder_of(uid)?.mark.as_ref()
    }

    /// Checks that a run folder belongs to this state directory. The error gives the reason for
    /// which that is not proven. `None` stands for the run folder of a process that is gone itself.
    fn check_mark_owner(&self, folder: Option<&RunFolder>) -> Result<(), String> {
        // A mark in the folder names one state directory and is stronger than the list of the whole
        // runtime directory. Without a mark the list decides, and it proves ownership only if this
        // state directory is the only one that ever used the runtime directory.
        let mark = folder.and_then(|folder| Some(folder.mark.as_ref()?.instance));
        let owner = mark.or_else(|| folder.and_then(|folder| folder.owner));
        let Some(ours) = self.facts.instance else {
            let marked = owner.map(|owner| format!("; it bears the mark of {}", self.named(owner)));
            return Err(format!("without a database no owner can be proven{}", marked.unwrap_or_default()));
        };
        match (owner, &self.facts.served) {
            (Some(owner), _) if owner == ours => Ok(()),
            (Some(owner), _) => Err(format!("it bears the mark of {}", self.named(owner))),
            (None, RuntimeDirUsers::One(theirs)) if ours == *theirs => Ok(()),
            (None, RuntimeDirUsers::One(theirs)) => {
                Err(format!("{} has used this runtime folder", self.named(*theirs)))
            }
            (None, RuntimeDirUsers::Nobody) => {
                Err("no list names the state directory that has used this runtime folder".to_owned())
            }
            (None, RuntimeDirUsers::Many) => {
                let known = self.facts.signatures.iter().filter_map(|signature| signature.state_dir.as_ref());
                let known: BTreeSet<String> = known.map(|path| path.display().to_string()).collect();
                let known = known.into_iter().collect::<Vec<_>>().join(", ");
                let known = if known.is_empty() { known } else { format!(" ({known})") };
                Err(format!(
                    "it bears no mark, and more than one state directory has used this runtime folder{known}, so no owner can be \
                     proven"
                ))
            }
        }
    }

    /// Returns the words for another state directory, with its path if that is known.
    fn named(&self, instance: InstanceId) -> String {
        let mut signatures = self.facts.signatures.iter();
        let signature = signatures.find(|signature| signature.instance == Some(instance));
        match signature.and_then(|signature| signature.state_dir.as_ref()) {
            Some(path) => format!("another state directory, {} (instance {instance})", path.display()),
            None => format!("another state directory (instance {instance})"),
        }
    }

    /// Returns true if this VM has processes and all of them are to end.
    fn all_end(&self, uid: VmUid, doomed: &BTreeSet<String>) -> bool {
        let mut users = self.facts.survey.users.iter().filter(|user| user.uids().contains(&uid)).peekable();
        users.peek().is_some() && users.all(|user| doomed.contains(&user.found.identity.pid.to_string()))
    }

    fn item(
        &self,
        kind: ItemKind,
        name: String,
        uid: Option<VmUid>,
        verdict: ReasonedDecision,
        target: ItemTarget,
    ) -> Item {
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

/// Returns true if a process was given the control socket of a VM.
pub(super) fn commands(user: &FolderUser, uid: VmUid) -> bool {
    CONTROL_SOCKETS.iter().any(|socket| user.names(uid, socket))
}

fn program(user: &FolderUser) -> String {
    user.found
        .program_name()
        .map_or_else(|| "an unknown program".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
