//! What must be true of the world, whatever was interrupted.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::case::Case;
use crate::harness::{Answer, World, eventually, try_call, vmm_pid};
use crate::hypervisor::Backend;
use crate::scenario::{CREATED, PAUSED, RUNNING, VmCondition};

/// Longer than anything that was interrupted takes to settle on a busy machine.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);
/// The phases of a VM with nothing under way.
const AT_REST: [&str; 5] = ["created", "running", "paused", "stopped", "failed"];

/// Waits until nothing is under way any more, and the VM is in one of the `allowed` conditions, as
/// the host shows it too.
#[track_caller]
pub(crate) fn settled(case: &Case, allowed: &[VmCondition]) -> VmCondition {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let doubt = match look_for(case, allowed) {
            Ok(condition) => return condition,
            Err(doubt) => doubt,
        };
        if Instant::now() > deadline {
            panic!(
                "{doubt}\n{:#}\n{:#}",
                case.world.call("GetVmInfo", &json!({"vm_id": case.vm})).body,
                log(case)
            );
        }
        pause();
    }
}

/// Where the VM is, if it has settled in one of the `allowed` conditions; or why that cannot be
/// said.
pub(crate) fn look_for(case: &Case, allowed: &[VmCondition]) -> Result<VmCondition, String> {
    let answer = try_call(case.world.url(), "GetVmInfo", &json!({"vm_id": case.vm}));
    match look(case, answer.map_err(|error| error.to_string())?) {
        (condition, None) if allowed.contains(&condition) => match doubt_elsewhere(case, condition) {
            None => Ok(condition),
            Some(doubt) => Err(doubt),
        },
        (condition, None) => Err(format!("{condition:?} is not among {allowed:?}")),
        (_, Some(doubt)) => Err(doubt),
    }
}

/// Where the API says that the VM is, and what on the host says otherwise.
fn look(case: &Case, answer: Answer) -> (VmCondition, Option<String>) {
    if answer.status != 200 {
        assert_eq!(answer.body["code"], "not_found", "{}", answer.body);
        let strays = case.acknowledged.iter().find(|(uid, _)| folder(&case.world, uid).exists());
        return (VmCondition::Nowhere, strays.map(|(uid, _)| format!("the folder of {uid} is left")));
    }
    let info = answer.body;
    let condition = match info["state"].as_str() {
        Some("VM_STATE_CREATED") => CREATED,
        Some("VM_STATE_RUNNING") => RUNNING,
        Some("VM_STATE_PAUSED") => PAUSED,
        Some("VM_STATE_SHUTDOWN") => crate::scenario::SHUT_DOWN,
        other => panic!("{other:?} is no state"),
    };
    (condition, doubt(case, &info, condition))
}

fn doubt(case: &Case, info: &Value, condition: VmCondition) -> Option<String> {
    let phase = info["status"]["phase"].as_str().unwrap_or_default();
    if !AT_REST.contains(&phase) {
        return Some(format!("it is still {phase}"));
    }
    let folder = folder(&case.world, info["uid"].as_str()?);
    if case.hypervisor.is_placed() {
        // What runs it names no folder of the daemon's.
        return None;
    }
    let users = users_of(&folder);
    if ![RUNNING, PAUSED].contains(&condition) {
        if case.scenario.with_spare && condition == CREATED && users.len() == 1 {
            // It waits for BootVm.
            return None;
        }
        return (!users.is_empty()).then(|| format!("{condition:?}, and processes {users:?} are its VMM"));
    }
    if users != [vmm_pid(info)] {
        return Some(format!("its VMM is {}, and processes {users:?} use its folder", vmm_pid(info)));
    }
    if case.hypervisor == Backend::Fake {
        let guest = fs::read_to_string(folder.join(vmm_testkit::fake::qemu::STATE)).unwrap_or_default();
        let expected = if condition == RUNNING { "running" } else { "paused" };
        return (guest != expected).then(|| format!("{condition:?}, and its guest is {guest}"));
    }
    None
}

