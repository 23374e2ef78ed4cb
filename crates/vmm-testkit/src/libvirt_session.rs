//! The libvirt of one user, `qemu:///session`, in folders of one test.
//!
//! ```text
//!   setpriv: the user nobody ── HOME, XDG_RUNTIME_DIR ──► the test's folder
//!      │                          run/libvirt/libvirt-sock, home/.config/libvirt, home/.cache
//!      ├─ virtlogd, libvirtd   below a reaper, as in [`crate::libvirtd`];
//!      │                       or started by libvirt itself for its first client
//!      └─ virsh, and the daemon under test, in the same environment
//! ```
//!
//! Root has no libvirt of this kind, so the test runs it as another user. Dropping the value ends
//! every process that was started in this environment.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

use crate::libvirtd::{REAPER, START_TIMEOUT, pause, qemus_that};

/// The user that runs libvirt.
const USER: &str = "nobody";
/// The script that runs below the reaper.
const SCRIPT: &str = "virtlogd & exec libvirtd";

/// The libvirt of a user, and its folder.
#[derive(Debug)]
pub struct UserLibvirt {
    dir: TempDir,
    uid: u32,
    gid: u32,
    reaper: Option<Child>,
}

impl UserLibvirt {
    /// Makes the folders and starts nothing, because libvirt starts its own libvirtd for its first
    /// client.
    ///
    /// # Errors
    /// The reason why this machine cannot run one. A test skips itself with that reason.
    pub fn asleep() -> Result<Self, String> {
        let needed = ["/usr/sbin/libvirtd", "/usr/sbin/virtlogd", "/usr/bin/virsh", "/usr/bin/setpriv"];
        if let Some(missing) = needed.iter().find(|program| !Path::new(program).exists()) {
            return Err(format!("{missing} is not installed; `make setup` installs it"));
        }
        if !rustix::process::geteuid().is_root() {
            return Err("only root can become another user".to_owned());
        }
        let (uid, gid) = user()?;
        let dir = tempfile::Builder::new().prefix("ls").tempdir().map_err(|error| error.to_string())?;
        let session = Self { dir, uid, gid, reaper: None };
        for folder in ["run", "home"] {
            fs::create_dir(session.dir.path().join(folder)).map_err(|error| error.to_string())?;
            session.give(&session.dir.path().join(folder));
        }
        session.give(session.dir.path());
        Ok(session)
    }

    /// Makes the folders and starts a libvirtd, and waits until it answers.
    ///
    /// # Errors
    /// The reason why this machine cannot run one. A test skips itself with that reason.
    pub fn start() -> Result<Self, String> {
        let mut session = Self::asleep()?;
        let said = File::create(session.dir.path().join("stderr")).map_err(|error| error.to_string())?;
        let mut reaper = Command::new("python3");
        reaper.args(["-c", REAPER]).args(session.wrapper()).args(["sh", "-c", SCRIPT]);
        let reaper = reaper.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).process_group(0).spawn();
        session.reaper = Some(reaper.map_err(|error| error.to_string())?);
        let deadline = Instant::now() + START_TIMEOUT;
        while session.try_virsh(&["version"]).is_err() {
            if Instant::now() > deadline {
                let said = fs::read_to_string(session.dir.path().join("stderr")).unwrap_or_default();
                return Err(format!("the user's libvirtd does not come up: {said}"));
            }
            pause();
        }
        Ok(session)
    }

    /// Returns the path of the socket, which libvirt chooses.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/libvirt/libvirt-sock")
    }

    /// Returns the program and arguments that run a following command as the user, in the session's
    /// environment.
    #[must_use]
    pub fn wrapper(&self) -> Vec<String> {
        let user = [format!("--reuid={}", self.uid), format!("--regid={}", self.gid)];
        let home = format!("HOME={}", self.dir.path().join("home").display());
        let mut words = vec!["setpriv".to_owned()];
        words.extend(user);
        words.extend(["--clear-groups", "env"].map(str::to_owned));
        // These variables would lead libvirt to folders outside the session.
        for variable in ["XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"] {
            words.extend(["-u", variable].map(str::to_owned));
        }
        words.extend([home, self.mark()]);
        words
    }

    fn mark(&self) -> String {
        format!("XDG_RUNTIME_DIR={}", self.dir.path().join("run").display())
    }

    /// Makes the user the owner of a file or folder.
    ///
    /// # Panics
    /// If the owner cannot be changed.
    pub fn give(&self, path: &Path) {
        chown(path, Some(self.uid), Some(self.gid)).expect("root may give files away");
    }

    /// Returns true if the user may run `program`.
    #[must_use]
    pub fn may_run(&self, program: &Path) -> bool {
        let mut test = self.command("test");
        test.arg("-x").arg(program).status().is_ok_and(|status| status.success())
    }

    /// Runs virsh as the user and returns its output. Starts no libvirtd.
    ///
    /// # Panics
    /// If virsh fails.
    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args).unwrap_or_else(|said| unreachable!("virsh {args:?}: {said}"))
    }

    fn try_virsh(&self, args: &[&str]) -> Result<String, String> {
        let mut virsh = self.command("virsh");
        // Without the variable virsh would start a libvirtd by itself.
        virsh.args(["--quiet", "--connect", "qemu:///session"]).args(args).env("LIBVIRT_AUTOSTART", "0");
        let output = virsh.output().map_err(|error| error.to_string())?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    fn command(&self, program: &str) -> Command {
        let wrapper = self.wrapper();
        let mut command = Command::new(&wrapper[0]);
        command.args(&wrapper[1..]).arg(program).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// Returns the process ids of the session's QEMUs. Their monitors are in the user's home, so
    /// their arguments contain its path.
    ///
    /// The search of `vmm-host` does not return these processes, because they belong to another
    /// user.
    #[must_use]
    pub fn qemus(&self) -> Vec<u32> {
        let home = self.dir.path().join("home").into_os_string().into_encoded_bytes();
        qemus_that(|pid| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.windows(home.len()).any(|part| part == home)
        })
    }

    /// Returns the process ids of all processes that were started in this environment, and of the
    /// QEMUs.
    fn all(&self) -> Vec<u32> {
        let mark = self.mark().into_bytes();
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_ours = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark)
        };
        pids.filter(is_ours).chain(self.qemus()).collect()
    }
}

impl Drop for UserLibvirt {
    fn drop(&mut self) {
        // The processes are found by their environment, because libvirt's daemons can leave the
        // reaper's group.
        for pid in self.all().into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = kill_process(pid, Signal::KILL);
        }
        if let Some(mut reaper) = self.reaper.take() {
            // The id of the group is the reaper's. It cannot belong to another group, because the
            // reaper is reaped by the wait below.
            if let Some(group) = Pid::from_raw(reaper.id().cast_signed()) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = reaper.wait();
        }
    }
}

/// Returns the user id and group id of [`USER`].
fn user() -> Result<(u32, u32), String> {
    let known = fs::read_to_string("/etc/passwd").map_err(|error| error.to_string())?;
    let ids = known.lines().find_map(|line| {
        let mut fields = line.strip_prefix(USER)?.strip_prefix(':')?.split(':').skip(1);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    });
    ids.ok_or_else(|| format!("there is no user {USER}"))
}
