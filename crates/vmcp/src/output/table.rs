//! Tables of columns, and lists of facts.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, ColumnConstraint, ContentArrangement};

use super::escape;

/// A table without lines, whose cells show every control byte.
pub(crate) struct Table(comfy_table::Table);

impl Table {
    /// Returns a table with a heading; `width` is that of the terminal; `None` disables wrapping.
    pub(crate) fn new<const N: usize>(width: Option<u16>, heading: [&str; N]) -> Self {
        let mut table = Self::facts(width);
        table.0.set_header(heading);
        table
    }

    /// Returns a table of two columns without a heading: names of facts, and facts.
    pub(crate) fn facts(width: Option<u16>) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(NOTHING);
        if let Some(width) = width {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        }
        Self(table)
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.0.add_row(cells.map(|cell| Cell::new(escape::line(&cell))));
    }

    /// Returns the text, without spaces at the ends of lines.
    pub(crate) fn render(mut self) -> String {
        // The first column begins at the edge, so that a name can be marked without a space.
        if let Some(first) = self.0.column_mut(0) {
            first.set_padding((0, 1));
        }
        // Only the last column has sentences. A name or number that was broken could not be copied.
        let last = self.0.column_count().saturating_sub(1);
        for column in self.0.column_iter_mut().take(last) {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
        self.0.trim_fmt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(width: Option<u16>) -> String {
        let mut table = Table::new(width, ["NAME", "MESSAGE"]);
        table.row(["web-1".into(), "as it should be".into()]);
        table.row(["b".into(), "\u{1b}[31mred\nline".into()]);
        table.render()
    }

    #[test]
    fn table_columns_are_aligned_and_control_bytes_are_escaped() {
        assert_eq!(
            table(None),
            "NAME   MESSAGE\n\
             web-1  as it should be\n\
             b      \\u{1b}[31mred\\nline"
        );
    }

    #[test]
    fn a_narrow_terminal_wraps_the_text_of_a_column() {
        let text = table(Some(20));
        assert!(text.lines().all(|line| line.chars().count() <= 20), "{text}");
        assert!(text.lines().count() > 3, "{text}");
        assert!(text.contains("web-1  as it"), "a name is never broken: {text}");
    }
}