/// What those say otherwise who run the VM for the daemon: the VMM that was started by hand, or
/// libvirt.
fn doubt_elsewhere(case: &Case, condition: VmCondition) -> Option<String> {
    let wanted = match condition {
        RUNNING => "running",
        PAUSED => "paused",
        VmCondition::In(_) | VmCondition::Nowhere => "",
    };
    if let Some(hand) = &case.hand {
        let (state, pid) = (hand.guest_state(), hand.pid());
        if wanted.is_empty() {
            let runs = ["running", "paused", "silent"].contains(&state.as_str());
            return runs
                .then(|| format!("{condition:?}, and the VMM {pid:?} says that its guest is {state}"));
        }
        let known = vmm_pid(&case.world.info(&case.vm));
        let right = state == wanted && pid == Some(known);
        return (!right).then(|| format!("{condition:?} in process {known}, and the VMM {pid:?} is {state}"));
    }
    let libvirtd = case.stage.libvirtd.as_ref()?;
    let qemus = case.stage.qemus(vmm_pid(&case.witness));
    if wanted.is_empty() {
        return (!qemus.is_empty()).then(|| format!("{condition:?}, and libvirt runs {qemus:?}"));
    }
    let known = vmm_pid(&case.world.info(&case.vm));
    let state = libvirtd.try_virsh(&["domstate", &case.vm]);
    let right = state.as_deref() == Ok(wanted) && qemus == [known];
    (!right).then(|| format!("{condition:?} in process {known}, and libvirt says {state:?} of {qemus:?}"))
}

/// The console goes on with the next daemon: all that the guest has printed is streamed, and a VMM
/// whose guest runs or is paused takes input.
#[track_caller]
pub(crate) fn console(case: &Case, condition: VmCondition) {
    if case.hypervisor.is_placed() || condition == VmCondition::Nowhere {
        return;
    }
    let info = case.world.info(&case.vm);
    // A configuration without the part has a kept console.
    let console = &info["config"]["console"];
    if case.scenario.removes_its_console() && console.is_object() && console["enabled"] != true {
        let error = streamed(case).unwrap_err();
        assert_eq!(error["code"], "failed_precondition", "{error}");
        return;
    }
    let path = folder(&case.world, info["uid"].as_str().unwrap()).join("console.log");
    let printed = fs::read(path).unwrap_or_default();
    let streamed = streamed(case).unwrap();
    assert!(streamed.starts_with(&printed), "{:?}", String::from_utf8_lossy(&streamed));
    if case.hypervisor != Backend::Fake && [RUNNING, PAUSED].contains(&condition) {
        case.world.type_at_console(&case.vm, b"typed");
    }
}

/// All that StreamConsole sends without following, or its error.
fn streamed(case: &Case) -> Result<Vec<u8>, Value> {
    let body = json!({"vm_id": case.vm}).to_string().into_bytes();
    let mut framed = vec![0];
    framed.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
    framed.extend(body);
    let url = format!("{}/vmm.v1.VmService/StreamConsole", case.world.url());
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(SETTLE_TIMEOUT)).build().into();
    let sent = agent.post(&url).header("content-type", "application/connect+json").send(&framed[..]);
    let answer = sent.unwrap().into_body().read_to_vec().unwrap();
    let (mut rest, mut all) = (&answer[..], Vec::new());
    while let [flags, a, b, c, d, more @ ..] = rest {
        let (message, next) = more.split_at(u32::from_be_bytes([*a, *b, *c, *d]) as usize);
        let message: Value = serde_json::from_slice(message).unwrap();
        if flags & 2 != 0 {
            return message.get("error").map_or(Ok(all), |error| Err(error.clone()));
        }
        all.extend(STANDARD.decode(message["data"].as_str().unwrap_or_default()).unwrap());
        rest = next;
    }
    panic!("the stream has no end: {}", String::from_utf8_lossy(&answer));
}

/// A guest that resets itself would end its run, as its policy has it: what a reset of ours needed
/// is taken back.
#[track_caller]
pub(crate) fn resets_end_it(case: &Case) {
    let Some(libvirtd) = &case.stage.libvirtd else { return };
    eventually("a reset ends the domain", || {
        libvirtd.virsh(&["dumpxml", &case.vm]).contains("<on_reboot>destroy</on_reboot>")
    });
}

/// Nothing of the VM under test is left on the host, and what was there before is there still.
#[track_caller]
pub(crate) fn nothing_left(case: &Case) {
    case.world.assert_nothing_left();
    if !case.hypervisor.is_placed() {
        return;
    }
    case.witness_goes_on();
    let listed = case.world.call("ListVms", &json!({})).ok();
    let names: Vec<_> = listed["vms"].as_array().unwrap().iter().map(|vm| &vm["vm_id"]).collect();
    assert_eq!(names, [&json!(case.witness_vm)], "{listed:#}");
    if let Some(libvirtd) = &case.stage.libvirtd {
        assert_eq!(libvirtd.domains(), [case.witness_vm.as_str()]);
        assert_eq!(case.stage.qemus(vmm_pid(&case.witness)), Vec::<u32>::new());
    }
}

