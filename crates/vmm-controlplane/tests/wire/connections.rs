//! Connections that stall, are too many, or outlive the server.

use std::time::Duration;

use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use connectrpc::{ErrorCode, Protocol};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use vmm_controlplane::rpc::ServeOptions;
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceClient;

use crate::http_client::{json_call, send};
use crate::server::TestServer;

/// Far longer than anything here takes: only a hang gets there.
const FOREVER: Duration = Duration::from_secs(60);

fn client(server: &TestServer, protocol: Protocol) -> VmServiceClient<HttpClient> {
    let config = ClientConfig::new(server.uri()).with_protocol(protocol);
    VmServiceClient::new(HttpClient::plaintext_http2_only(), config)
}

/// Sends the beginning of something; true if the server then closes the connection by itself.
async fn is_closed_after(server: &TestServer, beginning: &[u8]) -> bool {
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    stream.write_all(beginning).await.unwrap();
    let mut rest = Vec::new();
    // A reset closes as well as an end does.
    tokio::time::timeout(FOREVER, stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test]
async fn a_slow_head_is_cut_off() {
    let options = ServeOptions { header_timeout: Duration::from_millis(200), ..Default::default() };
    let server = TestServer::with(options).await;
    for beginning in [
        &b""[..],
        b"P",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"POST /vmm.v1.VmService/ListVms HTTP/1.1\r\n",
        b"POST /vmm.v1.VmService/ListVms HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    ] {
        assert!(is_closed_after(&server, beginning).await, "{:?}", String::from_utf8_lossy(beginning));
    }
}

#[tokio::test]
async fn a_stalled_body_is_given_up() {
    let options = ServeOptions { body_idle_timeout: Duration::from_millis(200), ..Default::default() };
    let server = TestServer::with(options).await;
    let head = b"POST /vmm.v1.VmService/ListVms HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
        Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    assert!(is_closed_after(&server, head).await);
}

#[tokio::test]
async fn a_call_without_a_deadline_gets_the_longest_one() {
    let options = ServeOptions { max_deadline: Duration::from_millis(200), ..Default::default() };
    let server = TestServer::with(options).await;
    let reply = send(server.addr, json_call("WaitVm", r#"{"timeout_seconds":3600}"#)).await;
    assert_eq!(reply.error().0, "deadline_exceeded");
    let long = CallOptions::default().with_timeout(Duration::from_secs(3600));
    let request = pb::WaitVmRequest { timeout_seconds: 3600, ..Default::default() };
    let error = client(&server, Protocol::Grpc).wait_vm_with_options(request, long).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_a_slot() {
    let options = ServeOptions { max_connections: 1, ..Default::default() };
    let server = TestServer::with(options).await;
    // Holds the only slot: it has been accepted once it has had an answer.
    let mut holder = TcpStream::connect(server.addr).await.unwrap();
    holder.write_all(b"GET /_/health HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    holder.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");

    let addr = server.addr;
    let mut waiting = tokio::spawn(async move { send(addr, json_call("ListVms", "{}")).await.status });
    let early = tokio::time::timeout(Duration::from_millis(200), &mut waiting).await;
    assert!(early.is_err(), "served beside the one that holds the slot");
    drop(holder);
    assert_eq!(tokio::time::timeout(FOREVER, waiting).await.unwrap().unwrap(), 200);
}

#[tokio::test]
async fn a_drain_ends_streams_and_lets_calls_finish() {
    let mut server = TestServer::with(ServeOptions { drain_timeout: FOREVER, ..Default::default() }).await;
    let mut streams = Vec::new();
    for protocol in [Protocol::Connect, Protocol::Grpc, Protocol::GrpcWeb] {
        let mut stream = client(&server, protocol).watch_vms(pb::WatchVmsRequest::default()).await.unwrap();
        assert!(stream.message::<pb::VmEvent>().await.unwrap().is_some());
        streams.push(stream);
    }
    let caller = client(&server, Protocol::Grpc);
    let request = pb::WaitVmRequest { vm_id: "a".into(), timeout_seconds: 1, ..Default::default() };
    let call = tokio::spawn(async move { caller.wait_vm(request).await });
    server.waiting.notified().await;

    server.begin_shutdown();
    for mut stream in streams {
        let error = stream.message::<pb::VmEvent>().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable);
    }
    assert_eq!(call.await.unwrap().unwrap().into_owned().vm_id, "a");
    let addr = server.addr;
    tokio::time::timeout(FOREVER, server.ended()).await.unwrap();
    assert!(TcpStream::connect(addr).await.is_err(), "nothing listens any more");
}

#[tokio::test]
async fn a_drain_has_a_deadline() {
    let options = ServeOptions { drain_timeout: Duration::from_millis(100), ..Default::default() };
    let server = TestServer::with(options).await;
    let caller = client(&server, Protocol::Grpc);
    let request = pb::WaitVmRequest { timeout_seconds: 3600, ..Default::default() };
    let call = tokio::spawn(async move { caller.wait_vm(request).await });
    server.waiting.notified().await;
    tokio::time::timeout(FOREVER, server.ended()).await.unwrap();
    assert!(tokio::time::timeout(FOREVER, call).await.unwrap().unwrap().is_err());
}
