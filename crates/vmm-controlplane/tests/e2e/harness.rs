//! A daemon of a test's own, and what a test needs around it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use base64::Engine as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_testkit::guests::TinyGuest;
pub(crate) use vmm_testkit::skip::{hypervisors, on_path, skipped};

/// Longer than anything here takes on a busy machine; only a hang reaches it.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(90);

/// Leaves the test where QEMU is missing.
#[macro_export]
macro_rules! needs_qemu {
    () => {
        if !$crate::harness::on_path("qemu-system-x86_64") {
            return $crate::harness::skipped(
                concat!(module_path!(), ":", line!()),
                "qemu-system-x86_64 is not on PATH; `make setup` installs it",
            );
        }
    };
}

/// A Linux kernel and initramfs, where `make setup` has made them.
pub(crate) fn linux() -> Option<(PathBuf, PathBuf)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest");
    let kernel = dir.join("vmlinuz").canonicalize().ok()?;
    let initrd = dir.join("initramfs.cpio.gz").canonicalize().ok()?;
    Some((kernel, initrd))
}

/// Folders that live as long as a test, with a daemon in them that can be ended and started again.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    env: BTreeMap<String, String>,
    /// What the daemon is started by, if not by the test itself: a program and its arguments.
    pub(crate) wrapper: Vec<String>,
    daemon: Option<Daemon>,
}

struct Daemon {
    child: Child,
    url: String,
    /// The lines of the log from before the daemon served.
    at_start: Vec<String>,
    /// Reads the daemon's log until it ends, so that it never blocks on a full pipe.
    log: Receiver<String>,
}

/// What the API answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl Answer {
    /// The body of a success.
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.body
    }

    /// The message of a failure with this Connect code.
    #[track_caller]
    pub(crate) fn error(self, code: &str) -> String {
        assert_eq!(self.body["code"], code, "HTTP {}: {}", self.status, self.body);
        self.body["message"].as_str().unwrap_or_default().to_owned()
    }
}

impl World {
    /// Folders with QEMU as the backend and software emulation; `env` comes on top.
    pub(crate) fn new(env: &[(&str, &str)]) -> Self {
        let dir = tempfile::Builder::new().prefix("vmcp").tempdir().unwrap();
        let mut all = BTreeMap::from([
            // The host may have a configuration of its own.
            ("UNKEY_VMCP_CONFIG".to_owned(), "/dev/null".to_owned()),
            ("UNKEY_VMCP_ADDRESS".to_owned(), "127.0.0.1".to_owned()),
            ("UNKEY_VMCP_PORT".to_owned(), "0".to_owned()),
            // Its port is one for the whole host.
            ("UNKEY_VMCP_OTEL_PROMETHEUS_ENABLED".to_owned(), "false".to_owned()),
            ("UNKEY_VMCP_BACKEND".to_owned(), "qemu".to_owned()),
            ("UNKEY_VMCP_QEMU_KVM".to_owned(), "false".to_owned()),
            ("UNKEY_VMCP_METRICS_INTERVAL".to_owned(), "1".to_owned()),
            ("UNKEY_VMCP_STATE_DIR".to_owned(), dir.path().join("state").display().to_string()),
            ("UNKEY_VMCP_RUNTIME_DIR".to_owned(), dir.path().join("run").display().to_string()),
        ]);
        all.extend(env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        Self { dir, env: all, wrapper: Vec::new(), daemon: None }
    }

    /// The same, with the daemon started.
    pub(crate) fn started(env: &[(&str, &str)]) -> Self {
        let mut world = Self::new(env);
        world.start();
        world
    }

    /// The daemon's command line, with nothing of the test's own environment that concerns it.
    pub(crate) fn command(&self) -> Command {
        let daemon = env!("CARGO_BIN_EXE_vmm-controlplane");
        let mut command = match &self.wrapper[..] {
            [] => Command::new(daemon),
            [wrapper, arguments @ ..] => {
                let mut command = Command::new(wrapper);
                command.args(arguments).arg(daemon);
                command
            }
        };
        for (key, _) in std::env::vars_os() {
            if ["UNKEY_VMCP_", "VMCP_", "CHCP_"]
                .iter()
                .any(|prefix| key.to_string_lossy().starts_with(prefix))
            {
                command.env_remove(key);
            }
        }
        command.envs(&self.env).stdin(Stdio::null());
        command
    }

    /// Starts the daemon and waits until it serves.
    pub(crate) fn start(&mut self) {
        if let Err(log) = self.try_start() {
            panic!("the daemon did not come up:\n{}", log.join("\n"));
        }
    }

    /// As [`World::start`], but the daemon may end before it serves: then this answers its log.
    pub(crate) fn try_start(&mut self) -> Result<(), Vec<String>> {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let mut child = self.command().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (tell, log) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let deadline = Instant::now() + WAIT_TIMEOUT;
        let mut seen = Vec::new();
        let address = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = log.recv_timeout(left) else {
                let _ = child.kill();
                let _ = child.wait();
                return Err(seen);
            };
            let parsed: Value = serde_json::from_str(&line).unwrap_or_default();
            if parsed["message"] == "serving" {
                break parsed["address"].as_str().unwrap_or_default().to_owned();
            }
            seen.push(line);
        };
        self.daemon = Some(Daemon { child, url: format!("http://{address}"), at_start: seen, log });
        Ok(())
    }

