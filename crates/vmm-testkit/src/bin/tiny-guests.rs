//! Writes the tiny guest kernels into a folder, for scripts and for trying a hypervisor by hand.
//!
//! Usage: `cargo run -p vmm-testkit --bin tiny-guests -- DIR`. Prints one line per kernel: its path
//! and the line that the guest prints when it boots.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use vmm_testkit::guests::TinyGuest;

fn main() -> ExitCode {
    let mut errors = io::stderr();
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        let _ = writeln!(errors, "usage: tiny-guests DIR (the folder that the kernels are written to)");
        return ExitCode::from(2);
    };
    match write_all(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(
                errors,
                "tiny-guests: cannot write to {}: {error}; choose a folder that you can write to",
                folder.display()
            );
            ExitCode::FAILURE
        }
    }
}

fn write_all(folder: &std::path::Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut out = io::stdout().lock();
    for guest in TinyGuest::ALL {
        writeln!(out, "{}\t{}", guest.write_to(folder)?.display(), guest.banner())?;
    }
    Ok(())
}
