//! The console as clients see it: StreamConsole and WriteConsole.

use std::time::Duration;

use vmm_service::{ConsoleQuery, ConsoleStream, ServiceError};

use super::results::CaseVerdict;
use super::rig::{DaemonLife, VM};
use crate::guests::TinyGuest;

/// The time in which a console must print what a case waits for.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// A stream, and its text so far.
struct Followed {
    stream: ConsoleStream,
    text: String,
}

impl Followed {
    async fn begin(vms: &DaemonLife) -> Self {
        let query = ConsoleQuery { vm_id: VM.to_owned(), follow: true, ..ConsoleQuery::default() };
        let stream = vms.service.stream_console(query).await.expect("StreamConsole succeeds");
        Self { stream, text: String::new() }
    }

    /// Reads until the text contains `wanted` `times` times.
    async fn shows(&mut self, wanted: &str, times: usize) {
        while self.text.matches(wanted).count() < times {
            let piece = tokio::time::timeout(WAIT_TIMEOUT, self.stream.next()).await;
            let piece = piece.unwrap_or_else(|_| panic!("{wanted:?} x {times} in {:?}", self.text));
            let piece = piece.expect("the console can be read").expect("the stream goes on");
            self.text.push_str(&String::from_utf8_lossy(&piece.data));
        }
    }

    /// Reads the rest, such as the end of the last line, up to the end of the stream.
    async fn ends(mut self) {
        let rest = async { while self.stream.next().await.expect("no error").is_some() {} };
        tokio::time::timeout(WAIT_TIMEOUT, rest).await.expect("the stream ends with the VM");
    }
}

/// A stream goes on over a shutdown and a boot, and ends with the VM.
pub(super) async fn console_streamed(vms: DaemonLife) -> CaseVerdict {
    let banner = TinyGuest::Idle.banner();
    vms.create(VM, vms.config(TinyGuest::Idle)).await;
    let mut followed = Followed::begin(&vms).await;
    vms.boot(VM).await.expect("BootVm succeeds");
    followed.shows(&banner, 1).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    vms.force_shutdown(VM).await.expect("ShutdownVm succeeds");
    vms.boot_again(VM).await.expect("BootVm succeeds");
    followed.shows(&banner, 2).await;
    vms.delete(VM, true).await.expect("DeleteVm succeeds");
    followed.ends().await;
    CaseVerdict::Served
}

/// A guest sends back what is typed: while it runs, after a pause, and after a reboot.
pub(super) async fn console_input(vms: DaemonLife) -> CaseVerdict {
    let banner = TinyGuest::Echo.banner();
    vms.run_tiny(TinyGuest::Echo).await;
    match vms.service.write_console(VM, b"one;").await {
        Ok(()) => {}
        Err(ServiceError::Unsupported(why)) => {
            assert!(why.to_string().contains("takes no input"), "{why}");
            return CaseVerdict::Rejected(
                "WriteConsole is UNIMPLEMENTED: another program started the VMM and has its input".to_owned(),
            );
        }
        Err(error) => panic!("{error}"),
    }
    if !vms.column().is_real() {
        return CaseVerdict::Served;
    }
    let mut followed = Followed::begin(&vms).await;
    followed.shows("one;", 1).await;
    vms.pause(VM).await.expect("PauseVm succeeds");
    vms.service.write_console(VM, b"two;").await.expect("a paused VM takes input");
    vms.resume(VM).await.expect("ResumeVm succeeds");
    followed.shows("two;", 1).await;
    if vms.facts.reboots {
        vms.reboot(VM, true).await.expect("RebootVm succeeds");
        followed.shows(&banner, 2).await;
        vms.service.write_console(VM, b"three;").await.expect("WriteConsole succeeds");
        followed.shows("three;", 1).await;
    }
    CaseVerdict::Served
}
