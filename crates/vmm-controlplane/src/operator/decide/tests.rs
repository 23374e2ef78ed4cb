use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use uuid::Uuid;
use vmm_core::caller::Caller;
use vmm_core::id::{BackendName, InstanceId};
use vmm_core::store::{Intent, IntentKind, RunRecord};
use vmm_host::process::ProcessMatch;
use vmm_host::survey::{RunSocket, Signature, Survey};
use vmm_testkit::store_suite;

use super::*;

const VMS: &str = "/run/x/vms";

fn uid() -> VmUid {
    VmUid::new(Uuid::now_v7())
}

fn identity(pid: u32) -> ProcessIdentity {
    ProcessIdentity { pid, start_ticks: 7, boot_id: "now".to_owned(), namespaces: None }
}

/// Makes a process of this program with these arguments.
fn user(pid: u32, exe: &str, args: &[String]) -> FolderUser {
    let found = ProcessMatch {
        identity: identity(pid),
        uid: 0,
        exe: Some(PathBuf::from(exe)),
        args: args.iter().map(Into::into).collect(),
    };
    FolderUser { paths: found.paths_below(Path::new(VMS)), found }
}

fn dir(uid: VmUid) -> String {
    uid.run_dir(Path::new("/run/x")).display().to_string()
}

fn vmm(pid: u32, uid: VmUid) -> FolderUser {
    user(pid, "/usr/bin/qemu", &[format!("path={}/qmp.sock,server=on", dir(uid))])
}

fn folder(uid: VmUid, held: bool) -> RunFolder {
    let path = PathBuf::from(dir(uid));
    let sockets = vec![RunSocket { path: path.join("qmp.sock"), held }];
    RunFolder { path, uid: Some(uid), own: true, sockets, owner: None, mark: None }
}

/// Makes the folder of a spare VMM of `instance`.
fn marked(uid: VmUid, held: bool, instance: InstanceId) -> RunFolder {
    let mark = SpareMark { instance, backend: BackendName::new("qemu") };
    RunFolder { mark: Some(mark), ..folder(uid, held) }
}

/// Makes a host whose runtime folder only this state directory has used.
fn facts() -> ReconcileFacts {
    let instance = InstanceId::new(Uuid::now_v7());
    ReconcileFacts {
        instance: Some(instance),
        records: BTreeMap::new(),
        daemon: false,
        served: RuntimeDirUsers::One(instance),
        signatures: BTreeSet::new(),
        survey: Survey::default(),
        taps: Vec::new(),
        programs: BTreeSet::from(["qemu".to_owned()]),
        notes: Vec::new(),
    }
}

fn known(facts: &mut ReconcileFacts, uid: VmUid, process: Option<ProcessIdentity>) {
    let mut record = VmRecord { uid, intent: None, pending: None, ..store_suite::record("vm") };
    record.run = process.map(|process| RunRecord {
        process,
        socket: PathBuf::from(dir(uid)).join("qmp.sock"),
        version: String::new(),
        accelerator: String::new(),
        machine: String::new(),
        started_ms: 0,
        claims: Vec::new(),
        taps: Vec::new(),
    });
    facts.records.insert(uid, record);
}

fn decisions(items: &[Item]) -> Vec<(ItemKind, ItemDecision)> {
    items.iter().map(|item| (item.kind, item.decision)).collect()
}

#[test]
fn traces_of_a_vm_on_record_are_kept() {
    let (mut facts, uid) = (facts(), uid());
    known(&mut facts, uid, Some(identity(5)));
    facts.survey = Survey { folders: vec![folder(uid, true)], users: vec![vmm(5, uid)] };
    facts.taps = vec![tap(&facts, uid, true)];
    for kill in [false, true] {
        let items = decide(&facts, kill);
        assert!(items.iter().all(|item| item.decision == ItemDecision::Keep), "{items:?}");
        assert!(items.iter().all(|item| item.vm_id.as_deref() == Some("vm")), "{items:?}");
        assert_eq!(items.len(), 4);
    }
}

fn tap(facts: &ReconcileFacts, uid: VmUid, attached: bool) -> OwnedTap {
    OwnedTap { name: "vmt0".to_owned(), owner: TapOwner { instance: facts.instance.unwrap(), uid }, attached }
}

#[test]
fn a_leftover_without_a_process_is_removed() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey.folders = vec![folder(uid, false)];
    facts.taps = vec![tap(&facts, uid, false)];
    let expected = [
        (ItemKind::Tap, ItemDecision::Remove),
        (ItemKind::Socket, ItemDecision::Remove),
        (ItemKind::Folder, ItemDecision::Remove),
    ];
    assert_eq!(decisions(&decide(&facts, false)), expected);
}

