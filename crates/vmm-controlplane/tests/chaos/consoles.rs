//! Consoles: what clients read of them and typed into them, and whether it can all be true.
//!
//! ```text
//!   one VM's output   b a n n e r < c 3 . 1 7 > b a n n e r ...      far less than its history, so that nothing of it may be lost
//!     read by one         └── offset 4 ──┘└─ its next read ─┘        each read goes on where the client's last one ended
//!     read by another └────────────────────────┘                     the same byte at the same offset, whoever reads it
//! ```
//!
//! A client types a [`token`]. The bytes of one call stay together, and are read by the guest once at most, so that a guest that
//! sends back what it reads prints each token once at most, and never one inside another.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// The bytes of one StreamConsole, by a client that knows which creation it read.
#[derive(Clone, Debug)]
pub(crate) struct ConsoleRead {
    /// The VM, by its place among the run's names.
    pub(crate) vm: usize,
    pub(crate) uid: String,
    pub(crate) client: usize,
    /// The offset at which the client asked the stream to begin.
    pub(crate) offset: u64,
    pub(crate) pieces: Vec<(u64, Vec<u8>)>,
    /// The code of the stream's error.
    pub(crate) error: Option<String>,
    /// True if the bytes are the whole console at the end of the run.
    pub(crate) whole: bool,
}

/// Returns the input of a client: its number and the number of its call. The input has no letter that
/// the guest obeys, and none of the guest's banner.
pub(crate) fn token(client: usize, call: u64) -> String {
    format!("<c{client}.{call}>")
}

/// The output of one creation as far as it was read.
#[derive(Default)]
struct Output {
    /// By offset, with the client that read the byte first.
    bytes: BTreeMap<u64, (u8, usize)>,
}

impl Output {
    /// Adds a piece. Fails if another client was told something else.
    fn add(&mut self, client: usize, offset: u64, data: &[u8]) -> Result<(), String> {
        for (place, byte) in (offset..).zip(data) {
            let (known, by) = *self.bytes.entry(place).or_insert((*byte, client));
            if known != *byte {
                return Err(format!(
                    "at {place} client {client} read {:?} and client {by} {:?}",
                    char::from(*byte),
                    char::from(known)
                ));
            }
        }
        Ok(())
    }

    /// Returns the bytes that were read without a gap, with their place in the console.
    fn runs(&self) -> Vec<(Range<u64>, String)> {
        let mut runs: Vec<(Range<u64>, Vec<u8>)> = Vec::new();
        for (place, (byte, _)) in &self.bytes {
            match runs.last_mut() {
                Some((range, bytes)) if range.end == *place => {
                    range.end += 1;
                    bytes.push(*byte);
                }
                _ => runs.push((*place..place + 1, vec![*byte])),
            }
        }
        runs.into_iter().map(|(range, bytes)| (range, String::from_utf8_lossy(&bytes).into_owned())).collect()
    }
}

/// The findings of the reads of one name.
pub(crate) struct ConsoleVerdict {
    /// Each text is a violation.
    pub(crate) violations: Vec<String>,
    /// The number of bytes that were read of all consoles of the name, each counted once.
    pub(crate) bytes: usize,
    /// The number of tokens that the guests sent back.
    pub(crate) echoed: usize,
}

/// Judges all reads of one name. `typed` has every token that was sent to the name.
pub(crate) fn check(reads: &[ConsoleRead], typed: &HashMap<String, usize>) -> ConsoleVerdict {
    let mut found = Vec::new();
    let mut outputs: BTreeMap<&str, Output> = BTreeMap::new();
    for read in reads {
        let at = |text: String| format!("the console of {} from {}: {text}", read.uid, read.offset);
        if let Err(problem) = is_one_stream(read) {
            found.push(at(problem));
        }
        let output = outputs.entry(&read.uid).or_default();
        for (offset, data) in &read.pieces {
            if let Err(problem) = output.add(read.client, *offset, data) {
                found.push(at(problem));
            }
        }
    }
    for whole in reads.iter().filter(|read| read.whole) {
        let last = outputs.get(whole.uid.as_str()).and_then(|output| output.bytes.keys().next_back());
        let end = whole.pieces.last().map_or(whole.offset, |(offset, data)| offset + data.len() as u64);
        if let Some(lost) = last.filter(|last| **last >= end) {
            found
                .push(format!("the console of {} ends at {end}, and the byte at {lost} was read", whole.uid));
        }
    }
    let mut printed: HashMap<&str, usize> = HashMap::new();
    let runs: Vec<_> = outputs.values().flat_map(Output::runs).collect();
    for (range, text) in &runs {
        for token in tokens(text) {
            match token {
                Ok(token) if typed.contains_key(token) => *printed.entry(token).or_default() += 1,
                Ok(token) => found.push(format!("the console printed {token:?}, which nobody typed")),
                Err(mixed) => found.push(format!("two calls are mixed in {mixed:?} of {range:?}")),
            }
        }
    }
    let twice = printed.iter().filter(|(_, times)| **times > 1);
    found.extend(twice.map(|(token, times)| format!("{token} was typed once and printed {times} times")));
    let bytes = outputs.values().map(|output| output.bytes.len()).sum();
    ConsoleVerdict { violations: found, bytes, echoed: printed.len() }
}

