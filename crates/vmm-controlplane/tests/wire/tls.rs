//! TLS on the TCP port: handshakes, client certificates, and files that change.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};
use vmm_controlplane::rpc::{Listener, ServeOptions, TlsFiles, TlsServer};

use crate::http_client::{get, json_call, post, send_on};
use crate::server::TestServer;

/// Far longer than anything here takes: only a hang gets there.
const UNREACHED_TIMEOUT: Duration = Duration::from_secs(60);

/// A certificate and its key, in PEM.
struct Identity {
    certificate: String,
    key: String,
}

/// An authority of a test's own.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Issues a certificate for `localhost` that ends in the year `until`.
    fn issue(&self, until: i32) -> Identity {
        let key = KeyPair::generate().unwrap();
        let certificate = params(until).signed_by(&key, &self.0).unwrap();
        Identity { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

fn params(until: i32) -> CertificateParams {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(until, 1, 1);
    params
}

fn self_signed() -> Identity {
    let key = KeyPair::generate().unwrap();
    let certificate = params(4000).self_signed(&key).unwrap();
    Identity { certificate: certificate.pem(), key: key.serialize_pem() }
}

/// A server with TLS, and its files.
struct TlsBench {
    authority: Authority,
    folder: TempDir,
    server: TestServer,
}

impl TlsBench {
    /// Starts a server that demands client certificates of its own authority if `demands` is true.
    async fn start(demands: bool, options: ServeOptions) -> Self {
        let authority = Authority::new();
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &authority.issue(4000));
        std::fs::write(folder.path().join("ca.pem"), authority.0.pem()).unwrap();
        let tls = TlsServer::load(files(folder.path(), demands)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = TestServer::on(vec![Listener::Tls(listener, tls)], options).await;
        Self { authority, folder, server }
    }

    /// Connects, and shakes hands with `identity` if one is given.
    async fn connect(
        &self,
        identity: Option<&Identity>,
        alpn: &[u8],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.0.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.unwrap().with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![certificate], key).unwrap()
            }
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        let stream = TcpStream::connect(self.server.addr).await?;
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), stream).await
    }

    /// Calls ListVms over HTTP/1.1. Returns the status, or the error of the connection. With TLS
    /// 1.3 a client learns by its first read that its certificate was refused.
    async fn call(&self, identity: Option<&Identity>) -> std::io::Result<String> {
        let mut stream = self.connect(identity, b"http/1.1").await?;
        stream.write_all(b"GET /_/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer.lines().next().unwrap_or_default().to_owned())
    }

    /// Returns the certificate of the server's next handshake.
    async fn served(&self) -> CertificateDer<'static> {
        let stream = self.connect(None, b"h2").await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    }

    /// Waits until a new connection is served `identity`.
    async fn until_served(&self, identity: &Identity) {
        let wanted = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
        let until = async {
            while self.served().await != wanted {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(UNREACHED_TIMEOUT, until).await.unwrap();
    }
}

fn files(folder: &Path, demands: bool) -> TlsFiles {
    TlsFiles {
        certificate: folder.join("cert.pem"),
        key: folder.join("key.pem"),
        client_ca: demands.then(|| folder.join("ca.pem")),
    }
}

fn write(folder: &Path, identity: &Identity) {
    std::fs::write(folder.join("cert.pem"), &identity.certificate).unwrap();
    std::fs::write(folder.join("key.pem"), &identity.key).unwrap();
}

#[tokio::test]
async fn tls_serves_http1_and_http2() {
    let bench = TlsBench::start(false, ServeOptions::default()).await;
    let stream = bench.connect(None, b"http/1.1").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert_eq!(send_on(stream, "localhost", json_call("ListVms", "{}")).await.status, 200);
    let stream = bench.connect(None, b"h2").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = post("https://localhost/vmm.v1.VmService/ListVms", "application/json", b"{}");
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
    driver.abort();
    // Without a client certificate the names of the Host header are checked as in clear text.
    let mut foreign = json_call("ListVms", "{}");
    foreign.headers_mut().insert("host", "foreign.example".parse().unwrap());
    let stream = bench.connect(None, b"http/1.1").await.unwrap();
    assert_eq!(send_on(stream, "localhost", foreign).await.status, 403);
}

#[tokio::test]
async fn a_client_without_a_valid_certificate_is_refused() {
    let bench = TlsBench::start(true, ServeOptions::default()).await;
    let valid = bench.authority.issue(4000);
    assert_eq!(bench.call(Some(&valid)).await.unwrap(), "HTTP/1.1 200 OK");
    let expired = bench.authority.issue(2020);
    let foreign = Authority::new().issue(4000);
    let own = self_signed();
    for (refused, what) in [
        (None, "none"),
        (Some(&expired), "expired"),
        (Some(&foreign), "foreign"),
        (Some(&own), "self-signed"),
    ] {
        assert!(bench.call(refused).await.is_err(), "{what}");
    }
    // A caller with a certificate is no foreign page.
    let mut request = get("/caller");
    request.headers_mut().insert("host", "vmm.example.org".parse().unwrap());
    let stream = bench.connect(Some(&valid), b"http/1.1").await.unwrap();
    assert_eq!(send_on(stream, "localhost", request).await.status, 200);
}

#[tokio::test]
async fn changed_certificates_are_served_and_open_streams_go_on() {
    let bench = TlsBench::start(false, ServeOptions::default()).await;
    let stream = bench.connect(None, b"h2").await.unwrap();
    let (mut sender, connection) =
        http2::handshake::<_, _, Full<bytes::Bytes>>(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    let driver = tokio::spawn(connection);
    let waiting =
        post("https://localhost/vmm.v1.VmService/WaitVm", "application/json", br#"{"timeout_seconds":3600}"#);
    let _open = tokio::spawn(sender.send_request(waiting));
    bench.server.waiting.notified().await;

    let next = bench.authority.issue(4001);
    write(bench.folder.path(), &next);
    bench.until_served(&next).await;
    // Files that do not go together are not served. A later pair is.
    std::fs::write(bench.folder.path().join("cert.pem"), "nonsense").unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    bench.until_served(&next).await;
    let last = bench.authority.issue(4002);
    write(bench.folder.path(), &last);
    bench.until_served(&last).await;

    assert!(!driver.is_finished(), "the open connection goes on");
    let request = post("https://localhost/vmm.v1.VmService/ListVms", "application/json", b"{}");
    assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
    driver.abort();
}

#[tokio::test]
async fn unusable_files_are_refused_with_their_paths() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let refused = |wanted: &str| {
        let error = TlsServer::load(files(folder.path(), true)).err().unwrap().to_string();
        assert!(error.contains(wanted), "{error}");
    };
    write(folder.path(), &authority.issue(4000));
    refused("ca.pem cannot be read");
    std::fs::write(folder.path().join("ca.pem"), "").unwrap();
    refused("ca.pem has no certificate in PEM form");
    std::fs::write(folder.path().join("ca.pem"), authority.0.pem()).unwrap();
    assert!(TlsServer::load(files(folder.path(), true)).is_ok());
    std::fs::write(folder.path().join("key.pem"), self_signed().key).unwrap();
    refused("check that the key is the certificate's");
    std::fs::write(folder.path().join("key.pem"), "nonsense").unwrap();
    refused("key.pem has no private key in PEM form");
}

#[tokio::test]
async fn a_slow_handshake_and_a_slow_head_time_out() {
    let options = ServeOptions { header_timeout: Duration::from_millis(300), ..Default::default() };
    let bench = TlsBench::start(false, options).await;
    // The head of a record of the handshake, and no more.
    for beginning in [&b""[..], &[22, 3, 1, 2, 0, 1]] {
        let mut slow = TcpStream::connect(bench.server.addr).await.unwrap();
        slow.write_all(beginning).await.unwrap();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(UNREACHED_TIMEOUT, slow.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the server closed it");
    }
    let mut slow = bench.connect(None, b"http/1.1").await.unwrap();
    slow.write_all(b"GET /_/health HTTP/1.1\r\nHost:").await.unwrap();
    let mut rest = Vec::new();
    assert!(tokio::time::timeout(UNREACHED_TIMEOUT, slow.read_to_end(&mut rest)).await.is_ok());
}

#[tokio::test]
async fn unfinished_handshakes_keep_no_slot_from_others() {
    let bench = TlsBench::start(false, ServeOptions { max_connections: 2, ..Default::default() }).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(bench.server.addr).await.unwrap());
    }
    let stream = bench.connect(None, b"http/1.1").await.unwrap();
    assert_eq!(send_on(stream, "localhost", json_call("ListVms", "{}")).await.status, 200);
}

#[tokio::test]
async fn health_and_force_are_served_behind_tls_with_every_slot_in_use() {
    let bench = TlsBench::start(false, ServeOptions { max_connections: 1, ..Default::default() }).await;
    let stream = bench.connect(None, b"h2").await.unwrap();
    let (mut sender, connection) =
        http2::handshake::<_, _, Full<bytes::Bytes>>(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    let _driver = tokio::spawn(connection);
    let waiting =
        post("https://localhost/vmm.v1.VmService/WaitVm", "application/json", br#"{"timeout_seconds":3600}"#);
    let _open = tokio::spawn(sender.send_request(waiting));
    bench.server.waiting.notified().await;
    for (request, wanted) in [
        (get("/_/health"), 200),
        (json_call("DeleteVm", r#"{"force":true}"#), 200),
        (json_call("ListVms", "{}"), 429),
    ] {
        let stream = bench.connect(None, b"http/1.1").await.unwrap();
        assert_eq!(send_on(stream, "localhost", request).await.status.as_u16(), wanted);
    }
}
