//! Sanitizes text that comes from a VMM before it is shown or stored: limits the length, keeps it
//! on one line, and removes control characters.
//!
//! A VMM hosts a guest that may have taken it over, and this text reaches terminals, logs and the
//! database.

/// The most characters of a sentence.
const MAX_SENTENCE: usize = 2048;
/// The most characters of a version.
const MAX_VERSION: usize = 64;

/// Sanitizes a reason or an explanation.
pub(crate) fn sentence(text: &str) -> String {
    cut(text, MAX_SENTENCE)
}

/// The most characters that are quoted of an answer in an unexpected form.
const MAX_QUOTE: usize = 512;

/// Sanitizes an answer in an unexpected form, so that an error can quote it.
pub(crate) fn quote(answer: &[u8]) -> String {
    // A character has at most four bytes, so these bytes hold one character more than is shown,
    // which is enough to see that the answer is longer.
    let begin = &answer[..answer.len().min(4 * (MAX_QUOTE + 1))];
    cut(String::from_utf8_lossy(begin).trim(), MAX_QUOTE)
}

/// The most characters of a path or a kernel command line.
const MAX_VALUE: usize = 4096;

/// Sanitizes a value of a VMM's configuration.
pub(crate) fn value(text: &str) -> String {
    cut(text, MAX_VALUE)
}

/// Sanitizes the version that a program reports.
pub(crate) fn version(text: &str) -> String {
    cut(text, MAX_VERSION)
}

fn cut(text: &str, most: usize) -> String {
    let clean = |letter: char| if letter.is_control() { ' ' } else { letter };
    let mut shown: String = text.chars().take(most).map(clean).collect();
    if text.chars().nth(most).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_shortened_and_escaped() {
        assert_eq!(version("v53.0"), "v53.0");
        assert_eq!(version("1\u{1b}[2J\n"), "1 [2J ");
        assert_eq!(version(&"ä".repeat(64)), "ä".repeat(64));
        assert_eq!(version(&"ä".repeat(65)), format!("{}…", "ä".repeat(64)));
        assert_eq!(sentence(&"x".repeat(1 << 20)).chars().count(), MAX_SENTENCE + 1);
    }
}
