//! Tests of real processes: they are started, signalled, adopted, confused with each other, and
//! found.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Pid;
use vmm_core::store::{Namespaces, ProcessScope};

use super::*;

/// Ends a process that is not a child of the test, even if the test fails.
struct Killed(Process);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::KILL);
    }
}

/// A shell script whose output goes to `log` in a folder of its own.
struct Script {
    dir: tempfile::TempDir,
    guard: ProcessGuard,
}

impl Script {
    async fn start(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let guard = spawn_guarded(sh(dir.path(), script)).await.unwrap();
        Self { dir, guard }
    }

    fn output(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Waits for the first line of output; every script prints one at once.
    async fn first_line(&self) -> String {
        loop {
            if let Some((line, _)) = self.output().split_once('\n') {
                return line.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn sh(dir: &Path, script: &str) -> Command {
    Command::new("/bin/sh", ["-c", script], dir.join("log"))
}

fn identity_of(pid: u32) -> ProcessIdentity {
    let start_ticks = procfs::stat(pid).unwrap().start_ticks;
    ProcessIdentity { pid, start_ticks, boot_id: boot_id().unwrap(), namespaces: None }
}

#[tokio::test]
async fn an_exit_is_published_to_every_waiter() {
    let script = Script::start("exit 3").await;
    let process = script.guard.process();
    let expected = ProcessExit { status: Some(ExitStatus::Code(3)) };
    let (one, two) = tokio::join!(process.wait(), process.wait());
    assert_eq!((one, two), (expected, expected));
    assert_eq!(process.exit(), Some(expected));
    assert!(process.has_ended());
    process.signal(Signal::TERM).unwrap();
    assert!(matches!(adopt(process.identity()), Lookup::Gone));
    assert_eq!(process.usage().unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[tokio::test]
async fn a_wait_may_be_cancelled() {
    let script = Script::start("exec sleep 600").await;
    assert_eq!(script.guard.wait_for(Duration::from_millis(1)).await, None);
    assert_eq!((script.guard.exit(), script.guard.has_ended()), (None, false));
    let exit = script.guard.kill_and_wait(Duration::from_secs(60)).await.unwrap();
    assert_eq!(exit.status, Some(ExitStatus::Signal(9)));
}

#[tokio::test]
async fn a_stopped_process_can_be_killed() {
    let script = Script::start("exec sleep 600").await;
    script.guard.signal(Signal::STOP).unwrap();
    script.guard.kill_and_wait(Duration::from_secs(60)).await.unwrap();
}

#[tokio::test]
async fn a_dropped_guard_kills_its_process() {
    let Script { dir: _dir, guard } = Script::start("exec sleep 600").await;
    let process = guard.process().clone();
    drop(guard);
    assert_eq!(process.wait().await.status, Some(ExitStatus::Signal(9)));
}

#[tokio::test]
async fn a_child_inherits_no_descriptors_or_variables() {
    let script = Script::start("ls /proc/$$/fd; exec /usr/bin/env").await;
    let pid = Pid::from_raw(i32::try_from(script.guard.pid()).unwrap());
    // A process group of its own keeps a Ctrl+C for the daemon away from its VMs. The test fails
    // with ESRCH only if the process was reaped.
    if let Ok(group) = rustix::process::getpgid(pid) {
        assert_eq!(Some(group), pid);
    }
    assert!(script.guard.wait().await.is_success());
    let output = script.output();
    let (descriptors, variables): (Vec<&str>, Vec<&str>) =
        output.lines().partition(|line| line.parse::<u32>().is_ok());
    assert!(descriptors.len() >= 3, "{output}");
    for descriptor in descriptors {
        let ours = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap_or_default();
        let flags = ours
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .map_or(0, |flags| u32::from_str_radix(flags.trim(), 8).unwrap());
        // Descriptors that the test's parent left open without O_CLOEXEC are not the daemon's.
        let inherited_by_all = !ours.is_empty() && flags & 0o2_000_000 == 0;
        assert!(matches!(descriptor, "0" | "1" | "2") || inherited_by_all, "descriptor {descriptor}");
    }
    for variable in variables {
        let name = variable.split('=').next().unwrap();
        // The shell itself sets PWD, OLDPWD, SHLVL and _.
        let shell = ["PWD", "OLDPWD", "SHLVL", "_"];
        let known = ["PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ"];
        assert!(shell.contains(&name) || known.contains(&name), "{variable}");
    }
}

#[tokio::test]
async fn output_goes_to_its_file_which_is_private() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("in"), "typed\n").unwrap();
    let console = dir.path().join("console");
    std::fs::write(&console, "before\n").unwrap();
    let mut command = sh(dir.path(), "read line; echo \"$line\"; echo oops >&2");
    command.stdin = Stdin::File(std::fs::File::open(dir.path().join("in")).unwrap().into());
    command.stdout = Some(console.clone());
    assert!(spawn(command).await.unwrap().wait().await.is_success());
    assert_eq!(std::fs::read_to_string(&console).unwrap(), "before\ntyped\n");
    let log = dir.path().join("log");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "oops\n");
    assert_eq!(std::fs::metadata(&log).unwrap().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn output_can_be_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = sh(dir.path(), "echo out; echo err >&2");
    command.stdout = Some("/dev/null".into());
    assert!(spawn(command).await.unwrap().wait().await.is_success());
    assert_eq!(std::fs::read_to_string(dir.path().join("log")).unwrap(), "err\n");
    // Other devices are refused, because the child could read and change a terminal, for example.
    let mut command = sh(dir.path(), "true");
    command.stdout = Some("/dev/zero".into());
    assert_eq!(spawn(command).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_program_that_cannot_start_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let error = |program: &str, log: &Path| {
        let command = Command::new(program, [""; 0], log);
        async move { spawn(command).await.unwrap_err() }
    };
    let log = dir.path().join("log");
    assert_eq!(error("/nowhere/vmm", &log).await.kind(), io::ErrorKind::NotFound);
    assert_eq!(error("sh", &log).await.kind(), io::ErrorKind::InvalidInput, "never looked up by the child");
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let text = error("/bin/true", &fifo).await.to_string();
    assert!(text.contains("fifo"), "a FIFO must neither hold us nor be used: {text}");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
    error("/bin/true", &link).await;
    assert!(!dir.path().join("elsewhere").exists());
}

#[tokio::test]
async fn a_process_of_another_parent_can_be_adopted() {
    let script = Script::start("sleep 600 & echo $!; wait").await;
    let identity = identity_of(script.first_line().await.parse().unwrap());
    let Lookup::Alive(process) = adopt(&identity) else { panic!("it is there") };
    let process = Killed(process);
    assert_eq!(process.0.kill_and_wait(Duration::from_secs(60)).await.unwrap(), ProcessExit::UNKNOWN);
    assert!(matches!(adopt(&identity), Lookup::Gone));
    script.guard.wait().await;
}

#[tokio::test]
async fn only_the_recorded_process_is_adopted() {
    let script = Script::start("exec sleep 600").await;
    let identity = script.guard.identity().clone();
    let Lookup::Alive(again) = adopt(&identity) else { panic!("it is there") };
    assert_eq!(again.identity(), &identity);
    assert!(again.usage().unwrap().resident_bytes > 0);

    let recycled = ProcessIdentity { start_ticks: identity.start_ticks - 1, ..identity.clone() };
    assert!(matches!(adopt(&recycled), Lookup::Gone), "the pid is another's");
    let rebooted = ProcessIdentity { boot_id: "another boot".to_owned(), ..identity.clone() };
    assert!(matches!(adopt(&rebooted), Lookup::Gone), "the host was rebooted");
    let nobody = ProcessIdentity { pid: 4_194_305, ..identity.clone() };
    assert!(matches!(adopt(&nobody), Lookup::Gone), "no such pid");
    for pid in [0, 1, u32::MAX] {
        let wrong = ProcessIdentity { pid, ..identity.clone() };
        assert!(matches!(adopt(&wrong), Lookup::Unprovable(_)), "{pid}");
    }

    script.guard.kill_and_wait(Duration::from_secs(60)).await.unwrap();
    assert_eq!(again.wait().await, ProcessExit::UNKNOWN, "the parent gets the status, an adopter does not");
}

/// Counts the pidfds for `pid` in this process.
fn pidfds_of(pid: u32) -> usize {
    let wanted = format!("Pid:\t{pid}");
    let infos = std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    let infos = infos.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    infos.filter(|info| info.lines().any(|line| line == wanted)).count()
}

#[tokio::test]
async fn a_dropped_handle_leaves_no_descriptor_and_no_task() {
    let script = Script::start("exec sleep 600").await;
    let before = pidfds_of(script.guard.pid());
    for _ in 0..100 {
        assert!(matches!(adopt(script.guard.identity()), Lookup::Alive(_)));
    }
    // A task ends when the runtime runs it next.
    let left = tokio::time::timeout(Duration::from_secs(60), async {
        while pidfds_of(script.guard.pid()) > before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    left.await.expect("the descriptors of dropped handles are closed while the process lives");
    let Lookup::Alive(kept) = adopt(script.guard.identity()) else { panic!("it is there") };
    script.guard.kill_and_wait(Duration::from_secs(60)).await.unwrap();
    assert_eq!(kept.wait().await, ProcessExit::UNKNOWN, "a handle that is kept still hears of the end");
}

#[tokio::test]
async fn a_process_recorded_in_another_namespace_is_unproven() {
    let script = Script::start("exec sleep 600").await;
    let identity = script.guard.identity().clone();
    let here = identity.namespaces.expect("what is started now is recorded with its namespaces");
    for other in [Namespaces { pid: here.pid + 1, ..here }, Namespaces { time: here.time + 1, ..here }] {
        // Neither the process with this pid nor its absence proves anything.
        for pid in [identity.pid, 4_194_305] {
            let elsewhere = ProcessIdentity { pid, namespaces: Some(other), ..identity.clone() };
            let Lookup::Unprovable(why) = adopt(&elsewhere) else { panic!("{elsewhere:?}") };
            assert!(why.contains("namespace"), "{why}");
        }
        let rebooted = ProcessIdentity {
            boot_id: "another boot".to_owned(),
            namespaces: Some(other),
            ..identity.clone()
        };
        assert!(matches!(adopt(&rebooted), Lookup::Gone), "no process outlives its host");
    }
    let older = ProcessIdentity { namespaces: None, ..identity };
    assert!(matches!(adopt(&older), Lookup::Alive(_)), "records of earlier releases do not tell");
}

#[test]
fn a_search_proves_nothing_about_another_namespace() {
    let here = scope().unwrap();
    let namespaces = here.namespaces;
    for other in [
        Namespaces { pid: namespaces.pid + 1, ..namespaces },
        Namespaces { time: namespaces.time + 1, ..namespaces },
    ] {
        let elsewhere = ProcessScope { namespaces: other, ..here.clone() };
        assert!(can_search(Some(&elsewhere)).unwrap_err().contains("namespace"), "{elsewhere:?}");
        let rebooted = ProcessScope { boot_id: "another boot".to_owned(), ..elsewhere };
        assert_eq!(can_search(Some(&rebooted)), Ok(()), "no process outlives its host");
    }
    assert_eq!(can_search(Some(&here)), Ok(()));
    assert_eq!(can_search(None), Ok(()), "records of earlier releases do not tell");
}

#[test]
fn another_pid_namespace_has_another_inode() {
    let ours = procfs::namespaces().unwrap();
    let theirs = std::process::Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "stat",
            "-Lc",
            "%i",
            "/proc/self/ns/pid_for_children",
        ])
        .output();
    let theirs = match theirs {
        Ok(reported) if reported.status.success() => String::from_utf8(reported.stdout).unwrap(),
        refused => {
            let why = format!("unshare --pid is not possible here: {refused:?}");
            return vmm_testkit::skip::skipped("another_pid_namespace_has_another_inode", &why);
        }
    };
    assert_ne!(theirs.trim().parse::<u64>().unwrap(), ours.pid);
}

#[test]
fn a_child_that_cannot_be_monitored_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    // A runtime that has shut down watches no descriptor.
    drop(runtime);
    let _entered = handle.enter();
    let marked = dir.path().join("marked");
    std::fs::write(&marked, "").unwrap();
    let command =
        Command::new("/usr/bin/tail", [OsStr::new("-f"), marked.as_os_str()], dir.path().join("log"));
    start_guarded(command).expect_err("no task could report its end");
    let left = find_by_argument(&marked).unwrap();
    for found in &left {
        let _ = rustix::process::kill_process(
            Pid::from_raw(found.identity.pid.cast_signed()).unwrap(),
            Signal::KILL,
        );
    }
    assert_eq!(left, [], "it was killed");
}

#[tokio::test]
async fn a_pid_reused_by_a_thread_counts_as_gone() {
    let (reported, thread) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let worker = std::thread::spawn(move || {
        reported.send(rustix::thread::gettid()).unwrap();
        let _ = ended.recv();
    });
    let thread = u32::try_from(thread.recv().unwrap().as_raw_nonzero().get()).unwrap();
    let lookup = adopt(&identity_of(thread));
    drop(end);
    worker.join().unwrap();
    assert!(matches!(lookup, Lookup::Gone), "{lookup:?}");
}

#[tokio::test]
async fn a_zombie_counts_as_gone() {
    let dir = tempfile::tempdir().unwrap();
    let gate = dir.path().join("gate");
    rustix::fs::mkfifoat(rustix::fs::CWD, &gate, rustix::fs::Mode::RWXU).unwrap();
    let gate_text = gate.display();
    // The parent becomes a sleep, which never reaps. Only then may the child end.
    let script = Script::start(&format!("(read go < {gate_text}) & echo $!; exec sleep 600")).await;
    let pid = script.first_line().await.parse().unwrap();
    let identity = identity_of(pid);
    while procfs::arguments(script.guard.pid()).unwrap().len() != 2 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    std::fs::write(&gate, "go\n").unwrap();
    while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") Z ") {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(matches!(adopt(&identity), Lookup::Gone));
}

#[test]
fn a_process_outlives_the_runtime_that_started_it() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let first = runtime();
    let process = first.block_on(spawn(sh(dir.path(), "exec sleep 600"))).unwrap();
    let kept = Killed(process.clone());
    drop(first);
    assert!(!process.has_ended());
    runtime().block_on(async {
        let Lookup::Alive(adopted) = adopt(process.identity()) else { panic!("it is there") };
        adopted.kill_and_wait(Duration::from_secs(60)).await.unwrap();
    });
    drop(kept);
}

#[tokio::test]
async fn a_process_is_found_by_its_run_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("vms/0a");
    std::fs::create_dir_all(&folder).unwrap();
    let log = folder.join("log");
    let tail = find_tail();
    let arguments = |path: &Path| vec!["-f".into(), path.as_os_str().to_owned()];
    let user = spawn_guarded(Command::new(&tail, arguments(&log), &log)).await.unwrap();
    let other = dir.path().join("vms/0ab");
    std::fs::write(&other, "").unwrap();
    let bystander = spawn_guarded(Command::new(&tail, arguments(&other), &log)).await.unwrap();

    let found = find_by_argument(&folder).unwrap();
    assert!(!user.has_ended() && !bystander.has_ended());
    let pids: BTreeSet<u32> = found.iter().map(|found| found.identity.pid).collect();
    assert!(pids.contains(&user.pid()) && !pids.contains(&bystander.pid()), "{found:?}");
    let found = found.iter().find(|found| found.identity.pid == user.pid()).unwrap();
    assert_eq!(&found.identity, user.identity());
    assert_eq!(found.exe, Some(user.executable().unwrap()));
    assert_eq!(found.args[1..], ["-f".into(), log.clone().into_os_string()]);
    assert!(found.program_name().is_some());

    user.kill_and_wait(Duration::from_secs(60)).await.unwrap();
    assert!(find_by_argument(&folder).unwrap().is_empty());
}

#[tokio::test]
async fn a_process_is_found_from_the_moment_of_its_start() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    // The kernel wakes the parent before it has copied the child's arguments, so some of a hundred
    // children show none yet.
    for _ in 0..100 {
        let arguments = ["-f".into(), log.clone().into_os_string()];
        let user = start_guarded(Command::new(find_tail(), arguments, &log)).unwrap();
        let found = find_by_argument(dir.path()).unwrap();
        assert!(found.iter().any(|found| &found.identity == user.identity()), "{user:?}, {found:?}");
    }
}

#[tokio::test]
async fn a_search_waits_for_a_process_before_its_exec() {
    let dir = tempfile::tempdir().unwrap();
    // The folder is reached by another path, as /run is by /var/run.
    let link = dir.path().join("link");
    let folder = dir.path().join("vms/0a");
    std::fs::create_dir_all(&folder).unwrap();
    std::os::unix::fs::symlink(&folder, &link).unwrap();
    // The shell's own arguments do not name the folder. Those of the program that it becomes do.
    let script = "sleep 0.2; real=$(readlink /proc/$$/fd/2); exec tail -f \"${real%/vms/0a/log}/link/log\"";
    let on_its_way = spawn_guarded(Command::new("/bin/sh", ["-c", script], link.join("log"))).await.unwrap();

    let found = find_by_argument(&link).unwrap();
    assert!(!on_its_way.has_ended());
    let found = found.iter().find(|found| &found.identity == on_its_way.identity()).unwrap();
    assert_eq!(found.args[1..], ["-f".into(), link.join("log").into_os_string()]);
}

fn find_tail() -> PathBuf {
    crate::path::find_program("tail", Some(std::ffi::OsStr::new("/usr/bin:/bin"))).unwrap()
}

#[test]
fn a_final_close_waits_for_the_start_of_a_child() {
    let started = exec_guard();
    let closing = std::thread::spawn(|| command::close_for_good(|| STARTED.load(Ordering::SeqCst)));
    STARTED.store(true, Ordering::SeqCst);
    drop(started);
    assert!(closing.join().unwrap(), "it did not wait");
}

/// Returns true if the start that the test above plays has ended.
static STARTED: AtomicBool = AtomicBool::new(false);
