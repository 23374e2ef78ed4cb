//! The command line of a QEMU that makes an empty machine and ends.

use std::ffi::OsString;

use uuid::Uuid;
use vmm_core::id::VmUid;

use super::option::QemuOption;
use super::{Accelerator, QemuMachine, command_line, identity, model, panic_device, processor, serial};

/// The input of a QEMU with the words of [`trial`]. QEMU reads the input after it has made its
/// machine.
pub(in super::super) const MADE: &[u8] = b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n";

/// Returns the command line of a QEMU that makes a `machine` without kernel, disks and network, as
/// [`super::arguments`] makes it for a VM, and is controlled by its standard input and output. The
/// guest never runs.
pub(in super::super) fn trial(machine: QemuMachine, accelerator: Accelerator) -> Vec<OsString> {
    let mut options = Vec::new();
    identity(&mut options, VmUid::new(Uuid::nil()));
    model(&mut options, machine, None);
    processor(&mut options, accelerator, None);
    if machine == QemuMachine::Q35 {
        options.push(panic_device());
    }
    serial(&mut options, false);
    options.push(QemuOption::ahead("-m", "64M"));
    options.push(QemuOption::ahead("-qmp", "stdio"));
    command_line(options.iter())
}
