//! Text of others on a terminal: names, metadata and messages come from clients, guests and VMMs.
//!
//! A terminal obeys control bytes, and some letters turn the direction of a line, so that a text
//! can hide or forge what stands beside it. Both are shown as escapes.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Returns a text with every control character escaped, line ends included.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// Returns a text with every control character but line ends escaped.
pub(crate) fn block(text: &str) -> Cow<'_, str> {
    escaped(text, |letter| letter == '\n')
}

/// Returns JSON with the control characters escaped that JSON itself allows in strings (DEL and
/// C1), and those that turn the direction. The document means the same.
pub(crate) fn json(text: &str) -> Cow<'_, str> {
    if !text.chars().any(|letter| letter != '\n' && is_unsafe(letter)) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter != '\n' && is_unsafe(letter) {
            // All of these letters are in the first plane of Unicode, so four digits are enough.
            let _infallible = write!(safe, "\\u{:04x}", u32::from(letter));
        } else {
            safe.push(letter);
        }
    }
    Cow::Owned(safe)
}

fn escaped(text: &str, allowed: impl Fn(char) -> bool) -> Cow<'_, str> {
    let must = |letter: char| is_unsafe(letter) && !allowed(letter);
    if !text.chars().any(must) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        if must(letter) {
            safe.extend(letter.escape_default());
        } else {
            safe.push(letter);
        }
    }
    Cow::Owned(safe)
}

/// Returns true if a terminal may obey a character instead of showing it.
fn is_unsafe(letter: char) -> bool {
    letter.is_control()
        || matches!(
            letter,
            '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_are_escaped() {
        for (text, wanted) in [
            ("web-1", "web-1"),
            ("größe ☃", "größe ☃"),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("a\r\nb\tc", "a\\r\\nb\\tc"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            ("\u{202e}gnp", "\\u{202e}gnp"),
        ] {
            assert_eq!(line(text), wanted);
        }
        assert_eq!(block("a\nb\u{7}"), "a\nb\\u{7}");
    }

    #[test]
    fn escaped_json_has_the_same_value() {
        let value = serde_json::json!({"a\u{9b}": "\u{1b}[2J\u{7f}\u{202e}\n"});
        let text = serde_json::to_string_pretty(&value).unwrap();
        let safe = json(&text);
        assert!(!safe.chars().any(|letter| letter != '\n' && is_unsafe(letter)), "{safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }
}
