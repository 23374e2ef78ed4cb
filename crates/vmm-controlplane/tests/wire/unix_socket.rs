//! The API on a unix socket: who may connect, who called, and what was at the path before.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use connectrpc::client::{ClientConfig, Http2Connection};
use connectrpc::{ErrorCode, Protocol};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use vmm_controlplane::rpc::{ServeOptions, UnixSocket, UnixSocketError, UnixSocketOptions};
use vmm_proto::v1 as pb;
use vmm_proto::v1::VmServiceClient;

use crate::http_client::{Reply, get, json_call, send_on};
use crate::server::TestServer;

/// Far longer than anything here takes: only a hang gets there.
const UNREACHED_TIMEOUT: Duration = Duration::from_secs(60);

/// A folder with a path for a socket.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    fn options(&self) -> UnixSocketOptions {
        UnixSocketOptions { path: self.path(), mode: 0o660, group: None }
    }

    /// Starts a server on the socket.
    async fn serve(&self, options: ServeOptions) -> TestServer {
        let socket = UnixSocket::bind(&self.options()).unwrap();
        TestServer::on(vec![vmm_controlplane::rpc::Listener::Unix(socket)], options).await
    }

    /// The names in the folder.
    fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.folder.path()).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

async fn send(path: &Path, request: http::Request<http_body_util::Full<bytes::Bytes>>) -> Reply {
    send_on(UnixStream::connect(path).await.unwrap(), "localhost", request).await
}

#[tokio::test]
async fn a_unix_socket_serves_every_protocol_and_names_the_user() {
    let place = Place::new();
    let server = place.serve(ServeOptions::default()).await;
    assert_eq!(send(&place.path(), json_call("ListVms", "{}")).await.status, 200);
    let uid = std::fs::metadata(place.folder.path()).unwrap().uid();
    assert_eq!(send(&place.path(), get("/caller")).await.body, format!("uid:{uid}"));
    // No page can send a name of its own over a unix socket, so every name is served.
    let mut foreign = get("/caller");
    foreign.headers_mut().insert("host", "anything.example".parse().unwrap());
    assert_eq!(send(&place.path(), foreign).await.status, 200);
    for protocol in [Protocol::Connect, Protocol::Grpc] {
        let uri: http::Uri = "http://localhost".parse().unwrap();
        let connection = Http2Connection::lazy_unix(place.path(), uri.clone());
        let config = ClientConfig::new(uri).with_protocol(protocol);
        let client = VmServiceClient::new(connection.shared(16), config);
        let error = client.boot_vm(pb::BootVmRequest::default()).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unimplemented, "{error}");
    }
    server.ended().await;
    assert_eq!(place.names(), [""; 0], "the socket and its lock were removed");
}

#[tokio::test]
async fn the_socket_has_the_configured_mode_and_group() {
    let place = Place::new();
    // A user may give a file to any group of which the user is a member.
    let group = rustix::process::getgroups().unwrap().first().map(|group| group.as_raw());
    let options = UnixSocketOptions { mode: 0o600, group, ..place.options() };
    let _socket = UnixSocket::bind(&options).unwrap();
    let metadata = std::fs::symlink_metadata(place.path()).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert!(group.is_none_or(|group| group == metadata.gid()));
}

#[tokio::test]
async fn a_user_outside_the_group_cannot_connect() {
    if !rustix::process::geteuid().is_root() {
        return vmm_testkit::skip::skipped(
            "a_user_outside_the_group_cannot_connect",
            "root is needed to be another user",
        );
    }
    let place = Place::new();
    std::fs::set_permissions(place.folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let _socket = UnixSocket::bind(&place.options()).unwrap();
    let script = format!("import socket; socket.socket(socket.AF_UNIX).connect({:?})", place.path());
    let connect = |uid: u32| {
        use std::os::unix::process::CommandExt as _;
        let mut python = std::process::Command::new("python3");
        python.args(["-c", &script]).uid(uid).gid(uid).output().unwrap()
    };
    assert!(connect(0).status.success());
    let refused = connect(65_534);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("PermissionError"), "{refused:?}");
}

#[tokio::test]
async fn the_socket_of_a_dead_daemon_is_replaced() {
    let place = Place::new();
    // The standard library's listener leaves its file, as a daemon that was killed does.
    drop(std::os::unix::net::UnixListener::bind(place.path()).unwrap());
    std::fs::write(place.folder.path().join("api.sock.lock"), "").unwrap();
    let server = place.serve(ServeOptions::default()).await;
    assert_eq!(send(&place.path(), get("/_/health")).await.status, 200);
    drop(server);
}

#[tokio::test]
async fn a_second_daemon_is_refused_and_the_first_serves_on() {
    let place = Place::new();
    let server = place.serve(ServeOptions::default()).await;
    let options = place.options();
    let second = tokio::task::spawn_blocking(move || UnixSocket::bind(&options)).await.unwrap();
    let error = second.err().unwrap();
    assert!(matches!(error, UnixSocketError::InUse(_)), "{error}");
    assert!(error.to_string().contains("UNKEY_VMCP_SOCKET"), "{error}");
    assert_eq!(send(&place.path(), get("/_/health")).await.status, 200);
    drop(server);
}

#[tokio::test]
async fn a_server_of_another_program_is_refused() {
    let place = Place::new();
    let _other = std::os::unix::net::UnixListener::bind(place.path()).unwrap();
    let error = UnixSocket::bind(&place.options()).err().unwrap();
    assert!(matches!(error, UnixSocketError::InUse(_)), "{error}");
    assert!(std::os::unix::net::UnixStream::connect(place.path()).is_ok(), "it still listens");
}

#[tokio::test]
async fn a_foreign_file_is_refused_and_stays() {
    let place = Place::new();
    std::fs::write(place.path(), "of somebody").unwrap();
    let error = UnixSocket::bind(&place.options()).err().unwrap();
    assert!(matches!(error, UnixSocketError::Foreign { .. }), "{error}");
    assert_eq!(std::fs::read(place.path()).unwrap(), b"of somebody");
    std::fs::remove_file(place.path()).unwrap();
    std::os::unix::fs::symlink("/nonexistent", place.path()).unwrap();
    assert!(UnixSocket::bind(&place.options()).is_err(), "a link is not followed");
}

#[tokio::test]
async fn a_socket_that_somebody_replaced_is_not_removed() {
    let place = Place::new();
    let socket = UnixSocket::bind(&place.options()).unwrap();
    std::fs::remove_file(place.path()).unwrap();
    std::fs::write(place.path(), "of somebody").unwrap();
    drop(socket);
    assert_eq!(place.names(), ["api.sock"]);
}

#[tokio::test]
async fn a_slow_head_on_a_unix_socket_times_out() {
    let place = Place::new();
    let options = ServeOptions { header_timeout: Duration::from_millis(100), ..Default::default() };
    let _server = place.serve(options).await;
    for beginning in [&b""[..], b"PRI * HT", b"GET /_/health HTTP/1.1\r\nHost:"] {
        let mut slow = UnixStream::connect(place.path()).await.unwrap();
        slow.write_all(beginning).await.unwrap();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(UNREACHED_TIMEOUT, slow.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the server closed it");
    }
}
