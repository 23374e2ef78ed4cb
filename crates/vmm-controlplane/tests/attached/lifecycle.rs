//! A VM through its life in a VMM that waited.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use vmm_testkit::by_hand::{ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, WAITING, able, endpoint};
use crate::harness::eventually;

#[test]
fn cloud_hypervisor_boots_any_number_of_times() {
    for kind in able("cloud_hypervisor_boots_any_number_of_times", &[ByHandProgram::CloudHypervisor]) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.waits();
        bench.world.start();
        bench.world.create("vm", &bench.world.tiny(TinyGuest::Idle));
        for boot in 1..=2 {
            bench.world.boot("vm");
            bench.world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2 * boot - 1);
            assert_eq!(bench.op("PauseVm", "vm").ok()["state"], "VM_STATE_PAUSED");
            assert_eq!(bench.op("ResumeVm", "vm").ok()["state"], "VM_STATE_RUNNING");
            assert_eq!(bench.op("RebootVm", "vm").ok()["state"], "VM_STATE_RUNNING");
            bench.world.wait_for_console("vm", &TinyGuest::Idle.banner(), 2 * boot);
            let down = bench.shutdown("vm", 1).ok();
            assert_eq!((&down["state"], &down["ended_by"]), (&json!("VM_STATE_SHUTDOWN"), &json!("vmm")));
            assert_eq!(vmm.runs_a_guest(), Some(false), "the VM has really gone");
        }
        bench.op("DeleteVm", "vm").ok();
        assert!(vmm.is_alive(), "its VMM waits on");
        let (status, _) = vmm.request("GET", "/api/v1/vm.info", &json!(null));
        assert_eq!(status, 404, "and has forgotten the VM, so it is not found again");
        // Guests that power off take it along; then another is needed.
        bench.world.create("off", &bench.world.tiny(TinyGuest::PowerOff));
        bench.world.boot("off");
        bench.world.wait_for_state("off", "VM_STATE_SHUTDOWN");
        let refused = bench.op("BootVm", "off").error("unavailable");
        assert!(
            refused.contains(&endpoint(&bench.socket)) && refused.contains("start one there"),
            "{refused}"
        );
        vmm.end();
        let _another = bench.waits();
        eventually("another VMM is taken", || bench.op("BootVm", "off").status == 200);
        bench.world.wait_for_console("off", &TinyGuest::PowerOff.banner(), 2);
    }
}

#[test]
fn firecracker_needs_another_vmm_for_another_boot() {
    for kind in able("firecracker_needs_another_vmm_for_another_boot", &[ByHandProgram::Firecracker]) {
        let mut bench = Bench::new(kind);
        let mut vmm = bench.waits();
        bench.world.start();
        let mut config = bench.world.tiny(TinyGuest::Obey);
        config["boot"]["kernel_args"] = json!("reboot=k");
        bench.world.create("vm", &config);
        for boot in 1..=2 {
            bench.world.boot("vm");
            bench.world.wait_for_console("vm", &TinyGuest::Obey.banner(), boot);
            bench.op("PauseVm", "vm").ok();
            bench.op("ResumeVm", "vm").ok();
            let refused = bench.op("RebootVm", "vm").error("unavailable");
            assert!(refused.contains(&endpoint(&bench.socket)), "{refused}");
            assert_eq!(bench.world.info("vm")["state"], "VM_STATE_RUNNING", "it goes on as it was");
            let down = bench.shutdown("vm", 30).ok();
            assert_eq!(
                (&down["state"], &down["ended_by"]),
                (&json!("VM_STATE_SHUTDOWN"), &json!("ctrl-alt-del"))
            );
            eventually("its process ended by itself", || !crate::harness::is_alive(vmm.pid()));
            let refused = bench.op("BootVm", "vm").error("unavailable");
            assert!(refused.contains("start one there (rm -f "), "{refused}");
            vmm.end();
            vmm = bench.waits();
        }
        bench.op("DeleteVm", "vm").ok();
        assert!(vmm.is_alive());
    }
}

/// What a message says to type, typed: a shell with its VMM, in a process group of their own.
struct Typed(Child);

impl Typed {
    fn as_printed(message: &str) -> Self {
        let from = message.split_once("start one there (").unwrap().1;
        let command = &from[..from.rfind(')').unwrap()];
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(shell.process_group(0).spawn().unwrap())
    }
}

