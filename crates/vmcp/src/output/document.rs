//! The API's messages as JSON and YAML.

use std::borrow::Cow;

use serde::Serialize;

use super::escape;
use crate::failure::Failure;

/// Returns a message as JSON on many lines.
///
/// # Errors
///
/// The message cannot be written as JSON.
pub(crate) fn json_pretty<M: Serialize>(message: &M) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(message).map_err(|error| unwritable("JSON", &error))?;
    Ok(escape::json(&text).into_owned())
}

/// Returns a message as JSON on one line.
///
/// # Errors
///
/// The message cannot be written as JSON.
pub(crate) fn json_line<M: Serialize>(message: &M) -> Result<String, Failure> {
    let text = serde_json::to_string(message).map_err(|error| unwritable("JSON", &error))?;
    Ok(escape::json(&text).into_owned())
}

/// Returns a message as YAML, from the same tree that its JSON has.
///
/// YAML shows letters that turn the direction of a line as they are, and only some of its strings
/// can hold escapes. A message with such letters is written as JSON, which is YAML, too.
///
/// # Errors
///
/// The message cannot be written as YAML.
pub(crate) fn yaml<M: Serialize>(message: &M) -> Result<String, Failure> {
    let text = serde_saphyr::to_string(message).map_err(|error| unwritable("YAML", &error))?;
    match escape::block(&text) {
        Cow::Borrowed(_) => Ok(text),
        Cow::Owned(_) => json_pretty(message),
    }
}

fn unwritable(form: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::Local(format!("the answer cannot be written as {form}: {error}"))
}

#[cfg(test)]
mod tests {
    use vmm_proto::v1 as pb;

    use super::*;

    fn info() -> pb::VmInfo {
        pb::VmInfo {
            vm_id: "web-1".into(),
            state: pb::VmState::Running.into(),
            memory_size_bytes: 1 << 40,
            metadata: [
                ("team".to_owned(), "no".to_owned()),
                ("esc".to_owned(), "\u{1b}[2J\u{9b}".to_owned()),
                ("\u{1b}[2J".to_owned(), "\u{9b}\u{7f}\u{202e}\r\n- x: [".to_owned()),
            ]
            .into(),
            ..Default::default()
        }
    }

    #[test]
    fn json_output_is_the_message_of_the_api() {
        let text = json_pretty(&info()).unwrap();
        assert!(text.contains("\"vm_id\": \"web-1\"") && text.contains("\"1099511627776\""), "{text}");
        assert_eq!(serde_json::from_str::<pb::VmInfo>(&text).unwrap(), info());
        assert_eq!(json_line(&info()).unwrap().lines().count(), 1);
    }

    #[test]
    fn yaml_output_equals_the_json_and_has_no_control_bytes() {
        let mut harmless = info();
        harmless.metadata.retain(|_, value| !value.contains('\u{202e}'));
        assert!(yaml(&harmless).unwrap().contains("vm_id: web-1\n"));
        for message in [harmless, info()] {
            let text = yaml(&message).unwrap();
            assert_eq!(serde_saphyr::from_str::<pb::VmInfo>(&text).unwrap(), message);
            let unsafe_letter =
                |letter: char| letter != '\n' && (letter.is_control() || letter == '\u{202e}');
            assert!(!text.chars().any(unsafe_letter), "{text:?}");
        }
    }
}
