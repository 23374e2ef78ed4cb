//! Reports tests that cannot run on this machine.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;

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

/// Returns true if `program` is on `PATH`.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Returns the backends whose hypervisors can run here, and reports that `test` does not run on the
/// others.
pub fn hypervisors(test: &str) -> Vec<&'static str> {
    let kvm = Path::new("/dev/kvm").exists();
    let all = [
        ("qemu", "qemu-system-x86_64", true),
        ("cloudhypervisor", "cloud-hypervisor", kvm),
        ("firecracker", "firecracker", kvm),
    ];
    let can_run = |(backend, program, can_run): (&'static str, &str, bool)| {
        if can_run && on_path(program) {
            return Some(backend);
        }
        skipped(&format!("{test} on {backend}"), &format!("{program} or /dev/kvm is missing"));
        None
    };
    all.into_iter().filter_map(can_run).collect()
}
