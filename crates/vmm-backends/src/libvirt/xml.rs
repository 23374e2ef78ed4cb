//! Writes XML, with every value escaped.

use std::fmt::Write as _;

/// An XML text under construction.
#[derive(Debug, Default)]
pub(super) struct Xml {
    text: String,
    depth: usize,
}

impl Xml {
    /// Writes an element with attributes only.
    pub(super) fn empty(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.open_tag(name, attributes);
        self.text.push_str("/>\n");
    }

    /// Writes an element with attributes and a text.
    pub(super) fn text(&mut self, name: &str, attributes: &[(&str, &str)], text: &str) {
        self.open_tag(name, attributes);
        self.text.push('>');
        self.escaped(text);
        let _ = writeln!(self.text, "</{name}>");
    }

    /// Writes an element with attributes and the content that `inside` writes.
    pub(super) fn element(
        &mut self,
        name: &str,
        attributes: &[(&str, &str)],
        inside: impl FnOnce(&mut Self),
    ) {
        self.open_tag(name, attributes);
        self.text.push_str(">\n");
        self.depth += 1;
        inside(self);
        self.depth -= 1;
        self.indent();
        let _ = writeln!(self.text, "</{name}>");
    }

    /// Returns the whole text.
    pub(super) fn finish(self) -> String {
        self.text
    }

    fn open_tag(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.indent();
        let _ = write!(self.text, "<{name}");
        for (key, value) in attributes {
            let _ = write!(self.text, " {key}='");
            self.escaped(value);
            self.text.push('\'');
        }
    }

    fn indent(&mut self) {
        self.text.extend(std::iter::repeat_n("  ", self.depth));
    }

    fn escaped(&mut self, text: &str) {
        for letter in text.chars() {
            match letter {
                '&' => self.text.push_str("&amp;"),
                '<' => self.text.push_str("&lt;"),
                '>' => self.text.push_str("&gt;"),
                '\'' => self.text.push_str("&apos;"),
                '"' => self.text.push_str("&quot;"),
                // Readers replace these letters by blanks unless they are escaped.
                '\t' | '\n' | '\r' => {
                    let _ = write!(self.text, "&#{};", u32::from(letter));
                }
                other => self.text.push(other),
            }
        }
    }
}

/// Returns true if XML can express a text.
pub(super) fn can_carry(text: &str) -> bool {
    text.chars().all(|letter| match letter {
        '\t' | '\n' | '\r' => true,
        '\u{fffe}' | '\u{ffff}' => false,
        other => u32::from(other) >= 0x20,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xml_values_are_escaped() {
        let mut xml = Xml::default();
        xml.element("a", &[("b", "'<&\"\n")], |xml| {
            xml.text("c", &[], "a=\"b,c\" && <x>'");
            xml.empty("d", &[]);
        });
        let want = "<a b='&apos;&lt;&amp;&quot;&#10;'>\n  <c>a=&quot;b,c&quot; &amp;&amp; &lt;x&gt;&apos;</c>\n  <d/>\n</a>\n";
        assert_eq!(xml.finish(), want);
    }

    #[test]
    fn control_characters_are_refused_in_xml() {
        assert!(can_carry("a\tb ü\n"));
        assert!(!can_carry("a\u{1b}") && !can_carry("\0"));
    }
}
