//! Makes TAPs for the cases of the backend suite.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A TAP that is deleted when the value is dropped.
#[derive(Debug)]
pub struct TestTap(String);

impl TestTap {
    /// Makes a TAP with a unique name.
    ///
    /// # Errors
    /// The reason why this machine cannot make one, for people.
    pub fn new() -> Result<Self, String> {
        let tap = Self(Self::free_name());
        let made = Command::new("ip")
            .args(["tuntap", "add", "dev", &tap.0, "mode", "tap"])
            .output()
            .map_err(|error| format!("no TAP can be made here: ip cannot be run: {error}"))?;
        if made.status.success() {
            return Ok(tap);
        }
        Err(format!("no TAP can be made here: {}", String::from_utf8_lossy(&made.stderr).trim()))
    }

    /// Returns a name that no interface of this host has, also not one of another test.
    #[must_use]
    pub fn free_name() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("vs{:x}x{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the name of the TAP.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Returns true if an interface has this name.
    #[must_use]
    pub fn exists(name: &str) -> bool {
        Path::new("/sys/class/net").join(name).exists()
    }
}

impl Drop for TestTap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}