#[test]
fn a_live_orphan_is_reported_with_its_folder_sockets_and_taps() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey = Survey { folders: vec![folder(uid, true)], users: vec![vmm(5, uid)] };
    facts.taps = vec![tap(&facts, uid, true)];
    let items = decide(&facts, false);
    assert_eq!(items.len(), 4);
    assert!(items.iter().all(|item| item.decision == ItemDecision::Report), "{items:?}");
    let items = decide(&facts, true);
    assert!(items.iter().all(|item| item.decision == ItemDecision::Remove), "{items:?}");
}

#[test]
fn nothing_is_removed_in_a_runtime_directory_of_several_instances() {
    for served in [
        RuntimeDirUsers::Many,
        RuntimeDirUsers::Nobody,
        RuntimeDirUsers::One(InstanceId::new(Uuid::now_v7())),
    ] {
        let (mut facts, uid, dead) = (facts(), uid(), uid());
        facts.survey =
            Survey { folders: vec![folder(uid, true), folder(dead, false)], users: vec![vmm(5, uid)] };
        facts.served = served;
        let items = decide(&facts, true);
        assert_eq!(items.len(), 5);
        assert!(items.iter().all(|item| item.decision == ItemDecision::Report), "{items:?}");
    }
}

#[test]
fn nothing_is_removed_without_a_database() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey = Survey { folders: vec![folder(uid, false)], users: vec![vmm(5, uid)] };
    facts.instance = None;
    assert!(decide(&facts, true).iter().all(|item| item.decision == ItemDecision::Report));
}

#[test]
fn a_foreign_process_that_names_a_run_folder_keeps_it() {
    let (mut facts, uid) = (facts(), uid());
    let tail = user(6, "/usr/bin/tail", &["-f".to_owned(), format!("{}/console.log", dir(uid))]);
    facts.survey = Survey { folders: vec![folder(uid, false)], users: vec![tail] };
    let expected = [
        (ItemKind::Process, ItemDecision::Keep),
        (ItemKind::Socket, ItemDecision::Report),
        (ItemKind::Folder, ItemDecision::Report),
    ];
    assert_eq!(decisions(&decide(&facts, true)), expected);
}

#[test]
fn a_hypervisor_without_the_control_socket_is_not_ended() {
    let (mut facts, uid) = (facts(), uid());
    let own_disk = vec![format!("file={}/disk.img", dir(uid))];
    facts.survey.users = vec![user(6, "/usr/bin/qemu", &own_disk)];
    facts.survey.folders = vec![folder(uid, false)];
    let items = decide(&facts, true);
    assert!(items.iter().all(|item| item.decision == ItemDecision::Report), "{items:?}");
}

#[test]
fn the_mark_of_a_run_folder_decides_its_owner_in_a_shared_runtime_directory() {
    let (mut facts, uid) = (facts(), uid());
    let theirs = InstanceId::new(Uuid::now_v7());
    let signature = Signature { instance: Some(theirs), state_dir: Some("/var/lib/other".into()) };
    facts.signatures = BTreeSet::from([signature]);
    let of = |owner: Option<InstanceId>| RunFolder { owner, ..folder(uid, false) };
    for served in [RuntimeDirUsers::Many, RuntimeDirUsers::Nobody, RuntimeDirUsers::One(theirs)] {
        facts.served = served;
        facts.survey = Survey { folders: vec![of(facts.instance)], users: vec![vmm(5, uid)] };
        assert!(decide(&facts, true).iter().all(|item| item.decision == ItemDecision::Remove));
    }
    facts.served = RuntimeDirUsers::One(facts.instance.unwrap());
    facts.survey.folders = vec![of(Some(theirs))];
    let items = decide(&facts, true);
    assert!(items.iter().all(|item| item.decision == ItemDecision::Report), "{items:?}");
    assert!(items[0].reason.contains("/var/lib/other"), "{items:?}");
}

#[test]
fn a_hypervisor_with_a_hidden_executable_is_recognised_by_its_arguments() {
    let (mut facts, uid) = (facts(), uid());
    let mut hidden = vmm(7, uid);
    hidden.found.exe = None;
    for (name, decision) in [("/opt/qemu", ItemDecision::Remove), ("/usr/bin/socat", ItemDecision::Keep)] {
        hidden.found.args.insert(0, name.into());
        facts.survey.users = vec![hidden.clone()];
        assert_eq!(decisions(&decide(&facts, true)), [(ItemKind::Process, decision)], "{name}");
    }
}

#[test]
fn a_second_vmm_of_a_vm_is_reported_unless_an_intent_covers_it() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey.users = vec![vmm(5, uid)];
    for on_record in [None, Some(identity(4))] {
        known(&mut facts, uid, on_record);
        assert_eq!(decisions(&decide(&facts, true)), [(ItemKind::Process, ItemDecision::Report)]);
    }
    let record = facts.records.get_mut(&uid).unwrap();
    let kind = IntentKind::Boot { claims: Vec::new() };
    record.intent = Some(Intent { kind, caller: Caller::system(), since_ms: 0, scope: None });
    assert_eq!(decisions(&decide(&facts, true)), [(ItemKind::Process, ItemDecision::Keep)]);
}

