//! The errors of a configuration: all at once, each with its origin and its remedy.
//!
//! ```text
//!   failed to load config: 2 errors
//!     unsupported backend type: xen
//!       from VMCP_BACKEND; set UNKEY_VMCP_BACKEND to cloudhypervisor, firecracker or qemu
//!     port: "80800" is not a port
//!       from vmm.toml:3 (port); write `port = …` there, with a number from 0 to 65535
//! ```

use std::fmt;
use std::path::PathBuf;

/// The origin of a setting's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A flag on the command line, with its dashes.
    Flag(String),
    /// An environment variable.
    Variable(String),
    /// A location in the configuration file.
    File {
        /// The file, as it was named.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key as it is written there, with its section. Empty if the location is not a value.
        key: String,
    },
    /// The default, because nobody gave a value.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag(name) | Origin::Variable(name) => f.write_str(name),
            Origin::File { path, line, key } => {
                write!(f, "{}:{line}", printable(&path.to_string_lossy()))?;
                if key.is_empty() { Ok(()) } else { write!(f, " ({})", printable(key)) }
            }
            Origin::Default => f.write_str("default"),
        }
    }
}

/// One error in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The error.
    pub message: String,
    /// The origin of the bad value; `None` if the error does not concern a value.
    pub origin: Option<Origin>,
    /// The advice, which names the variable to set or the key to write.
    pub advice: String,
    /// True if a retired variable is set while its successor is not.
    pub(super) retired: bool,
}

impl ConfigError {
    pub(super) fn new(
        message: impl Into<String>,
        origin: impl Into<Option<Origin>>,
        advice: impl Into<String>,
    ) -> Self {
        Self { message: message.into(), origin: origin.into(), advice: advice.into(), retired: false }
    }

    fn details(&self) -> String {
        match &self.origin {
            Some(Origin::Default) | None => self.advice.clone(),
            Some(origin) => format!("from {origin}; {}", self.advice),
        }
    }
}

/// All errors. The `Display` is the whole text for a person, over several lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub(super) Vec<ConfigError>);

impl ConfigErrors {
    /// Returns the errors, in the order in which they are shown; never empty.
    pub fn errors(&self) -> &[ConfigError] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed to load config: ")?;
        match self.0.as_slice() {
            errors if errors.iter().any(|error| error.retired) => {
                f.write_str("missing required environment variables")?;
            }
            [only] => return write!(f, "{}\n  {}", only.message, only.details()),
            errors => write!(f, "{} errors", errors.len())?,
        }
        for error in &self.0 {
            write!(f, "\n  {}\n    {}", error.message, error.details())?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Makes a foreign text safe to show on a terminal by escaping control characters.
pub(super) fn printable(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
        shown
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(message: &str) -> ConfigError {
        ConfigError::new(message, Origin::Flag("--port".into()), "set UNKEY_VMCP_PORT")
    }

    #[test]
    fn a_single_error_is_on_the_first_line() {
        let shown = ConfigErrors(vec![error("a")]).to_string();
        assert_eq!(shown, "failed to load config: a\n  from --port; set UNKEY_VMCP_PORT");
    }

    #[test]
    fn several_errors_are_counted_and_listed() {
        let shown = ConfigErrors(vec![error("a"), error("b")]).to_string();
        assert!(shown.starts_with("failed to load config: 2 errors\n  a\n    from --port; "), "{shown}");
        assert!(shown.contains("\n  b\n"), "{shown}");
    }

    #[test]
    fn control_characters_never_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jä\n"), "a\\u{1b}[2Jä\\n");
    }
}
