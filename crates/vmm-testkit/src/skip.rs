//! Reports tests that cannot run on this machine.

use std::fs::OpenOptions;
use std::io::Write as _;

/// Reports on stdout that `test` did not run, and `why`. Appends the line to the file that
/// `VMCP_SKIP_LOG` names, because the last line of a test run counts the skipped tests.
#[expect(clippy::print_stdout, reason = "the person who runs the tests must see what did not run")]
pub fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED: {test}: {}\n", why.replace('\n', " "));
    print!("{line}");
    if let Some(log) = std::env::var_os("VMCP_SKIP_LOG")
        && let Ok(mut file) = OpenOptions::new().append(true).create(true).open(log)
    {
        // One write for each line, because tests run side by side.
        let _ = file.write_all(line.as_bytes());
    }
}
