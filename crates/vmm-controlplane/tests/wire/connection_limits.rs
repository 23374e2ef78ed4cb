//! More connections, calls and bytes than there is room for: others are served, health and force always.

use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::{ClientConfig, HttpClient};
use connectrpc::{ErrorCode, Protocol};
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use vmm_controlplane::rpc::ServeOptions;
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceClient;

use crate::http_client::{Reply, get, json_call, post, send};
use crate::server::TestServer;

/// Far longer than anything here takes: only a hang gets there.
const UNREACHED_TIMEOUT: Duration = Duration::from_secs(60);

/// An HTTP/2 connection of its own.
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<hyper::Result<()>>,
}

impl Connection {
    async fn open(server: &TestServer) -> Self {
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        Self { sender, driver: tokio::spawn(connection) }
    }

    /// Begins a call that lasts an hour, and waits until its handler has it.
    async fn wait_for_long(&mut self, server: &TestServer) -> JoinHandle<hyper::Result<http::StatusCode>> {
        let uri = format!("{}vmm.v1.VmService/WaitVm", server.uri());
        let call = self.sender.send_request(post(&uri, "application/json", br#"{"timeout_seconds":3600}"#));
        let call = tokio::spawn(async move { call.await.map(|answer| answer.status()) });
        server.waiting.notified().await;
        call
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

fn refused(reply: &Reply) -> bool {
    (reply.status.as_u16(), reply.error().0.as_str()) == (429, "resource_exhausted")
}

#[tokio::test]
async fn idle_connections_are_closed_for_new_ones() {
    let server = TestServer::with(ServeOptions { max_connections: 4, ..Default::default() }).await;
    let mut crowd = Vec::new();
    for _ in 0..40 {
        crowd.push(Connection::open(&server).await);
    }
    for _ in 0..8 {
        assert_eq!(send(server.addr, json_call("ListVms", "{}")).await.status, 200);
    }
    let evicted = crowd.iter_mut().map(|connection| &mut connection.driver).next().unwrap();
    assert!(tokio::time::timeout(UNREACHED_TIMEOUT, evicted).await.is_ok(), "the oldest was told to go");
}

#[tokio::test]
async fn health_and_force_are_served_with_every_connection_in_use() {
    let server = TestServer::with(ServeOptions { max_connections: 2, ..Default::default() }).await;
    let mut holders = vec![Connection::open(&server).await, Connection::open(&server).await];
    let mut calls = Vec::new();
    for holder in &mut holders {
        calls.push(holder.wait_for_long(&server).await);
    }
    for _ in 0..3 {
        assert_eq!(send(server.addr, get("/_/health")).await.status, 200);
        let forced = send(server.addr, json_call("DeleteVm", r#"{"force":true}"#)).await;
        assert_eq!((forced.status.as_u16(), forced.json()["success"].as_bool()), (200, Some(true)));
        for (method, body) in [("ListVms", "{}"), ("DeleteVm", "{}"), ("CreateVm", "{}")] {
            let reply = send(server.addr, json_call(method, body)).await;
            assert!(refused(&reply), "{method}: {} {:?}", reply.status, reply.body);
        }
    }
    // gRPC is told in its own terms, on a connection that then ends.
    let config = ClientConfig::new(server.uri()).with_protocol(Protocol::Grpc);
    let client = VmServiceClient::new(HttpClient::plaintext_http2_only(), config);
    let error = client.list_vms(pb::ListVmsRequest::default()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    let force = pb::DeleteVmRequest { force: true, ..Default::default() };
    assert!(client.delete_vm(force).await.unwrap().into_owned().success);
    assert!(calls.iter().all(|call| !call.is_finished()), "the calls under way are not touched");

    // The call keeps its connection open.
    calls.pop().unwrap().abort();
    drop(holders.pop());
    let mut reply = send(server.addr, json_call("ListVms", "{}")).await;
    while refused(&reply) {
        // The server has yet to see that the connection ended.
        reply = send(server.addr, json_call("ListVms", "{}")).await;
    }
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn silent_connections_beyond_the_limit_are_closed() {
    let server = TestServer::with(ServeOptions { max_connections: 1, ..Default::default() }).await;
    let mut holder = Connection::open(&server).await;
    let _call = holder.wait_for_long(&server).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(server.addr).await.unwrap());
    }
    let health = tokio::time::timeout(UNREACHED_TIMEOUT, send(server.addr, get("/_/health"))).await;
    assert_eq!(health.unwrap().status, 200);
}

#[tokio::test]
async fn requests_beyond_the_limit_are_refused_except_vital_ones() {
    let server = TestServer::with(ServeOptions { max_requests: 2, ..Default::default() }).await;
    let mut connection = Connection::open(&server).await;
    let _calls = [connection.wait_for_long(&server).await, connection.wait_for_long(&server).await];
    assert!(refused(&send(server.addr, json_call("ListVms", "{}")).await));
    assert_eq!(send(server.addr, get("/_/health")).await.status, 200);
    let forced = send(server.addr, json_call("DeleteVm", r#"{"force":true}"#)).await;
    assert_eq!(forced.status, 200);
}

#[tokio::test]
async fn hundreds_of_waiting_calls_on_one_connection_delay_no_other() {
    let server = TestServer::start().await;
    let mut connection = Connection::open(&server).await;
    let mut calls = Vec::new();
    for _ in 0..300 {
        calls.push(connection.wait_for_long(&server).await);
    }
    let uri = format!("{}vmm.v1.VmService/ListVms", server.uri());
    let call = connection.sender.send_request(post(&uri, "application/json", b"{}"));
    let answer = tokio::time::timeout(UNREACHED_TIMEOUT, call).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
}

#[tokio::test]
async fn the_bodies_of_all_requests_share_one_limit() {
    let server = TestServer::with(ServeOptions { max_bytes_in_flight: 1000, ..Default::default() }).await;
    let mut connection = Connection::open(&server).await;
    let uri = format!("{}vmm.v1.VmService/WaitVm", server.uri());
    let large = "x".repeat(800);
    let body = format!(r#"{{"vm_id":"{large}","timeout_seconds":3600}}"#);
    let holder = connection.sender.send_request(post(&uri, "application/json", body.as_bytes()));
    let holder = tokio::spawn(holder);
    server.waiting.notified().await;

    let body = format!(r#"{{"vm_id":"{large}","force":true}}"#);
    let reply = send(server.addr, json_call("CreateVm", &body.replace(r#","force":true"#, ""))).await;
    assert!(refused(&reply) && reply.error().1.contains("no memory left"), "{:?}", reply.body);
    assert_eq!(send(server.addr, json_call("ListVms", "{}")).await.status, 200, "what fits is served");
    assert_eq!(
        send(server.addr, json_call("DeleteVm", &body)).await.status,
        200,
        "force has memory of its own"
    );

    holder.abort();
    drop(connection);
    loop {
        let reply = send(server.addr, json_call("CreateVm", &format!(r#"{{"vm_id":"{large}"}}"#))).await;
        if !refused(&reply) {
            assert_eq!(reply.status, 200);
            break;
        }
    }
}

#[tokio::test]
async fn a_connection_beyond_the_limit_serves_one_vital_request() {
    let server = TestServer::with(ServeOptions { max_connections: 1, ..Default::default() }).await;
    let mut holder = Connection::open(&server).await;
    let _call = holder.wait_for_long(&server).await;
    let mut last_resort = Connection::open(&server).await;
    let request = Request::get(format!("{}_/health", server.uri())).body(Full::default()).unwrap();
    let answer = last_resort.sender.send_request(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(!answer.into_body().collect().await.unwrap().to_bytes().is_empty());
    assert!(
        tokio::time::timeout(UNREACHED_TIMEOUT, &mut last_resort.driver).await.is_ok(),
        "the server closed it"
    );
}
