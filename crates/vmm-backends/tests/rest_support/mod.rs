//! What the tests against a real Firecracker and a real Cloud Hypervisor share: a bench that starts
//! guests and leaves nothing behind, failed or not.

#![allow(dead_code, unreachable_pub, reason = "every test program uses its own part of this")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes this for no test, because it is shared"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;
use uuid::Uuid;
use vmm_core::backend::{
    AdoptRequest, Adoption, Backend, BackendError, Effect, Exit, GuestState, LadderOptions, LaunchRequest,
    LaunchedVmm, SweepRequest, Vmm, VmmEvent,
};
use vmm_core::config::{
    BootConfig, CpuConfig, MemoryConfig, NetworkInterface, RestartPolicyConfig, StorageDevice, VmConfig,
};
use vmm_core::id::{InstanceId, VmUid};
use vmm_core::kind::VmKind;
use vmm_core::run_permit::RunPermit;
use vmm_core::spec::VmSpec;
use vmm_core::store::RunRecord;
use vmm_host::process::{Lookup, Signal, adopt, find_by_argument};
use vmm_testkit::guests::TinyGuest;
pub use vmm_testkit::skip::skipped;

/// Longer than anything honest takes on a busy host.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Does not ask the guest.
pub const FORCE: LadderOptions = LadderOptions { guest_timeout: None };

pub const UNSET: i32 = 0;
pub const NEVER: i32 = 1;
pub const GUEST_REBOOT: i32 = 2;

/// Asks the guest, and waits for it.
pub fn ask_for(time: Duration) -> LadderOptions {
    LadderOptions { guest_timeout: Some(time) }
}

/// The backend, or `None` after saying that `test` is skipped, where people and scripts see it.
pub async fn usable<B: Backend>(test: &str, backend: B) -> Option<B> {
    let Err(why) = backend.ping().await.version else { return Some(backend) };
    skipped(test, &why);
    None
}

/// One VM's run folder and configuration, and whatever runs there.
pub struct Bench<B> {
    pub backend: B,
    pub uid: VmUid,
    pub config: VmConfig,
    pub taps: Vec<String>,
    dir: TempDir,
}

/// A TAP that goes with its test.
pub struct Tap(pub String);

impl Tap {
    /// A TAP, or `None` after saying that `test` is skipped.
    pub fn new(test: &str, name: &str) -> Option<Self> {
        let tap = Self(format!("{name}{}", std::process::id() % 100_000));
        match ip(&["tuntap", "add", "dev", &tap.0, "mode", "tap"]) {
            Ok(()) => Some(tap),
            Err(why) => {
                skipped(test, &format!("no TAP can be made here: {why}"));
                None
            }
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.0]);
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = std::process::Command::new("ip").args(args).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl<B: Backend> Bench<B> {
    /// A bench for a tiny guest.
    pub fn new(backend: B, guest: TinyGuest, restart: i32) -> Self {
        Self::in_folder(backend, "vmcp-rest-", guest, restart)
    }

    /// The same, whose run folder's name begins with `prefix`.
    pub fn in_folder(backend: B, prefix: &str, guest: TinyGuest, restart: i32) -> Self {
        let dir = tempfile::Builder::new().prefix(prefix).tempdir().unwrap();
        let kernel = guest.write_to(dir.path()).unwrap();
        let config = VmConfig {
            cpu: Some(CpuConfig { vcpu_count: 1, ..CpuConfig::default() }),
            memory: Some(MemoryConfig { size_bytes: 64 << 20, ..MemoryConfig::default() }),
            boot: Some(BootConfig {
                kernel_path: kernel.to_str().unwrap().to_owned(),
                ..BootConfig::default()
            }),
            restart_policy: Some(RestartPolicyConfig { mode: restart, max_restarts: 0 }),
            ..VmConfig::default()
        };
        Self { backend, uid: VmUid::new(Uuid::now_v7()), config, taps: Vec::new(), dir }
    }

    /// Adds a raw disk of 1 MiB.
    pub fn add_disk(&mut self, id: &str) {
        let path = self.dir().join(format!("{id}.raw"));
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        self.config.storage.push(StorageDevice {
            id: id.to_owned(),
            path: path.to_str().unwrap().to_owned(),
            ..StorageDevice::default()
        });
    }

    /// Adds a network interface on `tap`.
    pub fn add_nic(&mut self, tap: &Tap) {
        self.config.network.push(NetworkInterface {
            id: "net".to_owned(),
            mac_address: "02:00:00:00:00:07".to_owned(),
            options: [("rate_limit.bytes_per_second".to_owned(), "1000000".to_owned())].into(),
            ..NetworkInterface::default()
        });
        self.taps.push(tap.0.clone());
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn spec(&self) -> VmSpec {
        VmSpec::parse(&self.config).unwrap()
    }

    pub fn request(&self) -> LaunchRequest {
        LaunchRequest {
            instance: InstanceId::new(Uuid::nil()),
            uid: self.uid,
            vm_id: "bench".parse().unwrap(),
            spec: self.spec(),
            dir: self.dir().to_path_buf(),
            console: Some(self.console_file()),
            permit: RunPermit::granted(),
            taps: self.taps.clone(),
            kind: VmKind::Managed,
            imported: false,
            incomplete: None,
        }
    }

    pub fn adoption(&self, run: Option<RunRecord>) -> AdoptRequest {
        AdoptRequest {
            instance: InstanceId::new(Uuid::nil()),
            uid: self.uid,
            vm_id: "bench".parse().unwrap(),
            spec: self.spec(),
            dir: self.dir().to_path_buf(),
            run,
            kind: VmKind::Managed,
            imported: false,
            changed_ms: 0,
        }
    }

    /// Adopts a VMM whose socket somebody else has taken: nothing is sent there.
    pub async fn nothing_is_sent_to_another_listener(&self) {
        use std::io::Read as _;

        let run = self.launch().await;
        let record = run.vmm.run().clone();
        std::fs::remove_file(&record.socket).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&record.socket).unwrap();
        let adoption = self.backend.adopt(self.adoption(Some(record))).await.unwrap();
        let Adoption::Unreachable { message, launched: Some(launched), .. } = adoption else {
            panic!("{adoption:?}")
        };
        assert!(message.contains("nothing was sent to it"), "{message}");
        other.set_nonblocking(true).unwrap();
        while let Ok((mut stream, _)) = other.accept() {
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).unwrap();
            assert_eq!(heard, b"");
        }
        launched.vmm.kill().await.unwrap();
    }

