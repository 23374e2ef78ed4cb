//! The editor of the person.

use std::path::Path;
use std::process::{Command, ExitStatus};

use tokio::sync::oneshot;

use crate::commands::signals::EndSignals;
use crate::failure::Failure;
use crate::output::escape;

/// The variables that name an editor, in the order in which they are read.
const VARIABLES: [&str; 2] = ["VISUAL", "EDITOR"];
/// The editor that every Unix has.
const DEFAULT_EDITOR: &str = "vi";
/// The exit code of a shell that does not find a program, and of one that may not run it.
const NOT_RUN: [i32; 2] = [127, 126];
/// The exit code of this process if Ctrl-C is typed, which is a key of the editor.
const INTERRUPTED: u8 = 130;

/// The command line of an editor.
#[derive(Debug)]
pub(super) struct Editor {
    command: String,
}

/// The end of an editor.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EditorEnd {
    /// The person has left the editor.
    Done,
    /// A signal asks this process to end, with this exit code.
    BySignal(u8),
}

impl Editor {
    /// Returns the editor that the environment names.
    ///
    /// # Errors
    ///
    /// The name is not UTF-8.
    pub(super) fn of_environment() -> Result<Self, Failure> {
        for variable in VARIABLES {
            match std::env::var(variable) {
                Ok(command) if !command.trim().is_empty() => return Ok(Self { command }),
                Err(std::env::VarError::NotUnicode(_)) => {
                    return Err(Failure::input(format!("{variable} is not UTF-8")));
                }
                _ => {}
            }
        }
        Ok(Self { command: DEFAULT_EDITOR.to_owned() })
    }

    /// Opens a file, and waits until the editor has ended. Ctrl-C is the editor's key.
    ///
    /// # Errors
    ///
    /// The editor cannot be started, or fails.
    pub(super) async fn open(&self, file: &Path, signals: &mut EndSignals) -> Result<EditorEnd, Failure> {
        // The shell splits the command into words, as `code --wait`; git and kubectl do the same.
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{} \"$1\"", self.command)).arg("sh").arg(file);
        let (tell, mut ended) = oneshot::channel();
        // A thread of its own, because the end of the runtime would wait for a blocking task.
        std::thread::spawn(move || {
            // The receiver is gone if a signal ended this process first.
            let _gone = tell.send(command.status());
        });
        loop {
            tokio::select! {
                status = &mut ended => {
                    let status = status.map_err(|_| Failure::Local("the editor was lost".to_owned()))?;
                    let status = status.map_err(|error| Failure::Local(format!("sh cannot be run: {error}")))?;
                    return self.judge(status).map(|()| EditorEnd::Done);
                }
                code = signals.next() => if code != INTERRUPTED {
                    return Ok(EditorEnd::BySignal(code));
                },
            }
        }
    }

    fn judge(&self, status: ExitStatus) -> Result<(), Failure> {
        let editor = escape::line(&self.command);
        match status.code() {
            Some(0) => Ok(()),
            Some(code) if NOT_RUN.contains(&code) => Err(Failure::Local(format!(
                "the editor \"{editor}\" cannot be run; name another one in VISUAL or EDITOR. Nothing was sent"
            ))),
            _ => Err(Failure::Local(format!("the editor \"{editor}\" failed ({status}). Nothing was sent"))),
        }
    }
}
