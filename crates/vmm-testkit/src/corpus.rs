//! Runs the fuzz inputs in the repository as tests.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use tar::Archive;

/// Passes every stored input of the fuzz target `name` to `target`, and returns their number. The
/// inputs are the files of `fuzz/seeds/<name>`, which are real messages and former findings, and
/// the members of `fuzz/corpus/<name>.tar`, which fuzzing found.
///
/// # Panics
///
/// If an input cannot be read or the target panics. The name of the input is printed then.
pub fn replay(name: &str, target: impl Fn(&[u8])) -> usize {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let mut inputs = seeds(&fuzz.join("seeds").join(name));
    inputs.extend(corpus(&fuzz.join("corpus").join(name).with_extension("tar")));
    for (path, input) in &inputs {
        // A panic of the target drops `named` while it unwinds, which prints the path.
        let named = InputNamer(path);
        target(input);
        drop(named);
    }
    inputs.len()
}

fn seeds(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("the folder can be listed").path());
    paths.map(|path| (path.clone(), fs::read(path).expect("an input can be read"))).collect()
}

fn corpus(archive: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let file = match File::open(archive) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
        file => file.expect("the archive can be opened"),
    };
    let mut members = Archive::new(file);
    let members = members.entries().expect("the archive can be read").map(|member| {
        let mut member = member.expect("a member can be read");
        let path = archive.join(member.path().expect("a member has a name"));
        let mut input = Vec::new();
        member.read_to_end(&mut input).expect("a member can be read");
        (path, input)
    });
    members.collect()
}

/// Prints the name of the input if its target panics.
struct InputNamer<'a>(&'a Path);

impl Drop for InputNamer<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[expect(clippy::print_stderr, reason = "a panic's message goes there too")]
            {
                eprintln!("the input was {}", self.0.display());
            }
        }
    }
}
