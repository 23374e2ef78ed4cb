//! The migration guide, run as printed: every command block of docs/migration-guide.md, in its order, on the real daemon and real
//! hypervisors, and what the guide says is printed is compared with what is.
//!
//! ```text
//!   this test ─► unshare ─► namespaces.sh ─► this program again, with one test
//!                           its own /tmp, /opt/kernels, /var/lib, /run, port 8080 and processes: the guide's
//!                           /tmp/ch.sock, localhost:8080 and qemu:///system are used as they stand there
//! ```
//!
//! The namespace of processes ends with its first one, and takes everything along that was started in it, however the test ended.
//! What cannot run here is `SKIPPED`, with the reason.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the helpers of a test give up as loudly as the test itself"
)]

mod compare;
mod guide;
#[allow(dead_code, unused_imports, reason = "another program's harness, of which this one needs a part")]
#[path = "../e2e/harness.rs"]
mod harness;
mod reader;
mod terminal;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::{on_path, skipped};

/// Longer than the whole guide takes on a busy machine, with a libvirtd that looks at QEMU for the first time.
const RUN_TIMEOUT: Duration = Duration::from_secs(900);
/// Tells the program that it runs in the namespaces.
const INSIDE: &str = "VMCP_MIGRATION_INSIDE";
/// The programs without which nothing of the guide can be run.
const TOOLS: [&str; 7] = ["setpriv", "unshare", "mount", "ip", "sh", "curl", "jq"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The options that make the namespaces, or why there are none here.
fn namespaces() -> Result<Vec<&'static str>, String> {
    if let Some(tool) = TOOLS.iter().find(|tool| !on_path(tool)) {
        return Err(format!("{tool} is not on PATH"));
    }
    let mut options = vec!["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"];
    options.extend(["--propagation", "private"]);
    if !rustix::process::geteuid().is_root() {
        options.extend(["--user", "--map-root-user"]);
    }
    let probe = Command::new("unshare").args(&options).arg("true").stdin(Stdio::null()).output().unwrap();
    if probe.status.success() {
        return Ok(options);
    }
    let said = String::from_utf8_lossy(&probe.stderr).trim().to_owned();
    Err(format!("the guide's paths and port can be used in namespaces only, which root may make: {said}"))
}

/// What must stay visible of /tmp, if it lies there.
fn needed() -> String {
    let daemon = Path::new(env!("CARGO_BIN_EXE_vmm-controlplane"));
    let program = std::env::current_exe().unwrap();
    let mut paths = vec![repository(), daemon.to_owned(), program];
    paths.extend(vmm_testkit::libvirtd::helper());
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let shown: Vec<_> = paths.iter().map(|path| format!("{}/", path.display())).collect();
    shown.join(" ")
}

#[test]
fn the_commands_of_the_guide_run_as_printed() {
    let options = match namespaces() {
        Ok(options) => options,
        Err(why) => return skipped("the migration guide", &why),
    };
    let dir = tempfile::Builder::new().prefix("migration").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let stage = dir.path().join("stage");
    std::fs::create_dir(&stage).unwrap();
    let output = dir.path().join("output");
    let log = File::create(&output).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/migration/namespaces.sh");
    // Should this test be killed, the namespaces go too.
    let mut inside = Command::new("setpriv");
    inside
        .args(["--pdeathsig", "KILL", "unshare"])
        .args(options)
        .arg("sh")
        .arg(script)
        .args([&stage])
        .arg(needed());
    inside.arg(std::env::current_exe().unwrap());
    inside.args(["--exact", "child_follows_the_guide_in_namespaces", "--ignored", "--nocapture"]);
    // What it skips it says here; a file in /tmp would be out of its sight.
    inside.env(INSIDE, "1").env_remove("TMPDIR").env_remove("VMCP_SKIP_LOG");
    inside.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut child = inside.spawn().unwrap();
    let deadline = Instant::now() + RUN_TIMEOUT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > deadline {
            // Its death is that of all in the namespace of processes (--kill-child).
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        terminal::pause();
    };
    let said = String::from_utf8_lossy(&std::fs::read(&output).unwrap()).into_owned();
    for line in said.lines() {
        match line.strip_prefix("SKIPPED: ").and_then(|line| line.split_once(": ")) {
            Some((what, why)) => skipped(what, why),
            None => println!("{line}"),
        }
    }
    assert!(status.is_some_and(|status| status.success()), "{status:?} (None: not done in {RUN_TIMEOUT:?})");
    assert!(said.contains(reader::DONE), "the test did not run in the namespaces");
}

#[test]
#[ignore = "the_commands_of_the_guide_run_as_printed runs it, in namespaces"]
fn child_follows_the_guide_in_namespaces() {
    if std::env::var_os(INSIDE).is_some() {
        reader::follow(&guide::steps());
    }
}

#[test]
fn every_block_of_the_guide_is_run_or_compared() {
    let steps = guide::steps();
    assert!(steps.len() > 30, "only {} blocks were found: the search has gone blind", steps.len());
    let shown = steps.iter().filter(|step| step.shown.is_some()).count();
    assert!(shown > 25, "only {shown} blocks have what is printed beside them");
}
