//! `doctor` about VMMs that somebody else started: beside a daemon that is attached to them, and without one.

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::by_hand::ByHandProgram;
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, able, endpoint};

/// The exit code of doctor, and its lines about the backend.
fn doctor(bench: &Bench) -> (i32, Vec<Value>) {
    let output = bench.world.command().args(["doctor", "--json"]).output().unwrap();
    let diagnosis: Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = format!("backend {}", bench.kind.backend());
    let mut checks = diagnosis["checks"].as_array().unwrap().clone();
    checks.retain(|check| check["name"] == name.as_str());
    assert!(!checks.is_empty(), "{diagnosis:#}");
    (output.status.code().unwrap(), checks)
}

/// The only line about the backend.
#[track_caller]
fn finding(bench: &Bench, code: i32) -> String {
    let (exit, checks) = doctor(bench);
    assert_eq!((exit, checks.len()), (code, 1), "{checks:#?}");
    assert_eq!(checks[0]["verdict"], if code == 0 { "ok" } else { "fail" }, "{checks:#?}");
    let remedy = checks[0]["remedy"].as_str().unwrap_or_default();
    assert!(!remedy.contains("install"), "the VMM is not this program's to start: {remedy}");
    checks[0]["finding"].as_str().unwrap().to_owned()
}

#[test]
fn doctor_does_not_disturb_an_attached_daemon() {
    for kind in able("doctor_does_not_disturb_an_attached_daemon", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.runs(TinyGuest::Idle);
        let alone = finding(&bench, 0);
        assert!(alone.contains(&endpoint(&bench.socket)), "{alone}");
        bench.world.start();
        let vm = bench.the_vm();
        let events =
            |bench: &Bench| bench.world.call("ListVmEvents", &json!({"vm_id": vm})).ok()["events"].clone();
        let before = events(&bench);
        for _ in 0..3 {
            let beside = finding(&bench, 0);
            assert!(beside.contains(&endpoint(&bench.socket)), "{beside}");
            assert_eq!(beside.contains("so it was not asked"), kind == ByHandProgram::Qemu, "{beside}");
        }
        bench.op("PauseVm", &vm).ok();
        bench.op("ResumeVm", &vm).ok();
        let after = events(&bench);
        let of_doctors_time = after.as_array().unwrap().len() - before.as_array().unwrap().len();
        assert_eq!(of_doctors_time, 4, "two operations, and nothing else: {after:#}");
        // One that is known to say nothing is told as that, and not taken for the daemon's own doing.
        vmm.signal(Signal::STOP);
        bench.world.wait_for(&vm, "unreachable", |info| info["status"]["phase"] == "unreachable");
        let silent = finding(&bench, 1);
        assert!(silent.contains(&endpoint(&bench.socket)), "{silent}");
        assert!(!silent.contains("another program"), "{silent}");
        vmm.signal(Signal::CONT);
        assert!(vmm.is_alive());
    }
}

#[test]
fn doctor_names_the_unusable_part_of_an_endpoint() {
    for kind in able("doctor_names_the_unusable_part_of_an_endpoint", &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let nobody = finding(&bench, 1);
        assert!(nobody.contains("start one there"), "{nobody}");
        // One of two serves, and that is enough; the other is told of.
        let other = bench.world.dir.path().join("other.sock");
        let both = format!("{},{}", endpoint(&bench.socket), endpoint(&other));
        bench.world.set_env(kind.variable(), Some(&both));
        let _vmm = bench.runs(TinyGuest::Idle);
        for beside_a_daemon in [false, true] {
            if beside_a_daemon {
                bench.world.start();
                bench.the_vm();
            }
            let (code, checks) = doctor(&bench);
            let verdicts: Vec<_> = checks.iter().map(|check| check["verdict"].as_str().unwrap()).collect();
            assert_eq!((code, &verdicts[..]), (0, &["ok", "warn"][..]), "{checks:#?}");
            assert!(checks[1]["finding"].as_str().unwrap().contains("other.sock"), "{checks:#?}");
        }
    }
}

#[test]
fn doctor_names_the_possible_holder_of_a_qmp_socket() {
    for kind in able("doctor_names_the_possible_holder_of_a_qmp_socket", &[ByHandProgram::Qemu]) {
        let bench = Bench::new(kind);
        let _vmm = bench.runs(TinyGuest::Idle);
        let mut greeting = String::new();
        let client = UnixStream::connect(&bench.socket).unwrap();
        BufReader::new(&client).read_line(&mut greeting).unwrap();
        let taken = finding(&bench, 1);
        assert!(taken.contains("one client at a time"), "{taken}");
    }
}
