//! The certificates of TLS, which are read again when their files change.
//!
//! ```text
//!   every RELOAD_INTERVAL:  stamps of the files ── as before ──► nothing
//!                                │
//!                                └─ changed ── read ──┬─ valid ──► for the next handshakes
//!                                                     └─ not ────► the old ones stay, one warning
//! ```
//!
//! Connections that are open keep the certificates of their handshake.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

/// The interval between two looks at the files.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// The largest file that is read, far above the size of a chain or of a bundle of authorities.
const FILE_LIMIT: u64 = 4 << 20;

/// The files of TLS, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, followed by those between it and its authority.
    pub certificate: PathBuf,
    /// The private key of the server's certificate.
    pub key: PathBuf,
    /// The authorities of client certificates. If there are any, every client needs a certificate.
    pub client_ca: Option<PathBuf>,
}

/// The reason for which the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("the file {} cannot be read; check that it exists and that the daemon's user may read it", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A file has not what it should have.
    #[error("the file {} has no {expected} in PEM form{}", .path.display(), detail(.why))]
    Content {
        /// The file.
        path: PathBuf,
        /// The expected content.
        expected: &'static str,
        /// The error in the content, if there is one.
        why: Option<String>,
    },
    /// The certificate and the key cannot be used together, or with this version of TLS.
    #[error("the certificate in {} and the key in {} cannot be used; check that the key is the certificate's", .certificate.display(), .key.display())]
    Pair {
        /// The file of the certificate.
        certificate: PathBuf,
        /// The file of the key.
        key: PathBuf,
        /// The error of the TLS library.
        source: rustls::Error,
    },
    /// The authorities of client certificates cannot be used.
    #[error("the client authorities in {} cannot be used: {why}", .path.display())]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// The error of the TLS library.
        why: String,
    },
}

fn detail(why: &Option<String>) -> String {
    why.as_ref().map(|why| format!(": {why}")).unwrap_or_default()
}

/// The certificates in use.
pub struct TlsServer {
    files: TlsFiles,
    state: Mutex<TlsState>,
}

struct TlsState {
    config: Arc<ServerConfig>,
    /// The stamps at the last attempt to read the files, whether it succeeded or not.
    stamps: Vec<Option<FileStamp>>,
}

/// The identity and the last change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileStamp {
    /// Returns the stamp of the file that `path` leads to, or nothing if there is none.
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl TlsFiles {
    fn stamps(&self) -> Vec<Option<FileStamp>> {
        [&self.certificate, &self.key]
            .into_iter()
            .chain(&self.client_ca)
            .map(|path| FileStamp::of(path))
            .collect()
    }

    /// Reads the files. Blocks.
    fn read(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let pair =
            |source| TlsError::Pair { certificate: self.certificate.clone(), key: self.key.clone(), source };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_safe_default_protocol_versions().map_err(pair)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let refused = |why: String| TlsError::ClientCa { path: path.clone(), why };
                let mut roots = RootCertStore::empty();
                for authority in certificates(path)? {
                    roots.add(authority).map_err(|error| refused(error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder
                    .with_client_cert_verifier(verifier.build().map_err(|error| refused(error.to_string()))?)
            }
        };
        let key = bytes(&self.key)?;
        let key = PrivateKeyDer::from_pem_slice(&key)
            .map_err(|error| content(&self.key, "private key", Some(&error)))?;
        let mut config = builder.with_single_cert(certificates(&self.certificate)?, key).map_err(pair)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = bytes(path)?;
    let found = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| content(path, "certificate", Some(&error)))?;
    if found.is_empty() { Err(content(path, "certificate", None)) } else { Ok(found) }
}

fn content(path: &Path, expected: &'static str, why: Option<&dyn std::fmt::Display>) -> TlsError {
    TlsError::Content { path: path.to_owned(), expected, why: why.map(ToString::to_string) }
}

fn bytes(path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |source| TlsError::Unreadable { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    // A FIFO would block, and a device has no end.
    if !metadata.is_file() || metadata.size() > FILE_LIMIT {
        return Err(unreadable(io::Error::other("it is no regular file of at most 4 MiB")));
    }
    std::fs::read(path).map_err(unreadable)
}

impl TlsServer {
    /// Reads the files. Blocks while they are read.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or has no certificate or key, or the key is not the certificate's.
    pub fn load(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        // The stamps are older than the content, so a change between the two is seen at the next
        // look.
        let stamps = files.stamps();
        let config = files.read()?;
        Ok(Arc::new(Self { files, state: Mutex::new(TlsState { config, stamps }) }))
    }

    /// Returns the configuration for the next handshake, and true if it demands a client
    /// certificate.
    pub(super) fn current(&self) -> (Arc<ServerConfig>, bool) {
        (Arc::clone(&self.state().config), self.files.client_ca.is_some())
    }

    /// Reads the files again at every change, for ever.
    pub(super) async fn reload_forever(self: Arc<Self>) {
        loop {
            time::sleep(RELOAD_INTERVAL).await;
            let server = Arc::clone(&self);
            // Files of a network file system may block, so they are read on a thread of their own.
            // The next look waits for this one.
            let looked = tokio::task::spawn_blocking(move || server.reload_if_changed()).await;
            if let Err(error) = looked {
                tracing::error!(%error, "reading the TLS files panicked, which is a defect of this program");
            }
        }
    }

    /// Reads the files if one has changed since the last attempt. If they cannot be used, the
    /// certificates in use stay.
    fn reload_if_changed(&self) {
        let stamps = self.files.stamps();
        if self.state().stamps == stamps {
            return;
        }
        let read = self.files.read();
        let mut state = self.state();
        state.stamps = stamps;
        match read {
            Ok(config) => {
                state.config = config;
                tracing::info!(certificate = %self.files.certificate.display(), "the TLS certificates were read again");
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(
                    %error,
                    detail = source,
                    "the TLS files changed and cannot be used; the daemon keeps the old certificates"
                );
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, TlsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
