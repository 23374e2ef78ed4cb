//! What is printed, held against what the guide says is printed.
//!
//! `…` in a line stands for anything, on a line of its own for any lines. JSON may have more members and elements than are shown.

use serde_json::{Deserializer, Value};

/// Numbers that are different each time.
const VARYING: [&str; 1] = ["uptime_seconds"];

/// What the guide shows.
#[derive(Debug)]
pub(crate) enum Shown {
    Text(String),
    /// The last answer of the block.
    Json(Value),
}

impl Shown {
    /// Says what differs.
    pub(crate) fn differs(&self, printed: &str) -> Option<String> {
        match self {
            Self::Text(shown) => {
                let lines = |text: &'_ str| text.trim_end().lines().map(str::to_owned).collect::<Vec<_>>();
                (!lines_fit(&lines(shown), &lines(printed))).then(|| format!("shown:\n{shown}"))
            }
            Self::Json(shown) => match answers(printed) {
                Ok(answers) => {
                    let fits = answers.last().is_some_and(|answer| fits("", shown, answer));
                    (!fits).then(|| format!("shown:\n{shown:#}"))
                }
                Err(error) => Some(format!("it should be JSON: {error}")),
            },
        }
    }

    /// Whether it shows the refusal of a call.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Json(shown) if shown.get("code").is_some())
    }
}

/// The answers that a block has printed, one behind the other.
pub(crate) fn answers(printed: &str) -> Result<Vec<Value>, serde_json::Error> {
    Deserializer::from_str(printed).into_iter().collect()
}

fn fits(name: &str, shown: &Value, printed: &Value) -> bool {
    match (shown, printed) {
        (Value::Object(shown), Value::Object(printed)) => {
            shown.iter().all(|(key, value)| printed.get(key).is_some_and(|found| fits(key, value, found)))
        }
        (Value::Array(shown), Value::Array(printed)) => {
            shown.iter().all(|wanted| printed.iter().any(|found| fits(name, wanted, found)))
        }
        (Value::String(shown), Value::String(printed)) => line_fits(shown, printed),
        (Value::Number(_), Value::Number(_)) if VARYING.contains(&name) => true,
        _ => shown == printed,
    }
}

fn lines_fit(shown: &[String], printed: &[String]) -> bool {
    match shown {
        [] => printed.is_empty(),
        [any, rest @ ..] if any == "…" => {
            (0..=printed.len()).any(|skipped| lines_fit(rest, &printed[skipped..]))
        }
        [first, rest @ ..] => {
            printed.first().is_some_and(|line| line_fits(first, line)) && lines_fit(rest, &printed[1..])
        }
    }
}

fn line_fits(shown: &str, printed: &str) -> bool {
    let Some((start, rest)) = shown.split_once('…') else { return shown == printed };
    let Some(left) = printed.strip_prefix(start) else { return false };
    let starts = left.char_indices().map(|(at, _)| at).chain([left.len()]);
    starts.into_iter().any(|at| line_fits(rest, &left[at..]))
}

#[test]
fn a_printed_answer_may_add_fields_to_the_shown_one() {
    let json = |shown: &str| Shown::Json(serde_json::from_str(shown).unwrap());
    let printed = r#"{"success":false}{"vm_id":"a-1","n":"5","vms":[{"x":1},{"x":2}],"uptime_seconds":7}"#;
    for shown in [r#"{"vm_id":"a-…"}"#, r#"{"vms":[{"x":2}],"n":"5"}"#, r#"{"uptime_seconds":3600}"#, r"{}"]
    {
        assert_eq!(json(shown).differs(printed), None, "{shown}");
    }
    for shown in [r#"{"vm_id":"b-…"}"#, r#"{"vms":[{"x":3}]}"#, r#"{"n":5}"#, r#"{"success":false}"#] {
        assert!(json(shown).differs(printed).is_some(), "{shown}");
    }
    let text = |shown: &str| Shown::Text(shown.to_owned());
    for shown in ["a b\nc\n", "…\nc\n", "a …\n…\n", "…\n", "a b\nc\n…\n"] {
        assert_eq!(text(shown).differs("a b\nc\n"), None, "{shown}");
    }
    for shown in ["a b\n", "…\nb\n", "b\nc\n", "a b\nc\nd\n", ""] {
        assert!(text(shown).differs("a b\nc\n").is_some(), "{shown}");
    }
}
