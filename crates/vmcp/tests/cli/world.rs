//! A daemon of a test's own, and `vmcp` beside it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_controlplane::config::{Cli, DaemonConfig, Environment, ThisHost};
use vmm_testkit::guests::TinyGuest;
pub(crate) use vmm_testkit::skip::{hypervisors, on_path, skipped};

/// The variable that makes this program the daemon.
pub(crate) const BE_THE_DAEMON: &str = "VMCP_TEST_BE_THE_DAEMON";
/// Longer than anything here takes on a busy machine; only a hang reaches it.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(90);

/// Serves as `vmm-controlplane` does.
pub(crate) fn daemon() -> ExitCode {
    let environment: Environment = std::env::vars_os().collect();
    let loaded = DaemonConfig::load(&Cli::default(), &environment, &ThisHost).unwrap();
    let _log = vmm_controlplane::telemetry::start().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let outcome = runtime.block_on(vmm_controlplane::daemon::run(loaded));
    runtime.shutdown_background();
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Folders that live as long as a test, with a daemon in them that can be ended and started again.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    /// The address that the first daemon got, which the later ones take again.
    port: u16,
    daemon: Option<Child>,
    env: Vec<(String, String)>,
}

/// The output and the exit code of a command.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Returns the standard output of a success.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:#?}");
        self.stdout
    }

    /// Returns the message of a success, as `-o json` prints it.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// Returns the standard error of a failure with this exit code.
    #[track_caller]
    pub(crate) fn failed(self, code: i32) -> String {
        assert_eq!(self.code, code, "{self:#?}");
        assert_eq!(self.stdout, "", "a failure prints nothing for programs");
        self.stderr
    }
}

impl World {
    /// Starts a daemon whose default backend is QEMU in software emulation; `env` comes on top.
    pub(crate) fn started(env: &[(&str, &str)]) -> Self {
        let dir = tempfile::Builder::new().prefix("vmcp").tempdir().unwrap();
        let folder = |name: &str| dir.path().join(name).display().to_string();
        let own = [
            ("UNKEY_VMCP_CONFIG", "/dev/null".to_owned()),
            ("UNKEY_VMCP_ADDRESS", "127.0.0.1".to_owned()),
            ("UNKEY_VMCP_BACKEND", "qemu".to_owned()),
            ("UNKEY_VMCP_QEMU_KVM", "false".to_owned()),
            ("UNKEY_VMCP_OTEL_PROMETHEUS_ENABLED", "false".to_owned()),
            ("UNKEY_VMCP_STATE_DIR", folder("state")),
            ("UNKEY_VMCP_RUNTIME_DIR", folder("run")),
            (BE_THE_DAEMON, "1".to_owned()),
        ];
        let env = env.iter().map(|(key, value)| (*key, (*value).to_owned()));
        let env = own.into_iter().chain(env).map(|(key, value)| (key.to_owned(), value)).collect();
        let mut world = Self { dir, port: 0, daemon: None, env };
        world.start();
        world
    }

    /// Starts the daemon, and waits until it serves.
    pub(crate) fn start(&mut self) {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let mut command = Command::new(std::env::current_exe().unwrap());
        without_settings(&mut command);
        command.envs(self.env.iter().cloned()).env("UNKEY_VMCP_PORT", self.port.to_string());
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = lines(child.stderr.take().unwrap());
        self.daemon = Some(child);
        let mut seen = Vec::new();
        while let Ok(line) = log.recv_timeout(WAIT_TIMEOUT) {
            let parsed: Value = serde_json::from_str(&line).unwrap_or_default();
            if parsed["message"] == "serving" {
                let address = parsed["address"].as_str().unwrap();
                self.port = address.rsplit_once(':').unwrap().1.parse().unwrap();
                return;
            }
            seen.push(line);
        }
        panic!("the daemon did not come up:\n{}", seen.join("\n"));
    }

    /// Ends the daemon with a signal, and waits for it.
    pub(crate) fn stop(&mut self, signal: Signal) {
        let mut daemon = self.daemon.take().expect("a daemon runs");
        kill_process(Pid::from_child(&daemon), signal).unwrap();
        daemon.wait().unwrap();
    }

