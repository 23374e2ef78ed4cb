//! The output: tables for people, the API's own messages for programs, names for scripts.
//!
//! ```text
//!   answer ──► Format::Table ──► table, with control bytes escaped
//!          ├─► Format::Json, Format::Yaml ──► document: the message as the API defines it
//!          └─► Format::Name ──► one name a line
//! ```

pub(crate) mod document;
pub(crate) mod escape;
pub(crate) mod problem;
pub(crate) mod progress;
pub(crate) mod table;
pub(crate) mod units;
pub(crate) mod words;

use std::io::{self, IsTerminal as _, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::failure::Failure;
pub(crate) use table::Table;

/// The form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// The API's message, as JSON.
    Json,
    /// The API's message, as YAML.
    Yaml,
    /// The names of the VMs, one a line.
    Name,
}

impl Format {
    /// Returns true if the output is the API's message itself.
    pub(crate) fn is_message(self) -> bool {
        matches!(self, Self::Json | Self::Yaml)
    }
}

/// The standard output.
pub(crate) struct Output {
    format: Format,
    /// The columns of the terminal; `None` if the output is no terminal.
    width: Option<u16>,
    /// The number of YAML documents written so far, because a marker stands between two.
    documents: usize,
}

impl Output {
    /// Returns the standard output of this process.
    pub(crate) fn new(format: Format) -> Self {
        Self { format, width: terminal_width(), documents: 0 }
    }

    /// Returns the requested form.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Prints one answer: as a message, or as the text for people that `text_of` makes.
    ///
    /// `names` gives the lines of `-o name`.
    ///
    /// # Errors
    ///
    /// The output cannot be written.
    pub(crate) fn answer<M: Serialize>(
        &mut self,
        message: &M,
        names: &[&str],
        text_of: impl FnOnce(Option<u16>) -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => self.text(&text_of(self.width)),
            Format::Name => names.iter().try_for_each(|name| self.text(&escape::line(name))),
            Format::Json | Format::Yaml => self.message(message, document::json_pretty),
        }
    }

    /// Prints one of a stream of messages; JSON takes one line each.
    ///
    /// # Errors
    ///
    /// The output cannot be written.
    pub(crate) fn item<M: Serialize>(&mut self, message: &M) -> Result<(), Failure> {
        self.message(message, document::json_line)
    }

    /// Prints a text and ends its line. An empty text prints nothing.
    ///
    /// # Errors
    ///
    /// The output cannot be written.
    pub(crate) fn text(&self, text: &str) -> Result<(), Failure> {
        let text = text.trim_end_matches('\n');
        if text.is_empty() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{text}").and_then(|()| out.flush()).map_err(Failure::Output)
    }

    fn message<M: Serialize>(
        &mut self,
        message: &M,
        json: impl FnOnce(&M) -> Result<String, Failure>,
    ) -> Result<(), Failure> {
        if self.format != Format::Yaml {
            return self.text(&json(message)?);
        }
        let text = document::yaml(message)?;
        if self.documents > 0 {
            self.text("---")?;
        }
        self.documents += 1;
        self.text(&text)
    }
}

/// Prints a remark for people on the standard error. An error is ignored, because it could not be
/// printed either.
pub(crate) fn remark(text: &str) {
    let _gone = writeln!(io::stderr(), "{text}");
}

/// Returns true if both outputs are terminals, so that a spinner disturbs nobody.
pub(crate) fn is_interactive() -> bool {
    io::stdout().is_terminal() && io::stderr().is_terminal()
}

fn terminal_width() -> Option<u16> {
    if !io::stdout().is_terminal() {
        return None;
    }
    // Some consoles report 0 instead of their size.
    rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| size.ws_col).filter(|columns| *columns > 0)
}
