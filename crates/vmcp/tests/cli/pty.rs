//! A terminal with `vmcp` in it, and the screen that it shows.

use std::io::{Read as _, Write as _};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pty_process::Size;
use pty_process::blocking::{Command, Pty, open};

use crate::world::{WAIT_TIMEOUT, World, pause};

/// The rows of every terminal here.
const ROWS: u16 = 40;

/// A terminal with `vmcp` in it.
pub(crate) struct Terminal {
    pty: Arc<Pty>,
    child: Child,
    /// Every byte that was sent to the terminal.
    sent: Arc<Mutex<Vec<u8>>>,
    columns: u16,
}

impl Terminal {
    /// Runs `vmcp` in a terminal; `redirect` leads its standard error or output elsewhere.
    pub(crate) fn run(world: &World, columns: u16, arguments: &[&str], redirect: Redirect) -> Self {
        Self::start(world.command(arguments), columns, redirect)
    }

    /// Runs a command in a terminal, as [`Self::run`] does.
    pub(crate) fn start(command: std::process::Command, columns: u16, redirect: Redirect) -> Self {
        let (pty, pts) = open().unwrap();
        pty.resize(Size::new(ROWS, columns)).unwrap();
        let mut command = Command::from(command).env("TERM", "xterm");
        match redirect {
            Redirect::Nothing => {}
            Redirect::Stdout => command = command.stdout(std::process::Stdio::null()),
            Redirect::Stderr => command = command.stderr(std::process::Stdio::null()),
        }
        let child = command.spawn(pts).unwrap();
        let (pty, sent) = (Arc::new(pty), Arc::new(Mutex::new(Vec::new())));
        let (terminal, into) = (Arc::clone(&pty), Arc::clone(&sent));
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            // The read fails when the program has ended and its terminal is closed.
            while let Ok(length) = (&*terminal).read(&mut part) {
                into.lock().unwrap().extend_from_slice(&part[..length]);
                if length == 0 {
                    break;
                }
            }
        });
        Self { pty, child, sent, columns }
    }

    /// Returns the screen as a person sees it, after everything that was sent.
    pub(crate) fn screen(&self) -> String {
        let mut parser = vt100::Parser::new(nonzero(ROWS), nonzero(self.columns), 0);
        parser.process(&self.sent.lock().unwrap());
        parser.screen().contents()
    }

    /// Returns the rows of the screen. The screen's text has one line for rows that wrap.
    pub(crate) fn rows(&self) -> Vec<String> {
        let mut parser = vt100::Parser::new(nonzero(ROWS), nonzero(self.columns), 0);
        parser.process(&self.sent.lock().unwrap());
        parser.screen().rows(0, self.columns).map(|row| row.trim_end().to_owned()).collect()
    }

    /// Returns everything that was sent to the terminal.
    pub(crate) fn sent(&self) -> String {
        String::from_utf8_lossy(&self.sent.lock().unwrap()).into_owned()
    }

    /// Returns the process in the terminal.
    pub(crate) fn child(&self) -> &Child {
        &self.child
    }

    /// Returns whether the terminal hands every key on.
    pub(crate) fn is_raw(&self) -> bool {
        let settings = rustix::termios::tcgetattr(&*self.pty).unwrap();
        !settings.local_modes.contains(rustix::termios::LocalModes::ICANON)
    }

    /// Gives the terminal another width. The screen is still read with the first one.
    pub(crate) fn resize(&self, columns: u16) {
        self.pty.resize(Size::new(ROWS, columns)).unwrap();
    }

    /// Types text into the terminal.
    pub(crate) fn type_in(&self, text: &str) {
        (&*self.pty).write_all(text.as_bytes()).unwrap();
    }

    /// Waits until the screen has `text`.
    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) -> String {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            let screen = self.screen();
            if screen.contains(text) {
                return screen;
            }
            assert!(Instant::now() < deadline, "{text:?} never stood on the screen:\n{screen}");
            pause();
        }
    }

    /// Waits until the program has ended, and returns its exit code.
    pub(crate) fn code(&mut self) -> i32 {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // The last bytes may still be on their way to the reader.
                let mut before = None;
                while before != Some(self.sent().len()) {
                    before = Some(self.sent().len());
                    pause();
                    pause();
                }
                return status.code().expect("no signal ended it");
            }
            assert!(Instant::now() < deadline, "vmcp does not end:\n{}", self.screen());
            pause();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn nonzero(number: u16) -> std::num::NonZero<u16> {
    number.try_into().unwrap()
}

/// The output that does not go to the terminal.
pub(crate) enum Redirect {
    Nothing,
    Stdout,
    Stderr,
}
