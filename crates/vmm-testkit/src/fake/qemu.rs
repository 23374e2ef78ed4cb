//! A VMM that is a real process and runs no guest: it takes QEMU's command line and speaks QEMU's protocol.
//!
//! ```text
//!   the daemon itself, with UNKEY_VMCP_QEMU_BINARY ──► fake-qemu -S … -chardev …path=<run folder>/qmp.sock …
//!        │ killed and started again                       │ outlives it, as every VMM does
//!        └──────────────── qmp.sock ──────────────────────┘──► <run folder>/fake.state, the console's file
//! ```
//!
//! The other fakes of this crate live in the test's process and die with it. Where the daemon is killed, it must be the daemon,
//! and its VMMs must be processes that it has to find again; but they need no hypervisor, no `/dev/kvm` and no time. What a
//! guest does is told by its kernel's arguments ([`Script`]). What it is doing stands in `fake.state`, so that a test knows it
//! without asking the daemon, and without taking the one connection that a QMP socket serves.

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

/// The file in the run folder that says what the guest is doing: `prelaunch`, `running` or `paused`.
pub const STATE: &str = "fake.state";
/// The file in the run folder that names, one a line, the commands that came after the end was told, which is none of a careful
/// client's. Only of a VMM that hangs then.
pub const LATE: &str = "fake.late";
/// What a guest prints on its console each time it starts.
pub const BANNER: &str = "fake guest: up";

/// What `--version` says, in QEMU's form.
const VERSION: &str = "QEMU emulator version 9.0.0 (a fake)";

/// How a guest and its VMM behave, as words among the kernel's arguments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// `fake.deaf`: the guest ignores its power button.
    pub deaf: bool,
    /// `fake.stubborn`: the VMM refuses to power the VM off. Signals end it all the same.
    pub stubborn: bool,
    /// `fake.slow-off=MS`: the guest takes so long to power off.
    pub power_off_takes: Duration,
    /// `fake.off-after=MS`: the guest powers off by itself, so long after it was first let go.
    pub powers_off_after: Option<Duration>,
    /// `fake.hangs`: the VMM tells of its end and does not end, as QEMU 7.2 may. Signals end it all the same.
    pub hangs: bool,
    /// `fake.unwakeable`: SIGTERM does nothing to the VMM.
    pub unwakeable: bool,
}

