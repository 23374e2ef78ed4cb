//! The fuzz targets for the answers of VMMs, which are not trusted because VMMs host guests. Run by
//! `make fuzz`, and over the kept corpora by the tests.
//!
//! Each target drives the real client over a socket pair, under a paused clock: a wait for a VMM
//! that sends nothing more ends at once.

use std::cell::RefCell;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};
use vmm_core::config::VmConfig;
use vmm_core::spec::VmSpec;

pub use crate::cloud_hypervisor::fuzzing::cloud_hypervisor;
pub use crate::firecracker::fuzzing::firecracker;
pub use crate::qemu::fuzzing::qemu;

/// The longest message of an error, in bytes.
const MAX_MESSAGE: usize = 12 << 10;

thread_local! {
    static RUNTIME: RefCell<Runtime> = RefCell::new(
        Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime can be made"),
    );
}

/// Runs `work` to its end.
pub(crate) fn run<T>(work: impl Future<Output = T>) -> T {
    RUNTIME.with_borrow(|runtime| runtime.block_on(work))
}

/// The bytes that a VMM sends on one connection.
#[derive(Clone)]
pub(crate) enum PeerOutput {
    /// These bytes after the first request, then nothing more.
    Once(Vec<u8>),
    /// These bytes after each request.
    Always(Vec<u8>),
}

impl PeerOutput {
    /// Returns the input as answers for a REST client: as it is on the wire, or else as the body of
    /// three kinds of answers.
    pub(crate) fn of(input: &[u8]) -> Vec<Self> {
        if input.starts_with(b"HTTP/") {
            return vec![Self::Once(input.to_vec())];
        }
        ["200 OK", "400 Bad Request", "500 Internal Server Error"]
            .map(|status| {
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", input.len());
                Self::Always([head.as_bytes(), input].concat())
            })
            .into()
    }
}

/// Connects `calls` to a VMM that sends `says`. `calls` must drop its stream.
pub(crate) async fn with_vmm(says: PeerOutput, calls: impl AsyncFnOnce(UnixStream)) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair can be made");
    tokio::join!(calls(ours), serve(theirs, says));
}

async fn serve(mut stream: UnixStream, says: PeerOutput) {
    let mut request = Vec::new();
    let mut some = [0; 4096];
    let mut first = true;
    while let Ok(read @ 1..) = stream.read(&mut some).await {
        request.extend_from_slice(&some[..read]);
        if !is_whole(&request) {
            continue;
        }
        request.clear();
        // A client that closes the connection makes this write fail, and the next read.
        let _ = match &says {
            PeerOutput::Always(answer) => stream.write_all(answer).await,
            PeerOutput::Once(answer) if first => match stream.write_all(answer).await {
                Ok(()) => stream.shutdown().await,
                Err(error) => Err(error),
            },
            PeerOutput::Once(_) => Ok(()),
        };
        first = false;
    }
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
    body.len() >= length.and_then(|length| length.parse().ok()).unwrap_or(0)
}

/// Checks that an error has a kind that a VMM can cause, and a message that can be shown.
pub(crate) fn check_error(error: &BackendError, only_asks: bool) {
    let kinds = [
        BackendErrorKind::Rejected,
        BackendErrorKind::Protocol,
        BackendErrorKind::Unreachable,
        BackendErrorKind::Timeout,
    ];
    assert!(kinds.contains(&error.kind), "{error:?}");
    assert!(!only_asks || error.effect == Effect::NotApplied, "a question changes nothing: {error:?}");
    check_words(&error.message, MAX_MESSAGE);
}

/// Checks that the description of a VM is as bounded and as valid as a client's request.
pub(crate) fn check_description(config: &VmConfig, unrepresented: &[String]) {
    unrepresented.iter().for_each(|what| check_words(what, MAX_MESSAGE));
    for text in config.boot.iter().flat_map(|boot| [&boot.kernel_path, &boot.initrd_path, &boot.kernel_args])
    {
        check_words(text, 5 * 4096);
    }
    let negative = |number: i64| number < 0;
    assert!(
        !config.memory.iter().any(|it| negative(it.size_bytes) || negative(it.max_size_bytes)),
        "{config:?}"
    );
    assert!(!config.cpu.iter().any(|it| it.vcpu_count < 0 || it.max_vcpu_count < 0), "{config:?}");
    // The VM need not be startable here, but the parser must accept or refuse it.
    if let Err(report) = VmSpec::parse(config) {
        assert!(!report.is_ok());
    }
}

/// Checks that a text from a VMM is bounded and has no control characters.
pub(crate) fn check_words(text: &str, most: usize) {
    assert!(text.len() <= most, "{} bytes", text.len());
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_of_the_corpus_passes() {
        for (name, target) in [
            ("cloud_hypervisor", cloud_hypervisor as fn(&[u8])),
            ("firecracker", firecracker),
            ("qemu", qemu),
        ] {
            assert!(vmm_testkit::corpus::replay(name, target) > 0, "{name}");
        }
    }
}