impl Drop for Typed {
    fn drop(&mut self) {
        // The shell leads the group, and its number is not used again before the wait below.
        if let Some(group) = Pid::from_raw(self.0.id().cast_signed()) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

#[test]
fn the_printed_command_starts_a_vmm() {
    for kind in able("the_printed_command_starts_a_vmm", &WAITING) {
        let mut bench = Bench::new(kind);
        let folder = bench.world.dir.path().join("it's a $(folder)");
        std::fs::create_dir(&folder).unwrap();
        bench.socket = folder.join("vmm.sock");
        bench.world.set_env(kind.variable(), Some(&endpoint(&bench.socket)));
        bench.world.start();
        bench.world.create("vm", &bench.world.tiny(TinyGuest::Idle));
        // First there is nothing; then what a VMM left that was killed with its VM.
        for boot in 1..=3 {
            let refused = bench.op("BootVm", "vm").error("unavailable");
            let typed = Typed::as_printed(&refused);
            eventually("its VMM is taken", || bench.op("BootVm", "vm").status == 200);
            bench.world.wait_for_console("vm", &TinyGuest::Idle.banner(), boot);
            drop(typed);
            bench.world.wait_for_state("vm", "VM_STATE_SHUTDOWN");
            assert!(bench.socket.exists(), "it could not take its socket away");
        }
        bench.op("DeleteVm", "vm").ok();
    }
}

#[test]
fn a_failed_launch_leaves_nothing() {
    for kind in
        able("a_failed_launch_leaves_nothing", &[ByHandProgram::CloudHypervisor, ByHandProgram::Firecracker])
    {
        let mut bench = Bench::new(kind);
        let vmm = bench.waits();
        bench.world.start();
        let mut config = bench.world.tiny(TinyGuest::Idle);
        let disk = bench.world.dir.path().join("disk.raw");
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        config["storage"] = json!([{"path": disk}]);
        bench.world.create("vm", &config);
        std::fs::rename(&disk, disk.with_extension("away")).unwrap();
        bench.op("BootVm", "vm").error("failed_precondition");
        // A kernel that the daemon takes for one and the VMM does not.
        let broken = bench.world.dir.path().join("broken.elf");
        std::fs::write(&broken, &TinyGuest::Idle.elf()[..64]).unwrap();
        bench.op("DeleteVm", "vm").ok();
        let mut config = bench.world.tiny(TinyGuest::Idle);
        config["boot"]["kernel_path"] = json!(broken);
        if bench.world.call("CreateVm", &json!({"vm_id": "broken", "config": config})).status == 200 {
            bench.op("BootVm", "broken").error("failed_precondition");
            assert_eq!(bench.world.info("broken")["state"], "VM_STATE_CREATED");
            bench.op("DeleteVm", "broken").ok();
        }
        assert_eq!(vmm.runs_a_guest(), Some(false));
        if kind == ByHandProgram::CloudHypervisor {
            assert_eq!(
                vmm.request("GET", "/api/v1/vm.info", &json!(null)).0,
                404,
                "what was begun was undone"
            );
        }
        drop(vmm);
        let _fresh = ByHandVmm::waits(kind, &bench.socket);
        bench.world.create("good", &bench.world.tiny(TinyGuest::Idle));
        eventually("the fresh VMM is taken", || bench.op("BootVm", "good").status == 200);
        bench.world.wait_for_console("good", &TinyGuest::Idle.banner(), 1);
    }
}

#[test]
fn policies_that_need_another_vmm_are_refused() {
    for (kind, modes) in [
        (ByHandProgram::CloudHypervisor, ["NEVER", "ON_FAILURE", "ALWAYS"]),
        (ByHandProgram::Firecracker, ["GUEST_REBOOT", "ON_FAILURE", "ALWAYS"]),
    ] {
        let mut bench = Bench::new(kind);
        bench.world.start();
        for mode in modes {
            let mut config = bench.world.tiny(TinyGuest::Idle);
            config["restart_policy"] = json!({"mode": format!("RESTART_MODE_{mode}")});
            let refused = bench.world.call("CreateVm", &json!({"config": config})).error("invalid_argument");
            assert!(refused.contains("config.restart_policy.mode"), "{mode}: {refused}");
        }
        // It reserves a place, VMM or not, and starts nothing.
        bench.world.create("vm", &bench.world.tiny(TinyGuest::Idle));
    }
}
