//! The output of `check-config`: every setting in effect, with its origin.

use std::fmt::Write as _;

use super::LoadedConfig;
use super::error::printable;

impl LoadedConfig {
    /// Returns the text of a good configuration: OK, each setting with its origin, and the
    /// warnings.
    pub fn report(&self) -> String {
        let rows: Vec<[String; 3]> = self
            .effective
            .iter()
            .map(|entry| {
                let value =
                    entry.value.as_deref().filter(|text| !text.is_empty()).map_or("-".into(), printable);
                [entry.setting.variable(), value, entry.origin.to_string()]
            })
            .collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let (name, value) = (width(0), width(1));
        let mut text = format!("OK\n\n{:name$}  {:value$}  FROM\n", "VARIABLE", "VALUE");
        // Writing to a String cannot fail.
        for row in &rows {
            let _ = writeln!(text, "{:name$}  {:value$}  {}", row[0], row[1], row[2]);
        }
        for warning in &self.warnings {
            let _ = write!(text, "\nwarning: {warning}");
        }
        if !self.warnings.is_empty() {
            text.push('\n');
        }
        text
    }
}
