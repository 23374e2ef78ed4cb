//! The inputs of the fuzz targets that are kept in the repository, as tests.

use std::path::Path;

/// Gives every kept input of the fuzz target `name` to `target`: real messages, what fuzzing found worth keeping, and what
/// once was a finding. Answers how many there were.
///
/// # Panics
///
/// Where an input cannot be read, or the target panics; its file's name is printed then.
pub fn replay(name: &str, target: impl Fn(&[u8])) -> usize {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let mut replayed = 0;
    for folder in ["seeds", "corpus"] {
        let folder = fuzz.join(folder).join(name);
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("the folder can be listed").path();
            let input = std::fs::read(&path).expect("an input can be read");
            let named = Named(&path);
            target(&input);
            drop(named);
            replayed += 1;
        }
    }
    replayed
}

/// Says which input it was, when its target panics.
struct Named<'a>(&'a Path);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[expect(clippy::print_stderr, reason = "a panic's message goes there too")]
            {
                eprintln!("the input was {}", self.0.display());
            }
        }
    }
}