#[test]
fn a_socket_with_an_unknown_holder_keeps_its_folder() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey.folders = vec![folder(uid, true)];
    assert!(decide(&facts, true).iter().all(|item| item.decision == ItemDecision::Report));
}

#[test]
fn a_folder_that_is_no_run_folder_is_reported() {
    let (mut facts, uid) = (facts(), uid());
    let path = format!("{VMS}/lost+found").into();
    let strange = RunFolder { path, uid: None, own: true, sockets: Vec::new(), owner: None, mark: None };
    let anothers = RunFolder { own: false, sockets: Vec::new(), ..folder(uid, false) };
    facts.survey.folders = vec![strange, anothers];
    assert!(decide(&facts, true).iter().all(|item| item.decision == ItemDecision::Report));
}

#[test]
fn a_spare_vmm_is_kept_beside_its_daemon_and_ended_without_one() {
    for kill in [false, true] {
        let (mut facts, uid) = (facts(), uid());
        let ours = facts.instance.unwrap();
        // The mark proves the owner, whichever other state directories use the runtime folder.
        facts.served = RuntimeDirUsers::Many;
        facts.survey = Survey { folders: vec![marked(uid, true, ours)], users: vec![vmm(5, uid)] };
        let reported = |facts: &ReconcileFacts, decision, why: &str| {
            let items = decide(facts, kill);
            assert_eq!(items.len(), 3);
            assert!(items.iter().all(|item| item.decision == decision), "{items:?}");
            assert!(items[0].reason.contains(why) && items[2].reason.contains(why), "{items:?}");
        };
        facts.daemon = true;
        reported(&facts, ItemDecision::Keep, "a spare VMM of backend qemu, which waits for a VM");
        facts.daemon = false;
        reported(&facts, ItemDecision::Remove, "the next start of the daemon ends it");
    }
}

#[test]
fn an_unproven_spare_vmm_is_reported() {
    for daemon in [false, true] {
        let (mut facts, uid) = (facts(), uid());
        let ours = facts.instance.unwrap();
        facts.daemon = daemon;
        let anothers = marked(uid, true, InstanceId::new(Uuid::now_v7()));
        facts.survey = Survey { folders: vec![anothers], users: vec![vmm(5, uid)] };
        let items = decide(&facts, true);
        assert!(items.iter().all(|item| item.decision == ItemDecision::Report), "{items:?}");
        assert!(items[0].reason.contains("another state directory"), "{items:?}");

        facts.survey.folders = vec![marked(uid, true, ours)];
        facts.instance = None;
        assert!(decide(&facts, true).iter().all(|item| item.decision == ItemDecision::Report));
    }
}

#[test]
fn the_folder_of_an_ended_spare_vmm_is_removed_unless_it_is_in_use() {
    let (mut facts, uid, watched) = (facts(), uid(), uid());
    let ours = facts.instance.unwrap();
    let tail = user(6, "/usr/bin/tail", &["-f".to_owned(), format!("{}/console.log", dir(watched))]);
    facts.survey =
        Survey { folders: vec![marked(uid, false, ours), marked(watched, false, ours)], users: vec![tail] };
    let expected = [
        (ItemKind::Process, ItemDecision::Keep),
        (ItemKind::Socket, ItemDecision::Remove),
        (ItemKind::Folder, ItemDecision::Remove),
        (ItemKind::Socket, ItemDecision::Report),
        (ItemKind::Folder, ItemDecision::Report),
    ];
    assert_eq!(decisions(&decide(&facts, false)), expected);
}

#[test]
fn a_record_overrides_a_mark() {
    let (mut facts, uid) = (facts(), uid());
    let ours = facts.instance.unwrap();
    known(&mut facts, uid, None);
    facts.survey = Survey { folders: vec![marked(uid, true, ours)], users: vec![vmm(5, uid)] };
    let process = |facts: &ReconcileFacts| decide(facts, true).remove(0);
    let folder = |facts: &ReconcileFacts| decide(facts, true).remove(2).decision;
    assert_eq!((process(&facts).decision, folder(&facts)), (ItemDecision::Remove, ItemDecision::Keep));
    // The spare VMM was given to a VM that has not been booted yet.
    facts.daemon = true;
    assert_eq!((process(&facts).decision, folder(&facts)), (ItemDecision::Keep, ItemDecision::Keep));
    assert!(process(&facts).reason.contains("waits for the boot of VM vm"));
    // A second VMM of a VM that already runs a spare one is not excused by the mark.
    known(&mut facts, uid, Some(identity(4)));
    assert_eq!(process(&facts).decision, ItemDecision::Report);
}
