//! A libvirtd for one test: Debian's program, with folders, sockets and domains that no other
//! libvirtd sees.
//!
//! ```text
//!   reaper ─ unshare --mount ── /run, /var/lib, /etc and /var/log/libvirt ──► the test's folder
//!                 │             /var/cache/libvirt ──► shared by all tests: the knowledge of QEMU
//!                 │             /dev/kvm ──► hidden, because libvirt would examine a software KVM
//!                 │                          for half a minute
//!                 ├─ virtlogd
//!                 └─ libvirtd ── a socket in the test's folder, reachable from outside
//! ```
//!
//! libvirtd takes a QEMU for gone when its process id is free, so a parent must reap the QEMU at
//! once. The first process of a container may reap late. Each test therefore starts a reaper of its
//! own.
//!
//! The QEMUs of a libvirtd are recognised by their mount namespace, which is libvirtd's. Dropping
//! the value ends libvirtd, virtlogd and the QEMUs, also if a test fails.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

/// The time that libvirtd has to answer after its start. It takes less even on a busy machine.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The program of the reaper. It starts its arguments and reaps every orphaned descendant (36 is
/// PR_SET_CHILD_SUBREAPER).
pub(crate) const REAPER: &str = r#"
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
subprocess.Popen(sys.argv[1:])
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"#;

/// The time limit of virsh, in seconds.
const VIRSH_SECONDS: &str = "60";

/// The script that runs in the new mount namespace. `$1` is the folder of the test, `$2` the shared
/// cache.
const SCRIPT: &str = r#"
set -e
mkdir -p /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /etc/libvirt
mount --bind "$1/run" /run/libvirt
mount --bind "$1/lib" /var/lib/libvirt
mount --bind "$1/log" /var/log/libvirt
mount --bind "$1/etc" /etc/libvirt
mount --bind "$2" /var/cache/libvirt
if [ -e /dev/kvm ]; then mount --bind "$1/no-kvm" /dev/kvm; fi
[ -S /run/libvirt/virtlogd-sock ] || /usr/sbin/virtlogd -f "$1/virtlogd.conf" -p "$1/virtlogd.pid" &
exec /usr/sbin/libvirtd -f "$1/libvirtd.conf" -p "$1/libvirtd.pid"
"#;

/// A running libvirtd and its folder.
#[derive(Debug)]
pub struct Libvirtd {
    dir: TempDir,
    /// The process id of the present libvirtd. `None` while it is stopped.
    pid: Mutex<Option<Pid>>,
    /// The mount namespaces of the present libvirtd and its predecessors.
    namespaces: Mutex<Vec<u64>>,
    /// The reapers of the present libvirtd and its predecessors. Each leads a process group with
    /// its libvirtd and virtlogd.
    reapers: Mutex<Vec<Child>>,
}

impl Libvirtd {
    /// Starts a libvirtd and waits until it answers.
    ///
    /// # Errors
    /// The reason why this machine cannot run one. A test skips itself with that reason.
    pub fn start() -> Result<Self, String> {
        for program in ["/usr/sbin/libvirtd", "/usr/sbin/virtlogd", "/usr/bin/virsh", "/usr/bin/unshare"] {
            if !Path::new(program).exists() {
                return Err(format!("{program} is not installed; `make setup` installs it"));
            }
        }
        if !rustix::process::geteuid().is_root() {
            return Err("only root can give libvirtd folders of its own".to_owned());
        }
        let dir = tempfile::Builder::new().prefix("lv").tempdir().map_err(|error| error.to_string())?;
        configure(dir.path()).map_err(|error| error.to_string())?;
        let libvirtd =
            Self { dir, pid: Mutex::new(None), namespaces: Mutex::default(), reapers: Mutex::default() };
        // The lock of the cache is held until libvirtd answers, because an answer means that the
        // cache is filled.
        let cache = warm_cache()?;
        libvirtd.run(cache.path())?;
        Ok(libvirtd)
    }

    /// Starts libvirtd again after [`Libvirtd::stop`].
    ///
    /// # Panics
    /// If libvirtd does not answer in time.
    pub fn start_again(&self) {
        self.run(&cache_dir()).expect("libvirtd starts again");
    }

