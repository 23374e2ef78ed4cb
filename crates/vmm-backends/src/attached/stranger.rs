//! Who listens on a socket that is not the VMM that was expected there.
//!
//! Asked only after the expected question has failed, so that people are told what they have mixed up.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::rest::client::RestClient;
use crate::words;

/// How long QEMU may take to greet; who is no QEMU says nothing by itself.
const GREETING: Duration = Duration::from_millis(300);
/// How long the other questions may take together.
const ASKING: Duration = Duration::from_secs(3);

/// Says who listens on `socket`, in words that end the sentence "it is …"; `None` where it is nobody that is known.
pub(crate) async fn who(socket: &Path) -> Option<String> {
    if greets_as_qemu(socket).await {
        return Some("QEMU, whose endpoint is UNKEY_VMCP_QEMU_ENDPOINT".to_owned());
    }
    tokio::time::timeout(ASKING, async {
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
    answer.and_then(|answer| answer.get(field)?.as_str().map(words::version))
}

async fn greets_as_qemu(socket: &Path) -> bool {
    let greeting = async {
        let mut stream = UnixStream::connect(socket).await.ok()?;
        let mut head = [0; 8];
        stream.read_exact(&mut head).await.ok()?;
        Some(head)
    };
    let head = tokio::time::timeout(GREETING, greeting).await.ok().flatten();
    head.is_some_and(|head| head.starts_with(b"{\"QMP\""))
}
