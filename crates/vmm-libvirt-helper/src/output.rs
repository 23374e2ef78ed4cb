//! Writes messages to the daemon, one whole line at a time.

use std::io::Write as _;

use vmm_libvirt_wire::HelperMessage;

/// Writes one message to stdout. Ends this process if the daemon has closed the pipe.
pub(crate) fn write_message(message: &HelperMessage) {
    let written = vmm_libvirt_wire::to_line(message).map_err(std::io::Error::from).and_then(|line| {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(&line)?;
        stdout.flush()
    });
    if let Err(error) = written {
        eprintln!("vmm-libvirt-helper: the daemon does not listen any more: {error}");
        std::process::exit(0);
    }
}

/// Cuts a text to at most `most` bytes, at a character boundary. libvirt or a guest chose its
/// length.
pub(crate) fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        let end = (0..=most).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_shortened_between_characters() {
        assert_eq!(cut("abc".to_owned(), 3), "abc");
        assert_eq!(cut("abcd".to_owned(), 3), "abc");
        assert_eq!(cut("aüü".to_owned(), 4), "aü");
    }
}
