//! A VMM that is a real process without a guest. It takes QEMU's command line and speaks QEMU's
//! protocol.
//!
//! ```text
//!   daemon, with UNKEY_VMCP_QEMU_BINARY ──► fake-qemu -S … -chardev …path=<run folder>/qmp.sock
//!        │ killed and started again             │ outlives it, as every VMM does
//!        └──────────── qmp.sock ────────────────┘──► fake.state, the console's file
//! ```
//!
//! The other fakes of this crate are in the test's process and end with it. A test that kills the
//! daemon needs the real program, and VMMs that are processes, because the next daemon has to find
//! them again. It needs no hypervisor, no `/dev/kvm` and no time. The arguments of the kernel
//! control a guest ([`GuestScript`]). The state of the guest is in `fake.state`, because a test
//! must see it without the daemon and without the one connection that a QMP socket serves.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

/// The file in the run folder with the state of the guest: `prelaunch`, `running` or `paused`.
pub const STATE: &str = "fake.state";
/// The file in the run folder with the commands that came after the SHUTDOWN event, one a line. A
/// careful client sends none. Only a VMM that hangs at its end writes the file.
pub const LATE: &str = "fake.late";
/// The line that a guest prints on its console each time it starts.
pub const BANNER: &str = "fake guest: up";

/// The output of `--version`, in QEMU's form.
const VERSION: &str = "QEMU emulator version 9.0.0 (a fake)";

/// The behaviour of a guest and its VMM, as words among the kernel's arguments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestScript {
    /// `fake.deaf`: the guest ignores its power button.
    pub deaf: bool,
    /// `fake.stubborn`: the VMM refuses to power the VM off. Signals end the VMM all the same.
    pub stubborn: bool,
    /// `fake.slow-off=MS`: the time that the guest takes to power off.
    pub power_off_delay: Duration,
    /// `fake.off-after=MS`: the time after its first start at which the guest powers off by itself.
    pub own_power_off_delay: Option<Duration>,
    /// `fake.hangs`: the VMM announces its end and does not exit, as QEMU 7.2 may. Signals end it
    /// all the same.
    pub hangs: bool,
    /// `fake.unwakeable`: SIGTERM has no effect on the VMM.
    pub unwakeable: bool,
}

impl GuestScript {
    /// Parses the words of a kernel command line. Unknown words are skipped.
    fn read(kernel_args: &str) -> Self {
        let mut script = Self::default();
        for word in kernel_args.split_whitespace() {
            match word.split_once('=').unwrap_or((word, "")) {
                ("fake.deaf", _) => script.deaf = true,
                ("fake.stubborn", _) => script.stubborn = true,
                ("fake.slow-off", ms) => script.power_off_delay = millis(ms),
                ("fake.off-after", ms) => script.own_power_off_delay = Some(millis(ms)),
                ("fake.hangs", _) => script.hangs = true,
                ("fake.unwakeable", _) => script.unwakeable = true,
                _ => {}
            }
        }
        script
    }
}

fn millis(text: &str) -> Duration {
    Duration::from_millis(text.parse().unwrap_or_default())
}

/// The content of the command line.
#[derive(Debug, PartialEq, Eq)]
struct FakeQemuArguments {
    socket: PathBuf,
    console: Option<PathBuf>,
    script: GuestScript,
}

impl FakeQemuArguments {
    fn read(args: &[OsString]) -> Option<Self> {
        let (mut socket, mut console, mut script) = (None, None, GuestScript::default());
        for pair in args.windows(2) {
            let Some(value) = pair[1].to_str() else { continue };
            match pair[0].to_str() {
                Some("-chardev") if value.starts_with("socket,id=qmp,") => socket = property(value, "path="),
                Some("-chardev") => console = property(value, "logfile="),
                Some("-append") => script = GuestScript::read(value),
                _ => {}
            }
        }
        Some(Self { socket: socket?, console, script })
    }
}

/// Returns a property in QEMU's option syntax, in which a comma in a value is doubled.
fn property(text: &str, name: &str) -> Option<PathBuf> {
    let one = text.replace(",,", "\0");
    let value = one.split(',').find_map(|part| part.strip_prefix(name))?;
    Some(PathBuf::from(value.replace('\0', ",")))
}

/// The state of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FakeGuestState {
    Prelaunch,
    Running,
    Paused,
}

