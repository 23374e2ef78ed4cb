//! What a VMM says, made fit to be shown and stored: bounded, on one line, without control characters.
//!
//! A VMM hosts a guest that may have taken it over; its words reach terminals, logs and the database.

/// The longest sentence that is passed on, in characters.
const MAX_SENTENCE: usize = 2048;
/// The longest version, in characters.
const MAX_VERSION: usize = 64;

/// A reason or an explanation.
pub(crate) fn sentence(text: &str) -> String {
    cut(text, MAX_SENTENCE)
}

/// The longest quotation of an answer in a form that nobody expects, in characters.
const MAX_QUOTE: usize = 512;

/// An answer in a form that nobody expects, as it came.
pub(crate) fn quote(answer: &[u8]) -> String {
    // A character has at most four bytes.
    let begin = &answer[..answer.len().min(4 * (MAX_QUOTE + 1))];
    cut(String::from_utf8_lossy(begin).trim(), MAX_QUOTE)
}

/// The longest path or kernel command line, in characters.
const MAX_VALUE: usize = 4096;

/// A value of a configuration that a VMM tells.
pub(crate) fn value(text: &str) -> String {
    cut(text, MAX_VALUE)
}

/// The version that a program claims to have.
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
    fn words_are_cut_and_cleaned() {
        assert_eq!(version("v53.0"), "v53.0");
        assert_eq!(version("1\u{1b}[2J\n"), "1 [2J ");
        assert_eq!(version(&"ä".repeat(64)), "ä".repeat(64));
        assert_eq!(version(&"ä".repeat(65)), format!("{}…", "ä".repeat(64)));
        assert_eq!(sentence(&"x".repeat(1 << 20)).chars().count(), MAX_SENTENCE + 1);
    }
}
