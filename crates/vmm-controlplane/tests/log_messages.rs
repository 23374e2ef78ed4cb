//! The table of messages worth an alert, in `docs/operating.md`, names messages that the program logs, at their level, and every
//! message of level ERROR.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers are tests too; clippy.toml only sees #[test] functions"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const PAGE: &str = "docs/operating.md";
const TABLE: &str = "### Messages worth an alert";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|found| found == "rs") {
            into.push(path);
        }
    }
}

/// Returns the last string literal of a macro call whose arguments `text` begins with, as the program sees it.
fn last_literal(text: &str) -> Option<String> {
    let mut depth = 1;
    let mut last = None;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            '"' => {
                let mut literal = String::new();
                while let Some(letter) = letters.next() {
                    match letter {
                        '"' => break,
                        '\\' => match letters.next()? {
                            // A line that goes on: the indentation of the next one does not count.
                            '\n' => {
                                let rest = letters.as_str().trim_start();
                                letters = rest.chars();
                            }
                            escaped => literal.push(escaped),
                        },
                        other => literal.push(other),
                    }
                }
                last = Some(literal);
            }
            _ => {}
        }
        if depth == 0 {
            return last;
        }
    }
    None
}

/// Returns the messages that the program logs, with their level.
fn logged() -> BTreeMap<String, &'static str> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(repository().join("crates")).unwrap() {
        let source = entry.unwrap().path().join("src");
        if source.is_dir() && !source.to_string_lossy().contains("testkit") {
            sources(&source, &mut files);
        }
    }
    let mut messages = BTreeMap::new();
    for file in files {
        let text = std::fs::read_to_string(file).unwrap();
        // `leveled!` picks the level by the outcome: a failure is a warning.
        for (call, level) in
            [("error!(", "ERROR"), ("warn!(", "WARN"), ("info!(", "INFO"), ("leveled!(", "WARN")]
        {
            for (at, _) in text.match_indices(call) {
                if let Some(message) = last_literal(&text[at + call.len()..]) {
                    messages.insert(message, level);
                }
            }
        }
    }
    assert!(messages.len() > 100, "{}", messages.len());
    messages
}

/// Returns the messages of the table, with their level.
fn documented() -> BTreeMap<String, String> {
    let page = std::fs::read_to_string(repository().join(PAGE)).unwrap();
    let (_, table) = page.split_once(TABLE).expect("the page has the table");
    let (table, _) = table.split_once("\n## ").unwrap_or((table, ""));
    let row = |line: &str| {
        let (message, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        Some((message.to_owned(), rest.split(" | ").next()?.to_owned()))
    };
    table.lines().filter_map(row).collect()
}

#[test]
fn every_message_of_the_table_is_logged_at_its_level() {
    let logged = logged();
    let documented = documented();
    assert!(documented.len() > 20, "{documented:#?}");
    let wrong: Vec<_> = documented
        .iter()
        .filter(|(message, level)| logged.get(*message).copied() != Some(level.as_str()))
        .collect();
    assert!(wrong.is_empty(), "{PAGE} names messages that no code logs at that level: {wrong:#?}");
}

#[test]
fn every_error_of_the_log_is_in_the_table() {
    let documented = documented();
    let missing: Vec<_> = logged()
        .into_iter()
        .filter(|(message, level)| *level == "ERROR" && !documented.contains_key(message))
        .collect();
    assert!(missing.is_empty(), "{PAGE}, {TABLE:?}, has no row for {missing:#?}");
}