    /// Sets a variable of the next daemon's environment, or with `None` takes it away.
    #[allow(dead_code, reason = "not every program that shares this harness has use for it")]
    pub(crate) fn set_env(&mut self, key: &str, value: Option<&str>) {
        match value {
            Some(value) => self.env.insert(key.to_owned(), value.to_owned()),
            None => self.env.remove(key),
        };
    }

    /// Waits until the daemon has ended by itself, and answers the signal that ended it, and its log.
    #[allow(dead_code, reason = "as above")]
    pub(crate) fn await_end(&mut self) -> (Option<i32>, Vec<String>) {
        let mut daemon = self.daemon.take().expect("a daemon runs");
        let deadline = Instant::now() + WAIT_TIMEOUT;
        let status = loop {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = daemon.child.kill();
                panic!("the daemon did not end:\n{}", daemon.log.try_iter().collect::<Vec<_>>().join("\n"));
            }
            pause();
        };
        (std::os::unix::process::ExitStatusExt::signal(&status), daemon.log.iter().collect())
    }

    /// Whether the daemon has ended by itself.
    #[allow(dead_code, reason = "as above")]
    pub(crate) fn has_ended(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(|daemon| daemon.child.try_wait().unwrap().is_some())
    }

    /// Ends the daemon with a signal, waits for it, and answers its exit code and its log.
    pub(crate) fn stop(&mut self, signal: Signal) -> (Option<i32>, Vec<String>) {
        let mut daemon = self.daemon.take().expect("a daemon runs");
        kill_process(pid_of(&daemon.child), signal).unwrap();
        let status = daemon.child.wait().unwrap();
        (status.code(), daemon.log.iter().collect())
    }

    /// The lines that the daemon logged before it served, as JSON.
    #[allow(dead_code, reason = "as above")]
    pub(crate) fn log_at_start(&self) -> Vec<Value> {
        let lines = self.daemon.as_ref().expect("a daemon runs").at_start.iter();
        lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The warnings that the daemon logged before it served, as JSON.
    #[allow(dead_code, reason = "as above")]
    pub(crate) fn warnings_at_start(&self) -> Vec<Value> {
        self.log_at_start().into_iter().filter(|line| line["level"] == "WARN").collect()
    }

    /// The daemon's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("a daemon runs").child.id()
    }

    /// Returns the URL of the daemon.
    pub(crate) fn url(&self) -> &str {
        &self.daemon.as_ref().expect("a daemon runs").url
    }

    /// Calls a method with a JSON body.
    pub(crate) fn call(&self, method: &str, body: &Value) -> Answer {
        call(self.url(), method, body)
    }

    /// Gets a page.
    pub(crate) fn get(&self, path: &str) -> Answer {
        answer(agent().get(format!("{}{path}", self.url())).call().unwrap())
    }

    pub(crate) fn create(&self, vm_id: &str, config: &Value) -> Value {
        self.call("CreateVm", &json!({"vm_id": vm_id, "config": config})).ok()
    }

    /// Creates a VM with a tiny guest on one of several backends.
    pub(crate) fn create_on(&self, backend: &str, vm_id: &str, guest: TinyGuest) -> Value {
        let config = self.tiny(guest);
        self.call("CreateVm", &json!({"vm_id": vm_id, "backend": backend, "config": config})).ok()
    }

    pub(crate) fn boot(&self, vm_id: &str) -> Value {
        self.call("BootVm", &json!({"vm_id": vm_id})).ok()
    }

    pub(crate) fn info(&self, vm_id: &str) -> Value {
        self.call("GetVmInfo", &json!({"vm_id": vm_id})).ok()
    }

    /// Waits until GetVmInfo satisfies `wanted`.
    #[track_caller]
    pub(crate) fn wait_for(&self, vm_id: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let info = self.info(vm_id);
            if wanted(&info) {
                return info;
            }
            assert!(Instant::now() < deadline, "{vm_id} was never {what}: {info:#}");
            pause();
        }
    }

    #[track_caller]
    pub(crate) fn wait_for_state(&self, vm_id: &str, state: &str) -> Value {
        self.wait_for(vm_id, state, |info| info["state"] == state)
    }

    /// The configuration of a VM with a tiny guest, small enough to start many.
    pub(crate) fn tiny(&self, guest: TinyGuest) -> Value {
        let kernel = guest.write_to(self.dir.path()).unwrap();
        json!({
            "cpu": {"vcpu_count": 1},
            "memory": {"size_bytes": "67108864"},
            "boot": {"kernel_path": kernel},
        })
    }

    /// The kept console of a VM so far.
    pub(crate) fn console(&self, vm_id: &str) -> String {
        let uid = self.info(vm_id)["uid"].as_str().unwrap().replace('-', "");
        let path = self.dir.path().join("run/vms").join(uid).join("console.log");
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// Types `bytes` at the console of a VM.
    #[track_caller]
    #[allow(dead_code, reason = "as above")]
    pub(crate) fn type_at_console(&self, vm_id: &str, bytes: &[u8]) {
        let data = base64::engine::general_purpose::STANDARD.encode(bytes);
        self.call("WriteConsole", &json!({"vm_id": vm_id, "data": data})).ok();
    }

    /// Waits until the kept console has `text` `times` times.
    #[track_caller]
    pub(crate) fn wait_for_console(&self, vm_id: &str, text: &str, times: usize) -> String {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let console = self.console(vm_id);
            if console.matches(text).count() >= times {
                return console;
            }
            assert!(Instant::now() < deadline, "{text:?} x {times} never came up on the console:\n{console}");
            pause();
        }
    }

    /// The process ids of all VMMs that belong to this world's run folder.
    pub(crate) fn vmms(&self) -> Vec<u32> {
        let needle = self.dir.path().join("run").display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let Ok(arguments) = fs::read(entry.path().join("cmdline")) else { continue };
            let of_this_world = String::from_utf8_lossy(&arguments).contains(&needle);
            let is_daemon = self.daemon.as_ref().is_some_and(|daemon| daemon.child.id() == pid);
            if of_this_world && !is_daemon && !arguments.is_empty() {
                found.push(pid);
            }
        }
        found
    }

    /// The folders of VMs.
    pub(crate) fn run_folders(&self) -> Vec<PathBuf> {
        fs::read_dir(self.dir.path().join("run/vms"))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default()
    }

    /// Fails unless nothing of any VM is left on the host.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.vmms(), Vec::<u32>::new(), "processes left");
        assert_eq!(self.run_folders(), Vec::<PathBuf>::new(), "folders left");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.child.kill();
            let _ = daemon.child.wait();
            if std::thread::panicking() {
                for line in daemon.log.try_iter() {
                    eprintln!("daemon: {line}");
                }
            }
        }
        for pid in self.vmms() {
            signal(pid, Signal::KILL);
        }
    }
}

