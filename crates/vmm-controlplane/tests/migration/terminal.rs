//! A terminal: a shell that keeps its variables from block to block.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longer than any block takes on a busy machine.
const TERMINAL_TIMEOUT: Duration = Duration::from_secs(400);

/// A shell that is told what to run over its standard input.
pub(crate) struct Terminal {
    shell: Child,
    input: ChildStdin,
    dir: PathBuf,
    name: &'static str,
}

impl Terminal {
    /// Opens one in `dir`, with `env` and nothing of the test's environment that concerns the daemon.
    pub(crate) fn open(name: &'static str, dir: &Path, env: &[(&str, String)]) -> Self {
        let mut command = Command::new("sh");
        for (key, _) in std::env::vars_os() {
            let text = key.to_string_lossy();
            if ["UNKEY_VMCP_", "VMCP_", "CHCP_"].iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(&key);
            }
        }
        command.current_dir(dir).envs(env.iter().map(|(key, value)| (key, value)));
        let mut shell = command.stdin(Stdio::piped()).spawn().unwrap();
        let input = shell.stdin.take().unwrap();
        Self { shell, input, dir: dir.to_owned(), name }
    }

    fn file(&self, what: &str) -> PathBuf {
        self.dir.join(format!(".{}-{what}", self.name))
    }

    /// Runs a block, and answers its exit code and what it prints.
    pub(crate) fn run(&mut self, block: &str) -> (i32, String) {
        let (output, status) = (self.file("output"), self.file("status"));
        let _ = std::fs::remove_file(&status);
        self.write(&format!(
            "{{\n{block}\n}} > {output} 2>&1 < /dev/null\nprintf '%s' \"$?\" > {status}.new\nmv {status}.new {status}\n",
            output = output.display(),
            status = status.display(),
        ));
        let printed = || String::from_utf8_lossy(&std::fs::read(&output).unwrap_or_default()).into_owned();
        let deadline = Instant::now() + TERMINAL_TIMEOUT;
        while !status.exists() {
            let ended = self.shell.try_wait().unwrap();
            assert!(ended.is_none(), "the shell ended over\n{block}\n{}", printed());
            assert!(Instant::now() < deadline, "this does not end:\n{block}\n{}", printed());
            pause();
        }
        (std::fs::read_to_string(&status).unwrap().parse().unwrap(), printed())
    }

    /// Runs a block whose last line stays: it goes on in the background, and what it prints goes to [`Terminal::log`].
    pub(crate) fn run_and_stay(&mut self, block: &str) -> Pid {
        let (before, last) = block.trim_end().rsplit_once('\n').unwrap_or(("", block.trim_end()));
        let log = self.file("log");
        let (code, printed) =
            self.run(&format!("{before}\n{last} > {} 2>&1 < /dev/null &\nprintf '%s' \"$!\"", log.display()));
        assert_eq!(code, 0, "{block}\n{printed}");
        printed.parse().ok().and_then(Pid::from_raw).unwrap_or_else(|| panic!("no process id in {printed:?}"))
    }

    /// Presses Ctrl-C over what [`Terminal::run_and_stay`] has started, and answers its exit code.
    pub(crate) fn interrupt(&mut self, pid: Pid) -> i32 {
        // The shell has not waited for it yet, so the number is still its own.
        kill_process(pid, Signal::INT).unwrap();
        self.run(&format!("wait {}", pid.as_raw_nonzero())).0
    }

    /// What the program in the background has printed.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.file("log")).unwrap_or_default()).into_owned()
    }

    fn write(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

#[expect(clippy::disallowed_methods, reason = "a test's own thread waits for other processes")]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
