//! Explains why the body of a request is not JSON: the place, the text before it, and the fault.

use serde_json::error::Category;

/// The most characters before a fault that an error quotes.
const MAX_BEFORE: usize = 32;

/// Returns the violation for an error of syntax in `json`. `None` for an error of another kind,
/// such as a limit on entries.
pub(super) fn explain(json: &[u8], error: &serde_json::Error) -> Option<String> {
    let text = error.to_string();
    let fault = text.split(" at line ").next().unwrap_or_default();
    let (line, column) = (error.line(), error.column());
    match error.classify() {
        Category::Eof => {
            let place = match fault.strip_prefix("EOF while parsing ") {
                Some("a value") | None => "where a value has to follow".to_owned(),
                Some(part) => format!("inside {part}"),
            };
            let bytes = json.len();
            Some(format!(
                "is cut off: the body ends after {bytes} bytes (line {line}, column {column}), {place}, behind `{}`; send the whole of it",
                before(json)
            ))
        }
        Category::Syntax => {
            let behind = before(up_to(json, line, column.saturating_sub(1)));
            let behind =
                if behind.is_empty() { "at its beginning".to_owned() } else { format!("behind `{behind}`") };
            Some(format!("is not JSON at line {line}, column {column}, {behind}: {}", in_words(fault)))
        }
        Category::Data | Category::Io => None,
    }
}

/// Returns the words for a fault that the parser names too briefly for a person.
fn in_words(fault: &str) -> &str {
    match fault {
        "expected value" => {
            "a value is expected: text in double quotes, a number, true, false, null, { … } or [ … ]"
        }
        "key must be a string" => "the name of a field in double quotes is expected",
        "trailing comma" => "a comma stands before the closing bracket",
        "trailing characters" => "the JSON object has ended, and more text follows",
        "recursion limit exceeded" => "the values are nested too deeply",
        other => other,
    }
}

/// Returns the text before a column of a line. Both count from 1, in bytes.
fn up_to(json: &[u8], line: usize, column: usize) -> &[u8] {
    let start: usize =
        json.split_inclusive(|&byte| byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    &json[..start.saturating_add(column).min(json.len())]
}

/// Returns the last characters of a text.
fn before(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4 * MAX_BEFORE)..]);
    let text = text.trim();
    let Some((at, _)) = text.char_indices().rev().nth(MAX_BEFORE - 1) else { return text.to_owned() };
    if at == 0 { text.to_owned() } else { format!("…{}", &text[at..]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(json: &str) -> Option<String> {
        let error = serde_json::from_str::<serde_json::Value>(json).unwrap_err();
        explain(json.as_bytes(), &error)
    }

    #[test]
    fn a_truncated_body_is_reported_with_its_length_and_its_last_text() {
        for (json, expected) in [
            (
                "{",
                "is cut off: the body ends after 1 bytes (line 1, column 1), inside an object, behind `{`; send the whole of it",
            ),
            (
                "{\"config\":\n {\"cpu\": ",
                "is cut off: the body ends after 20 bytes (line 2, column 9), where a value has to follow, behind `{\"config\":\n {\"cpu\":`; \
                 send the whole of it",
            ),
            (
                r#"{"vm_id":"a"#,
                "is cut off: the body ends after 11 bytes (line 1, column 11), inside a string, behind `{\"vm_id\":\"a`; send the whole of it",
            ),
            (
                "[1,",
                "is cut off: the body ends after 3 bytes (line 1, column 3), where a value has to follow, behind `[1,`; send the whole of it",
            ),
        ] {
            assert_eq!(explained(json).as_deref(), Some(expected), "{json}");
        }
        // Every beginning of a whole body is cut off, and nothing else.
        let whole = r#"{"vm_id":"ä","config":{"cpu":{"vcpu_count":2},"storage":[{"path":"/d","read_only":true}],"metadata":null}}"#;
        for (end, _) in whole.char_indices().skip(1) {
            let reported = explained(&whole[..end]).unwrap();
            assert!(reported.contains(&format!("is cut off: the body ends after {end} bytes")), "{reported}");
        }
    }

    #[test]
    fn a_syntax_fault_is_reported_with_its_position_and_the_text_before_it() {
        for (json, expected) in [
            (
                r#"{"vm_id": a}"#,
                r#"is not JSON at line 1, column 11, behind `{"vm_id":`: a value is expected: "#,
            ),
            (
                r#"{'vm_id': 1}"#,
                "is not JSON at line 1, column 2, behind `{`: the name of a field in double quotes is expected",
            ),
            (
                r#"{"a":1,}"#,
                r#"is not JSON at line 1, column 8, behind `{"a":1,`: a comma stands before the closing bracket"#,
            ),
            (r#"{"a":1 "b":2}"#, r#"is not JSON at line 1, column 8, behind `{"a":1`: expected `,` or `}`"#),
            (
                r#"{"a":1} x"#,
                r#"is not JSON at line 1, column 9, behind `{"a":1}`: the JSON object has ended, and more text follows"#,
            ),
            ("vm_id=a", "is not JSON at line 1, column 1, at its beginning: a value is expected: "),
        ] {
            let reported = explained(json).unwrap();
            assert!(reported.starts_with(expected), "{json}: {reported}");
        }
        let long = format!("{{\"a\":\"{}\" 7}}", "ü".repeat(1000));
        let reported = explained(&long).unwrap();
        assert!(reported.contains(&format!("behind `…{}\"`", "ü".repeat(MAX_BEFORE - 1))), "{reported}");
        assert!(explained(&"[".repeat(200)).unwrap().ends_with("nested too deeply"));
    }

    #[test]
    fn an_error_of_another_kind_keeps_its_text() {
        let error = serde_json::from_str::<bool>("7").unwrap_err();
        assert_eq!(explain(b"7", &error), None);
    }
}