impl FakeGuestState {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

/// True if the machine of this process has announced its end and hangs.
static HANGS: AtomicBool = AtomicBool::new(false);

/// The machine of this process.
struct FakeQemu {
    order: FakeQemuArguments,
    guest: FakeGuestState,
    /// True if the power button was pressed and the guest has not obeyed yet.
    button: bool,
    /// The client that is served now.
    client: Option<UnixStream>,
}

/// Runs the program. `arguments` begin with the name of the program, as QEMU's do.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.get(1).map(OsString::as_os_str) == Some(OsStr::new("--version")) {
        return if writeln!(io::stdout(), "{VERSION}").is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    if arguments.windows(2).any(|pair| pair[0] == "-qmp" && pair[1] == "stdio") {
        return if answer_trial(io::stdin().lock(), io::stdout()).is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    let problem = match FakeQemuArguments::read(&arguments) {
        Some(order) => serve(order).err().map(|error| error.to_string()),
        None => Some("no QMP socket is named; this is a stand-in for QEMU, for tests".to_owned()),
    };
    if let Some(problem) = problem {
        let _ = writeln!(io::stderr(), "fake-qemu: {problem}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Answers the commands of a trial start, which has no run folder and no guest, up to `quit`.
fn answer_trial(input: impl io::BufRead, mut output: impl io::Write) -> io::Result<()> {
    for line in input.lines() {
        writeln!(output, "{}", json!({"return": {}}))?;
        if serde_json::from_str::<Value>(&line?)?["execute"] == "quit" {
            break;
        }
    }
    Ok(())
}

/// Serves one client after the other. The process ends with the machine.
fn serve(order: FakeQemuArguments) -> io::Result<()> {
    if order.script.unwakeable {
        // The signal is blocked before the first thread starts, because threads inherit the mask.
        SigSet::from(Signal::SIGTERM).thread_block()?;
    }
    let listener = UnixListener::bind(&order.socket)?;
    let machine = FakeQemu { order, guest: FakeGuestState::Prelaunch, button: false, client: None };
    machine.write_state()?;
    let machine = Arc::new(Mutex::new(machine));
    loop {
        let (client, _) = listener.accept()?;
        // An error ends the connection only, because QEMU too waits for the next client.
        let _ = attend(&machine, client);
        lock(&machine).client = None;
    }
}

fn attend(machine: &Arc<Mutex<FakeQemu>>, client: UnixStream) -> io::Result<()> {
    let mut lines = BufReader::new(client.try_clone()?);
    let late = lock(machine).beside_socket(LATE);
    {
        let mut machine = lock(machine);
        machine.client = Some(client);
        let version = json!({"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": "fake"});
        machine.say(&json!({"QMP": {"version": version, "capabilities": []}}))?;
    }
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        let command: Value = serde_json::from_str(&line)?;
        // The thread that announced the end holds the machine's lock for ever, so no command can be
        // executed any more. The file shows a test which commands still came.
        if HANGS.load(Ordering::Relaxed) {
            let mut late = fs::OpenOptions::new().append(true).create(true).open(&late)?;
            writeln!(late, "{}", command["execute"].as_str().unwrap_or_default())?;
        } else {
            FakeQemu::execute(machine, &command)?;
        }
        line.clear();
    }
    Ok(())
}

fn lock(machine: &Mutex<FakeQemu>) -> MutexGuard<'_, FakeQemu> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeQemu {
    fn execute(shared: &Arc<Mutex<Self>>, command: &Value) -> io::Result<()> {
        let mut machine = lock(shared);
        let id = &command["id"];
        let nothing = json!({});
        let answer = match command["execute"].as_str().unwrap_or_default() {
            "qmp_capabilities" | "set-action" => nothing,
            "cont" => {
                // The time until the guest powers off by itself begins with the first `cont`, as
                // its boot does.
                if machine.guest == FakeGuestState::Prelaunch
                    && let Some(delay) = machine.order.script.own_power_off_delay
                {
                    Self::power_off_after(shared, delay)?;
                }
                machine.go_on()?;
                nothing
            }
            "stop" => {
                machine.become_state(FakeGuestState::Paused)?;
                machine.event("STOP", &Value::Null)?;
                nothing
            }
            "query-status" => {
                json!({"status": machine.guest.as_str(), "running": machine.guest == FakeGuestState::Running})
            }
            "query-version" => json!({"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": "fake"}),
            "query-blockstats" => json!([]),
            "system_reset" => {
                machine.event("RESET", &json!({"guest": false, "reason": "host-qmp-system-reset"}))?;
                machine.boot()?;
                nothing
            }
            "system_powerdown" => {
                machine.button = true;
                nothing
            }
            "quit" if !machine.order.script.stubborn => {
                machine.say(&json!({"return": {}, "id": id}))?;
                // QEMU answers `quit` before it announces its end.
                machine.end("host-qmp-quit")
            }
            other => {
                let error = json!({"class": "GenericError", "desc": format!("{other} is refused")});
                return machine.say(&json!({"error": error, "id": id}));
            }
        };
        machine.say(&json!({"return": answer, "id": id}))?;
        drop(machine);
        Self::obey_button(shared)
    }

    /// Powers off, at once or after a delay, if the button was pressed and the guest runs and
    /// obeys.
    fn obey_button(shared: &Arc<Mutex<Self>>) -> io::Result<()> {
        let mut machine = lock(shared);
        let obeys = machine.button && machine.guest == FakeGuestState::Running && !machine.order.script.deaf;
        if !obeys {
            return Ok(());
        }
        // One press is one power-off, so the button is released before the delay begins.
        machine.button = false;
        let delay = machine.order.script.power_off_delay;
        if delay.is_zero() {
            machine.end("guest-shutdown");
        }
        Self::power_off_after(shared, delay)
    }

    fn power_off_after(shared: &Arc<Mutex<Self>>, delay: Duration) -> io::Result<()> {
        let shared = Arc::clone(shared);
        std::thread::Builder::new().spawn(move || {
            pause(delay);
            lock(&shared).end("guest-shutdown")
        })?;
        Ok(())
    }

    fn go_on(&mut self) -> io::Result<()> {
        if self.guest == FakeGuestState::Prelaunch {
            self.boot()?;
        }
        self.become_state(FakeGuestState::Running)?;
        self.event("RESUME", &Value::Null)
    }

    fn boot(&self) -> io::Result<()> {
        let Some(console) = &self.order.console else { return Ok(()) };
        let mut console = fs::OpenOptions::new().append(true).create(true).open(console)?;
        write!(console, "{BANNER}\r\n")
    }

    fn become_state(&mut self, guest: FakeGuestState) -> io::Result<()> {
        self.guest = guest;
        self.write_state()
    }

    fn write_state(&self) -> io::Result<()> {
        let fresh = self.beside_socket("fake.state.new");
        fs::write(&fresh, self.guest.as_str())?;
        fs::rename(fresh, self.beside_socket(STATE))
    }

    fn beside_socket(&self, name: &str) -> PathBuf {
        self.order.socket.parent().unwrap_or(Path::new("/")).join(name)
    }

    /// Ends the process like QEMU: sends the SHUTDOWN event, removes the socket, and exits. A VMM
    /// that hangs stops after the event.
    fn end(&mut self, reason: &str) -> ! {
        let guest = reason.starts_with("guest");
        // The flag is set before the event, because the client may send a command as soon as it has
        // the event.
        HANGS.store(self.order.script.hangs, Ordering::Relaxed);
        let _ = self.event("SHUTDOWN", &json!({"guest": guest, "reason": reason}));
        if self.order.script.hangs {
            loop {
                std::thread::park();
            }
        }
        let _ = fs::remove_file(&self.order.socket);
        std::process::exit(0)
    }

    fn event(&mut self, name: &str, data: &Value) -> io::Result<()> {
        let mut event = json!({"event": name, "timestamp": {"seconds": 0, "microseconds": 0}});
        if !data.is_null() {
            event["data"] = data.clone();
        }
        self.say(&event)
    }

    /// Sends a message to the client, if there is one. A client that has gone misses the message.
    fn say(&mut self, message: &Value) -> io::Result<()> {
        if let Some(client) = &mut self.client
            && client.write_all(format!("{message}\r\n").as_bytes()).is_err()
        {
            self.client = None;
        }
        Ok(())
    }
}

#[expect(clippy::disallowed_methods, reason = "a thread of a process of its own, without an executor")]
fn pause(delay: Duration) {
    std::thread::sleep(delay);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fake_reads_qemus_command_line() {
        let line =
            "fake-qemu -S -append console=ttyS0\u{20}fake.deaf\u{20}fake.slow-off=250\u{20}fake.off-after=9";
        let chardevs = [
            "pipe,id=console,path=/r/v,,m/console,logfile=/r/v,,m/console.log,logappend=on",
            "socket,id=qmp,server=on,wait=off,path=/r/v,,m/qmp.sock",
        ];
        let mut args: Vec<OsString> = line.splitn(4, ' ').map(OsString::from).collect();
        for chardev in chardevs {
            args.extend(["-chardev".into(), chardev.into()]);
        }
        let script = GuestScript {
            deaf: true,
            power_off_delay: Duration::from_millis(250),
            own_power_off_delay: Some(Duration::from_millis(9)),
            ..GuestScript::default()
        };
        let expected = FakeQemuArguments {
            socket: "/r/v,m/qmp.sock".into(),
            console: Some("/r/v,m/console.log".into()),
            script,
        };
        assert_eq!(FakeQemuArguments::read(&args), Some(expected));
        assert_eq!(FakeQemuArguments::read(&args[..4]), None, "without a QMP socket it is nobody's");
    }
}
