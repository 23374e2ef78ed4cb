//! Writes what the backend suite found last into the matrix of `docs/backend-support.md`. `scripts/backend-matrix.sh` runs both.

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
