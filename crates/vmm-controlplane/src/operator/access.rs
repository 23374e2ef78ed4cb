//! The checks of the listeners for `doctor`: who can be a caller, and the files of TLS.

use std::error::Error as _;
use std::path::Path;

use super::check::DoctorCheck;
use crate::config::DaemonConfig;
use crate::rpc::{TlsFiles, TlsServer, UnixSocketOptions};

/// The remedy for a TCP port that everybody may call.
const NARROWER: &str = "serve on a unix socket alone (UNKEY_VMCP_SOCKET, UNKEY_VMCP_ADDRESS=none), or demand client certificates \
                        (UNKEY_VMCP_TLS_CLIENT_CA)";

/// Returns the lines about the listeners. Reads the files of TLS as the daemon does.
pub(super) fn listeners(config: &DaemonConfig) -> Vec<DoctorCheck> {
    let tcp = config.listen.as_ref().map(|listen| {
        let name = format!("listener {listen}");
        if config.demands_certificates() {
            return DoctorCheck::ok(name, "demands client certificates");
        }
        let callers = if listen.is_loopback() { "local user" } else { "program that reaches the address" };
        DoctorCheck::warn(name, format!("every {callers} has the power of the daemon's user"), NARROWER)
    });
    let tls = config.listen.as_ref().and(config.tls.as_ref()).map(certificates);
    let socket = config.socket.as_ref().map(socket);
    tcp.into_iter().chain(tls).chain(socket).collect()
}

fn certificates(files: &TlsFiles) -> DoctorCheck {
    match TlsServer::load(files.clone()) {
        Ok(_) => {
            DoctorCheck::ok("TLS", format!("the certificate in {} can be used", files.certificate.display()))
        }
        Err(error) => {
            let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            DoctorCheck::fail(
                "TLS",
                format!("{error}{source}"),
                "put a certificate and its key in PEM form there",
            )
        }
    }
}

fn socket(options: &UnixSocketOptions) -> DoctorCheck {
    let name = format!("listener {}", options.path.display());
    let folder = options.path.parent().unwrap_or(Path::new("/"));
    if folder.is_dir() {
        return DoctorCheck::ok(name, format!("mode {:04o}", options.mode));
    }
    DoctorCheck::fail(
        name,
        format!("the folder {} does not exist", folder.display()),
        "make the folder, owned by root or the daemon's user, or name another path with UNKEY_VMCP_SOCKET",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::check::CheckVerdict;

    #[test]
    fn a_socket_without_its_folder_and_unusable_certificates_fail() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| UnixSocketOptions { path: folder.path().join(path), mode: 0o660, group: None };
        assert_eq!(socket(&at("api.sock")).verdict, CheckVerdict::Ok);
        assert_eq!(socket(&at("missing/api.sock")).verdict, CheckVerdict::Fail);
        let pem = folder.path().join("cert.pem");
        let files = TlsFiles { certificate: pem.clone(), key: pem, client_ca: None };
        let check = certificates(&files);
        assert!(check.verdict == CheckVerdict::Fail && check.finding.contains("cannot be read"), "{check:?}");
    }
}
