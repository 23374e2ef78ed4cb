//! The log: JSON for machines, text on a terminal. Both go to stderr, and `RUST_LOG` chooses the
//! level.
//!
//! Threads that serve calls never write to stderr; see [`queue`].

mod filter;
mod line;
mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal as _};
use std::panic::PanicHookInfo;
use std::time::Duration;

use tracing_subscriber::fmt::format::JsonFields;

use line::Form;
use queue::LogQueue;
pub(crate) use queue::dropped_lines;

/// The memory for lines that wait to be written, in bytes. Some 2,000 lines fit.
const CAPACITY: usize = 1 << 20;
/// The longest time for which the end of the program waits for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The log of this process. Dropping it waits for the last lines for at most a second.
pub struct LogGuard {
    queue: LogQueue,
}

/// Starts logging. Must be called once, before anything is logged.
///
/// From then on panics are logged as well, because the standard report of a panic blocks on stderr.
///
/// # Errors
///
/// The system has no room for the thread that writes the log.
pub fn start() -> io::Result<LogGuard> {
    let queue = LogQueue::new(CAPACITY);
    queue.start(io::stderr(), report_dropped)?;
    let text = std::env::var_os("RUST_LOG").unwrap_or_default();
    let (filter, errors) = filter::read(&text.to_string_lossy());
    let is_terminal = io::stderr().is_terminal();
    // The formatter would report its own errors with `eprintln!`, which panics where stderr is
    // broken.
    tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_ansi(is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()))
        .with_env_filter(filter)
        .fmt_fields(JsonFields::new())
        .event_format(if is_terminal { Form::Text } else { Form::Json })
        .with_writer(queue.clone())
        .init();
    std::panic::set_hook(Box::new(log_panic));
    for error in errors {
        tracing::warn!(error, "a part of RUST_LOG is not valid and is ignored");
    }
    Ok(LogGuard { queue })
}

impl LogGuard {
    /// Writes a line for a person behind everything that was logged.
    pub fn print_line(&self, line: &str) {
        self.queue.push(format!("{line}\n").as_bytes());
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.queue.flush(FLUSH_TIMEOUT);
    }
}

fn report_dropped(dropped: u64) {
    tracing::warn!(dropped, "log lines were dropped, because stderr did not take them in time");
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let text = panic.payload_as_str().unwrap_or("no message");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    // RUST_BACKTRACE decides whether a backtrace is captured.
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    tracing::error!(
        panic = text,
        place = location,
        backtrace,
        "a thread panicked, which is a defect of this program"
    );
}
