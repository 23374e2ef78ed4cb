//! Tests that cannot run here.

use std::fs::OpenOptions;
use std::io::Write as _;

/// Says that `test` was not run and why, where people see it and where the last line of the run counts it: in the file that
/// `VMCP_SKIP_LOG` names.
#[expect(clippy::print_stdout, reason = "whoever runs the tests is told what was not run")]
pub fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED: {test}: {}\n", why.replace('\n', " "));
    print!("{line}");
    if let Some(log) = std::env::var_os("VMCP_SKIP_LOG")
        && let Ok(mut file) = OpenOptions::new().append(true).create(true).open(log)
    {
        // One write for one line: tests run side by side.
        let _ = file.write_all(line.as_bytes());
    }
}