    fn run(&self, cache: &Path) -> Result<(), String> {
        // The chain is reaper, unshare, shell, libvirtd; unshare and the shell replace themselves
        // with the next program. The process group belongs to the reaper, so one signal reaches
        // libvirtd and virtlogd.
        let mut reaper = Command::new("python3")
            .args(["-c", REAPER, "/usr/bin/unshare", "--mount", "--propagation", "private"])
            .args(["/bin/sh", "-c", SCRIPT, "sh"])
            .args([self.dir.path(), cache])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.dir.path().join("stderr")).map_err(|error| error.to_string())?)
            .process_group(0)
            .spawn()
            .map_err(|error| error.to_string())?;
        let deadline = Instant::now() + START_TIMEOUT;
        // An answer of virsh is the only proof that libvirtd serves, because the socket exists
        // before.
        let came_up = loop {
            if self.answers() {
                break Ok(());
            }
            match reaper.try_wait() {
                Ok(None) if Instant::now() < deadline => pause(),
                ended => break Err(format!("libvirtd does not come up ({ended:?}): {}", self.said())),
            }
        };
        // The reaper is kept also if libvirtd did not come up, because `drop` must end it.
        lock(&self.reapers).push(reaper);
        came_up?;
        let pid =
            fs::read_to_string(self.dir.path().join("libvirtd.pid")).map_err(|error| error.to_string())?;
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw).ok_or("libvirtd has left no process id")?;
        lock(&self.namespaces).extend(namespace_of(pid.as_raw_nonzero().get().cast_unsigned()));
        *lock(&self.pid) = Some(pid);
        Ok(())
    }

    fn answers(&self) -> bool {
        let asked = self.command(&["version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        self.socket().exists() && asked.is_ok_and(|status| status.success())
    }

    /// Returns libvirtd's stderr and log.
    pub fn said(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        format!("{}{}", read("stderr"), read("libvirtd.log"))
    }

    /// Returns the path of libvirtd's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("libvirt-sock")
    }

    /// Returns the URI that connects to this libvirtd.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    /// Runs virsh and returns its output.
    ///
    /// # Panics
    /// If virsh fails.
    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args).unwrap_or_else(|said| unreachable!("virsh {args:?}: {said}; {}", self.said()))
    }

    /// Runs virsh, which may fail, and returns its output.
    ///
    /// # Errors
    /// The error message of virsh.
    pub fn try_virsh(&self, args: &[&str]) -> Result<String, String> {
        let output = self.command(args).output().map_err(|error| error.to_string())?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    fn command(&self, args: &[&str]) -> Command {
        // A libvirtd that waits for a hanging QEMU answers no client, and a test without a limit
        // would not end.
        let mut command = Command::new("/usr/bin/timeout");
        command
            .args([VIRSH_SECONDS, "/usr/bin/virsh", "--quiet", "--connect", &self.uri()])
            .args(args)
            .stdin(Stdio::null())
            .env("LC_ALL", "C");
        command
    }

    /// Defines and starts a domain that runs `kernel` with virsh, like a user who does not know the
    /// daemon.
    ///
    /// # Panics
    /// If virsh fails.
    pub fn run_foreign_domain(&self, name: &str, kernel: &Path) {
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel></os>\
             <devices><controller type='usb' model='none'/><memballoon model='none'/></devices>\
             <seclabel type='static' model='dac' relabel='no'><label>+0:+0</label></seclabel></domain>",
            kernel.display()
        );
        let file = self.dir.path().join(format!("{name}.xml"));
        fs::write(&file, xml).expect("a file can be written");
        self.virsh(&["define", &file.display().to_string()]);
        self.virsh(&["start", name]);
    }

    /// Returns the names of all domains, running or not.
    pub fn domains(&self) -> Vec<String> {
        self.virsh(&["list", "--all", "--name"]).split_whitespace().map(str::to_owned).collect()
    }

    /// Returns the process ids of the QEMUs that this libvirtd started.
    pub fn qemus(&self) -> Vec<u32> {
        let namespaces = lock(&self.namespaces).clone();
        qemus_that(|pid| namespace_of(pid).is_some_and(|namespace| namespaces.contains(&namespace)))
    }

    /// Kills libvirtd. Its domains keep running.
    pub fn stop(&self) {
        let Some(pid) = lock(&self.pid).take() else { return };
        // The process id cannot belong to another process yet, because the reaper has not reaped
        // libvirtd.
        let _ = kill_process(pid, Signal::KILL);
        while Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists() {
            pause();
        }
    }

    /// Stops libvirtd with SIGSTOP, or lets it continue with SIGCONT.
    pub fn freeze(&self, still: bool) {
        if let Some(pid) = *lock(&self.pid) {
            let _ = kill_process(pid, if still { Signal::STOP } else { Signal::CONT });
        }
    }

    /// Kills every QEMU of this libvirtd.
    pub fn kill_qemus(&self) {
        for pid in self.qemus().into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        // The QEMUs come first, because they are found by the namespace of a libvirtd, and they
        // leave the process group when libvirtd starts them.
        self.kill_qemus();
        for mut reaper in lock(&self.reapers).drain(..) {
            // The id of the group is the reaper's. It cannot belong to another group, because the
            // reaper is reaped by the wait below.
            if let Some(group) = Pid::from_raw(reaper.id().cast_signed()) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = reaper.wait();
        }
    }
}

