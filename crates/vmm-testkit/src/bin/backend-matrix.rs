//! Writes the last results of the backend suite into the matrix of `docs/backend-support.md`.
//! `scripts/backend-matrix.sh` runs the suite and this program.

use std::io::Write as _;
use std::process::ExitCode;

use vmm_testkit::backend_suite::{matrix, results};

fn main() -> ExitCode {
    match matrix::update() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "backend-matrix: {error}; run scripts/backend-matrix.sh, which fills {} first",
                results::folder().display()
            );
            ExitCode::FAILURE
        }
    }
}