/// Nothing that was acknowledged is lost, and no operation has a beginning without an end.
#[track_caller]
pub(crate) fn acknowledged(case: &Case) {
    let log = log(case);
    for (uid, method) in &case.acknowledged {
        let found = log.as_array().unwrap().iter().any(|event| {
            let done = ["created", "state-changed", "updated"].iter().any(|kind| event["type"] == *kind);
            event["uid"] == **uid && event["cause"] == *method && done
        });
        assert!(found, "{method} was acknowledged and is not in the log: {log:#}");
    }
    let listed = case.world.call("ListVms", &json!({})).ok();
    let names: Vec<_> = listed["vms"].as_array().unwrap().iter().map(|vm| &vm["vm_id"]).collect();
    assert!(names.contains(&&json!(case.witness_vm)), "{listed:#}");
    events(case);
}

/// The log of each creation: it begins with the creation, every operation that began has ended, and
/// the last word is the truth.
#[track_caller]
pub(crate) fn events(case: &Case) {
    let log = log(case);
    let all = log.as_array().unwrap();
    let mut uids: Vec<_> = all.iter().map(|event| event["uid"].as_str().unwrap()).collect();
    uids.dedup();
    for uid in uids {
        let own: Vec<_> = all.iter().filter(|event| event["uid"] == uid).collect();
        assert_eq!(own[0]["type"], "created", "{log:#}");
        for pair in own.windows(2) {
            // A deletion that was cut short is begun again by the next daemon.
            let goes_on = pair.iter().all(|event| event["cause"].as_str().unwrap().starts_with("DeleteVm"));
            let both_begin = pair.iter().all(|event| event["type"] == "operation-started");
            assert!(!both_begin || goes_on, "an operation has no end: {log:#}");
        }
        let last = own.last().unwrap();
        assert_ne!(last["type"], "operation-started", "an operation has no end: {log:#}");
        let info = case.world.call("GetVmInfo", &json!({"vm_id": case.vm}));
        if info.status == 200 && info.body["uid"] == uid {
            assert_eq!(last["state"], info.body["state"], "{log:#}\n{:#}", info.body);
        } else {
            assert_eq!(last["type"], "deleted", "{log:#}");
        }
    }
}

fn log(case: &Case) -> Value {
    let listed = case.world.call("ListVmEvents", &json!({"vm_id": case.vm, "page_size": 1000})).ok();
    listed.get("events").cloned().unwrap_or_else(|| json!([]))
}

/// The program's own ledger finds nothing on the host without an owner. It knows no hypervisors, so
/// the fake stands for all.
#[track_caller]
pub(crate) fn ledger(case: &Case) {
    if case.hypervisor != Backend::Fake {
        return;
    }
    let done = case.world.command().args(["reconcile", "--dry-run", "--json"]).output().unwrap();
    let ledger: Value = serde_json::from_slice(&done.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&done.stderr)));
    for item in ledger["items"].as_array().unwrap() {
        assert!(item["decision"] == "keep" && item["vm_id"].is_string(), "without an owner: {item:#}");
    }
}

/// The VM's disk serves it while it runs, and is free otherwise.
#[track_caller]
pub(crate) fn claims(case: &mut Case, condition: VmCondition) {
    const RIVAL: &str = "rival";
    if case.hypervisor != Backend::Fake {
        return;
    }
    let disk = case.world.dir.path().join(format!("{}.img", case.vm));
    let mut config = case.hypervisor.config(&case.world, RIVAL, TinyGuest::Idle, "");
    config["storage"][0]["path"] = json!(disk);
    let _ = fs::File::options().append(true).create(true).open(disk);
    case.create_as(RIVAL, &config);
    let booted = case.world.call("BootVm", &json!({"vm_id": RIVAL}));
    if [RUNNING, PAUSED].contains(&condition) {
        let message = booted.error("failed_precondition");
        assert!(message.contains(&format!("\"{}\"", case.vm)), "{message}");
    } else {
        booted.ok();
    }
    case.delete(RIVAL);
}

/// The run folder of a creation.
fn folder(world: &World, uid: &str) -> PathBuf {
    world.dir.path().join("run/vms").join(uid.replace('-', ""))
}

/// The processes that name a run folder.
fn users_of(folder: &std::path::Path) -> Vec<u32> {
    let found = vmm_host::process::find_by_argument(folder).unwrap();
    found.into_iter().map(|user| user.identity.pid).collect()
}

#[expect(clippy::disallowed_methods, reason = "a test's own thread waits for other processes")]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
