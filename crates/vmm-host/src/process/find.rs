//! Finds processes by the run folder that their arguments name.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmm_core::store::ProcessIdentity;

use super::{Process, procfs};

/// The age up to which a process may not have exec'ed yet.
const EXEC_LIMIT: Duration = Duration::from_secs(1);
/// The interval between two checks of a process that may not have exec'ed yet.
const EXEC_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// A process whose arguments match a search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessMatch {
    /// The identity of the process. [`super::adopt`] makes a handle of it.
    pub identity: ProcessIdentity,
    /// The real user id of the process. No user can start a process with another user's id, so this
    /// is the one fact here that cannot be forged.
    pub uid: u32,
    /// The program's real path; `None` where the kernel hides it, as for another user's process and
    /// for a program with file capabilities.
    pub exe: Option<PathBuf>,
    /// The arguments, beginning with the program's name.
    pub args: Vec<OsString>,
}

impl ProcessMatch {
    /// Returns the file name of the program: of the real path, or of the first argument where the
    /// path is hidden. A program that a distribution has wrapped into a script (`.NAME-wrapped` on
    /// NixOS) has the name of the script.
    pub fn program_name(&self) -> Option<&OsStr> {
        program_name(self.exe.as_deref(), &self.args)
    }

    /// Returns true if the program is called one of `names`.
    pub fn runs_one_of(&self, names: &[impl AsRef<str>]) -> bool {
        let name = self.program_name().and_then(OsStr::to_str);
        name.is_some_and(|name| names.iter().any(|known| known.as_ref() == name))
    }

    /// Returns the paths below `dir` that the arguments name, relative to `dir`: `0a/s` of `/run/x`
    /// for `path=/run/x/0a/s,server=on`.
    pub fn paths_below(&self, dir: &Path) -> BTreeSet<PathBuf> {
        let dir = dir.as_os_str().as_bytes();
        self.args.iter().flat_map(|arg| paths_below(arg.as_bytes(), dir)).collect()
    }
}

/// Returns the file name of the program that `process` runs, as [`ProcessMatch::program_name`]
/// does.
///
/// # Errors
/// Returns the kernel's error; `NotFound` where the process has ended.
pub fn program_name_of(process: &Process) -> io::Result<OsString> {
    let exe = match process.executable() {
        Ok(exe) => Some(exe),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
        Err(error) => return Err(error),
    };
    let args = procfs::arguments_of(process)?;
    Ok(program_name(exe.as_deref(), &args).unwrap_or_default().to_owned())
}

fn program_name<'a>(exe: Option<&'a Path>, args: &'a [OsString]) -> Option<&'a OsStr> {
    let name = match exe {
        Some(exe) => exe.file_name(),
        None => args.first().and_then(|name| Path::new(name).file_name()),
    };
    name.map(without_wrapper)
}

fn without_wrapper(name: &OsStr) -> &OsStr {
    let inner = name.as_bytes().strip_prefix(b".").and_then(|name| name.strip_suffix(b"-wrapped"));
    inner.filter(|inner| !inner.is_empty()).map_or(name, OsStr::from_bytes)
}

fn paths_below<'a>(text: &'a [u8], dir: &'a [u8]) -> impl Iterator<Item = PathBuf> + 'a {
    let dir = dir.strip_suffix(b"/").unwrap_or(dir);
    let windows = text.windows(dir.len().max(1)).enumerate();
    windows.filter_map(move |(at, window)| {
        let starts = at.checked_sub(1).is_none_or(|before| !is_path_byte(text[before]));
        let rest = text.get(at + dir.len()..)?.strip_prefix(b"/")?;
        let end = rest.iter().position(|&byte| !is_path_byte(byte)).unwrap_or(rest.len());
        (window == dir && starts && end > 0).then(|| PathBuf::from(OsStr::from_bytes(&rest[..end])))
    })
}

