//! Registers descriptors with the runtime.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the runtime, to wait until it is readable. Must be called inside a
/// runtime with I/O.
pub(crate) fn readable(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    register(fd, Interest::READABLE)
}

/// Registers a descriptor with the runtime, to wait until it is writable. Must be called inside a
/// runtime with I/O.
pub(crate) fn writable(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    register(fd, Interest::WRITABLE)
}

#[expect(
    deprecated,
    reason = "the successor is unsafe, because any AsRawFd may close its descriptor or name another; an OwnedFd behind an \
              Arc does neither, and this workspace forbids unsafe code"
)]
fn register(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    AsyncFd::with_interest(fd, interest)
}
