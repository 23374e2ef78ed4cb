//! The other protocols on the same port: gRPC, gRPC-Web, Connect over HTTP/2, health and reflection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use connectrpc::client::{ClientConfig, Http2Connection, HttpClient};
use connectrpc::{CodecFormat, ConnectError, ErrorCode, Protocol};
use connectrpc_health::HealthClient;
use connectrpc_health::wire::{HealthCheckRequest, ServingStatus};
use vmm_controlplane::rpc::{ServeOptions, Status};
use vmm_proto::v1 as pb;
use vmm_proto::v1::{VM_SERVICE_SERVICE_NAME, VmServiceClient};

use crate::http_client::{envelope, json_call, post, send, send_h2};
use crate::server::TestServer;

/// A client of each protocol, codec and HTTP version that is promised.
fn clients(server: &TestServer) -> Vec<(String, VmServiceClient<HttpClient>)> {
    let transports = [("h1", HttpClient::plaintext()), ("h2c", HttpClient::plaintext_http2_only())];
    let protocols = [Protocol::Connect, Protocol::Grpc, Protocol::GrpcWeb];
    let mut clients = Vec::new();
    for (version, transport) in transports {
        for protocol in protocols {
            for format in [CodecFormat::Proto, CodecFormat::Json] {
                if version == "h1" && protocol == Protocol::Grpc {
                    continue;
                }
                let config =
                    ClientConfig::new(server.uri()).with_protocol(protocol).with_codec_format(format);
                let name = format!("{protocol} {format:?} {version}");
                clients.push((name, VmServiceClient::new(transport.clone(), config)));
            }
        }
    }
    clients
}

fn create(vm_id: &str) -> pb::CreateVmRequest {
    pb::CreateVmRequest { vm_id: vm_id.into(), ..Default::default() }
}

#[tokio::test]
async fn every_protocol_answers_a_call() {
    let server = TestServer::start().await;
    for (name, client) in clients(&server) {
        let answer =
            client.create_vm(create("a")).await.unwrap_or_else(|e| panic!("{name}: {e}")).into_owned();
        assert_eq!(answer.vm_id, "a", "{name}");
        assert_eq!(answer.state, pb::VmState::Created, "{name}");
    }
}

#[tokio::test]
async fn every_protocol_carries_a_stream() {
    let server = TestServer::start().await;
    for (name, client) in clients(&server) {
        let request = pb::StreamConsoleRequest { offset: Some(0), ..Default::default() };
        let mut stream = client.stream_console(request).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        let piece = stream.message().await.unwrap().unwrap().to_owned_message();
        assert_eq!((piece.offset, &*piece.data), (0, &b"boot\n"[..]), "{name}");
        assert!(stream.message::<pb::StreamConsoleResponse>().await.unwrap().is_none(), "{name}");
    }
}

#[tokio::test]
async fn every_protocol_carries_error_details() {
    let server = TestServer::start().await;
    for (name, client) in clients(&server) {
        let error: ConnectError = client.create_vm(create("invalid")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{name}");
        assert!(error.message.unwrap().contains("config.memory: is required"), "{name}");
        assert_eq!(error.details.len(), 1, "{name}");
        assert!(error.details[0].type_url.ends_with("google.rpc.BadRequest"), "{name}");
    }
}

#[tokio::test]
async fn grpc_errors_have_the_status_details_trailer() {
    let server = TestServer::start().await;
    let uri = format!("http://{}/vmm.v1.VmService/CreateVm", server.addr);
    let message = buffa::Message::encode_to_vec(&create("invalid"));
    let reply = send_h2(server.addr, post(&uri, "application/grpc", &envelope(&message))).await;
    assert_eq!(reply.status, 200);
    let trailers = if reply.trailers.is_empty() { &reply.headers } else { &reply.trailers };
    assert_eq!(trailers["grpc-status"], "3");
    assert!(trailers.contains_key("grpc-status-details-bin"));
}

#[tokio::test]
async fn connect_json_works_over_http2_with_prior_knowledge() {
    let server = TestServer::start().await;
    let uri = format!("http://{}/vmm.v1.VmService/ListVms", server.addr);
    let reply = send_h2(server.addr, post(&uri, "application/json", b"{}")).await;
    assert_eq!((reply.status.as_u16(), reply.json()), (200, serde_json::json!({})));
}

#[tokio::test]
async fn an_oversized_message_is_resource_exhausted_on_every_protocol() {
    let server = TestServer::start().await;
    let limit = server.options.max_message_bytes;
    for (name, client) in clients(&server) {
        let error = client.create_vm(create(&"x".repeat(limit + 1))).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::ResourceExhausted, "{name}: {error}");
        // The server is well, and a large message that fits is served.
        let fits = "x".repeat(limit / 2);
        assert_eq!(client.create_vm(create(&fits)).await.unwrap().into_owned().vm_id, fits, "{name}");
    }
    let body = format!("{{\"vm_id\":\"{}\"}}", "x".repeat(3 * limit));
    let reply = send(server.addr, json_call("CreateVm", &body)).await;
    let (code, message) = reply.error();
    assert_eq!((reply.status.as_u16(), code.as_str()), (429, "resource_exhausted"));
    assert!(message.contains("limit"), "{message}");
}

