//! `vmcp edit`: the configuration of a VM in the editor of the person.
//!
//! ```text
//!   GetVmInfo ──► text ──► editor ──► parse ──► the changed parts ──► UpdateVm, if_generation
//!                  ▲                    │ wrong                          │ refused
//!                  └── the errors as comments, and the person's text ◄───┘
//! ```
//!
//! A text that could not be sent is never removed: the file stays, and its path is printed.

mod editor;
mod text;

use std::io::{self, IsTerminal as _};
use std::path::Path;

use connectrpc::ErrorCode;
use tempfile::NamedTempFile;
use vmm_proto::v1 as pb;

use super::signals::EndSignals;
use super::{Session, update};
use crate::cli::Edit;
use crate::connect::names;
use crate::failure::Failure;
use crate::input::changes::{ChangeFile, ConfigChange, changed_parts};
use crate::input::read;
use crate::output::{Format, escape, problem, remark};
use editor::{Editor, EditorEnd};
use text::EditText;

pub(super) async fn run(session: &mut Session, arguments: &Edit) -> Result<(), Failure> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(Failure::input("edit needs a terminal for the editor").with_remedy(
            "`vmcp update NAME -f FILE` changes the parts of a configuration that a file names",
        ));
    }
    let editor = Editor::of_environment()?;
    let vm = names::read(&session.client, &arguments.name).await?;
    let file = EditFile::new()?;
    let mut signals = EndSignals::new()?;
    let mut edit = Editing { session, editor, text: EditText::of_vm(&vm)?, vm, file, refused: None };
    let outcome = edit.until_sent(&mut signals).await;
    if outcome.is_err() {
        edit.keep_text();
    }
    outcome
}

/// The file that the editor opens. Dropping it removes the file.
struct EditFile(NamedTempFile);

impl EditFile {
    fn new() -> Result<Self, Failure> {
        let file = tempfile::Builder::new().prefix("vmcp-edit-").suffix(".yaml").tempfile();
        file.map(Self).map_err(|error| {
            let folder = std::env::temp_dir();
            Failure::Local(format!(
                "no file for the editor can be made in {}: {error}; set TMPDIR",
                folder.display()
            ))
        })
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

/// One edit of a VM, until its text is sent or given up.
struct Editing<'a> {
    session: &'a mut Session,
    editor: Editor,
    text: EditText,
    vm: pb::GetVmInfoResponse,
    file: EditFile,
    /// The failure that the present text had when it was last sent or read.
    refused: Option<Failure>,
}

impl Editing<'_> {
    async fn until_sent(&mut self, signals: &mut EndSignals) -> Result<(), Failure> {
        loop {
            self.write()?;
            match self.editor.open(self.file.path(), signals).await? {
                EditorEnd::Done => {}
                EditorEnd::BySignal(code) => return Err(Failure::Reported(code)),
            }
            let edited = read(&self.file.path().display().to_string())?;
            if text::is_empty(&edited) {
                return self.nothing_sent("the file is empty");
            }
            let is_same = text::body(&edited) == self.text.body();
            if let Some(failure) = self.refused.take().filter(|_| is_same) {
                return Err(failure);
            }
            if is_same {
                return self.nothing_sent("the file is unchanged");
            }
            self.text.take(&edited);
            match self.send().await {
                Ok(()) => return Ok(()),
                Err(failure) if is_correctable(&failure) => self.refused = Some(failure),
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Writes the text for the editor, with the errors of the attempt before at the top.
    fn write(&mut self) -> Result<(), Failure> {
        let path = self.file.path().to_owned();
        let mut text = self.text.document(&self.errors());
        // The comments at the top move the lines of the text, so a fault of the text is looked for
        // again where it stands now.
        if matches!(self.refused, Some(Failure::Input { .. }))
            && let Err(moved) = ChangeFile::parse(text::SHOWN_NAME, &text)
        {
            self.refused = Some(moved);
            text = self.text.document(&self.errors());
        }
        std::fs::write(&path, text).map_err(|error| Failure::Local(format!("{}: {error}", path.display())))
    }

    fn errors(&self) -> String {
        let Some(failure) = &self.refused else { return String::new() };
        problem::text(failure, Format::Table, &self.session.server.to_string()).unwrap_or_default()
    }

    /// Sends the parts that the person changed.
    async fn send(&mut self) -> Result<(), Failure> {
        let file = ChangeFile::parse(text::SHOWN_NAME, self.text.body())?;
        let config = file.config().clone();
        let parts = changed_parts(&self.vm.config, &config)?;
        if parts.is_empty() {
            return self.nothing_sent("no value is changed");
        }
        let change = ConfigChange { config, parts, is_merged: true };
        let answer = update::send(self.session, &self.vm, &change, self.vm.generation).await?;
        update::print(self.session, &self.vm, &answer)
    }

    fn nothing_sent(&self, reason: &str) -> Result<(), Failure> {
        remark(&format!("vmcp: {reason}; nothing was sent for {}", escape::line(&self.vm.vm_id)));
        Ok(())
    }

    /// Keeps the person's text in its file, and names the file. A text without a change goes.
    fn keep_text(self) {
        let path = self.file.path().display().to_string();
        let is_changed = read(&path)
            .is_ok_and(|edited| !text::is_empty(&edited) && text::body(&edited) != self.text.first_body());
        if !is_changed {
            return;
        }
        match self.file.0.keep() {
            Ok(_) => remark(&format!("vmcp: your text is kept in {}", escape::line(&path))),
            Err(error) => {
                remark(&format!("vmcp: your text could not be kept in {}: {error}", escape::line(&path)))
            }
        }
    }
}

/// Returns true if the person can mend the text so that the server takes it.
fn is_correctable(failure: &Failure) -> bool {
    matches!(
        failure.code(),
        Some(ErrorCode::InvalidArgument | ErrorCode::FailedPrecondition | ErrorCode::AlreadyExists)
    )
}
