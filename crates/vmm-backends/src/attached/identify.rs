//! Identifies the program on a socket where another VMM was expected.
//!
//! Used only after a call to the expected VMM has failed, so that the error can name the mix-up.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::rest::client::RestClient;
use crate::sanitize;

/// The longest wait for QEMU's greeting. The other hypervisors send nothing by themselves.
const GREETING_TIMEOUT: Duration = Duration::from_millis(300);
/// The longest time of the other questions together.
const IDENTIFY_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns the name of the program on `socket`, in words that complete "it is …", or `None` if the
/// program is unknown.
pub(crate) async fn program_on_socket(socket: &Path) -> Option<String> {
    if greets_as_qemu(socket).await {
        return Some("QEMU, whose endpoint is UNKEY_VMCP_QEMU_ENDPOINT".to_owned());
    }
    tokio::time::timeout(IDENTIFY_TIMEOUT, async {
        // The questions change nothing at any of the hypervisors. Each has its own path for the
        // version.
        let client = RestClient::new(socket, |_| None);
        if let Some(version) = text(client.get("/").await.ok(), "vmm_version") {
            return Some(format!("Firecracker {version}, whose endpoint is UNKEY_VMCP_FC_ENDPOINT"));
        }
        let version = text(client.get("/api/v1/vmm.ping").await.ok(), "version")?;
        Some(format!("Cloud Hypervisor {version}, whose endpoint is UNKEY_VMCP_CH_ENDPOINT"))
    })
    .await
    .ok()
    .flatten()
}

fn text(answer: Option<Value>, field: &str) -> Option<String> {
    answer.and_then(|answer| answer.get(field)?.as_str().map(sanitize::version))
}

async fn greets_as_qemu(socket: &Path) -> bool {
    let greeting = async {
        let mut stream = UnixStream::connect(socket).await.ok()?;
        let mut head = [0; 8];
        stream.read_exact(&mut head).await.ok()?;
        Some(head)
    };
    let head = tokio::time::timeout(GREETING_TIMEOUT, greeting).await.ok().flatten();
    head.is_some_and(|head| head.starts_with(b"{\"QMP\""))
}
