//! Requests that lead nowhere get an answer that says what to do, in the protocol they came in.

use bytes::Bytes;
use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use connectrpc::{ErrorCode, Protocol};
use http::Request;
use http_body_util::Full;
use vmm_controlplane::rpc::{HostPolicy, ServeOptions};
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceClient;

use crate::http_client::{Reply, envelope, get, json_call, post, send, send_h2};
use crate::server::TestServer;

fn with_header(mut request: Request<Full<Bytes>>, name: &'static str, value: &str) -> Request<Full<Bytes>> {
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

fn assert_refused(reply: &Reply, status: u16, code: &str, hint: &str) {
    let (found, message) = reply.error();
    assert_eq!((reply.status.as_u16(), found.as_str()), (status, code), "{message}");
    assert!(message.contains(hint), "{message}");
    assert!(reply.header("content-type").starts_with("application/json"));
}

#[tokio::test]
async fn the_path_of_the_predecessor_names_the_new_path() {
    let server = TestServer::start().await;
    let old = "/cloudhypervisor.v1.VmService/CreateVm";
    let reply = send(server.addr, post(old, "application/json", b"{}")).await;
    assert_refused(&reply, 404, "unimplemented", "/vmm.v1.VmService/CreateVm");
    let reply = send(server.addr, get(old)).await;
    assert_refused(&reply, 404, "unimplemented", "/vmm.v1.VmService/CreateVm");
    let uri = format!("http://{}{old}", server.addr);
    let reply = send_h2(server.addr, post(&uri, "application/grpc", &envelope(b""))).await;
    assert_eq!(reply.headers.get("grpc-status").or(reply.trailers.get("grpc-status")).unwrap(), "12");
}

#[tokio::test]
async fn unknown_paths_and_methods_are_404_with_advice() {
    let server = TestServer::start().await;
    let reply = send(server.addr, json_call("StartVm", "{}")).await;
    assert_refused(&reply, 404, "unimplemented", "BootVm, ");
    for path in ["/", "/nothing", "/vmm.v1", "/other.v1.Service/Method"] {
        assert_refused(
            &send(server.addr, get(path)).await,
            404,
            "unimplemented",
            "/vmm.v1.VmService/<Method>",
        );
    }
    assert_eq!(send(server.addr, get("/_/health")).await.status, 200);
}

#[tokio::test]
async fn only_reading_methods_accept_get() {
    let server = TestServer::start().await;
    for method in ["CreateVm", "DeleteVm", "ValidateVm", "WatchVms"] {
        let uri = format!("/vmm.v1.VmService/{method}?connect=v1&encoding=json&message=%7B%7D");
        let reply = send(server.addr, get(&uri)).await;
        assert_refused(&reply, 405, "unknown", "POST");
        assert_eq!(reply.header("allow"), "POST");
    }
    let options = Request::options("/vmm.v1.VmService/ListVms").body(Full::default()).unwrap();
    let reply = send(server.addr, with_header(options, "origin", "https://page.example")).await;
    assert_refused(&reply, 405, "unknown", "GET, POST");
    assert_eq!(reply.header("allow"), "GET, POST");
    assert!(!reply.headers.keys().any(|name| name.as_str().starts_with("access-control-")));
}

#[tokio::test]
async fn a_get_without_a_message_is_refused_with_advice() {
    let server = TestServer::start().await;
    let path = "/vmm.v1.VmService/ListVms";
    for query in ["", "?", "?encoding=json", "?message=%7B%7D"] {
        let reply = send(server.addr, get(&format!("{path}{query}"))).await;
        assert_refused(
            &reply,
            400,
            "invalid_argument",
            &format!("{path}?connect=v1&encoding=json&message=%7B%7D"),
        );
    }
    let with_body = Request::get(path).body(Full::from("{}")).unwrap();
    assert_refused(&send(server.addr, with_body).await, 400, "invalid_argument", "no body");
    let reply = send(server.addr, get(&format!("{path}?connect=v1&encoding=json&message=%7B%7D"))).await;
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn an_error_fits_into_the_metadata_limit_of_clients() {
    let server = TestServer::start().await;
    let size = |headers: &http::HeaderMap| -> usize {
        headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
    };
    let uri = |method: &str| format!("http://{}/vmm.v1.VmService/{method}", server.addr);
    let long = format!("{}/{}", uri("CreateVm"), "x".repeat(6000));
    let violations = buffa::Message::encode_to_vec(&pb::CreateVmRequest {
        vm_id: "many violations".into(),
        ..Default::default()
    });
    for (uri, body, status) in [(uri("CreateVm"), &violations[..], "3"), (long, b"", "12")] {
        let reply = send_h2(server.addr, post(&uri, "application/grpc", &envelope(body))).await;
        assert_eq!(reply.headers.get("grpc-status").or(reply.trailers.get("grpc-status")).unwrap(), status);
        let (headers, trailers) = (size(&reply.headers), size(&reply.trailers));
        assert!(headers < 8192 && trailers < 8192, "{headers} bytes and {trailers} bytes");
        assert!(headers + trailers > 4000, "as much as fits is said");
    }
    for protocol in [Protocol::Connect, Protocol::Grpc, Protocol::GrpcWeb] {
        let config = ClientConfig::new(server.uri()).with_protocol(protocol);
        let client = VmServiceClient::new(HttpClient::plaintext_http2_only(), config);
        let request = pb::CreateVmRequest { vm_id: "many violations".into(), ..Default::default() };
        let error = client.create_vm(request).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{protocol}");
        let message = error.message.unwrap();
        assert!(message.starts_with("config.storage[0].path: "), "{protocol}: {message}");
        assert!(message.ends_with(" more, shown when these are corrected"), "{protocol}: {message}");
    }
}

#[tokio::test]
async fn a_wrong_content_type_is_refused_with_the_accepted_ones() {
    let server = TestServer::start().await;
    let create = "/vmm.v1.VmService/CreateVm";
    // A client of no protocol must not take the answer for an error of the Connect protocol.
    let of_none = "application/json; charset=utf-8";
    for (wrong, answered) in [
        ("text/plain", of_none),
        ("application/x-www-form-urlencoded", of_none),
        ("application/connect+json", "application/json"),
    ] {
        let reply = send(server.addr, post(create, wrong, b"{}")).await;
        assert_refused(&reply, 415, "unknown", "application/json");
        assert_eq!(reply.header("content-type"), answered);
        assert!(reply.header("accept-post").contains("application/json"));
    }
    let bare = Request::post(create).body(Full::from("{}")).unwrap();
    assert_refused(&send(server.addr, bare).await, 415, "unknown", "application/json");
    let reply = send(server.addr, json_call("WatchVms", "{}")).await;
    assert_refused(&reply, 415, "unknown", "application/connect+json");
    let reply = send(server.addr, post(create, "application/json; charset=utf-8", b"{}")).await;
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn hosts_open_to_dns_rebinding_are_refused() {
    let known = HostPolicy::Known(vec!["vmm.example.org".into()]);
    let server = TestServer::with(ServeOptions { host_policy: known, ..Default::default() }).await;
    let call = |host: &str| with_header(json_call("ListVms", "{}"), "host", host);
    for good in ["localhost:1", "127.0.0.1", "[::1]:8080", "vmm.example.org"] {
        assert_eq!(send(server.addr, call(good)).await.status, 200, "{good}");
    }
    let reply = send(server.addr, call("evil.example:8080")).await;
    assert_refused(&reply, 403, "permission_denied", "evil.example:8080");
    assert_refused(&reply, 403, "permission_denied", "UNKEY_VMCP_ALLOWED_HOSTS");
    // A balancer asks for health under a name of its own.
    let page = with_header(get("/_/health"), "host", "vmm_backend");
    assert_eq!(send(server.addr, page).await.status, 200);
    let uri = "http://vmm_backend/grpc.health.v1.Health/Check";
    let reply = send_h2(server.addr, post(uri, "application/grpc", &envelope(b""))).await;
    assert_eq!(reply.trailers["grpc-status"], "0");
    // HTTP/2 has the name in :authority.
    let uri = "http://evil.example/vmm.v1.VmService/ListVms";
    let reply = send_h2(server.addr, post(uri, "application/grpc", &envelope(b""))).await;
    assert_eq!(reply.headers.get("grpc-status").or(reply.trailers.get("grpc-status")).unwrap(), "7");

    let any = TestServer::with(ServeOptions { host_policy: HostPolicy::Any, ..Default::default() }).await;
    assert_eq!(send(any.addr, call("evil.example")).await.status, 200);
}

#[tokio::test]
async fn unchecked_credentials_are_refused() {
    let server = TestServer::start().await;
    for (method, header) in
        [("CreateVm", "Bearer secret"), ("ListVms", "Bearer secret"), ("GetVmInfo", "Basic eA==")]
    {
        let reply = send(server.addr, with_header(json_call(method, "{}"), "authorization", header)).await;
        assert_refused(&reply, 401, "unauthenticated", "without it");
        assert!(!reply.error().1.contains("secret"));
    }
    for protocol in [Protocol::Connect, Protocol::Grpc, Protocol::GrpcWeb] {
        let config = ClientConfig::new(server.uri()).with_protocol(protocol);
        let client = VmServiceClient::new(HttpClient::plaintext_http2_only(), config);
        let options = CallOptions::default().with_header("authorization", "Bearer secret");
        let error =
            client.delete_vm_with_options(pb::DeleteVmRequest::default(), options.clone()).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unauthenticated, "{protocol}");
        // gRPC puts the error into the answer's head, Connect into its stream.
        let error = match client.watch_vms_with_options(pb::WatchVmsRequest::default(), options).await {
            Ok(mut stream) => stream.message::<pb::VmEvent>().await.unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.code, ErrorCode::Unauthenticated, "{protocol}");
    }
    // The health page says the same to everybody.
    let page = with_header(get("/_/health"), "authorization", "Basic eA==");
    assert_eq!(send(server.addr, page).await.status, 200);
}

#[tokio::test]
async fn a_request_id_is_kept_or_generated_and_returned() {
    let server = TestServer::start().await;
    let reply = send(server.addr, with_header(json_call("CreateVm", "{}"), "x-request-id", "mine-1")).await;
    assert_eq!(reply.header("x-request-id"), "mine-1");
    assert_eq!(reply.json()["uid"], "mine-1", "the handler sees the same id");
    let reply = send(server.addr, with_header(get("/nothing"), "x-request-id", "a b")).await;
    assert_eq!(reply.header("x-request-id").len(), 36, "an unfit id is replaced");
}

#[tokio::test]
async fn a_panic_is_answered_as_an_internal_error() {
    let server = TestServer::start().await;
    let reply = send(server.addr, json_call("CreateVm", r#"{"vm_id":"panic"}"#)).await;
    assert_refused(&reply, 500, "internal", reply.header("x-request-id"));
    assert!(!reply.error().1.contains("as the test wants it"), "a panic's text is for the log alone");
    assert_refused(&send(server.addr, get("/panic")).await, 500, "internal", "its log says more");

    for protocol in [Protocol::Connect, Protocol::Grpc, Protocol::GrpcWeb] {
        let config = ClientConfig::new(server.uri()).with_protocol(protocol);
        let client = VmServiceClient::new(HttpClient::plaintext_http2_only(), config);
        let request = pb::CreateVmRequest { vm_id: "panic".into(), ..Default::default() };
        assert_eq!(client.create_vm(request).await.unwrap_err().code, ErrorCode::Internal, "{protocol}");

        let request = pb::WatchVmsRequest { vm_id: "panic".into(), ..Default::default() };
        let mut stream = client.watch_vms(request).await.unwrap();
        assert!(stream.message::<pb::VmEvent>().await.unwrap().is_some(), "{protocol}");
        let error = stream.message::<pb::VmEvent>().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Internal, "{protocol}");
        // The connection that carried it still works.
        assert!(client.list_vms(pb::ListVmsRequest::default()).await.is_ok(), "{protocol}");
    }
}
