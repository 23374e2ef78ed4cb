//! The terminal of a person while a guest's console is in it.

use std::io::{self, IsTerminal as _, Read as _, Write as _};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Leaves the states that a guest may have put the terminal into: the alternate screen, reports of
/// the mouse and of pasted text, a hidden cursor, colours, another character set.
const CLEAN: &[u8] =
    b"\x1b[?1049l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?7h\x1b[?25h\x1b[?1l\x1b>\x1b(B\x1b[0m\r";
/// The bytes that one read of the keyboard takes, as for a pasted text.
const TYPED_AT_ONCE: usize = 4096;
/// The reads of the keyboard that may wait for the server. Behind them the reading stops, and the
/// terminal holds the keys.
const TYPED_WAITING: usize = 16;

/// A terminal that hands every key on. Dropping it restores the terminal.
pub(super) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Returns whether keys can be read and shown: input and output are terminals.
    pub(super) fn is_there() -> bool {
        io::stdin().is_terminal() && io::stdout().is_terminal()
    }

    /// Makes the terminal of the standard input hand every key on.
    ///
    /// # Errors
    ///
    /// The terminal refuses.
    pub(super) fn enter() -> Result<Self, Failure> {
        let failed = |error: rustix::io::Errno| Failure::Local(format!("the terminal refuses: {error}"));
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let mut out = io::stdout().lock();
        // Nobody is left to be told of an error, because the terminal itself has gone then.
        let _gone = out.write_all(CLEAN).and_then(|()| out.flush());
        // Keys that were typed for the guest must not reach the shell.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// Reads the keyboard on a thread of its own, because a read cannot be cancelled. The thread ends
/// with the process.
pub(super) fn keyboard() -> mpsc::Receiver<Vec<u8>> {
    let (tell, typed) = mpsc::channel(TYPED_WAITING);
    std::thread::spawn(move || {
        let mut part = [0; TYPED_AT_ONCE];
        while let Ok(length) = io::stdin().lock().read(&mut part) {
            if length == 0 || tell.blocking_send(part[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    typed
}
