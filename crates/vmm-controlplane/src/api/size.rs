//! Limits the size of answers. Default clients of gRPC accept 4 MiB, so a page whose entries are
//! large ends early, with a token.

use std::io::{self, Write};

use buffa::Message;
use serde::Serialize;
use vmm_core::report::FieldReport;

/// The most bytes that the entries of one answer may take, in the larger of the two encodings.
///
/// The difference to 4 MiB is left for the rest of the answer.
pub(super) const MAX_ENTRIES_BYTES: usize = 3 << 20;

/// The most bytes of JSON per byte of the wire format, because a control character becomes
/// `\u001f`.
const JSON_PER_BYTE: usize = 6;

/// The bytes of JSON that an entry takes for the names of its fields.
const JSON_NAMES: usize = 1000;

/// Returns the number of `entries`, from the first, that fit into one answer. The number is at
/// least one.
pub(super) fn fitting<T: Message + Serialize>(entries: &[T]) -> usize {
    let wire = |entry: &T| entry.encoded_len() as usize;
    // The upper bound is checked first, because measuring JSON costs as much as writing it and
    // ordinary pages are far from the limit.
    let most: usize = entries.iter().map(|entry| JSON_PER_BYTE * wire(entry) + JSON_NAMES).sum();
    if most <= MAX_ENTRIES_BYTES {
        return entries.len();
    }
    let mut left = MAX_ENTRIES_BYTES;
    for (index, entry) in entries.iter().enumerate() {
        let size = wire(entry).max(json_len(entry)) + 16;
        match left.checked_sub(size) {
            Some(rest) => left = rest,
            None => return index.max(1),
        }
    }
    entries.len()
}

fn json_len<T: Serialize>(entry: &T) -> usize {
    struct SizeCounter(usize);
    impl Write for SizeCounter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut counter = SizeCounter(0);
    // An entry that cannot be written counts as too large. The library reports the error when it
    // writes the answer.
    match serde_json::to_writer(&mut counter, entry) {
        Ok(()) => counter.0,
        Err(_) => MAX_ENTRIES_BYTES,
    }
}

/// Drops the reports that do not fit into one answer, and adds a report with their number.
pub(super) fn bounded(mut reports: Vec<FieldReport>) -> Vec<FieldReport> {
    // One answer has two lists of reports, so each gets half.
    let mut left = MAX_ENTRIES_BYTES / JSON_PER_BYTE / 2;
    let fits = |report: &&FieldReport| {
        let size = report.field.len() + report.message.len() + 16;
        left.checked_sub(size).map(|rest| left = rest).is_some()
    };
    let count = reports.iter().take_while(fits).count();
    if count < reports.len() {
        let more = reports.len() - count;
        reports.truncate(count);
        reports.push(FieldReport::new("request", format!("{more} more reports do not fit into this answer")));
    }
    reports
}

#[cfg(test)]
mod tests {
    use vmm_proto::v1 as pb;

    use super::*;

    fn labelled(value: &str) -> pb::VmInfo {
        pb::VmInfo { metadata: [("a".to_owned(), value.to_owned())].into(), ..Default::default() }
    }

    #[test]
    fn a_page_stays_below_the_size_limit_in_both_encodings() {
        assert_eq!(fitting::<pb::VmInfo>(&[]), 0);
        assert_eq!(fitting(&vec![labelled("x"); 1000]), 1000);
        for (letter, fewest) in [("x", 45), ("\u{1}", 7), ("\"", 22)] {
            let vms = vec![labelled(&letter.repeat(64 << 10)); 1000];
            let count = fitting(&vms);
            let page = pb::ListVmsResponse { vms: vms[..count].to_vec(), ..Default::default() };
            assert!(count >= fewest, "{count}");
            assert!(page.encoded_len() < 4 << 20 && serde_json::to_vec(&page).unwrap().len() < 4 << 20);
        }
        assert_eq!(fitting(&[labelled(&"x".repeat(5 << 20)), labelled("")]), 1, "no page is empty");
    }

    #[test]
    fn findings_beyond_the_size_limit_are_counted() {
        let few = vec![FieldReport::new("a", "b"); 1000];
        assert_eq!(bounded(few.clone()), few);
        let many = bounded(vec![FieldReport::new("a", "b".repeat(16 << 10)); 1000]);
        let last = many.last().unwrap();
        assert!(last.message.starts_with(&format!("{} more", 1000 - (many.len() - 1))), "{}", last.message);
        assert!(many.len() * (16 << 10) < 1 << 20);
    }
}
