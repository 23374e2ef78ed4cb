//! The configuration file: TOML with keys that are flat (`ch_endpoint = …`) or in sections (`[ch]`
//! `endpoint = …`).
//!
//! A section is only a prefix: the names on the way to a value, joined by underscores, are the
//! setting's key. Values keep the text with which they were written, so that one parser reads them
//! from all sources.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Origin, printable};
use super::settings::{CONFIG_KEY, Setting, nearest};

/// The values found in a file, each with its location.
pub(super) type FileValues = BTreeMap<Setting, (String, Origin)>;

/// Reads a file's text. Errors are added to `errors`, and the values without errors are returned.
pub(super) fn read(path: &Path, text: &str, errors: &mut Vec<ConfigError>) -> FileValues {
    let (document, faults) = DeTable::parse_recoverable(text);
    let mut reader = FileReader { path, text, values: FileValues::new(), errors };
    for fault in &faults {
        let origin = reader.location(fault.span().unwrap_or(0..0), "");
        reader.errors.push(ConfigError::new(
            format!("{origin}: {}", printable(fault.message())),
            None,
            "correct the TOML syntax there",
        ));
    }
    // After a syntax error the parser guesses the rest of the document, and errors about the
    // guesses would mislead.
    if faults.is_empty() {
        reader.table("", document.get_ref());
    }
    reader.values
}

struct FileReader<'a> {
    path: &'a Path,
    text: &'a str,
    values: FileValues,
    errors: &'a mut Vec<ConfigError>,
}

impl FileReader<'_> {
    fn table(&mut self, prefix: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            let path = if prefix.is_empty() {
                name.get_ref().to_string()
            } else {
                format!("{prefix}.{}", name.get_ref())
            };
            match value.get_ref().as_table() {
                Some(inner) if is_section(&path) => self.table(&path, inner),
                _ => self.value(&path, name.span(), value.get_ref()),
            }
        }
    }

    fn value(&mut self, path: &str, span: Range<usize>, value: &DeValue<'_>) {
        let origin = self.location(span, path);
        let Some(setting) = Setting::from_key(&path.replace('.', "_")) else {
            return self.unknown(path, origin);
        };
        let text = match value.as_array() {
            Some(_) if !setting.is_list() => {
                let what = "is a list, and the setting takes one value";
                return self.refuse(path, origin, what, "one value", setting);
            }
            Some(items) => {
                let items: Option<Vec<_>> = items.iter().map(|item| scalar(item.get_ref())).collect();
                items.map(|items| items.join(","))
            }
            None => scalar(value),
        };
        let Some(text) = text else {
            return self.refuse(
                path,
                origin,
                "has a type that no setting has",
                "a text, a number or a boolean",
                setting,
            );
        };
        if let Some((_, earlier)) = self.values.get(&setting) {
            let message = format!("{} is given twice, the first time at {earlier}", printable(path));
            let advice = format!("keep one of them, or set {} instead", setting.variable());
            self.errors.push(ConfigError::new(message, origin, advice));
        } else {
            self.values.insert(setting, (text, origin));
        }
    }

    fn unknown(&mut self, path: &str, origin: Origin) {
        let advice =
            match nearest(&path.replace(['.', '-'], "_"), Setting::ALL.iter().map(|setting| setting.key())) {
                _ if path == CONFIG_KEY => {
                    "name the file by --config or UNKEY_VMCP_CONFIG instead".to_owned()
                }
                Some(key) => format!("did you mean {key}? Else remove it"),
                None => "remove it; docs/configuration.md lists every key".to_owned(),
            };
        self.errors.push(ConfigError::new(format!("unknown key {}", printable(path)), origin, advice));
    }

    fn refuse(&mut self, path: &str, origin: Origin, what: &str, want: &str, setting: Setting) {
        let advice = format!("write {want} there, or set {}", setting.variable());
        self.errors.push(ConfigError::new(format!("{} {what}", printable(path)), origin, advice));
    }

    fn location(&self, span: Range<usize>, key: &str) -> Origin {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Origin::File { path: self.path.to_owned(), line, key: key.to_owned() }
    }
}

