//! The settings of TLS: the authorities that are trusted, and the client's certificate.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::config::TlsFiles;
use crate::failure::Failure;

/// Reads the files of TLS. Without a file of authorities, those of the system are trusted.
///
/// # Errors
///
/// A file cannot be read or has not what it should have.
pub(crate) fn client_config(files: &TlsFiles) -> Result<Arc<ClientConfig>, Failure> {
    let mut roots = RootCertStore::empty();
    match &files.ca {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| unusable(path, "authority", &error))?;
            }
        }
        // Authorities that cannot be read are missing, and the handshake says so.
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::Local(format!("TLS cannot be used: {error}")))?
        .with_root_certificates(roots);
    let mut config = match (&files.certificate, &files.key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(certificate), Some(key)) => {
            let private =
                PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, "private key", &error))?;
            builder
                .with_client_auth_cert(certificates(certificate)?, private)
                .map_err(|error| unusable(certificate, "certificate for the key", &error))?
        }
        (Some(_), None) => return Err(Failure::input("--cert is given without --key")),
        (None, Some(_)) => return Err(Failure::input("--key is given without --cert")),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = read.map_err(|error| unusable(path, "certificate", &error))?;
    if found.is_empty() {
        return Err(unusable(path, "certificate", &"the file has none"));
    }
    Ok(found)
}

fn unusable(path: &Path, expected: &str, why: &dyn std::fmt::Display) -> Failure {
    Failure::input(format!("{} gives no {expected} in PEM form: {why}", path.display()))
}
