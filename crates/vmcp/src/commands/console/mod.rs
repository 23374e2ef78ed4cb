//! `vmcp console`: the serial console of a VM, with its history and its input.
//!
//! ```text
//!   keyboard ─► keys ─► input ─► WriteConsole        each in a task of its own, so that a
//!                 │                                  terminal that stands still keeps no
//!              leave, help                           key, and a server that is slow to
//!                 ▼                                  answer keeps no output
//!   screen ◄── attach ◄── output ◄─ StreamConsole, again behind a loss of the server
//! ```

mod input;
mod keys;
mod output;
mod terminal;

use std::io::{self, Write as _};

use tokio::sync::mpsc;

use super::Session;
use super::signals::EndSignals;
use crate::cli::{Console, EscapeKey};
use crate::connect::names;
use crate::failure::Failure;
use crate::output::{escape, remark};
use input::InputNote;
use keys::KeyCommand;
use output::{ConsoleOutput, ConsoleStream};
use terminal::RawTerminal;

/// The reason for which a console was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// The person typed the escape sequence.
    ByKey,
    /// There is no more output: the history was read, or the VM was deleted, or `until` is over.
    AtEnd,
    /// A signal asks this process to end, with this exit code.
    BySignal(u8),
}

/// The way in which a console is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConsoleView {
    /// The number of the last bytes of the history; 0: all of them.
    pub(super) tail: i64,
    /// True: new output is shown too.
    pub(super) follow: bool,
    /// True: keys are sent where input and output are terminals.
    pub(super) takes_input: bool,
    /// The escape key.
    pub(super) escape: EscapeKey,
}

pub(super) async fn run(session: &mut Session, arguments: &Console) -> Result<(), Failure> {
    let vm_id = names::resolve(&session.client, &arguments.name).await?;
    let view = ConsoleView {
        tail: arguments.tail.map_or(0, i64::from),
        follow: !arguments.no_follow,
        takes_input: !arguments.no_input && !arguments.no_follow,
        escape: arguments.escape.key,
    };
    let mut signals = EndSignals::new()?;
    match attach(session, &vm_id, view, &mut signals, std::future::pending()).await? {
        Left::BySignal(code) => Err(Failure::Reported(code)),
        Left::ByKey | Left::AtEnd => Ok(()),
    }
}

/// Shows the console of a VM until it is left. At the end of `until` the output that is there is
/// still shown.
///
/// # Errors
///
/// The server refuses the console, or the output cannot be written.
pub(super) async fn attach(
    session: &mut Session,
    vm_id: &str,
    view: ConsoleView,
    signals: &mut EndSignals,
    until: impl Future<Output = ()>,
) -> Result<Left, Failure> {
    let stream = ConsoleStream::new(&session.client, &session.server, vm_id, view);
    let is_interactive = view.takes_input && !session.output.format().is_message() && RawTerminal::is_there();
    let raw = if is_interactive {
        greet(vm_id, view.escape);
        Some(RawTerminal::enter()?)
    } else {
        None
    };
    let mut screen = Screen { session, is_raw: raw.is_some(), escape: view.escape };
    let outcome = screen.show(stream, signals, until).await;
    // The terminal is restored before anything else is printed.
    drop(raw);
    outcome
}

fn greet(vm_id: &str, escape: EscapeKey) {
    let vm_id = escape::line(vm_id);
    remark(&match escape.0 {
        Some(_) => format!("vmcp: console of {vm_id}; {escape}. at the beginning of a line leaves it"),
        None => format!("vmcp: console of {vm_id}; close the terminal to leave it"),
    });
}

/// The screen that a console is shown on.
struct Screen<'a> {
    session: &'a mut Session,
    /// True if every key is handed on, so that a line ends in `\r\n`.
    is_raw: bool,
    escape: EscapeKey,
}

impl Screen<'_> {
    /// Shows the output of `stream` and sends the keys, until the console is left.
    async fn show(
        &mut self,
        stream: ConsoleStream,
        signals: &mut EndSignals,
        until: impl Future<Output = ()>,
    ) -> Result<Left, Failure> {
        let mut notes = self.input(&stream);
        let (mut output, finish) = stream.start();
        tokio::pin!(until);
        let mut is_over = false;
        loop {
            tokio::select! {
                code = signals.next() => return Ok(Left::BySignal(code)),
                Some(note) = notes.recv() => match note {
                    InputNote::Command(KeyCommand::Leave) => return Ok(Left::ByKey),
                    InputNote::Command(KeyCommand::Help) => self.help(),
                    InputNote::Remark(text) => self.remark(&text),
                },
                () = &mut until, if !is_over => {
                    is_over = true;
                    finish.notify_one();
                }
                next = output.recv() => match next {
                    Some(ConsoleOutput::Message(message)) => self.print(&message)?,
                    Some(ConsoleOutput::Remark(text)) => self.remark(&text),
                    Some(ConsoleOutput::Failed(failure)) => return Err(failure),
                    None => return Ok(Left::AtEnd),
                },
            }
        }
    }

    /// Starts to read keys where they can be read. The notes of the input come from the receiver.
    fn input(&self, stream: &ConsoleStream) -> mpsc::Receiver<InputNote> {
        if self.is_raw {
            input::start(stream.client(), stream.vm_id(), self.escape)
        } else {
            // A receiver without a sender has no notes.
            mpsc::channel(1).1
        }
    }

    fn print(&mut self, message: &vmm_proto::v1::StreamConsoleResponse) -> Result<(), Failure> {
        if self.session.output.format().is_message() {
            return self.session.output.item(message);
        }
        let mut out = io::stdout().lock();
        out.write_all(&message.data).and_then(|()| out.flush()).map_err(Failure::Output)
    }

    fn remark(&self, text: &str) {
        if self.is_raw {
            remark(&format!("\r\n{text}\r"));
        } else {
            remark(text);
        }
    }

    fn help(&self) {
        let key = self.escape;
        self.remark(&format!(
            "{key}.  leave the console; the guest runs on\r\n{key}?  this help\r\n{key}{key}  send {key}"
        ));
    }
}
