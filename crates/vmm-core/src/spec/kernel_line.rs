//! Splits the kernel's command line as Linux does: blanks separate words, quotes hold a word
//! together, and the part behind a lone `--` belongs to init.

/// Returns the kernel's own part of `line`, without a lone `--` and the rest behind it.
pub fn kernels_part(line: &str) -> &str {
    match pieces(line).find(|(_, piece)| *piece == "--") {
        Some((begin, _)) => &line[..begin],
        None => line,
    }
}

/// Returns the kernel's own words of `line`. A word that is quoted as a whole comes without its
/// first quote.
pub fn kernel_words(line: &str) -> impl Iterator<Item = &str> {
    pieces(kernels_part(line)).map(|(_, piece)| piece.strip_prefix('"').unwrap_or(piece))
}

/// Returns the pieces between unquoted blanks, each with its position in `line`.
fn pieces(line: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut quoted = false;
    let mut begin = 0;
    // The filter sees every character once and in order, so one flag tracks whether it is inside
    // quotes.
    let blanks = line.char_indices().filter(move |(_, letter)| {
        quoted ^= *letter == '"';
        !quoted && letter.is_ascii_whitespace()
    });
    let ends = blanks.map(|(offset, _)| offset).chain([line.len()]);
    // Blanks are ASCII and have one byte, so the next piece begins at the byte behind the blank.
    ends.map(move |end| (std::mem::replace(&mut begin, end + 1), end))
        .map(|(begin, end)| (begin, &line[begin..end]))
        .filter(|(_, piece)| !piece.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_arguments_are_split_as_linux_does() {
        let words = |line| kernel_words(line).collect::<Vec<_>>();
        assert_eq!(words("  quiet\tro  -- root=x"), ["quiet", "ro"]);
        assert_eq!(words("a=\"b -- c\" d -- e"), ["a=\"b -- c\"", "d"]);
        assert_eq!(words("\"root=/dev/vda\" --x"), ["root=/dev/vda\"", "--x"]);
        assert_eq!(words("a=\"b c -- d"), ["a=\"b c -- d"], "a quote that is never closed");
        assert_eq!(words(""), [""; 0]);
        assert_eq!(kernels_part("ä -- b"), "ä ");
        assert_eq!(kernels_part("-- b"), "");
        assert_eq!(kernels_part("b --"), "b ");
        assert_eq!(kernels_part("b"), "b");
    }
}
