//! Compares `docs/guarantees.md` with the code: each test that the page names exists and runs, and so does each constant.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers are tests too; clippy.toml only sees #[test] functions"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const PAGE: &str = "docs/guarantees.md";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The tests that the page names, as file and name.
fn named(page: &str) -> Vec<(&str, &str)> {
    page.split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|code| code.split_once(".rs::").map(|_| code))
        .map(split)
        .collect()
}

fn split(code: &str) -> (&str, &str) {
    let at = code.find("::").unwrap();
    (&code[..at], &code[at + 2..])
}

/// Why `name` is no test of `file`, if it is none.
fn problem(file: &str, name: &str) -> Option<String> {
    let path = format!("crates/{file}");
    if !repository().join(&path).is_file() {
        return Some(format!("there is no {path}"));
    }
    let code = read(&path);
    let found = if file.ends_with("tests/faults/scenario.rs") {
        // A long scenario has a line for each argument.
        let code = code.split_whitespace().collect::<Vec<_>>().join(" ").replace("( ", "(");
        code.contains(&format!("Self::new(\"{name}\","))
    } else if file == "vmm-testkit/src/backend_suite/cases.rs" {
        // The suite itself holds its list of names against its list of cases.
        listed("crates/vmm-testkit/src/backend_suite/mod.rs", "backend_suite", name)
    } else if file.starts_with("vmm-testkit/src/store_suite/") {
        defines(&code, name) && listed("crates/vmm-testkit/src/store_suite.rs", "store_suite", name)
    } else {
        is_test(&code, name)
    };
    (!found).then(|| format!("{file} has no test {name}"))
}

fn defines(code: &str, name: &str) -> bool {
    code.contains(&format!(" fn {name}("))
}

/// Whether a suite's macro makes a test of the case.
fn listed(path: &str, suite: &str, name: &str) -> bool {
    let code = read(path);
    let list = code.split_once(&format!("macro_rules! {suite}")).unwrap().1;
    let list = list.split_once("@each $make:").unwrap().1.split(");").next().unwrap();
    list.split_whitespace().any(|case| case == name)
}

/// Whether a function of that name is marked as a test, and not as one that is left out.
fn is_test(code: &str, name: &str) -> bool {
    let Some(at) = code.find(&format!("fn {name}(")) else { return false };
    let above = code[..at].rsplit_once('\n').map_or("", |(above, _)| above);
    let marks: Vec<_> = above
        .lines()
        .rev()
        .map(str::trim_start)
        .take_while(|line| line.starts_with("#[") || line.starts_with("///"))
        .collect();
    marks.iter().any(|mark| mark.starts_with("#[test]") || mark.starts_with("#[tokio::test"))
        && !marks.iter().any(|mark| mark.starts_with("#[ignore"))
}

#[test]
fn every_test_that_a_guarantee_names_exists() {
    let page = read(PAGE);
    let tests = named(&page);
    assert!(tests.len() > 80, "only {} names were found: the search has gone blind", tests.len());
    let missing: Vec<_> = tests.iter().filter_map(|(file, name)| problem(file, name)).collect();
    assert!(missing.is_empty(), "{PAGE}: {missing:#?}");
    let mut seen = BTreeSet::new();
    let twice: Vec<_> = tests.iter().filter(|test| !seen.insert(**test)).collect();
    assert!(twice.is_empty(), "{PAGE} names these twice: {twice:?}");
}

/// Returns the constants that the page names.
fn constants(page: &str) -> Vec<&str> {
    let codes = page.split('`').skip(1).step_by(2);
    codes
        .filter(|code| code.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
        .filter(|code| !code.starts_with("UNKEY_"))
        .collect()
}

/// Returns the code of every source file below `folder`.
fn sources(folder: &Path, into: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            into.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_constant_that_a_guarantee_names_exists() {
    let page = read(PAGE);
    let mut code = String::new();
    for crate_folder in std::fs::read_dir(repository().join("crates")).unwrap().map(Result::unwrap) {
        sources(&crate_folder.path().join("src"), &mut code);
    }
    let constants = constants(&page);
    assert!(constants.len() >= 15, "only {constants:?} were found: the search has gone blind");
    let missing: Vec<_> =
        constants.iter().filter(|name| !code.contains(&format!("const {name}: "))).collect();
    assert!(missing.is_empty(), "{PAGE} names constants that do not exist: {missing:?}");
}

#[test]
fn every_guarantee_has_tests() {
    let page = read(PAGE);
    for chapter in
        page.split("\n## ").skip(1).filter(|chapter| chapter.starts_with(|c: char| c.is_ascii_digit()))
    {
        let title = chapter.lines().next().unwrap();
        assert!(!named(chapter).is_empty(), "{PAGE}: {title} names no test");
        let anchor: String = title
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        assert!(page.contains(&format!("](#{anchor})")), "{PAGE}: the table does not lead to {title}");
    }
}

#[test]
fn a_function_without_a_test_attribute_is_no_test() {
    let code = "#[test]\nfn runs() {}\n\nfn helper() {}\n\n#[test]\n#[ignore = \"x\"]\nfn left_out() {}\n\n#[tokio::test(start_paused = true)]\nasync fn waits() {}\n";
    let found = |name| is_test(code, name);
    assert!(found("runs") && found("waits"));
    assert!(!found("helper") && !found("left_out") && !found("missing"));
}