#[tokio::test]
async fn the_health_service_returns_the_set_status() {
    let server = TestServer::start().await;
    let connection = Http2Connection::lazy_plaintext(server.uri()).shared(8);
    let client = HealthClient::new(connection, ClientConfig::new(server.uri()).with_protocol(Protocol::Grpc));
    let ask = |service: &str| HealthCheckRequest { service: service.into(), ..Default::default() };
    for service in ["", VM_SERVICE_SERVICE_NAME, "grpc.health.v1.Health"] {
        let answer = client.check(ask(service)).await.unwrap().into_owned();
        assert_eq!(answer.status, ServingStatus::SERVING, "{service}");
    }
    server.options.health.set_status(VM_SERVICE_SERVICE_NAME, Status::NotServing).unwrap();
    let answer = client.check(ask(VM_SERVICE_SERVICE_NAME)).await.unwrap().into_owned();
    assert_eq!(answer.status, ServingStatus::NOT_SERVING);
    assert_eq!(client.check(ask("no.such.Service")).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn the_health_service_agrees_with_the_health_page() {
    let healthy = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&healthy);
    let options = ServeOptions {
        is_healthy: Some(Arc::new(move || asked.load(Ordering::Relaxed))),
        ..Default::default()
    };
    let server = TestServer::with(options).await;
    let connection = Http2Connection::lazy_plaintext(server.uri()).shared(8);
    let client = HealthClient::new(connection, ClientConfig::new(server.uri()).with_protocol(Protocol::Grpc));
    let mut watch = client.watch(HealthCheckRequest::default()).await.unwrap();
    for (is_healthy, status) in [
        (false, ServingStatus::NOT_SERVING),
        (true, ServingStatus::SERVING),
        (false, ServingStatus::NOT_SERVING),
    ] {
        healthy.store(is_healthy, Ordering::Relaxed);
        // The watch is told without anybody asking.
        assert_eq!(watch.message().await.unwrap().unwrap().to_owned_message().status, status);
        for service in ["", VM_SERVICE_SERVICE_NAME] {
            let request = HealthCheckRequest { service: service.into(), ..Default::default() };
            assert_eq!(client.check(request).await.unwrap().into_owned().status, status, "{service:?}");
        }
    }
}

/// Asks a version of the reflection service in raw gRPC; answers its reply as text.
async fn reflect(server: &TestServer, version: &str, field: u8, argument: &str) -> String {
    let uri =
        format!("http://{}/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo", server.addr);
    let mut request = vec![field << 3 | 2, u8::try_from(argument.len()).unwrap()];
    request.extend(argument.as_bytes());
    let reply = send_h2(server.addr, post(&uri, "application/grpc", &envelope(&request))).await;
    assert_eq!(reply.trailers["grpc-status"], "0", "{version}");
    String::from_utf8_lossy(&reply.body).into_owned()
}

#[tokio::test]
async fn reflection_lists_and_describes_every_service() {
    const LIST_SERVICES: u8 = 7;
    const FILE_CONTAINING_SYMBOL: u8 = 4;
    let server = TestServer::start().await;
    for version in ["v1", "v1alpha"] {
        let list = reflect(&server, version, LIST_SERVICES, "*").await;
        for service in ["vmm.v1.VmService", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"] {
            assert!(list.contains(service), "{version}: {service}");
        }
        let file = reflect(&server, version, FILE_CONTAINING_SYMBOL, "vmm.v1.VmService").await;
        // The names as the .proto has them: the generator's swapped ones must not get out.
        assert!(file.contains("vm_id") && file.contains("vmm-controlplane/gen/vmm/v1;vmmv1"), "{version}");
        let file = reflect(&server, version, FILE_CONTAINING_SYMBOL, "grpc.health.v1.Health").await;
        assert!(file.contains("HealthCheckRequest"), "{version}");
    }
}