/// Calls a method of the daemon at `url` with a JSON body; from any thread.
pub(crate) fn call(url: &str, method: &str, body: &Value) -> Answer {
    try_call(url, method, body).unwrap_or_else(|error| panic!("no answer: {error}"))
}

/// As [`call`], but the daemon may go away over it.
pub(crate) fn try_call(url: &str, method: &str, body: &Value) -> Result<Answer, ureq::Error> {
    let response = agent()
        .post(format!("{url}/vmm.v1.VmService/{method}"))
        .header("content-type", "application/json")
        .header("x-request-id", format!("test-{method}"))
        .send(body.to_string());
    response.map(answer)
}

/// Calls with an `Idempotency-Key`. Also says whether the answer was given before.
pub(crate) fn try_call_keyed(
    url: &str,
    method: &str,
    body: &Value,
    key: &str,
) -> Result<(Answer, bool), ureq::Error> {
    let response = agent()
        .post(format!("{url}/vmm.v1.VmService/{method}"))
        .header("content-type", "application/json")
        .header("idempotency-key", key)
        .send(body.to_string())?;
    let replayed = response.headers().get("idempotency-replayed").is_some_and(|value| value == "true");
    Ok((answer(response), replayed))
}

/// Posts JSON to any page.
pub(crate) fn post(url: &str, body: &Value) -> Answer {
    let sent = agent().post(url).header("content-type", "application/json").send(body.to_string());
    answer(sent.unwrap_or_else(|error| panic!("no answer: {error}")))
}

/// Signals a process that the test, or its daemon, started.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process is there and not a zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(')').map(|(_, rest)| rest.trim_start().to_owned()))
        .is_some_and(|rest| !rest.starts_with('Z'))
}

/// Waits until `wanted` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, wanted: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !wanted() {
        assert!(Instant::now() < deadline, "never: {what}");
        pause();
    }
}

/// The pid of the VMM, as GetVmInfo tells it.
#[track_caller]
pub(crate) fn vmm_pid(info: &Value) -> u32 {
    info["backend_info"]["pid"]
        .as_str()
        .and_then(|pid| pid.parse().ok())
        .unwrap_or_else(|| panic!("no pid in {info:#}"))
}

/// Lets others go on for a moment.
#[expect(clippy::disallowed_methods, reason = "a test's own thread waits for other processes")]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(WAIT_TIMEOUT))
        .build()
        .into()
}

fn answer(mut response: ureq::http::Response<ureq::Body>) -> Answer {
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string().unwrap();
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Answer { status, body }
}
