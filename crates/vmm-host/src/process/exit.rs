//! The exit of a process, and its text for people.

use rustix::process::WaitIdStatus;
use std::fmt;

/// The end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessExit {
    /// The exit status. `None` where only another parent could read it.
    pub status: Option<ExitStatus>,
}

/// The exit status that a process leaves to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// The process exited with this code.
    Code(i32),
    /// This signal ended the process.
    Signal(i32),
}

impl ProcessExit {
    /// The end of a process that is not a child of this daemon.
    pub const UNKNOWN: Self = Self { status: None };

    /// Returns true if the process exited with code 0.
    pub fn is_success(&self) -> bool {
        self.status == Some(ExitStatus::Code(0))
    }
}

impl From<WaitIdStatus> for ProcessExit {
    fn from(status: WaitIdStatus) -> Self {
        let code = status.exit_status().map(ExitStatus::Code);
        Self { status: code.or_else(|| status.terminating_signal().map(ExitStatus::Signal)) }
    }
}

impl fmt::Display for ProcessExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            Some(ExitStatus::Code(code)) => write!(f, "exit status {code}"),
            Some(ExitStatus::Signal(signal)) => match signal_name(signal) {
                Some(name) => write!(f, "killed by {name} ({signal})"),
                None => write!(f, "killed by signal {signal}"),
            },
            None => f.write_str("exit status unknown: an earlier run of the daemon was its parent"),
        }
    }
}

/// Returns the name of a signal that ends VMMs in practice. Numbers are those of Linux on x86-64
/// and aarch64.
fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        10 => "SIGUSR1",
        11 => "SIGSEGV",
        12 => "SIGUSR2",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_status_is_printed_as_a_phrase() {
        let text = |status| ProcessExit { status }.to_string();
        assert_eq!(text(Some(ExitStatus::Code(1))), "exit status 1");
        assert_eq!(text(Some(ExitStatus::Signal(11))), "killed by SIGSEGV (11)");
        assert_eq!(text(Some(ExitStatus::Signal(40))), "killed by signal 40");
        assert!(text(None).starts_with("exit status unknown: "));
    }
}