    pub async fn try_launch(&self) -> Result<Run, BackendError> {
        self.backend.launch(self.request()).await.map(Run::from)
    }

    /// Asks a VMM for signs of life and counters again and again, and expects that it has no
    /// connection more afterwards.
    pub async fn samples_leave_no_connection(&self) {
        let run = self.launch().await;
        let folder = format!("/proc/{}/fd", run.vmm.run().process.pid);
        let open = || std::fs::read_dir(&folder).unwrap().count();
        run.vmm.sample().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let before = open();
        for _ in 0..20 {
            run.vmm.probe().await.unwrap();
            assert_eq!(run.vmm.sample().await.missing, Vec::<String>::new());
        }
        for _ in 0..100 {
            if open() <= before {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(open(), before);
        run.vmm.kill().await.unwrap();
    }

    pub async fn launch(&self) -> Run {
        self.try_launch().await.unwrap()
    }

    /// Checks that a VMM is told nothing before the permit is granted, and ends if that cannot
    /// happen.
    pub async fn keeps_the_gate(&self, listens: bool) {
        let (issuer, permit) = RunPermit::pending();
        let launching = self.backend.launch(LaunchRequest { permit, ..self.request() });
        let calling_off = async {
            let socket = self.dir().join("api.sock");
            if listens {
                while tokio::net::UnixStream::connect(&socket).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                let adopted = self.backend.adopt(self.adoption(None)).await.unwrap();
                assert!(matches!(adopted, Adoption::Alive { guest: GuestState::Ended, .. }), "{adopted:?}");
            } else {
                while self.processes() == 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                assert!(!socket.exists(), "a VMM that waits for its pipe does not listen");
            }
            assert_eq!(self.processes(), 1);
            drop(issuer);
        };
        let (launched, ()) = tokio::join!(launching, calling_off);
        let error = launched.unwrap_err();
        assert_eq!(error.effect, Effect::NotApplied);
        assert!(error.message.contains("was cancelled"), "{error}");
        assert_eq!((self.processes(), self.console().as_str()), (0, ""));
    }

    pub async fn sweep(&self) {
        self.backend.sweep(SweepRequest::of_folder(self.uid, self.dir())).await.unwrap();
    }

    pub fn console_file(&self) -> PathBuf {
        self.dir().join("console,log")
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.console_file()).unwrap_or_default()).into_owned()
    }

    /// Waits until the console shows `text` for the `times`th time.
    pub async fn console_shows(&self, text: &str, times: usize) {
        let shown = async {
            while self.console().matches(text).count() < times {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(WAIT_TIMEOUT, shown).await.is_err() {
            panic!("the console does not show {text:?} {times} times: {}", self.console());
        }
    }

    /// The processes that use the run folder.
    pub fn processes(&self) -> usize {
        find_by_argument(self.dir()).unwrap().len()
    }
}

impl<B> Drop for Bench<B> {
    fn drop(&mut self) {
        for found in find_by_argument(self.dir.path()).unwrap_or_default() {
            if let Lookup::Alive(process) = adopt(&found.identity) {
                let _ = process.signal(Signal::KILL);
            }
        }
    }
}

/// A running VM.
pub struct Run {
    pub vmm: Arc<dyn Vmm>,
    pub events: mpsc::Receiver<VmmEvent>,
}

impl From<LaunchedVmm> for Run {
    fn from(launched: LaunchedVmm) -> Self {
        Self { vmm: launched.vmm, events: launched.events }
    }
}

impl Run {
    pub async fn event(&mut self) -> VmmEvent {
        tokio::time::timeout(WAIT_TIMEOUT, self.events.recv()).await.expect("an event").expect("not the end")
    }

    /// The end, which must be the next event and the last.
    pub async fn gone(&mut self) -> Exit {
        match self.event().await {
            VmmEvent::Gone(exit) => {
                assert_eq!(self.events.recv().await, None, "nothing follows the end");
                exit
            }
            other => panic!("{other:?} instead of the end"),
        }
    }

    /// Fails if there is news.
    pub fn no_event(&mut self) {
        assert_eq!(self.events.try_recv(), Err(mpsc::error::TryRecvError::Empty));
    }

    /// Stops the VMM, and waits until each of its threads stands still.
    pub async fn stop(&self) {
        self.signal(Signal::STOP);
        let threads = format!("/proc/{}/task", self.vmm.run().process.pid);
        let stopped = |thread: &Path| {
            let stat = std::fs::read_to_string(thread.join("stat")).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        };
        while !std::fs::read_dir(&threads).unwrap().all(|thread| stopped(&thread.unwrap().path())) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub fn signal(&self, signal: Signal) {
        match adopt(&self.vmm.run().process) {
            Lookup::Alive(process) => process.signal(signal).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}
