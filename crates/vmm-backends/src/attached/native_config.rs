//! Reads the JSON configuration that a VMM reports, without trust: bounds it, sanitizes it, and
//! compares it.

use serde_json::{Map, Value};

use crate::sanitize;

/// The most devices of one kind that are read.
pub(crate) const MAX_DEVICES: usize = 64;

/// Returns the text of a field, or an empty text if there is none.
pub(crate) fn text(of: &Value, field: &str) -> String {
    of.get(field).and_then(Value::as_str).map(sanitize::value).unwrap_or_default()
}

/// Returns the number of a field, at most [`i64::MAX`], or 0 if there is none.
pub(crate) fn number(of: &Value, field: &str) -> i64 {
    of.get(field).and_then(Value::as_u64).map_or(0, |number| i64::try_from(number).unwrap_or(i64::MAX))
}

/// Returns the number of a field, at most [`i32::MAX`], or 0 if there is none.
pub(crate) fn count(of: &Value, field: &str) -> i32 {
    i32::try_from(number(of, field)).unwrap_or(i32::MAX)
}

/// Returns the value of a boolean field, or false if there is none.
pub(crate) fn flag(of: &Value, field: &str) -> bool {
    of.get(field).and_then(Value::as_bool).unwrap_or(false)
}

/// Returns the first [`MAX_DEVICES`] elements of a list.
pub(crate) fn list<'a>(of: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    of.get(field).and_then(Value::as_array).into_iter().flatten().take(MAX_DEVICES)
}

/// Appends to `unrepresented` the name of each field of `of` that is set, except those in `known`
/// and those with a value in `defaults`. `what` precedes the name.
pub(crate) fn list_unrepresented(
    of: &Value,
    known: &[&str],
    defaults: &[(&str, Value)],
    unrepresented: &mut Vec<String>,
    what: &str,
) {
    let Some(fields) = of.as_object() else { return };
    // The number is limited, because a VMM may report fields without end.
    for (name, value) in fields.iter().take(MAX_DEVICES) {
        let is_default = defaults.iter().any(|(field, default)| field == name && default == value);
        if known.contains(&name.as_str()) || is_default || is_empty_value(value) {
            continue;
        }
        unrepresented.push(sanitize::version(&if what.is_empty() {
            name.clone()
        } else {
            format!("{what} {name}")
        }));
    }
}

fn is_empty_value(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty_value),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// Returns true if `theirs` contains every value of `ours`. `theirs` may contain more.
pub(crate) fn contains_values(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => contains_fields(ours, theirs),
        (Value::Array(ours), Value::Array(theirs)) => {
            ours.len() == theirs.len()
                && ours.iter().zip(theirs).all(|(ours, theirs)| contains_values(ours, theirs))
        }
        _ => ours == theirs,
    }
}

fn contains_fields(ours: &Map<String, Value>, theirs: &Map<String, Value>) -> bool {
    ours.iter().all(|(name, ours)| match theirs.get(name) {
        Some(theirs) => contains_values(ours, theirs),
        None => is_empty_value(ours),
    })
}

#[cfg(test)]
mod unit_tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_may_add_values_but_not_change_them() {
        let ours = json!({"a": 1, "list": [{"id": "x"}], "none": [], "off": false});
        assert!(contains_values(&ours, &json!({"a": 1, "b": 2, "list": [{"id": "x", "more": true}]})));
        for other in [
            json!({"a": 2, "list": [{"id": "x"}]}),
            json!({"a": 1, "list": []}),
            json!({"a": 1, "list": [{"id": "x"}, {"id": "y"}]}),
            json!({"a": 1, "list": [{"id": "x"}], "none": [1]}),
            json!({"a": 1, "list": [{"id": "x"}], "off": true}),
            json!([]),
        ] {
            assert!(!contains_values(&ours, &other), "{other}");
        }
    }

    #[test]
    fn only_set_unrepresented_fields_are_named() {
        let mut unrepresented = Vec::new();
        let reported = json!({"a": 1, "b": null, "c": [], "d": {"e": false}, "f": 2, "g": {"h": 1}});
        list_unrepresented(&reported, &["a"], &[("f", json!(2))], &mut unrepresented, "");
        assert_eq!(unrepresented, ["g"]);
    }
}
