//! Runs a program that ends by itself, and reads its output.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use vmm_host::process::{environment, exec_guard};

/// The most bytes that are read of each output. A program that writes more gets SIGPIPE.
const MAX_BYTES: u64 = 64 << 10;

/// The end of a program, and its output.
#[derive(Debug)]
pub(crate) struct Output {
    /// The exit status.
    pub(crate) status: ExitStatus,
    /// The beginning of the standard output.
    pub(crate) stdout: String,
    /// The beginning of the standard error.
    pub(crate) stderr: String,
}

/// Runs `program` with `arguments` in a process group of its own, writes `input` to its standard
/// input, and waits for its end. At the end of the call every process of the group is killed; also
/// if `timeout` passes, if the future is dropped, and if the daemon ends.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] after `timeout`; else the kernel's error.
pub(crate) async fn run(
    program: &Path,
    arguments: &[OsString],
    input: &[u8],
    timeout: Duration,
) -> io::Result<Output> {
    // Without a shell on the host only the program itself is killed, and only by the daemon.
    let group = Group::start().ok();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(environment())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(group.as_ref().map_or(0, Group::id))
        .kill_on_drop(true);
    let child = {
        let _starting = exec_guard();
        command.spawn()?
    };
    match tokio::time::timeout(timeout, finish(child, input)).await {
        Ok(output) => output,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn finish(mut child: Child, input: &[u8]) -> io::Result<Output> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // A program that has ended, or that needs no input, reads nothing.
            let _ = stdin.write_all(input).await;
        }
        Ok(())
    };
    // A program that writes more than is read gets SIGPIPE, because the reads close its pipes.
    let (stdout, stderr, (), status) =
        tokio::try_join!(beginning(stdout), beginning(stderr), write, child.wait())?;
    Ok(Output { status, stdout, stderr })
}

/// A process group. It is killed when the guard is dropped and when the daemon ends.
struct Group {
    /// A shell that waits for the end of its input and then kills the group, itself included. The
    /// daemon holds the other end of the input, which the kernel closes when the daemon ends. A
    /// parent-death signal would do the same, but setting one needs code between fork and exec.
    leader: Child,
}

impl Group {
    fn start() -> io::Result<Self> {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "read -r _; kill -KILL 0"])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true);
        let _starting = exec_guard();
        Ok(Self { leader: command.spawn()? })
    }

    /// Returns the number of the group. No other group gets the number, because the leader is not
    /// reaped before the guard is dropped.
    fn id(&self) -> i32 {
        self.leader.id().map_or(0, u32::cast_signed)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = Pid::from_raw(self.id()) {
            // An error means that the group has ended.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn beginning(output: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let mut said = Vec::new();
    if let Some(output) = output {
        output.take(MAX_BYTES).read_to_end(&mut said).await?;
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns true if a process with `word` among its arguments runs.
    fn runs(word: &str) -> bool {
        std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            std::fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes()))
        })
    }

    async fn shell(script: &str, input: &[u8], timeout: Duration) -> io::Result<Output> {
        run(Path::new("/bin/sh"), &["-c".into(), script.into()], input, timeout).await
    }

    #[tokio::test]
    async fn a_program_gets_its_input_and_returns_its_exit_status() {
        let minute = Duration::from_secs(60);
        let done = shell("cat; echo no >&2; exit 3", b"yes", minute).await.unwrap();
        assert_eq!(
            (done.stdout.as_str(), done.stderr.as_str(), done.status.code()),
            ("yes", "no\n", Some(3))
        );
        let done = shell("exit 0", &[b'x'; 1 << 20], minute).await.unwrap();
        assert!(done.status.success(), "input that nobody reads is no error");
        let done = shell("yes", b"", minute).await.unwrap();
        assert_eq!(done.stdout.len() as u64, MAX_BYTES);
    }

    #[tokio::test]
    async fn a_program_that_hangs_or_ends_leaves_no_process() {
        let seconds = format!("86400.{}", std::process::id());
        let hangs = format!("sleep {seconds} & sleep {seconds}");
        let late = shell(&hangs, b"", Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let ends = format!("sleep {seconds} > /dev/null 2>&1 &");
        assert!(shell(&ends, b"", Duration::from_secs(60)).await.unwrap().status.success());
        // A killed process is in the list until it has been torn down.
        for _ in 0..600 {
            if !runs(&seconds) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("a process is left");
    }
}
