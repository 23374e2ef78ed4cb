//! The fuzz target for the configuration: command line, environment and file.
//!
//! ```text
//!   --port=9000                      a flag
//!   UNKEY_VMCP_BACKEND=qemu          a variable
//!   ---
//!   [otel]                           the rest is the file
//!   enabled = true
//! ```

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use clap::{CommandFactory as _, FromArgMatches as _};

use crate::config::{Cli, DaemonConfig, Environment, LoaderHost, PREFIX, migrate_env};

/// The line between the variables and the file.
const FENCE: &[u8] = b"\n---\n";
/// The variable that names the file.
const FILE: &str = "UNKEY_VMCP_CONFIG";

thread_local! {
    /// The definition of the command line. It is made once, because making it takes longer than
    /// everything else.
    static COMMAND: RefCell<clap::Command> = RefCell::new(Cli::command());
}

/// A machine with given answers.
struct FuzzHost<'a> {
    uid: u32,
    file: &'a [u8],
}

impl LoaderHost for FuzzHost<'_> {
    fn uid(&self) -> u32 {
        self.uid
    }

    fn read_file(&self, _: &Path) -> io::Result<Vec<u8>> {
        Ok(self.file.to_vec())
    }

    fn exists(&self, path: &Path) -> bool {
        path.starts_with("/tmp")
    }
}

/// Runs one input.
///
/// # Panics
///
/// A broken guarantee panics, which is the finding.
pub fn configuration(input: &[u8]) {
    let fence = input.windows(FENCE.len()).position(|window| window == FENCE);
    let (head, file) = match fence {
        Some(at) => (&input[..at], Some(&input[at + FENCE.len()..])),
        None => (input, None),
    };
    let (args, mut env) = given(head);
    if file.is_some() {
        env.insert(FILE.into(), "f.toml".into());
    }
    check_migration(&env);
    let Some(cli) = command_line(args) else { return };
    // A user with a home directory is not root here.
    let uid = if env.contains_key(OsStr::new("HOME")) { 1000 } else { 0 };
    let host = FuzzHost { uid, file: file.unwrap_or_default() };
    match DaemonConfig::load(&cli, &env, &host) {
        Ok(loaded) => {
            let report = loaded.report();
            assert!(report.starts_with("OK\n"));
            check_text(&report);
            let effective = loaded.effective.iter().filter_map(|entry| {
                let value = entry.value.as_deref().filter(|value| !value.is_empty())?;
                Some((entry.setting.variable().into(), value.into()))
            });
            let again = DaemonConfig::load(&Cli::default(), &effective.collect(), &host);
            let again = again.expect("what is in effect can be set");
            assert_eq!(again.config, loaded.config, "what is shown is what is in effect");
            if let Err(errors) = loaded.require_served() {
                check_text(&errors.to_string());
                assert_eq!(errors.errors().len(), loaded.config.unserved().len());
            }
        }
        Err(errors) => {
            assert!(!errors.errors().is_empty(), "a refusal has a reason");
            assert!(
                errors.errors().iter().all(|error| !error.message.is_empty() && !error.advice.is_empty())
            );
            check_text(&errors.to_string());
        }
    }
}

/// Reads flags and variables, one per line.
fn given(head: &[u8]) -> (Vec<OsString>, Environment) {
    let mut args = Vec::new();
    let mut env = Environment::new();
    for line in head.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let equals = line.iter().position(|byte| *byte == b'=');
        match equals {
            Some(at) if !line.starts_with(b"-") => {
                let text = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
                env.insert(text(&line[..at]), text(&line[at + 1..]));
            }
            _ => args.push(OsStr::from_bytes(line).to_owned()),
        }
    }
    (args, env)
}

fn command_line(args: Vec<OsString>) -> Option<Cli> {
    if args.is_empty() {
        return Some(Cli::default());
    }
    let args = std::iter::once("vmm-controlplane".into()).chain(args);
    COMMAND
        .with_borrow_mut(|command| Cli::from_arg_matches(&command.try_get_matches_from_mut(args).ok()?).ok())
}

/// Checks that text for a terminal has no control sequences.
fn check_text(text: &str) {
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
}

/// Checks that a shell evaluates only exports of this program's variables, whatever the input
/// variables contain.
fn check_migration(env: &Environment) {
    let text = migrate_env(env);
    let evaluated = evaluated(&text);
    let export = |line: &str| {
        line.strip_prefix("export ").is_some_and(|rest| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,=@%+".contains(&byte);
            rest.starts_with(PREFIX) && rest.bytes().all(plain)
        })
    };
    assert!(evaluated.lines().all(|line| line.is_empty() || export(line)), "{evaluated} in {text}");
}

/// Removes the parts of a text that a POSIX shell reads as comments and quoted text.
fn evaluated(text: &str) -> String {
    let mut left = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '#' if left.is_empty() || left.ends_with('\n') => {
                if letters.by_ref().any(|letter| letter == '\n') {
                    left.push('\n');
                }
            }
            '\'' => assert!(letters.by_ref().any(|letter| letter == '\''), "an open quote in {text}"),
            '\\' => assert_eq!(letters.next(), Some('\''), "{text}"),
            letter => left.push(letter),
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_of_the_corpus_passes() {
        assert!(vmm_testkit::corpus::replay("configuration", configuration) > 0);
    }
}
