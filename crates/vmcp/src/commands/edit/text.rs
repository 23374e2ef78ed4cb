//! The text of an edit: comments of this program at the top, and the configuration as YAML.

use serde::Serialize;
use vmm_proto::v1 as pb;

use crate::failure::Failure;
use crate::output::{document, escape, words};

/// The beginning of the lines that this program writes, which are left out of the person's text.
const MARK: &str = "##";
/// The name of the text in errors.
pub(super) const SHOWN_NAME: &str = "your text";
/// The parts that may change while the VM runs.
const LIVE_PARTS: &str = "metadata, restart_policy and delete_protection";

/// The text of a VM's configuration.
pub(super) struct EditText {
    /// The comments that say what may change.
    heading: String,
    /// The configuration as it was read.
    first_body: String,
    /// The configuration as the person left it.
    body: String,
}

impl EditText {
    /// Returns the text of a VM.
    ///
    /// # Errors
    ///
    /// The configuration cannot be written as YAML.
    pub(super) fn of_vm(vm: &pb::GetVmInfoResponse) -> Result<Self, Failure> {
        #[derive(Serialize)]
        struct Shown<'a> {
            config: &'a pb::VmConfig,
        }
        let mut body = document::yaml(&Shown { config: &vm.config })?;
        if !body.ends_with('\n') {
            body.push('\n');
        }
        Ok(Self { heading: heading(vm), first_body: body.clone(), body })
    }

    /// Returns the whole text, with `errors` at its top.
    pub(super) fn document(&self, errors: &str) -> String {
        let mut comments = String::new();
        for line in errors.lines() {
            comments.push_str(&format!("{MARK} {line}\n"));
        }
        if !errors.is_empty() {
            comments.push_str(&format!("{MARK}\n"));
        }
        format!("{comments}{}{}", self.heading, self.body)
    }

    /// Takes the text that the person left.
    pub(super) fn take(&mut self, edited: &str) {
        self.body = body(edited);
    }

    /// Returns the person's text.
    pub(super) fn body(&self) -> &str {
        &self.body
    }

    /// Returns the text as it was before the first edit.
    pub(super) fn first_body(&self) -> &str {
        &self.first_body
    }
}

/// Returns a text without the comments that this program wrote.
pub(super) fn body(edited: &str) -> String {
    let mut kept: String =
        edited.lines().filter(|line| !line.starts_with(MARK)).flat_map(|line| [line, "\n"]).collect();
    if kept.trim().is_empty() {
        kept.clear();
    }
    kept
}

/// Returns true if a text has nothing but comments.
pub(super) fn is_empty(edited: &str) -> bool {
    edited.lines().map(str::trim_start).all(|line| line.is_empty() || line.starts_with('#'))
}

/// Returns the comments about the VM and its state.
fn heading(vm: &pb::GetVmInfoResponse) -> String {
    let vm_id = escape::line(&vm.vm_id);
    let may_change = match vm.state.as_known() {
        Some(pb::VmState::VM_STATE_RUNNING | pb::VmState::VM_STATE_PAUSED) => format!(
            "Now only {LIVE_PARTS} may change, at once.\nThe other parts may change after `vmcp shutdown {vm_id}`."
        ),
        _ => "Every part may change. The next boot uses the new values.".to_owned(),
    };
    let lines = format!(
        "{vm_id}: {}, generation {}\n{may_change}\n\
         Only changed parts are sent. A part that is removed gets its default.\n\
         An unchanged or empty file sends nothing. Lines that begin with {MARK} are not kept.",
        words::state(&vm.state),
        vm.generation
    );
    lines.lines().map(|line| format!("{MARK} {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(state: pb::VmState) -> EditText {
        let config = pb::VmConfig {
            memory: pb::MemoryConfig { size_bytes: 1 << 30, ..Default::default() }.into(),
            ..Default::default()
        };
        let vm = pb::GetVmInfoResponse {
            vm_id: "web-1".into(),
            generation: 7,
            state: state.into(),
            config: config.into(),
            ..Default::default()
        };
        EditText::of_vm(&vm).unwrap()
    }

    #[test]
    fn the_comments_say_what_may_change_in_the_present_state() {
        let document = text(pb::VmState::Shutdown).document("");
        assert!(
            document.starts_with("## web-1: shutdown, generation 7\n## Every part may change."),
            "{document}"
        );
        assert!(document.ends_with("\nconfig:\n  memory:\n    size_bytes: \"1073741824\"\n"), "{document}");
        for state in [pb::VmState::Running, pb::VmState::Paused] {
            let document = text(state).document("");
            assert!(document.contains("\n## Now only metadata, "), "{document}");
            assert!(document.contains("`vmcp shutdown web-1`"), "{document}");
        }
    }

    #[test]
    fn errors_stand_at_the_top_once_and_the_text_of_the_person_stays() {
        let mut text = text(pb::VmState::Created);
        let edited = text.document("error: one\n  two\u{a0}").replace("1073741824", "1") + "# mine\n";
        assert!(edited.starts_with("## error: one\n##   two"), "{edited}");
        text.take(&edited);
        let document = text.document("error: three");
        assert!(document.starts_with("## error: three\n##\n## web-1: "), "{document}");
        assert!(document.ends_with("\"1\"\n# mine\n") && !document.contains("one"), "{document}");
        assert_ne!(text.body(), text.first_body());
    }

    #[test]
    fn a_text_of_comments_and_blank_lines_is_empty() {
        assert!(is_empty("") && is_empty("## a\n\n  # b\n"));
        assert!(!is_empty("## a\nconfig: {}\n"));
        assert_eq!(body("## a\n\n"), "");
    }
}