/// Checks that a stream has the bytes that were asked for, in their order, with no gap.
fn is_one_stream(read: &ConsoleRead) -> Result<(), String> {
    match read.error.as_deref() {
        None | Some("unavailable") => {}
        Some(code) => return Err(format!("the stream ended with {code}")),
    }
    let mut next = read.offset;
    for (offset, data) in &read.pieces {
        if *offset != next {
            return Err(format!("{offset} comes after {next}"));
        }
        next += data.len() as u64;
    }
    Ok(())
}

/// The tokens of a text; an error is one that begins inside another. A token may be cut by a boot, whose banner follows, and by the
/// end of what was read.
fn tokens(text: &str) -> Vec<Result<&str, &str>> {
    let mut found = Vec::new();
    for (begin, _) in text.match_indices('<') {
        let rest = &text[begin..];
        let end = rest[1..].find(|letter| !matches!(letter, 'c' | '.' | '0'..='9')).map(|end| end + 1);
        match end.map(|end| (end, &rest[end..=end])) {
            Some((end, ">")) => found.push(Ok(&rest[..=end])),
            Some((end, "<")) => found.push(Err(&rest[..=end])),
            Some(_) | None => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const BANNER: &str = "vmcp-tiny: up kind=obey\r\n";

    fn read(client: usize, offset: u64, text: &str) -> ConsoleRead {
        let pieces = vec![(offset, text.as_bytes().to_vec())];
        ConsoleRead { vm: 0, uid: "a".to_owned(), client, offset, pieces, error: None, whole: false }
    }

    fn judge(reads: &[ConsoleRead]) -> Vec<String> {
        let typed = ["<c1.1>", "<c2.1>"].map(|token| (token.to_owned(), 0));
        check(reads, &typed.into()).violations
    }

    #[test]
    fn reads_that_agree_have_no_violation() {
        let text = format!("{BANNER}<c1.1>{BANNER}<c2.1><c2");
        let middle = read(2, 10, &text[10..30]);
        let reads = [read(1, 0, &text[..20]), read(1, 20, &text[20..]), middle, read(3, 40, "")];
        assert_eq!(judge(&reads), [""; 0]);
        let verdict = check(&reads, &HashMap::from([("<c1.1>".to_owned(), 0), ("<c2.1>".to_owned(), 0)]));
        assert_eq!((verdict.bytes, verdict.echoed), (text.len(), 2));
        // The VM was created anew: its output is another one.
        let anew = ConsoleRead { uid: "b".to_owned(), ..read(1, 0, "vmcp") };
        assert_eq!(judge(&[read(1, 0, "<c1."), anew]), [""; 0]);
        // A token that a boot has cut.
        assert_eq!(judge(&[read(1, 0, &format!("<c1.{BANNER}<c2.1>"))]), [""; 0]);
        let lost = ConsoleRead { error: Some("unavailable".to_owned()), ..read(1, 0, "vm") };
        assert_eq!(judge(&[lost]), [""; 0]);
    }

    #[track_caller]
    fn fails(reads: &[ConsoleRead], text: &str) {
        let found = judge(reads);
        assert!(found.len() == 1 && found[0].contains(text), "{found:?}");
    }

    #[test]
    fn another_byte_at_a_known_offset_is_a_violation() {
        fails(&[read(1, 0, "vmcp"), read(2, 2, "xp")], "at 2 client 2 read 'x' and client 1 'c'");
    }

    #[test]
    fn a_gap_and_a_step_back_are_violations() {
        let pieces = |pieces: &[(u64, &str)]| {
            let pieces = pieces.iter().map(|(offset, text)| (*offset, text.as_bytes().to_vec())).collect();
            [ConsoleRead { pieces, ..read(1, 0, "") }]
        };
        fails(&pieces(&[(0, "vm"), (3, "p")]), "3 comes after 2");
        fails(&pieces(&[(0, "vm"), (1, "m")]), "1 comes after 2");
        fails(&pieces(&[(1, "m")]), "1 comes after 0");
    }

    #[test]
    fn output_that_was_read_and_is_gone_at_the_end_is_a_violation() {
        let whole = |text| ConsoleRead { whole: true, ..read(9, 0, text) };
        assert_eq!(judge(&[read(1, 0, "vmcp"), whole("vmcp-tiny")]), [""; 0]);
        fails(&[read(1, 0, "vmcp-"), whole("vm")], "ends at 2, and the byte at 4 was read");
    }

    #[test]
    fn an_offset_that_is_not_known_any_more_is_a_violation() {
        let past = ConsoleRead { error: Some("out_of_range".to_owned()), ..read(1, 9, "") };
        fails(&[past], "ended with out_of_range");
    }

    #[test]
    fn input_that_is_read_twice_or_mixed_or_from_nowhere_is_a_violation() {
        fails(&[read(1, 0, "<c1.1><c1.1>")], "<c1.1> was typed once and printed 2 times");
        fails(&[read(1, 0, "<c1.<c2.1>")], "two calls are mixed in \"<c1.<\"");
        fails(&[read(1, 0, "<c9.9>")], "which nobody typed");
    }

    #[test]
    fn a_token_has_no_letter_that_a_guest_obeys() {
        assert_eq!(token(3, 17), "<c3.17>");
        assert!(!token(7, 1234).contains(|letter| "RFPv".contains(letter)));
    }
}
