use std::collections::BTreeMap;
use std::path::Path;

use uuid::Uuid;
use vmm_core::id::InstanceId;
use vmm_core::state::Request;
use vmm_core::store::{Intent, RunRecord};
use vmm_host::ledger::{RunSocket, Survey};
use vmm_host::process::Found;
use vmm_testkit::store_suite;

use super::*;

const VMS: &str = "/run/x/vms";

fn uid() -> VmUid {
    VmUid::new(Uuid::now_v7())
}

fn identity(pid: u32) -> ProcessIdentity {
    ProcessIdentity { pid, start_ticks: 7, boot_id: "now".to_owned() }
}

/// A process with these arguments, of this program.
fn user(pid: u32, exe: &str, args: &[String]) -> User {
    let found = Found {
        identity: identity(pid),
        exe: Some(PathBuf::from(exe)),
        args: args.iter().map(Into::into).collect(),
    };
    User { paths: found.paths_below(Path::new(VMS)), found }
}

fn dir(uid: VmUid) -> String {
    uid.run_dir(Path::new("/run/x")).display().to_string()
}

fn vmm(pid: u32, uid: VmUid) -> User {
    user(pid, "/usr/bin/qemu", &[format!("path={}/qmp.sock,server=on", dir(uid))])
}

fn folder(uid: VmUid, held: bool) -> RunFolder {
    let path = PathBuf::from(dir(uid));
    let sockets = vec![RunSocket { path: path.join("qmp.sock"), held }];
    RunFolder { path, uid: Some(uid), own: true, sockets }
}

/// A host of which this state directory alone has used the runtime folder.
fn facts() -> Facts {
    let instance = InstanceId::new(Uuid::now_v7());
    Facts {
        instance: Some(instance),
        records: BTreeMap::new(),
        served: Served::One(instance),
        survey: Survey::default(),
        taps: Vec::new(),
        programs: BTreeSet::from(["qemu".to_owned()]),
        notes: Vec::new(),
    }
}

fn known(facts: &mut Facts, uid: VmUid, process: Option<ProcessIdentity>) {
    let mut record = VmRecord { uid, intent: None, ..store_suite::record("vm") };
    record.run = process.map(|process| RunRecord {
        process,
        socket: PathBuf::from(dir(uid)).join("qmp.sock"),
        version: String::new(),
        accelerator: String::new(),
        machine: String::new(),
        started_ms: 0,
        claims: Vec::new(),
    });
    facts.records.insert(uid, record);
}

fn decisions(items: &[Item]) -> Vec<(Kind, Decision)> {
    items.iter().map(|item| (item.kind, item.decision)).collect()
}

#[test]
fn what_has_an_owner_stays() {
    let (mut facts, uid) = (facts(), uid());
    known(&mut facts, uid, Some(identity(5)));
    facts.survey = Survey { folders: vec![folder(uid, true)], users: vec![vmm(5, uid)] };
    facts.taps = vec![tap(&facts, uid, true)];
    for kill in [false, true] {
        let items = decide(&facts, kill);
        assert!(items.iter().all(|item| item.decision == Decision::Keep), "{items:?}");
        assert!(items.iter().all(|item| item.vm_id.as_deref() == Some("vm")), "{items:?}");
        assert_eq!(items.len(), 4);
    }
}

fn tap(facts: &Facts, uid: VmUid, attached: bool) -> OwnedTap {
    OwnedTap { name: "vmt0".to_owned(), owner: TapOwner { instance: facts.instance.unwrap(), uid }, attached }
}

#[test]
fn what_is_dead_and_nobodys_goes() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey.folders = vec![folder(uid, false)];
    facts.taps = vec![tap(&facts, uid, false)];
    let expected =
        [(Kind::Tap, Decision::Remove), (Kind::Socket, Decision::Remove), (Kind::Folder, Decision::Remove)];
    assert_eq!(decisions(&decide(&facts, false)), expected);
}

