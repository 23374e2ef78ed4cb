//! A VM whose files lie where nothing answers is imported all the same, and nobody else gets its disk.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::by_hand::{ByHandProgram, ByHandVmm};
use vmm_testkit::guests::TinyGuest;

use crate::bench::{Bench, able};
use crate::harness::{eventually, vmm_pid};
use crate::hung_mount::HungMount;

/// The claims of the one VM on record.
fn claims(bench: &Bench) -> Value {
    let database = bench.world.dir.path().join("state").join(vmm_store::DATABASE_FILE);
    let database = rusqlite::Connection::open(database).unwrap();
    let sql = "SELECT json_extract(record, '$.run.claims') FROM vms";
    let text: String = database.query_row(sql, [], |row| row.get(0)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A VMM that runs a guest with the disk at `disk`.
fn with_disk(bench: &Bench, disk: &Path) -> ByHandVmm {
    let mut guest = bench.guest(TinyGuest::Idle);
    let drive = format!("file={},format=raw,if=virtio", disk.display());
    guest.more = vec!["-drive".to_owned(), drive];
    ByHandVmm::runs(bench.kind, &bench.socket, &guest)
}

#[test]
fn a_vm_on_a_hanging_mount_is_imported_and_its_disk_claimed() {
    let test = "a_vm_on_a_mount_that_hangs_is_imported";
    for kind in able(test, &[ByHandProgram::Qemu]) {
        let mut bench = Bench::new(kind);
        let hung = bench.world.dir.path().join("hung");
        std::fs::create_dir(&hung).unwrap();
        let disk = hung.join("disk");
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let _vmm = with_disk(&bench, &disk);
        let Some(mount) = HungMount::on(&mut bench.world, &hung, test) else { return };
        bench.world.start();
        let vm = bench.the_vm();
        let by_path = json!([{"path": {"path": disk, "writable": true}}]);
        for _ in 0..2 {
            assert_eq!(bench.world.info(&vm)["state"], "VM_STATE_RUNNING");
            assert_eq!(claims(&bench), by_path);
            bench.op("PauseVm", &vm).ok();
            bench.op("ResumeVm", &vm).ok();
            // The claim is on record, and the next daemon holds it too.
            bench.world.stop(Signal::TERM);
            bench.world.start();
        }
        mount.take_off(&hung);
        eventually("the disk is claimed as what it is", || claims(&bench)[0]["disk"].is_object());
        let claimed = claims(&bench);
        assert_eq!(
            (&claimed[0]["disk"]["path"], &claimed[0]["disk"]["writable"], claimed.as_array().unwrap().len()),
            (&json!(disk), &json!(true), 1)
        );
        assert_eq!(bench.world.info(&vm)["status"]["reason"], "files-answer");
    }
}

#[test]
fn a_vm_with_its_kernel_on_a_hanging_mount_is_imported() {
    let test = "a_vm_whose_kernel_does_not_answer_is_imported";
    for kind in able(test, &ByHandProgram::ALL) {
        let mut bench = Bench::new(kind);
        let hung = bench.world.dir.path().join("hung");
        std::fs::create_dir(&hung).unwrap();
        let mut guest = bench.guest(TinyGuest::Idle);
        let kernel = hung.join("kernel");
        std::fs::rename(&guest.kernel, &kernel).unwrap();
        guest.kernel = kernel;
        let vmm = ByHandVmm::runs(kind, &bench.socket, &guest);
        let Some(_mount) = HungMount::on(&mut bench.world, &hung, test) else { return };
        bench.world.start();
        let vm = bench.the_vm();
        let info = bench.world.info(&vm);
        assert_eq!((&info["state"], vmm_pid(&info)), (&json!("VM_STATE_RUNNING"), vmm.pid()), "{info:#}");
        bench.op("PauseVm", &vm).ok();
        bench.op("ResumeVm", &vm).ok();
    }
}
