//! Connections that stall, are too many, or outlive the server.

use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use connectrpc::{ErrorCode, Protocol};
use http::Request;
use http_body_util::Full;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use vmm_controlplane::rpc::ServeOptions;
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceClient;

use crate::http_client::{json_call, send};
use crate::server::TestServer;

/// Far longer than anything here takes: only a hang gets there.
const UNREACHED_TIMEOUT: Duration = Duration::from_secs(60);

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
    tokio::time::timeout(UNREACHED_TIMEOUT, stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test]
async fn a_slow_head_times_out() {
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
async fn a_stalled_body_times_out() {
    let options = ServeOptions { body_idle_timeout: Duration::from_millis(200), ..Default::default() };
    let server = TestServer::with(options).await;
    let head = b"POST /vmm.v1.VmService/ListVms HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
        Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    assert!(is_closed_after(&server, head).await);
}

#[tokio::test]
async fn a_call_without_a_timeout_gets_the_longest_one() {
    let options = ServeOptions { max_call_timeout: Duration::from_millis(200), ..Default::default() };
    let server = TestServer::with(options).await;
    let reply = send(server.addr, json_call("WaitVm", r#"{"timeout_seconds":3600}"#)).await;
    assert_eq!(reply.error().0, "deadline_exceeded");
    let long = CallOptions::default().with_timeout(Duration::from_secs(3600));
    let request = pb::WaitVmRequest { timeout_seconds: 3600, ..Default::default() };
    let error = client(&server, Protocol::Grpc).wait_vm_with_options(request, long).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded);
}

/// A connection over which HTTP/1.1 is spoken by hand.
struct Plain(TcpStream);

impl Plain {
    async fn open(server: &TestServer) -> Self {
        Self(TcpStream::connect(server.addr).await.unwrap())
    }

    /// Asks for the health page; answers the first line, or nothing if the connection has ended.
    async fn ask(&mut self) -> String {
        let _gone = self.0.write_all(b"GET /_/health HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        let mut answer = vec![0; 4096];
        let read =
            tokio::time::timeout(UNREACHED_TIMEOUT, self.0.read(&mut answer)).await.unwrap().unwrap_or(0);
        String::from_utf8_lossy(&answer[..read]).lines().next().unwrap_or_default().to_owned()
    }

    async fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        tokio::time::timeout(UNREACHED_TIMEOUT, self.0.read_to_end(&mut rest)).await.is_ok()
    }
}

#[tokio::test]
async fn an_idle_connection_outlasts_the_head_timeout() {
    let options = ServeOptions {
        header_timeout: Duration::from_millis(100),
        idle_timeout: UNREACHED_TIMEOUT,
        ..Default::default()
    };
    let server = TestServer::with(options).await;
    let mut idle = Plain::open(&server).await;
    assert_eq!(idle.ask().await, "HTTP/1.1 200 OK");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(idle.ask().await, "HTTP/1.1 200 OK", "the same connection");
    // The second head on a connection has the same time as the first.
    idle.0.write_all(b"GET /_/hea").await.unwrap();
    assert!(idle.is_closed().await);
    assert!(ServeOptions::default().idle_timeout >= Duration::from_secs(75));
}

#[tokio::test]
async fn an_idle_connection_times_out() {
    let options = ServeOptions { idle_timeout: Duration::from_millis(200), ..Default::default() };
    let server = TestServer::with(options).await;
    let mut idle = Plain::open(&server).await;
    assert_eq!(idle.ask().await, "HTTP/1.1 200 OK");
    assert!(idle.is_closed().await);

    let stream = TcpStream::connect(server.addr).await.unwrap();
    let (mut sender, connection) =
        http2::handshake::<_, _, Full<Bytes>>(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::get(format!("{}_/health", server.uri())).body(Full::default()).unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
    assert!(tokio::time::timeout(UNREACHED_TIMEOUT, driver).await.is_ok(), "HTTP/2 ends as well");
    // A call under way is not idle.
    let reply = send(server.addr, json_call("WaitVm", r#"{"timeout_seconds":1}"#)).await;
    assert_eq!(reply.status, 200);
}

/// Sends the head of a request, and then a byte of its body every 20 ms until the server answers;
/// its first line.
async fn trickle(server: &TestServer, path: &str) -> String {
    let (mut read, mut write) = TcpStream::connect(server.addr).await.unwrap().into_split();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    );
    write.write_all(head.as_bytes()).await.unwrap();
    let trickle = async {
        while write.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        std::future::pending::<()>().await
    };
    let mut answer = vec![0; 4096];
    tokio::select! {
        read = tokio::time::timeout(UNREACHED_TIMEOUT, read.read(&mut answer)) => {
            let text = String::from_utf8_lossy(&answer[..read.unwrap().unwrap()]).into_owned();
            text.lines().next().unwrap_or_default().to_owned()
        }
        () = trickle => unreachable!("never ends"),
    }
}

#[tokio::test]
async fn an_endless_body_times_out() {
    let options = ServeOptions { body_timeout: Duration::from_millis(300), ..Default::default() };
    let server = TestServer::with(options).await;
    assert_eq!(trickle(&server, "/vmm.v1.VmService/ListVms").await, "HTTP/1.1 504 Gateway Timeout");
    // A request that is refused anyway is read for the sake of its answer, and no longer.
    assert_eq!(trickle(&server, "/nowhere").await, "HTTP/1.1 404 Not Found");
}

#[tokio::test]
async fn a_drain_ends_streams_and_completes_calls() {
    let mut server =
        TestServer::with(ServeOptions { drain_timeout: UNREACHED_TIMEOUT, ..Default::default() }).await;
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
    tokio::time::timeout(UNREACHED_TIMEOUT, server.ended()).await.unwrap();
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
    tokio::time::timeout(UNREACHED_TIMEOUT, server.ended()).await.unwrap();
    assert!(tokio::time::timeout(UNREACHED_TIMEOUT, call).await.unwrap().unwrap().is_err());
}
