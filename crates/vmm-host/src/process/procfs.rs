//! Reads facts about processes from `/proc`.

use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use vmm_core::store::{Namespaces, ProcessIdentity};

/// The use of the host by a process, all its threads together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessUsage {
    /// CPU time in user and kernel mode since the start, in steps of a clock tick (usually 10 ms).
    pub cpu_time: Duration,
    /// Memory in use now, in bytes.
    pub resident_bytes: u64,
}

/// The fields of `/proc/PID/stat` that this program uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProcessStat {
    /// User and kernel time, in clock ticks.
    pub(super) cpu_ticks: u64,
    /// Start time in clock ticks since the host booted.
    pub(super) start_ticks: u64,
}

/// Reads `/proc/PID/stat`.
pub(super) fn stat(pid: u32) -> io::Result<ProcessStat> {
    let text = read(pid, "stat")?;
    parse_stat(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has an unknown form"))
    })
}

/// Parses `/proc/PID/stat`. The second field is the program's name in parentheses and may hold any
/// byte, so fields are counted from the last closing parenthesis.
fn parse_stat(text: &[u8]) -> Option<ProcessStat> {
    let after_name = text.iter().rposition(|&byte| byte == b')')? + 1;
    let rest = std::str::from_utf8(text.get(after_name..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // proc(5) counts from 1 and from the pid; `rest` begins with field 3.
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(ProcessStat { cpu_ticks: number(14)?.saturating_add(number(15)?), start_ticks: number(22)? })
}

/// Reads the number of resident pages from `statm`. The number in `stat` lacks the pages that each
/// CPU has yet to add up, which can be all pages of a small process.
fn resident_pages(pid: u32) -> io::Result<u64> {
    let text = read(pid, "statm")?;
    let pages =
        std::str::from_utf8(&text).ok().and_then(|text| text.split_ascii_whitespace().nth(1)?.parse().ok());
    pages.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/statm has an unknown form"))
    })
}

/// Reads the arguments of a process. Empty for a zombie and for a kernel thread.
pub(super) fn arguments(pid: u32) -> io::Result<Vec<std::ffi::OsString>> {
    let text = read(pid, "cmdline")?;
    let text = text.strip_suffix(b"\0").unwrap_or(&text);
    if text.is_empty() {
        return Ok(Vec::new());
    }
    Ok(text.split(|&byte| byte == 0).map(|part| std::ffi::OsString::from_vec(part.to_vec())).collect())
}

/// Returns the arguments of a process, beginning with its own name.
///
/// # Errors
/// Returns the kernel's error; `NotFound` where the process has ended.
pub fn arguments_of(process: &super::Process) -> io::Result<Vec<std::ffi::OsString>> {
    let arguments = arguments(process.pid())?;
    process.still_the_same()?;
    Ok(arguments)
}

/// Reads the id of the process that has the thread `task`.
pub(super) fn thread_group(task: u32) -> io::Result<Option<u32>> {
    let text = read(task, "status")?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok()))
}

/// Reads the real user id of a process.
pub(super) fn real_uid(pid: u32) -> io::Result<u32> {
    let text = read(pid, "status")?;
    let text = String::from_utf8_lossy(&text);
    let uid = text
        .lines()
        .find_map(|line| line.strip_prefix("Uid:")?.split_ascii_whitespace().next()?.parse().ok());
    uid.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/status has an unknown form"))
    })
}

/// Reads a file of `/proc/PID`. The kernel answers ESRCH for a process that ends during the read,
/// which becomes `NotFound`, because callers treat it like a missing file.
fn read(pid: u32, file: &str) -> io::Result<Vec<u8>> {
    fs::read(format!("/proc/{pid}/{file}")).map_err(gone_is_not_found)
}

fn gone_is_not_found(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) {
        return io::Error::new(io::ErrorKind::NotFound, error);
    }
    error
}

/// Reads the use of the host by a process.
///
/// # Errors
/// Returns the kernel's error; `NotFound` where there is no such process.
pub fn usage(pid: u32) -> io::Result<ProcessUsage> {
    let stat = stat(pid)?;
    let hertz = rustix::param::clock_ticks_per_second().max(1);
    let whole = Duration::from_secs(stat.cpu_ticks / hertz);
    let part = Duration::from_nanos((stat.cpu_ticks % hertz).saturating_mul(1_000_000_000) / hertz);
    let page_size = rustix::param::page_size() as u64;
    Ok(ProcessUsage {
        cpu_time: whole + part,
        resident_bytes: resident_pages(pid)?.saturating_mul(page_size),
    })
}

/// Returns the age of a process on the clock that counts from the host's boot and that nobody sets.
/// `None` where the process belongs to an earlier boot.
pub fn age(identity: &ProcessIdentity) -> Option<Duration> {
    if boot_id().ok()? != identity.boot_id {
        return None;
    }
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(now.tv_sec.try_into().ok()?, now.tv_nsec.try_into().ok()?);
    let hertz = rustix::param::clock_ticks_per_second().max(1);
    let ticks = identity.start_ticks;
    let part = Duration::from_nanos((ticks % hertz).saturating_mul(1_000_000_000) / hertz);
    Some(now.saturating_sub(Duration::from_secs(ticks / hertz) + part))
}

