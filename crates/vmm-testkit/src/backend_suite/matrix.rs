//! The matrix in `docs/backend-support.md`: written from results, and compared with later results.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use super::case::{Case, CaseGroup};
use super::cases::CASES;
use super::results::{self, CaseVerdict, ColumnResults, root};

/// The columns in their order: name and heading.
pub const COLUMNS: [(&str, &str); 9] = [
    ("qemu-q35", "QEMU q35"),
    ("qemu-microvm", "QEMU microvm"),
    ("libvirt-qemu", "QEMU through libvirt"),
    ("cloudhypervisor", "Cloud Hypervisor"),
    ("firecracker", "Firecracker"),
    ("attached-cloudhypervisor", "Cloud Hypervisor, attached"),
    ("attached-firecracker", "Firecracker, attached"),
    ("attached-qemu", "QEMU, attached"),
    ("fake", "scripted fake"),
];
/// The line after which the matrix begins.
pub const BEGIN: &str = "<!-- matrix: made by scripts/backend-matrix.sh; do not edit below -->";
/// The variable that makes the tests record results without comparing them, while the document is
/// regenerated.
pub const UPDATE: &str = "VMCP_BACKEND_MATRIX";

/// Returns the path of the document.
#[must_use]
pub fn document() -> PathBuf {
    root().join("docs/backend-support.md")
}

/// Writes the results into the document and keeps its prose.
///
/// # Errors
/// The document or the results cannot be read, or the document has no place for a matrix.
pub fn update() -> io::Result<()> {
    let path = document();
    let text = std::fs::read_to_string(&path)?;
    let Some((prose, _)) = text.split_once(BEGIN) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} lacks the line {BEGIN}", path.display()),
        ));
    };
    let folder = results::folder();
    let mut columns = Vec::new();
    for (name, heading) in COLUMNS {
        columns.push((heading, results::read(&folder, name)?));
    }
    std::fs::write(&path, format!("{prose}{BEGIN}\n{}", render(&columns)))
}

/// Returns the matrix as Markdown.
fn render(columns: &[(&str, Option<ColumnResults>)]) -> String {
    let mut text = String::new();
    for group in CaseGroup::ALL {
        let _ = writeln!(text, "\n## {}\n", group.title());
        let headings: Vec<&str> = columns.iter().map(|(heading, _)| *heading).collect();
        let _ = writeln!(text, "| | {} |", headings.join(" | "));
        let _ = writeln!(text, "|---|{}", "---|".repeat(columns.len()));
        if group == CaseGroup::States {
            let versions =
                columns.iter().map(|(_, found)| found.as_ref().map_or("–", |found| &found.version));
            let _ = writeln!(text, "| version | {} |", versions.collect::<Vec<_>>().join(" | "));
        }
        for case in CASES.iter().filter(|case| case.group == group) {
            let cells = columns.iter().map(|(_, found)| cell(found.as_ref(), case).cell().0);
            let _ = writeln!(text, "| {} | {} |", case.title, cells.collect::<Vec<_>>().join(" | "));
        }
    }
    text.push_str("\n## The reasons for the cells\n");
    for (heading, found) in columns {
        let said = CASES.iter().filter_map(|case| {
            let verdict = cell(found.as_ref(), case);
            let detail = verdict.detail()?.split_whitespace().collect::<Vec<_>>().join(" ");
            Some(format!("- {} – {}: {detail}", case.title, verdict.cell().0))
        });
        let said: Vec<String> = said.collect();
        if !said.is_empty() {
            let _ = writeln!(text, "\n### {heading}\n\n{}", said.join("\n"));
        }
    }
    text
}

fn cell(found: Option<&ColumnResults>, case: &Case) -> CaseVerdict {
    let verdict = found.and_then(|found| found.cases.get(case.id)).cloned();
    // No results mean that the column could not run on the documented host.
    verdict.unwrap_or_else(|| CaseVerdict::NotRun("its program was not there".to_owned()))
}

/// Returns the cell of `column` and `case` in the document.
fn committed(document: &str, column: &str, case: &Case) -> Option<String> {
    let index = COLUMNS.iter().position(|(name, _)| *name == column)?;
    let (_, matrix) = document.split_once(BEGIN)?;
    let row = matrix.lines().find_map(|line| line.strip_prefix(&format!("| {} | ", case.title)))?;
    row.trim_end_matches('|').split('|').nth(index).map(|cell| cell.trim().to_owned())
}

/// Compares the verdict with the committed document.
///
/// # Panics
/// If the two differ.
pub(super) fn assert_committed(column: &str, case: &Case, found: &CaseVerdict) {
    if std::env::var_os(UPDATE).is_some() {
        return;
    }
    let document = std::fs::read_to_string(document()).unwrap_or_default();
    let committed = committed(&document, column, case);
    // A cell "not run" agrees with every verdict, because the documented host lacked something that
    // this host may have.
    if committed.as_deref() != Some(found.cell().0) && committed.as_deref() != Some("not run") {
        panic!(
            "docs/backend-support.md says {committed:?} for \"{}\" on {column}, and this run found \"{}\": \
             find out which is right, then run scripts/backend-matrix.sh",
            case.title,
            found.cell().0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_results_are_read_back() {
        let mut found = ColumnResults { version: "1.0".to_owned(), ..ColumnResults::default() };
        found.cases.insert(CASES[0].id.to_owned(), CaseVerdict::Served);
        found.cases.insert(CASES[1].id.to_owned(), CaseVerdict::Rejected("it cannot\nat all".to_owned()));
        let columns: Vec<_> = COLUMNS
            .iter()
            .map(|(_, heading)| (*heading, (*heading == "Firecracker").then(|| found.clone())))
            .collect();
        let document = format!("prose\n{BEGIN}\n{}", render(&columns));
        assert_eq!(committed(&document, "firecracker", &CASES[0]).as_deref(), Some("served"));
        assert_eq!(committed(&document, "firecracker", &CASES[1]).as_deref(), Some("refused"));
        assert_eq!(committed(&document, "firecracker", &CASES[2]).as_deref(), Some("not run"));
        assert_eq!(committed(&document, "qemu-q35", &CASES[0]).as_deref(), Some("not run"));
        assert!(document.contains("refused: it cannot at all"), "{document}");
    }

    #[test]
    fn case_titles_are_unique() {
        let titles: std::collections::BTreeSet<&str> = CASES.iter().map(|case| case.title).collect();
        assert_eq!(titles.len(), CASES.len());
    }
}
