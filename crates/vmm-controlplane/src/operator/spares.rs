//! The line of `doctor` about spare VMMs: the number kept, the number waiting, and those left by a
//! daemon that was killed.

use std::collections::{BTreeMap, BTreeSet};

use vmm_core::id::{BackendName, InstanceId, VmUid};
use vmm_host::lock;
use vmm_host::survey::{self, RunFolder};

use super::check::DoctorCheck;
use crate::config::DaemonConfig;

/// The name of the line.
const NAME: &str = "spare VMMs";

/// Reads the marks of run folders, and changes nothing.
pub(super) fn check_spares(config: &DaemonConfig) -> DoctorCheck {
    // An error of the database has a line of its own.
    let Some(snapshot) = vmm_store::peek(&config.state_dir).ok().flatten() else {
        return spares_verdict(config.spare_vmms, false, &BTreeMap::new());
    };
    let survey = match survey::survey(&config.runtime_dir) {
        Ok(survey) => survey,
        Err(error) => {
            let finding = format!("the spare VMMs that wait cannot be counted: {error}");
            return DoctorCheck::warn(NAME, finding, "run doctor as the daemon's user");
        }
    };
    let unreadable = snapshot.unreadable.iter().map(|vm| vm.record.uid);
    let on_record = snapshot.vms.iter().map(|vm| vm.uid).chain(unreadable).collect();
    let daemon = lock::holder(&config.state_dir).is_ok_and(|holder| holder.is_some());
    spares_verdict(config.spare_vmms, daemon, &count_waiting(&survey.folders, snapshot.instance, &on_record))
}

/// Counts the spare VMMs of `instance` that no VM has been given, by backend.
fn count_waiting(
    folders: &[RunFolder],
    instance: InstanceId,
    on_record: &BTreeSet<VmUid>,
) -> BTreeMap<BackendName, usize> {
    let mut count = BTreeMap::new();
    for folder in folders {
        let Some(mark) = folder.mark.as_ref().filter(|mark| mark.instance == instance) else { continue };
        if folder.uid.is_some_and(|uid| !on_record.contains(&uid)) {
            *count.entry(mark.backend.clone()).or_default() += 1;
        }
    }
    count
}

fn spares_verdict(wanted: usize, daemon: bool, waiting: &BTreeMap<BackendName, usize>) -> DoctorCheck {
    let each: Vec<String> = waiting.iter().map(|(backend, count)| format!("{backend}: {count}")).collect();
    let each = each.join(", ");
    let kept = match wanted {
        0 => "none is kept (UNKEY_VMCP_SPARE_VMMS sets the number)".to_owned(),
        wanted => format!("{wanted} kept per backend that has started a VM"),
    };
    match (waiting.is_empty(), daemon) {
        (true, _) => DoctorCheck::ok(NAME, kept),
        (false, true) => DoctorCheck::ok(NAME, format!("{kept}; waiting for VMs now: {each}")),
        (false, false) => DoctorCheck::warn(
            NAME,
            format!("left by a daemon that was killed: {each}"),
            "the next start of the daemon ends them, and so does `vmm-controlplane reconcile` now; no guest runs in them",
        ),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use vmm_host::run_dir::SpareMark;

    use super::super::check::CheckVerdict;
    use super::*;

    #[test]
    fn only_unreserved_spare_vmms_of_this_instance_are_counted() {
        let (ours, anothers) = (InstanceId::new(Uuid::now_v7()), InstanceId::new(Uuid::now_v7()));
        let uids: Vec<VmUid> = (0..4).map(|_| VmUid::new(Uuid::now_v7())).collect();
        let folder = |uid: VmUid, mark: Option<InstanceId>| RunFolder {
            path: uid.run_dir("/run/x".as_ref()),
            uid: Some(uid),
            own: true,
            sockets: Vec::new(),
            owner: None,
            mark: mark.map(|instance| SpareMark { instance, backend: BackendName::new("firecracker") }),
        };
        let folders = [
            folder(uids[0], Some(ours)),
            folder(uids[1], Some(ours)),
            folder(uids[2], Some(anothers)),
            folder(uids[3], None),
        ];
        let count = count_waiting(&folders, ours, &BTreeSet::from([uids[1]]));
        assert_eq!(count, BTreeMap::from([(BackendName::new("firecracker"), 1)]));
    }

    #[test]
    fn a_spare_vmm_without_a_daemon_is_a_leftover() {
        let one = BTreeMap::from([(BackendName::new("qemu"), 1)]);
        let beside = spares_verdict(1, true, &one);
        assert!(beside.verdict == CheckVerdict::Ok && beside.finding.contains("qemu: 1"), "{beside:?}");
        let left = spares_verdict(0, false, &one);
        assert!(left.verdict == CheckVerdict::Warn && left.finding.contains("qemu: 1"), "{left:?}");
        assert!(left.remedy.unwrap().contains("reconcile"));
        assert!(spares_verdict(0, true, &BTreeMap::new()).finding.contains("UNKEY_VMCP_SPARE_VMMS"));
    }
}
