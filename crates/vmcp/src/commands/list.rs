//! `vmcp list`.

use std::time::SystemTime;

use vmm_proto::v1 as pb;

use super::{Session, live};
use crate::cli::List;
use crate::connect::names;
use crate::failure::Failure;
use crate::output::{Table, units, words};

/// The headings of [`cells`].
pub(super) const HEADING: [&str; 7] = ["NAME", "STATE", "BACKEND", "VCPUS", "MEMORY", "AGE", "STATUS"];

pub(super) async fn run(session: &mut Session, arguments: &List) -> Result<(), Failure> {
    if arguments.watch {
        return live::run(session, arguments).await;
    }
    let filter = pb::ListVmsRequest {
        state_filter: arguments.state.iter().map(|state| (*state).into()).collect(),
        metadata_filter: arguments
            .metadata
            .iter()
            .map(|pair| (pair.key.clone(), pair.value.clone()))
            .collect(),
        backend: arguments.backend.clone().unwrap_or_default(),
        ..Default::default()
    };
    let answer = names::all(&session.client, filter).await?;
    let names: Vec<_> = answer.vms.iter().map(|vm| vm.vm_id.as_str()).collect();
    session.output.answer(&answer, &names, |width| table(&answer.vms, width, SystemTime::now()))
}

/// Returns the table of VMs.
pub(super) fn table<'a>(
    vms: impl IntoIterator<Item = &'a pb::VmInfo>,
    width: Option<u16>,
    now: SystemTime,
) -> String {
    let mut table = Table::new(width, HEADING);
    vms.into_iter().for_each(|vm| table.row(cells(vm, now)));
    table.render()
}

/// Returns the cells of a VM.
pub(super) fn cells(vm: &pb::VmInfo, now: SystemTime) -> [String; 7] {
    [
        vm.vm_id.clone(),
        words::state(&vm.state),
        vm.backend.clone(),
        vm.vcpu_count.to_string(),
        units::size(vm.memory_size_bytes),
        units::age(vm.created_timestamp, now),
        words::status(&vm.state, &vm.status),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_row_has_name_state_reason_size_age_and_backend() {
        let vm = pb::VmInfo {
            vm_id: "web-1".into(),
            state: pb::VmState::Shutdown.into(),
            vcpu_count: 2,
            memory_size_bytes: 2 << 30,
            created_timestamp: 1000,
            backend: "qemu".into(),
            status: pb::VmStatus {
                phase: "failed".into(),
                reason: "boot-failed".into(),
                ..Default::default()
            }
            .into(),
            ..Default::default()
        };
        let now = UNIX_EPOCH + Duration::from_secs(1300);
        assert_eq!(
            table(&[vm], None, now),
            "NAME   STATE     BACKEND  VCPUS  MEMORY  AGE  STATUS\n\
             web-1  shutdown  qemu     2      2 GiB   5m   failed: boot-failed"
        );
    }
}