impl Script {
    /// Reads the words of a kernel command line; those of others are passed over.
    fn read(kernel_args: &str) -> Self {
        let mut script = Self::default();
        for word in kernel_args.split_whitespace() {
            match word.split_once('=').unwrap_or((word, "")) {
                ("fake.deaf", _) => script.deaf = true,
                ("fake.stubborn", _) => script.stubborn = true,
                ("fake.slow-off", ms) => script.power_off_takes = millis(ms),
                ("fake.off-after", ms) => script.powers_off_after = Some(millis(ms)),
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

/// What the command line says.
#[derive(Debug, PartialEq, Eq)]
struct Order {
    socket: PathBuf,
    console: Option<PathBuf>,
    script: Script,
}

impl Order {
    fn read(args: &[OsString]) -> Option<Self> {
        let (mut socket, mut console, mut script) = (None, None, Script::default());
        for pair in args.windows(2) {
            let Some(value) = pair[1].to_str() else { continue };
            match pair[0].to_str() {
                Some("-chardev") if value.starts_with("socket,id=qmp,") => socket = property(value, "path="),
                Some("-chardev") => console = property(value, "logfile="),
                Some("-append") => script = Script::read(value),
                _ => {}
            }
        }
        Some(Self { socket: socket?, console, script })
    }
}

/// Finds a property of QEMU's option syntax, in which a comma is doubled where it is no separator.
fn property(text: &str, name: &str) -> Option<PathBuf> {
    let one = text.replace(",,", "\0");
    let value = one.split(',').find_map(|part| part.strip_prefix(name))?;
    Some(PathBuf::from(value.replace('\0', ",")))
}

/// What the guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Prelaunch,
    Running,
    Paused,
}

impl Guest {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }
}

/// Whether the one machine of this process has told of its end and hangs.
static HANGS: AtomicBool = AtomicBool::new(false);

/// The one machine of this process.
struct Machine {
    order: Order,
    guest: Guest,
    /// Whether the power button was pressed.
    button: bool,
    /// The client that is served now.
    client: Option<UnixStream>,
}

/// Does what QEMU's program would: `arguments` begin with the program's own name.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.get(1).map(OsString::as_os_str) == Some(OsStr::new("--version")) {
        return if writeln!(io::stdout(), "{VERSION}").is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    let problem = match Order::read(&arguments) {
        Some(order) => serve(order).err().map(|error| error.to_string()),
        None => Some("no QMP socket is named; this is a stand-in for QEMU, for tests".to_owned()),
    };
    if let Some(problem) = problem {
        let _ = writeln!(io::stderr(), "fake-qemu: {problem}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Serves one client after the other, until the machine ends and the process with it.
fn serve(order: Order) -> io::Result<()> {
    if order.script.unwakeable {
        // Before there is another thread, which inherits it.
        SigSet::from(Signal::SIGTERM).thread_block()?;
    }
    let listener = UnixListener::bind(&order.socket)?;
    let machine = Machine { order, guest: Guest::Prelaunch, button: false, client: None };
    machine.write_state()?;
    let machine = Arc::new(Mutex::new(machine));
    loop {
        let (client, _) = listener.accept()?;
        // A client that breaks off is followed by the next, as with QEMU.
        let _ = attend(&machine, client);
        lock(&machine).client = None;
    }
}

fn attend(machine: &Arc<Mutex<Machine>>, client: UnixStream) -> io::Result<()> {
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
        if HANGS.load(Ordering::Relaxed) {
            let mut late = fs::OpenOptions::new().append(true).create(true).open(&late)?;
            writeln!(late, "{}", command["execute"].as_str().unwrap_or_default())?;
        } else {
            Machine::execute(machine, &command)?;
        }
        line.clear();
    }
    Ok(())
}

fn lock(machine: &Mutex<Machine>) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    fn execute(shared: &Arc<Mutex<Self>>, command: &Value) -> io::Result<()> {
        let mut machine = lock(shared);
        let id = &command["id"];
        let nothing = json!({});
        let answer = match command["execute"].as_str().unwrap_or_default() {
            "qmp_capabilities" | "set-action" => nothing,
            "cont" => {
                if machine.guest == Guest::Prelaunch
                    && let Some(delay) = machine.order.script.powers_off_after
                {
                    Self::power_off_after(shared, delay)?;
                }
                machine.go_on()?;
                nothing
            }
            "stop" => {
                machine.become_state(Guest::Paused)?;
                machine.event("STOP", &Value::Null)?;
                nothing
            }
            "query-status" => {
                json!({"status": machine.guest.as_str(), "running": machine.guest == Guest::Running})
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

    /// Powers off, now or in a while, if the button was pressed and the guest runs and listens.
    fn obey_button(shared: &Arc<Mutex<Self>>) -> io::Result<()> {
        let mut machine = lock(shared);
        let obeys = machine.button && machine.guest == Guest::Running && !machine.order.script.deaf;
        if !obeys {
            return Ok(());
        }
        machine.button = false;
        let delay = machine.order.script.power_off_takes;
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
        if self.guest == Guest::Prelaunch {
            self.boot()?;
        }
        self.become_state(Guest::Running)?;
        self.event("RESUME", &Value::Null)
    }

    fn boot(&self) -> io::Result<()> {
        let Some(console) = &self.order.console else { return Ok(()) };
        let mut console = fs::OpenOptions::new().append(true).create(true).open(console)?;
        write!(console, "{BANNER}\r\n")
    }

    fn become_state(&mut self, guest: Guest) -> io::Result<()> {
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

    /// Ends the process in QEMU's way: says why, takes its socket away, and exits, if it does.
    fn end(&mut self, reason: &str) -> ! {
        let guest = reason.starts_with("guest");
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

    /// Tells the client, if there is one. One that has gone misses it.
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
fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_command_line_is_read() {
        let line =
            "fake-qemu -S -append console=ttyS0\u{20}fake.deaf\u{20}fake.slow-off=250\u{20}fake.off-after=9";
        let chardevs = [
            "socket,id=console,server=on,wait=off,path=/r/v,,m/console.sock,logfile=/r/v,,m/console.log,logappend=on",
            "socket,id=qmp,server=on,wait=off,path=/r/v,,m/qmp.sock",
        ];
        let mut args: Vec<OsString> = line.splitn(4, ' ').map(OsString::from).collect();
        for chardev in chardevs {
            args.extend(["-chardev".into(), chardev.into()]);
        }
        let script = Script {
            deaf: true,
            power_off_takes: Duration::from_millis(250),
            powers_off_after: Some(Duration::from_millis(9)),
            ..Script::default()
        };
        let expected =
            Order { socket: "/r/v,m/qmp.sock".into(), console: Some("/r/v,m/console.log".into()), script };
        assert_eq!(Order::read(&args), Some(expected));
        assert_eq!(Order::read(&args[..4]), None, "without a QMP socket it is nobody's");
    }
}