/// Finds every process of this daemon's user, this daemon excepted, that has an argument with
/// `needle` as a whole path or as the beginning of one. `/run/x` matches in `--api-sock=/run/x/s`
/// and in `path=/run/x,server=on`, but not in `/run/xy` or `/mnt/run/x`. Blocks.
///
/// A process that [`super::spawn`] starts shows its own arguments only after its exec. Before, the
/// process shows the daemon's arguments or none, and a daemon that is killed in between leaves such
/// a process behind. A process whose stderr is a file below `needle` is therefore looked at again
/// until it is a second old.
///
/// Processes of other users are passed over, because any user can start a program with any
/// arguments. Real user ids are compared, because a VMM may change its effective one.
///
/// # Errors
/// Returns `InvalidInput` where `needle` is not absolute, and the error of listing `/proc`.
/// Processes that end meanwhile, and hidden ones, are passed over.
pub fn find_by_argument(needle: &Path) -> io::Result<Vec<ProcessMatch>> {
    let needle = needle.as_os_str().as_bytes();
    if !needle.starts_with(b"/") || needle.len() < 2 {
        let message = "processes can only be looked for by an absolute path";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // The link in `/proc/PID/fd` names the file by its real path, so the folder's real path is
    // needed.
    let real = Path::new(OsStr::from_bytes(needle)).canonicalize();
    let is_wanted = |args: &[OsString]| args.iter().any(|arg| mentions(arg.as_bytes(), needle));
    let may_become = |pid| {
        // A process that has not exec'ed shows no argument of its own, but posix_spawn has given it
        // its stderr before the exec. The log in the run folder is stderr, and so connects the
        // process with the folder.
        let (Ok(real), Ok(stderr)) = (&real, procfs::stderr_of(pid)) else { return false };
        stderr.starts_with(real)
    };
    let ours = rustix::process::getuid().as_raw();
    let mut found = find(is_wanted, may_become)?;
    found.retain(|found| found.uid == ours);
    Ok(found)
}

/// Finds every process, this daemon excepted, that has the argument `option` followed by `value`,
/// as in `-uuid UUID`. Processes of other users are included, because libvirt runs its VMMs under a
/// user of its own. The caller must compare [`ProcessMatch::uid`] with the user of the process that
/// is meant, because any user can start a program with any arguments.
///
/// # Errors
/// Fails as [`find_by_argument`] does.
pub fn find_by_option(option: &str, value: &str) -> io::Result<Vec<ProcessMatch>> {
    find(|args| args.windows(2).any(|pair| pair[0] == option && pair[1] == value), |_| false)
}

fn find(
    is_wanted: impl Fn(&[OsString]) -> bool,
    may_become: impl Fn(u32) -> bool,
) -> io::Result<Vec<ProcessMatch>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid != std::process::id()
            && let Some(process) = examine(pid, &is_wanted, &may_become)
        {
            found.push(process);
        }
    }
    Ok(found)
}

#[expect(clippy::disallowed_methods, reason = "callers search /proc on a thread for blocking work")]
fn examine(
    pid: u32,
    is_wanted: &impl Fn(&[OsString]) -> bool,
    may_become: &impl Fn(u32) -> bool,
) -> Option<ProcessMatch> {
    // The arguments are read first, because only a few of hundreds of processes match and need
    // more.
    while !is_wanted(&procfs::arguments(pid).ok()?) {
        // A process that may not have exec'ed yet is neither a match nor ruled out. The wait is
        // bounded by the age of the process and not by a number of checks, because an exec takes
        // longer on a busy host.
        if !may_become(pid) || procfs::age(&procfs::identify(pid).ok()?)? > EXEC_LIMIT {
            return None;
        }
        std::thread::sleep(EXEC_POLL_INTERVAL);
    }
    // The facts are read one after another, and the pid could pass to another process in between.
    // If the start time is equal before and after, every fact is about one process.
    let start_ticks = procfs::stat(pid).ok()?.start_ticks;
    let args = procfs::arguments(pid).ok()?;
    let exe = procfs::exe_of(pid).ok();
    let uid = procfs::real_uid(pid).ok()?;
    if !is_wanted(&args) || procfs::stat(pid).ok()?.start_ticks != start_ticks {
        return None;
    }
    Some(ProcessMatch { identity: procfs::identity(pid, start_ticks).ok()?, uid, exe, args })
}

/// Returns true if `text` names the path `needle` or a path below it.
fn mentions(text: &[u8], needle: &[u8]) -> bool {
    let needle = needle.strip_suffix(b"/").unwrap_or(needle);
    let mut windows = text.windows(needle.len()).enumerate();
    windows.any(|(at, window)| {
        window == needle
            && at.checked_sub(1).is_none_or(|before| !is_path_byte(text[before]))
            && text.get(at + needle.len()).is_none_or(|&after| after == b'/' || !is_path_byte(after))
    })
}