    /// Returns the URL of the daemon.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Returns `vmcp` with arguments, with nothing of the test's own environment that concerns it.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = vmcp(arguments);
        command
            .env("VMCP_SERVER", self.url())
            .env("VMCP_CONTEXTS_FILE", self.dir.path().join("contexts.toml"));
        command
    }

    /// Runs `vmcp` to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with_input(arguments, "")
    }

    /// Runs `vmcp` to its end with a text on its standard input.
    pub(crate) fn run_with_input(&self, arguments: &[&str], input: &str) -> Ran {
        finish(self.command(arguments), input)
    }

    /// Calls the API without `vmcp`.
    pub(crate) fn call(&self, method: &str, request: &Value) -> Value {
        let url = format!("{}/vmm.v1.VmService/{method}", self.url());
        let agent: ureq::Agent =
            ureq::Agent::config_builder().timeout_global(Some(WAIT_TIMEOUT)).build().into();
        let sent = agent.post(&url).header("content-type", "application/json").send(request.to_string());
        let text = sent.unwrap().body_mut().read_to_string().unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Creates a VM with a tiny guest.
    pub(crate) fn create(&self, vm_id: &str, guest: TinyGuest) {
        let config = self.tiny(guest);
        self.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
    }

    /// Returns the configuration of a VM with a tiny guest.
    pub(crate) fn tiny(&self, guest: TinyGuest) -> Value {
        json!({
            "cpu": {"vcpu_count": 1},
            "memory": {"size_bytes": "67108864"},
            "boot": {"kernel_path": self.kernel(guest)},
        })
    }

    /// Writes a tiny guest, and returns its path.
    pub(crate) fn kernel(&self, guest: TinyGuest) -> PathBuf {
        guest.write_to(self.dir.path()).unwrap()
    }

    /// Writes a file into the test's folder, and returns its path.
    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// Returns the VMMs that run for this daemon.
    fn vmms(&self) -> Vec<Pid> {
        let needle = self.dir.path().join("run").display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if let Some(pid) = pid
                && String::from_utf8_lossy(&arguments).contains(&needle)
            {
                found.push(pid);
            }
        }
        found
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for pid in self.vmms() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// A `vmcp` that runs until it is told to end, or ends by itself.
pub(crate) struct Running {
    child: Child,
    pub(crate) stdout: Receiver<String>,
    pub(crate) stderr: Receiver<String>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        Self { child, stdout: lines(stdout), stderr: lines(stderr) }
    }

    /// Returns the lines of an output up to one that has `text`, which is the last of them.
    #[track_caller]
    pub(crate) fn until(output: &Receiver<String>, text: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while let Ok(line) = output.recv_timeout(WAIT_TIMEOUT) {
            let is_last = line.contains(text);
            seen.push(line);
            if is_last {
                return seen;
            }
        }
        panic!("{text:?} never came: {seen:#?}");
    }

    /// Sends a signal to the program.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until the program has ended by itself, and returns its exit code.
    pub(crate) fn code(&mut self) -> i32 {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().expect("no signal ended it");
            }
            assert!(Instant::now() < deadline, "vmcp does not end");
            pause();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns `vmcp` with arguments, and with no server but the default one.
pub(crate) fn vmcp(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmcp"));
    without_settings(&mut command);
    command.env("VMCP_CONTEXTS_FILE", "/nonexistent/contexts.toml").args(arguments);
    command
}

/// Runs a program to its end.
pub(crate) fn finish(mut command: Command, input: &str) -> Ran {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    feed(child.stdin.take().unwrap(), input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let code = output.status.code().expect("no signal ended it");
    Ran { code, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Writes the input. A program that does not read it is none of the test's business.
fn feed(mut stdin: ChildStdin, input: &str) {
    let _ = stdin.write_all(input.as_bytes());
}

fn without_settings(command: &mut Command) {
    for (key, _) in std::env::vars_os() {
        if ["UNKEY_VMCP_", "VMCP_", "CHCP_"].iter().any(|prefix| key.to_string_lossy().starts_with(prefix)) {
            command.env_remove(key);
        }
    }
}

/// Reads lines in a thread of their own, so that the writer never blocks on a full pipe.
fn lines(output: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (tell, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let _ = tell.send(line);
        }
    });
    lines
}

/// Returns true if QEMU is there; where not, the test says that it is skipped.
pub(crate) fn has_qemu(test: &str) -> bool {
    let is_there = on_path("qemu-system-x86_64");
    if !is_there {
        skipped(test, "qemu-system-x86_64 is not on PATH; `make setup` installs it");
    }
    is_there
}

/// Lets others go on for a moment.
#[expect(clippy::disallowed_methods, reason = "a test's own thread waits for other processes")]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