fn configure(dir: &Path) -> std::io::Result<()> {
    for folder in ["run", "lib", "log", "etc"] {
        fs::create_dir(dir.join(folder))?;
    }
    let shown = dir.display();
    fs::write(
        dir.join("libvirtd.conf"),
        format!(
            "unix_sock_dir = \"{shown}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlog_outputs = \"3:file:{shown}/libvirtd.log\"\n"
        ),
    )?;
    fs::write(dir.join("virtlogd.conf"), "")?;
    // A file that no process may open hides /dev/kvm. With a file of another kind libvirt would
    // examine QEMU again and again to see whether KVM works now.
    fs::write(dir.join("no-kvm"), "")?;
    fs::set_permissions(dir.join("no-kvm"), fs::Permissions::from_mode(0o000))?;
    // Without a namespace of its own, a QEMU stays in libvirtd's namespace and can be recognised by
    // it.
    fs::write(dir.join("etc/qemu.conf"), "namespaces = []\n")
}

/// Returns the folder in which libvirt's knowledge of QEMU is kept between tests.
fn cache_dir() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| OsString::from("target"));
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(target).join("libvirt-cache")
}

/// The cache folder, with its lock while the cache is being filled.
struct LibvirtCache {
    dir: PathBuf,
    _lock: File,
}

impl LibvirtCache {
    fn path(&self) -> &Path {
        &self.dir
    }
}

fn warm_cache() -> Result<LibvirtCache, String> {
    let dir = cache_dir();
    fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    let lock = File::create(dir.with_extension("lock")).map_err(|error| error.to_string())?;
    // The first test holds the lock until its libvirtd has answered. Later tests find the cache
    // filled and release the lock at once, because they only read.
    lock.lock().map_err(|error| error.to_string())?;
    if dir.join("qemu/capabilities").is_dir() {
        lock.unlock().map_err(|error| error.to_string())?;
    }
    Ok(LibvirtCache { dir, _lock: lock })
}

/// Sleeps 10 ms. The callers poll, because the processes that they wait for send no notification.
#[expect(clippy::disallowed_methods, reason = "in a thread of a test, with no runtime")]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}

/// Returns the process ids of all running QEMUs, of any user, for which `is_wanted` holds.
pub(crate) fn qemus_that(is_wanted: impl Fn(u32) -> bool) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_qemu = |pid: u32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("qemu-system"))
    };
    pids.filter(|pid| is_qemu(*pid) && is_wanted(*pid)).collect()
}

fn namespace_of(pid: u32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/mnt")).ok().map(|namespace| namespace.ino())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the path of the helper that `make libvirt-helper` or scripts/test.sh has built.
///
/// # Errors
/// The reason why there is no helper. A test skips itself with that reason.
pub fn helper() -> Result<PathBuf, String> {
    let target = cache_dir().with_file_name("libvirt-helper");
    let built = ["debug", "release"].map(|profile| target.join(profile).join("vmm-libvirt-helper"));
    let found = built.into_iter().find_map(|path| path.canonicalize().ok());
    found.ok_or_else(|| "vmm-libvirt-helper is not built; `make libvirt-helper` builds it".to_owned())
}