/// Returns true if `byte` can be part of a path. Other bytes, such as `=`, `:`, `,` or a quote, end
/// it.
fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || !byte.is_ascii() || matches!(byte, b'/' | b'.' | b'_' | b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_paths_count_as_mentioned() {
        let needle = b"/run/vmm/vms/0a";
        for yes in [
            "/run/vmm/vms/0a",
            "/run/vmm/vms/0a/api.sock",
            "--api-socket=/run/vmm/vms/0a/api.sock",
            "unix:/run/vmm/vms/0a/qmp,server=on",
            "socket,path=/run/vmm/vms/0a,x",
            r#"{"path":"/run/vmm/vms/0a"}"#,
            "file=/other,path=/run/vmm/vms/0ab,log=/run/vmm/vms/0a/log",
        ] {
            assert!(mentions(yes.as_bytes(), needle), "{yes}");
        }
        for no in [
            "",
            "/run/vmm/vms/0",
            "/run/vmm/vms/0ab",
            "/run/vmm/vms/0a.old",
            "/mnt/run/vmm/vms/0a",
            "run/vmm/vms/0a",
        ] {
            assert!(!mentions(no.as_bytes(), needle), "{no}");
        }
    }

    #[test]
    fn a_mentioned_path_below_a_folder_ends_with_its_last_part() {
        let below = |text: &str| paths_below(text.as_bytes(), b"/run/vmm/vms").collect::<Vec<_>>();
        assert_eq!(below("socket,path=/run/vmm/vms/0a/qmp.sock,server=on"), [PathBuf::from("0a/qmp.sock")]);
        assert_eq!(
            below(r#"{"a":"/run/vmm/vms/0a","b":"/run/vmm/vms/0b/x"}"#),
            ["0a", "0b/x"].map(PathBuf::from)
        );
        for none in ["/run/vmm/vms", "/run/vmm/vms/", "/mnt/run/vmm/vms/0a", "/run/vmm/vmsx/0a", ""] {
            assert_eq!(below(none), Vec::<PathBuf>::new(), "{none}");
        }
    }

    #[test]
    fn a_wrapped_program_has_the_name_of_its_wrapper() {
        for (file, name) in [
            (".qemu-system-x86_64-wrapped", "qemu-system-x86_64"),
            ("qemu-system-x86_64", "qemu-system-x86_64"),
            (".-wrapped", ".-wrapped"),
            (".hidden", ".hidden"),
            ("x-wrapped", "x-wrapped"),
        ] {
            assert_eq!(without_wrapper(OsStr::new(file)), OsStr::new(name));
        }
    }

    /// A process of another user with chosen arguments. Ends with the test.
    struct Theirs(std::process::Child);

    impl Drop for Theirs {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_of_another_user_is_never_ours() {
        use std::os::unix::process::CommandExt;
        if !rustix::process::geteuid().is_root() {
            let why = "only root can start a process as another user";
            return vmm_testkit::skip::skipped("a_process_of_another_user_is_never_ours", why);
        }
        let dir = tempfile::tempdir().unwrap();
        let marked = dir.path().join("vms");
        let start = |uid| {
            let mut command = std::process::Command::new("tail");
            command.args(["-f", "/dev/null"]).arg(format!("--pid={}", std::process::id()));
            // The name of the program is an argument like any other.
            command.arg0(&marked).uid(uid).gid(uid);
            Theirs(command.spawn().unwrap())
        };
        let (ours, theirs) = (start(0), start(12_345));
        let named =
            |process: &Theirs| procfs::arguments(process.0.id()).unwrap().iter().any(|arg| *arg == marked);
        while !named(&ours) || !named(&theirs) {
            std::thread::yield_now();
        }
        let found = find_by_argument(&marked).unwrap();
        assert_eq!(found.iter().map(|found| found.identity.pid).collect::<Vec<_>>(), [ours.0.id()]);
    }

    #[test]
    fn an_option_is_found_with_its_separate_value() {
        let mut child =
            std::process::Command::new("tail").args(["-f", "/dev/null", "-s", "86399"]).spawn().unwrap();
        let pids = |option, value| {
            let found = find_by_option(option, value).unwrap();
            found.into_iter().map(|found| found.identity.pid).collect::<Vec<_>>()
        };
        // Between fork and exec the child still has the arguments of this program.
        while !pids("-s", "86399").contains(&child.id()) {
            assert!(child.try_wait().unwrap().is_none());
        }
        assert!(!pids("86399", "-s").contains(&child.id()));
        assert!(!pids("-s", "8639").contains(&child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_relative_or_empty_path_is_refused() {
        assert!(find_by_argument(Path::new("x")).is_err());
        assert!(find_by_argument(Path::new("/")).is_err());
    }
}
