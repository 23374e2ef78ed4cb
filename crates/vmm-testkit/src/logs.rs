//! The room that the log of a VMM takes.

#![allow(clippy::unwrap_used, reason = "a helper of tests")]

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use vmm_core::backend::Vmm;

/// The largest number of bytes that a log takes after a sample: 1 MiB, and the two blocks that the
/// trimming leaves at its ends.
const MOST: u64 = (1 << 20) + 8192;

/// Appends 4 MiB to the `log` of a VMM, and asserts that a sample of `vmm` gives all but the end of
/// the log back to the host.
pub async fn a_sample_trims(vmm: &dyn Vmm, log: &Path) {
    let noise = "x".repeat(4 << 20);
    OpenOptions::new().append(true).open(log).unwrap().write_all(noise.as_bytes()).unwrap();
    vmm.sample().await;
    let takes = std::fs::metadata(log).unwrap().blocks() * 512;
    assert!(takes <= MOST, "{} takes {takes} bytes", log.display());
}
