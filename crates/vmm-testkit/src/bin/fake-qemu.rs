//! Replaces QEMU where a test needs a VMM and no guest: `UNKEY_VMCP_QEMU_BINARY=…/fake-qemu
//! vmm-controlplane`.
//!
//! The arguments of a VM's kernel control its guest; see `vmm_testkit::fake::qemu`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm_testkit::fake::qemu::main(std::env::args_os())
}
