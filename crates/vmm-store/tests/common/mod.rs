//! Helpers that the tests of the store share: blocking calls, a child process that runs a part of a
//! test, and seeded randomness.

// Each test file is a program of its own and uses a part of this.
#![allow(dead_code, reason = "every test file compiles this module and uses another part of it")]

use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use vmm_store::SqliteStore;

/// Runs `future` to its end on a runtime of its own.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future)
}

/// Opens the store in `dir`, and makes the directory if it does not exist.
pub(crate) fn open(dir: &Path) -> SqliteStore {
    std::fs::create_dir_all(dir).unwrap();
    SqliteStore::open(dir).unwrap_or_else(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        unreachable!("opening {} failed: {error} ({cause:?})", dir.display())
    })
}

/// The environment variable with the state directory of a child.
pub(crate) const CHILD_DIR: &str = "VMM_STORE_TEST_DIR";

/// A child process that ends with the test, even if the test fails.
pub(crate) struct Player(Child);

impl Player {
    /// Starts this test program again, behind `wrapper` (a program and its arguments), to run its
    /// ignored test `part` alone.
    pub(crate) fn start(wrapper: &[&str], part: &str, dir: &Path) -> std::io::Result<Self> {
        let this = std::env::current_exe()?;
        let mut words = wrapper.iter().map(std::ffi::OsStr::new).chain([this.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or(this.as_os_str()));
        command.args(words).args(["--exact", part, "--ignored", "--nocapture", "--test-threads=1"]);
        command.env(CHILD_DIR, dir).stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().map(Self)
    }

    /// Returns the lines that the child prints until it ends.
    pub(crate) fn lines(&mut self) -> impl Iterator<Item = String> + use<> {
        let output = self.0.stdout.take().expect("its output is asked for once");
        BufReader::new(output).lines().map_while(Result::ok)
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.0.kill().expect("SIGKILL can be sent");
    }

    /// Waits for the end of the child. Returns true if it succeeded.
    pub(crate) fn succeeded(mut self) -> bool {
        self.0.wait().expect("it can be waited for").success()
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Prints a line for the parent and flushes it.
pub(crate) fn tell(line: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    // One write for each line, because a kill must not leave half a line.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}

/// Returns the directory that the parent gave. `None` if no parent started this process.
pub(crate) fn given_dir() -> Option<std::path::PathBuf> {
    std::env::var_os(CHILD_DIR).map(Into::into)
}

/// Returns the seed of this run: `VMM_TEST_SEED`, or a number from the clock. Prints the seed,
/// because a failure must be repeatable.
pub(crate) fn seed(name: &str) -> u64 {
    let given = std::env::var("VMM_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| u64::from(now.subsec_nanos()))
    });
    tell(format_args!("{name}: VMM_TEST_SEED={seed}"));
    seed
}

/// SplitMix64, a generator of pseudo-random numbers.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Returns a number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}
