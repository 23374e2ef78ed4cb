//! The keys of a person, and the escape sequences among them.
//!
//! ```text
//!   line start ── ~ ──► escaped ── . ──► leave
//!       ▲                  │   ├── ? ──► help
//!       │ Enter            │   ├── ~ ──► ~ goes to the guest
//!   within a line ◄────────┘   └── any other key ──► ~ and the key go to the guest
//! ```

/// The key behind the escape key that leaves the console.
const LEAVE: u8 = b'.';
/// The key behind the escape key that shows the help.
const HELP: u8 = b'?';

/// A command of the console itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyCommand {
    /// Leave the console. The guest runs on.
    Leave,
    /// Show the escape sequences.
    Help,
}

/// The place of the next key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    LineStart,
    WithinLine,
    Escaped,
}

/// Separates the escape sequences from the bytes for the guest.
#[derive(Debug)]
pub(super) struct Keys {
    escape: Option<u8>,
    position: Position,
}

impl Keys {
    /// Returns the state before the first key. Without an `escape` key every byte is for the guest.
    pub(super) fn new(escape: Option<u8>) -> Self {
        Self { escape, position: Position::LineStart }
    }

    /// Takes typed bytes. Returns those for the guest, and the first command among them. The bytes
    /// behind a command that leaves are dropped.
    pub(super) fn feed(&mut self, typed: &[u8]) -> (Vec<u8>, Option<KeyCommand>) {
        let mut for_guest = Vec::with_capacity(typed.len() + 1);
        let mut first_command = None;
        for &key in typed {
            match (self.position, self.escape) {
                (Position::LineStart, Some(escape)) if key == escape => {
                    self.position = Position::Escaped;
                    continue;
                }
                (Position::Escaped, _) if key == LEAVE => return (for_guest, Some(KeyCommand::Leave)),
                (Position::Escaped, _) if key == HELP => {
                    first_command = first_command.or(Some(KeyCommand::Help));
                    self.position = Position::LineStart;
                    continue;
                }
                (Position::Escaped, Some(escape)) if key != escape => for_guest.push(escape),
                _ => {}
            }
            for_guest.push(key);
            let ends_line = matches!(key, b'\r' | b'\n');
            self.position = if ends_line { Position::LineStart } else { Position::WithinLine };
        }
        (for_guest, first_command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fed(escape: Option<u8>, parts: &[&str]) -> (String, Vec<KeyCommand>) {
        let mut keys = Keys::new(escape);
        let (mut for_guest, mut commands) = (Vec::new(), Vec::new());
        for part in parts {
            let (bytes, command) = keys.feed(part.as_bytes());
            for_guest.extend(bytes);
            commands.extend(command);
        }
        (String::from_utf8(for_guest).unwrap(), commands)
    }

    #[test]
    fn an_escape_sequence_at_the_start_of_a_line_is_a_command() {
        for parts in [&["~."][..], &["~", "."], &["ls\r~."], &["ls\r", "~", "."], &["ls\n~."]] {
            assert_eq!(fed(Some(b'~'), parts).1, [KeyCommand::Leave], "{parts:?}");
        }
        assert_eq!(fed(Some(b'~'), &["~?~."]).1, [KeyCommand::Leave], "the help leaves the line empty");
        assert_eq!(fed(Some(b'~'), &["~?", "ls\r"]), ("ls\r".to_owned(), vec![KeyCommand::Help]));
    }

    #[test]
    fn other_keys_reach_the_guest_unchanged() {
        for (parts, wanted) in [
            (&["ls ~/x\r"][..], "ls ~/x\r"),
            (&["a~."], "a~."),
            (&["~~.\r"], "~.\r"),
            (&["~", "a\r"], "~a\r"),
            (&["~\r~~"], "~\r~"),
            (&["\u{3}\u{4}ü"], "\u{3}\u{4}ü"),
        ] {
            assert_eq!(fed(Some(b'~'), parts), (wanted.to_owned(), vec![]), "{parts:?}");
        }
    }

    #[test]
    fn another_escape_key_or_none_can_be_chosen() {
        assert_eq!(fed(Some(0x1d), &["~.\r\u{1d}."]), ("~.\r".to_owned(), vec![KeyCommand::Leave]));
        assert_eq!(fed(None, &["~."]), ("~.".to_owned(), vec![]));
    }

    #[test]
    fn keys_behind_a_command_that_leaves_are_dropped() {
        assert_eq!(fed(Some(b'~'), &["ls\r~.rm -rf /\r"]), ("ls\r".to_owned(), vec![KeyCommand::Leave]));
    }
}