#[test]
fn an_orphan_that_lives_is_reported_with_all_that_it_holds() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey = Survey { folders: vec![folder(uid, true)], users: vec![vmm(5, uid)] };
    facts.taps = vec![tap(&facts, uid, true)];
    let items = decide(&facts, false);
    assert_eq!(items.len(), 4);
    assert!(items.iter().all(|item| item.decision == Decision::Report), "{items:?}");
    let items = decide(&facts, true);
    assert!(items.iter().all(|item| item.decision == Decision::Remove), "{items:?}");
}

#[test]
fn nothing_is_ours_in_a_folder_that_another_has_used() {
    for served in [Served::Many, Served::Nobody, Served::One(InstanceId::new(Uuid::now_v7()))] {
        let (mut facts, uid, dead) = (facts(), uid(), uid());
        facts.survey =
            Survey { folders: vec![folder(uid, true), folder(dead, false)], users: vec![vmm(5, uid)] };
        facts.served = served;
        let items = decide(&facts, true);
        assert_eq!(items.len(), 5);
        assert!(items.iter().all(|item| item.decision == Decision::Report), "{items:?}");
    }
}

#[test]
fn without_a_database_nothing_is_removed() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey = Survey { folders: vec![folder(uid, false)], users: vec![vmm(5, uid)] };
    facts.instance = None;
    assert!(decide(&facts, true).iter().all(|item| item.decision == Decision::Report));
}

#[test]
fn strangers_that_mention_a_folder_are_left_alone_and_keep_it() {
    let (mut facts, uid) = (facts(), uid());
    let tail = user(6, "/usr/bin/tail", &["-f".to_owned(), format!("{}/console.log", dir(uid))]);
    facts.survey = Survey { folders: vec![folder(uid, false)], users: vec![tail] };
    let expected =
        [(Kind::Process, Decision::Keep), (Kind::Socket, Decision::Report), (Kind::Folder, Decision::Report)];
    assert_eq!(decisions(&decide(&facts, true)), expected);
}

#[test]
fn a_hypervisor_without_our_control_socket_is_not_proven_ours() {
    let (mut facts, uid) = (facts(), uid());
    let own_disk = vec![format!("file={}/disk.img", dir(uid))];
    facts.survey.users = vec![user(6, "/usr/bin/qemu", &own_disk), vmm(7, uid)];
    facts.survey.users[1].found.exe = None;
    facts.survey.users[1].found.args.insert(0, "qemu".into());
    facts.survey.folders = vec![folder(uid, false)];
    let items = decide(&facts, true);
    assert!(items.iter().all(|item| item.decision == Decision::Report), "{items:?}");
}

#[test]
fn a_second_vmm_of_a_known_vm_is_reported_unless_the_daemon_is_about_to_settle_it() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey.users = vec![vmm(5, uid)];
    for on_record in [None, Some(identity(4))] {
        known(&mut facts, uid, on_record);
        assert_eq!(decisions(&decide(&facts, true)), [(Kind::Process, Decision::Report)]);
    }
    let record = facts.records.get_mut(&uid).unwrap();
    record.intent =
        Some(Intent { request: Request::Boot, actor: String::new(), since_ms: 0, patience_ms: None });
    assert_eq!(decisions(&decide(&facts, true)), [(Kind::Process, Decision::Keep)]);
}

#[test]
fn a_socket_held_by_somebody_hidden_keeps_its_folder() {
    let (mut facts, uid) = (facts(), uid());
    facts.survey.folders = vec![folder(uid, true)];
    assert!(decide(&facts, true).iter().all(|item| item.decision == Decision::Report));
}

#[test]
fn what_this_program_does_not_make_is_reported() {
    let (mut facts, uid) = (facts(), uid());
    let strange =
        RunFolder { path: format!("{VMS}/lost+found").into(), uid: None, own: true, sockets: Vec::new() };
    let anothers = RunFolder { own: false, sockets: Vec::new(), ..folder(uid, false) };
    facts.survey.folders = vec![strange, anothers];
    assert!(decide(&facts, true).iter().all(|item| item.decision == Decision::Report));
}