/// Returns the real path of the program that a process runs. A program whose file was replaced
/// since keeps the old path.
///
/// # Errors
/// Returns the kernel's error: `NotFound` where there is no such process, `PermissionDenied` where
/// it belongs to another user or its program has file capabilities that the daemon lacks.
pub fn exe_of(pid: u32) -> io::Result<PathBuf> {
    let link = fs::read_link(format!("/proc/{pid}/exe")).map_err(gone_is_not_found)?;
    Ok(without_deleted(&link))
}

/// Returns the real path of the file that a process has as stderr.
pub(super) fn stderr_of(pid: u32) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/fd/2")).map_err(gone_is_not_found)
}

/// Cuts off the mark that the kernel puts behind the path of a removed file, as an upgrade leaves
/// one.
fn without_deleted(link: &Path) -> PathBuf {
    let bytes = link.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

/// Returns the identity of the process that has `pid` now. This alone proves nothing:
/// [`super::adopt`] makes a handle, if the process is still there.
///
/// # Errors
/// Returns the kernel's error; `NotFound` where there is no such process or `/proc` hides it.
pub fn identify(pid: u32) -> io::Result<ProcessIdentity> {
    identity(pid, stat(pid)?.start_ticks)
}

/// Returns the identity of the process that has `pid` now and started at `start_ticks`.
pub(super) fn identity(pid: u32, start_ticks: u64) -> io::Result<ProcessIdentity> {
    Ok(ProcessIdentity { pid, start_ticks, boot_id: boot_id()?, namespaces: Some(namespaces()?) })
}

/// Returns the namespaces in which this process sees pids and start times. Read once, because a
/// process never leaves them.
///
/// # Errors
/// Returns the kernel's error for `/proc/self/ns/pid`.
pub(super) fn namespaces() -> io::Result<Namespaces> {
    static NAMESPACES: OnceLock<Namespaces> = OnceLock::new();
    if let Some(known) = NAMESPACES.get() {
        return Ok(*known);
    }
    let inode = |name: &str| fs::metadata(format!("/proc/self/ns/{name}")).map(|facts| facts.ino());
    let time = match inode("time") {
        // Linux before 5.6 has no time namespaces.
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        time => time?,
    };
    let seen = Namespaces { pid: inode("pid")?, time };
    Ok(*NAMESPACES.get_or_init(|| seen))
}

/// Returns the id of the host's present boot. Read once.
///
/// # Errors
/// Returns the error of reading `/proc/sys/kernel/random/boot_id`.
pub fn boot_id() -> io::Result<String> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(known) = BOOT_ID.get() {
        return Ok(known.clone());
    }
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT_ID.get_or_init(|| text.trim().to_owned()).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_have_spaces_and_parentheses() {
        let text = b"42 (a) S 1 (x) Z 9) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 1 0 123456 4096000 250 1844 1 1\n";
        let stat = parse_stat(text).unwrap();
        assert_eq!(stat, ProcessStat { cpu_ticks: 12, start_ticks: 123_456 });
    }

    #[test]
    fn truncated_process_data_is_refused() {
        for text in [
            &b""[..],
            b"42 (a",
            b"42 (a) S 1 2",
            b"42 (a) S 1 42 42 0 -1 4 100 0 0 0 x 5 0 0 20 0 1 0 1 2 3",
            b"42 (a) S 1 42 42 0 -1 4 100 0 0 0 7 5 0 0 20 0 1 0",
        ] {
            assert_eq!(parse_stat(text), None, "{:?}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn the_identity_of_this_process_can_be_read() {
        let pid = std::process::id();
        assert!(usage(pid).unwrap().resident_bytes > 0);
        assert_eq!(exe_of(pid).unwrap(), std::env::current_exe().unwrap());
        assert_eq!(arguments(pid).unwrap(), std::env::args_os().collect::<Vec<_>>());
        assert_eq!(thread_group(pid).unwrap(), Some(pid));
        assert_eq!(boot_id().unwrap().len(), 36);
        let start_ticks = stat(pid).unwrap().start_ticks;
        let identity = ProcessIdentity { pid, start_ticks, boot_id: boot_id().unwrap(), namespaces: None };
        let first = ProcessIdentity { start_ticks: 0, ..identity.clone() };
        assert!(age(&identity).unwrap() <= age(&first).unwrap(), "it is no older than the host");
        // The kernel rounds this up.
        let up = Duration::from_secs(rustix::system::sysinfo().uptime.cast_unsigned().saturating_sub(1));
        assert!(age(&first).unwrap() >= up, "the first process is as old as the host");
        assert_eq!(age(&ProcessIdentity { boot_id: "another".to_owned(), ..identity }), None);
    }

    #[test]
    fn a_missing_process_is_not_found() {
        // Above the highest pid that a kernel can give (2^22).
        let nobody = 4_194_305;
        assert_eq!(stat(nobody).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(usage(nobody).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(exe_of(nobody).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_process_of_a_removed_program_keeps_its_name() {
        assert_eq!(without_deleted(Path::new("/usr/bin/qemu (deleted)")), Path::new("/usr/bin/qemu"));
        assert_eq!(without_deleted(Path::new("/usr/bin/qemu")), Path::new("/usr/bin/qemu"));
    }
}
