//! Stands in for QEMU where a VMM is needed and a guest is not: `UNKEY_VMCP_QEMU_BINARY=…/fake-qemu vmm-controlplane`.
//!
//! What its guests do is told by their kernel's arguments; see `vmm_testkit::fake::qemu`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm_testkit::fake::qemu::main(std::env::args_os())
}
