//! Tests the API from Rust, over every protocol of connectrpc.
//!
//! The environment gives the daemon's address (`VMCP_TEST_URL`) and the kernels of two guests
//! (`VMCP_TEST_KERNEL`, `VMCP_TEST_ECHO_KERNEL`). The program prints "ok NAME" or
//! "FAIL NAME: WHY", and ends with status 1 if something failed.

mod console;
mod lifecycle;
mod watch;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use connectrpc::client::{ClientConfig, HttpClient};
use connectrpc::{CodecFormat, ConnectError, ErrorCode, Protocol};
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceClient;

/// The client that `build.rs` of the crate vmm-proto generated, over HTTP.
type Client = VmServiceClient<HttpClient>;

/// One protocol with its encoding.
struct Dialect {
    name: &'static str,
    protocol: Protocol,
    format: CodecFormat,
    /// True: cleartext HTTP/2 with prior knowledge. False: HTTP/1.1.
    http2: bool,
    /// The content type of unary answers, which proves the dialect.
    content_type: &'static str,
}

#[rustfmt::skip] // one line a dialect
const DIALECTS: [Dialect; 5] = [
    Dialect { name: "connect binary, HTTP/1.1", protocol: Protocol::Connect, format: CodecFormat::Proto, http2: false, content_type: "application/proto" },
    Dialect { name: "connect JSON, HTTP/1.1", protocol: Protocol::Connect, format: CodecFormat::Json, http2: false, content_type: "application/json" },
    Dialect { name: "connect binary, h2c", protocol: Protocol::Connect, format: CodecFormat::Proto, http2: true, content_type: "application/proto" },
    Dialect { name: "gRPC, h2c", protocol: Protocol::Grpc, format: CodecFormat::Proto, http2: true, content_type: "application/grpc" },
    Dialect { name: "gRPC-Web, HTTP/1.1", protocol: Protocol::GrpcWeb, format: CodecFormat::Proto, http2: false, content_type: "application/grpc-web" },
];

impl Dialect {
    /// Returns a client. Nothing is sent yet.
    fn connect_to(&self, address: &http::Uri) -> Client {
        let transport = if self.http2 { HttpClient::plaintext_http2_only() } else { HttpClient::plaintext() };
        let config = ClientConfig::new(address.clone())
            .with_protocol(self.protocol)
            .with_codec_format(self.format)
            .with_default_timeout(Duration::from_secs(60));
        VmServiceClient::new(transport, config)
    }

    /// Checks that an answer has the content type of this dialect.
    async fn prove_spoken(&self, client: &Client) -> Result<()> {
        let answer = client.list_vms(pb::ListVmsRequest::default()).await?;
        let found = answer.headers().get("content-type").context("no content type")?.to_str()?;
        ensure!(found.starts_with(self.content_type), "{found}; {} was expected", self.content_type);
        Ok(())
    }
}

/// Returns the smallest configuration that boots a kernel.
fn config(kernel: &str) -> pb::VmConfig {
    pb::VmConfig {
        cpu: pb::CpuConfig { vcpu_count: 1, ..Default::default() }.into(),
        memory: pb::MemoryConfig { size_bytes: 128 << 20, ..Default::default() }.into(),
        boot: pb::BootConfig { kernel_path: kernel.to_owned(), ..Default::default() }.into(),
        ..Default::default()
    }
}

/// Removes a VM in whatever state.
async fn delete(client: &Client, vm_id: &str) -> Result<()> {
    let request = pb::DeleteVmRequest { vm_id: vm_id.to_owned(), force: true, ..Default::default() };
    let answer = client.delete_vm(request).await.context("DeleteVm")?.into_owned();
    ensure!(answer.success, "DeleteVm: {answer:?}");
    Ok(())
}

/// Checks that a call failed with this code, and with a message.
fn refused<T>(step: &str, code: ErrorCode, answer: Result<T, ConnectError>) -> Result<()> {
    let Err(error) = answer else { anyhow::bail!("{step}: it was accepted; {code:?} was expected") };
    let has_message = error.message.as_ref().is_some_and(|message| !message.is_empty());
    ensure!(error.code == code && has_message, "{step}: {error:?}; {code:?} was expected");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let variable =
        |name| std::env::var(name).with_context(|| format!("{name} is not set; run clients/rust/test.sh"));
    let address = variable("VMCP_TEST_URL")?.parse().context("VMCP_TEST_URL is no address")?;
    let (kernel, echo_kernel) = (variable("VMCP_TEST_KERNEL")?, variable("VMCP_TEST_ECHO_KERNEL")?);

    let mut failed = false;
    let mut report = |name: String, result: Result<()>| match result {
        Ok(()) => println!("ok {name}"),
        Err(error) => {
            failed = true;
            println!("FAIL {name}: {error:#}");
        }
    };
    for (index, dialect) in DIALECTS.iter().enumerate() {
        let (client, name) = (dialect.connect_to(&address), dialect.name);
        let lived = lifecycle::lifecycle(&client, &format!("rust-{index}"), &kernel).await;
        report(format!("lifecycle over {name}"), lived);
        let watched = watch::watch(&client, &format!("rust-watch-{index}"), &kernel).await;
        report(format!("a watch over {name}"), watched);
        let typed = console::console(&client, &format!("rust-console-{index}"), &echo_kernel).await;
        report(format!("a console over {name}"), typed);
        report(format!("it was {name}"), dialect.prove_spoken(&client).await);
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
