//! The Connect conformance suite, against the daemon's own HTTP server.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, which clippy does not take for tests"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use vmm_testkit::skip::skipped;

/// The suite's runner, which `make setup` installs where Go is installed.
const RUNNER: &str = "connectconformance";

/// The number of cases that the configuration selects at the least. A run of fewer cases would pass
/// without a proof.
const LEAST_CASES: usize = 5500;

/// Returns the path of the runner: on PATH, or where `make setup` puts it.
fn runner() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/tools/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain([tools]).map(|dir| dir.join(RUNNER)).find(|file| file.is_file())
}

/// Returns the number in a line of the runner such as "5554 passed, 0 failed".
fn count(output: &str, word: &str) -> Option<usize> {
    let line = output.lines().rev().find(|line| line.contains(" passed"))?;
    let before = line.split(',').find_map(|part| part.trim().strip_suffix(word))?;
    before.trim().parse().ok()
}

#[test]
fn the_connect_conformance_suite_passes() {
    let Some(runner) = runner() else {
        return skipped(
            "the Connect conformance suite",
            &format!(
                "{RUNNER} is not installed; 'make setup' installs it where Go 1.24 or newer is installed"
            ),
        );
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(runner)
        .args(["--mode", "server", "--conf"])
        .arg(folder.join("suite.yaml"))
        .args(["--", env!("CARGO_BIN_EXE_vmm-conformance")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    let passed = count(&text, " passed").unwrap_or_else(|| panic!("no count in {text}\n{errors}"));
    println!("Connect conformance: {passed} cases passed");
    assert!(passed >= LEAST_CASES, "{text}");
}
