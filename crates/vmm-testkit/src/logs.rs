//! The room that the log of a VMM takes.

#![allow(clippy::unwrap_used, reason = "a helper of tests")]

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use vmm_core::backend::Vmm;

/// The largest number of bytes that a trimmed log takes: 1 MiB, and the two blocks that the
/// trimming leaves at its ends.
const MOST: u64 = (1 << 20) + 8192;

/// Appends 4 MiB to the `log` of a VMM that is stopped by SIGSTOP, and asserts that `vmm` gives all
/// but the end of the log back to the host without an answer of the VMM.
pub async fn a_silent_vmm_is_trimmed(vmm: &dyn Vmm, log: &Path) {
    let noise = "x".repeat(4 << 20);
    OpenOptions::new().append(true).open(log).unwrap().write_all(noise.as_bytes()).unwrap();
    let pid = Pid::from_raw(vmm.run().process.pid.cast_signed()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    vmm.trim_logs().await;
    kill_process(pid, Signal::CONT).unwrap();
    let takes = std::fs::metadata(log).unwrap().blocks() * 512;
    assert!(takes <= MOST, "{} takes {takes} bytes", log.display());
}
