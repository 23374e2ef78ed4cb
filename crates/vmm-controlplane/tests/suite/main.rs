//! The backend suite on every column: each case against the real hypervisor, or against the scripted fake.
//!
//! Where a program is missing its column says `SKIPPED` and why. What is found goes to `target/backend-suite`, and is held
//! against `docs/backend-support.md`; `scripts/backend-matrix.sh` makes that document anew.

#![allow(clippy::unwrap_used, reason = "the helpers of a test give up as loudly as the test itself")]

mod attached;
mod columns;

mod fake {
    vmm_testkit::backend_suite!(crate::columns::fake);
}

mod qemu_q35 {
    vmm_testkit::backend_suite!(crate::columns::qemu_q35);
}

mod qemu_microvm {
    vmm_testkit::backend_suite!(crate::columns::qemu_microvm);
}

mod cloudhypervisor {
    vmm_testkit::backend_suite!(crate::columns::cloud_hypervisor);
}

mod firecracker {
    vmm_testkit::backend_suite!(crate::columns::firecracker);
}

mod attached_cloudhypervisor {
    vmm_testkit::backend_suite!(crate::attached::cloud_hypervisor);
}

mod attached_firecracker {
    vmm_testkit::backend_suite!(crate::attached::firecracker);
}

mod attached_qemu {
    vmm_testkit::backend_suite!(crate::attached::qemu);
}

mod libvirt_qemu {
    vmm_testkit::backend_suite!(crate::columns::libvirt_qemu);
}
