//! Logs: JSON for machines, text on a terminal. Both go to stderr, and `RUST_LOG` chooses what is said.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// What is said where `RUST_LOG` is unset.
const DEFAULT: &str = "info";

/// Starts logging. To be called once, before anything is logged.
pub fn start() {
    let (filter, problem) = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(error) => (EnvFilter::new(DEFAULT), Some(error)),
        },
        _ => (EnvFilter::new(DEFAULT), None),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        log.with_target(false).init();
    } else {
        log.json().with_current_span(true).with_span_list(true).with_span_events(FmtSpan::NONE).init();
    }
    if let Some(error) = problem {
        tracing::warn!(%error, "RUST_LOG is not valid and is ignored; the level is info");
    }
}