/// Returns true if some setting's key begins with these names. An empty or misspelt section is
/// therefore an error.
fn is_section(path: &str) -> bool {
    let prefix = format!("{}_", path.replace('.', "_"));
    Setting::ALL.iter().any(|setting| setting.key().starts_with(&prefix))
}

/// Returns a value as the text that a variable would hold, or `None` for a type that no setting
/// accepts.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Some(number.to_string()),
            // The number is too large for any setting. The setting's own parser refuses it and
            // shows it as it was written.
            Err(_) => Some(number.to_string()),
        },
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (BTreeMap<&'static str, String>, Vec<String>) {
        let mut errors = Vec::new();
        let values = read(Path::new("f.toml"), text, &mut errors);
        let shown = |error: &ConfigError| match &error.origin {
            Some(origin) => format!("{origin}: {}; {}", error.message, error.advice),
            None => format!("{}; {}", error.message, error.advice),
        };
        (
            values.into_iter().map(|(setting, (text, _))| (setting.key(), text)).collect(),
            errors.iter().map(shown).collect(),
        )
    }

    #[test]
    fn flat_keys_sections_and_dotted_keys_are_equivalent() {
        for text in [
            "otel_prometheus_port = 1\nch_endpoint = 'unix:///a,unix:///b'",
            "[otel]\nprometheus_port = 1\n[ch]\nendpoint = ['unix:///a', 'unix:///b']",
            "otel.prometheus.port = 0x1\nch.endpoint = 'unix:///a,unix:///b'",
        ] {
            let (values, errors) = parse(text);
            assert!(errors.is_empty(), "{errors:?}");
            let want = [("otel_prometheus_port", "1".into()), ("ch_endpoint", "unix:///a,unix:///b".into())];
            assert_eq!(values, want.into(), "{text}");
        }
    }

    #[test]
    fn the_text_of_a_value_is_kept() {
        let (values, errors) =
            parse("port = 8_080\notel_sampling_rate = 0.50\nqemu_kvm = true\nbackend = \"qemu\"");
        assert!(errors.is_empty(), "{errors:?}");
        let want =
            [("port", "8080"), ("otel_sampling_rate", "0.50"), ("qemu_kvm", "true"), ("backend", "qemu")];
        assert_eq!(values, want.map(|(key, text)| (key, text.to_owned())).into());
    }

    #[test]
    fn an_error_in_the_file_names_its_line_and_the_remedy() {
        let table = [
            ("\nprot = 1", "f.toml:2 (prot): unknown key prot; did you mean port?"),
            (
                "[otel]\nenabeld = true",
                "f.toml:2 (otel.enabeld): unknown key otel.enabeld; did you mean otel_enabled?",
            ),
            ("[zzz]", "f.toml:1 (zzz): unknown key zzz; remove it"),
            ("[zzz]\na = 1", "unknown key zzz; remove it"),
            ("state-dir = '/x'", "did you mean state_dir?"),
            ("config = 'x'", "by --config or UNKEY_VMCP_CONFIG"),
            (
                "port = [1]",
                "f.toml:1 (port): port is a list, and the setting takes one value; write one value there, or set UNKEY_VMCP_PORT",
            ),
            ("cors_origins = [[]]", "has a type that no setting has"),
            ("port = 1979-05-27", "has a type that no setting has"),
            ("port = {}", "has a type that no setting has"),
            ("ch_binary = 'a'\n[ch]\nbinary = 'b'", "is given twice, the first time at f.toml:"),
            ("port = 1\nport = 2", "f.toml:2: duplicate key"),
            ("port =", "f.toml:1: "),
        ];
        for (text, want) in table {
            let (_, errors) = parse(text);
            assert!(errors.len() == 1 && errors[0].contains(want), "{text}: {errors:?}");
        }
    }

    #[test]
    fn every_error_in_the_file_is_reported() {
        let (_, errors) = parse("prot = 1\nbackendd = 'x'\nport = [1]");
        assert_eq!(errors.len(), 3, "{errors:?}");
    }
}
