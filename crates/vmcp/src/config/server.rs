//! The server's URL.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use http::Uri;

use crate::failure::Failure;

/// The forms of a URL, for the advice.
const FORMS: &str = "write http://HOST:PORT, https://HOST:PORT or unix:///PATH";

/// A server that this program can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) endpoint: Endpoint,
    pub(crate) tls: TlsFiles,
}

/// The place at which a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Http(Uri),
    Https(Uri),
    /// A unix socket: an absolute path.
    Unix(PathBuf),
}

/// The files of TLS, in PEM. They have no effect where the server is not reached over TLS.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    /// The authorities that are trusted. Without the file those of the system are.
    pub(crate) ca: Option<PathBuf>,
    /// The certificate of the client.
    pub(crate) certificate: Option<PathBuf>,
    /// The private key of the client's certificate.
    pub(crate) key: Option<PathBuf>,
}

impl TlsFiles {
    /// Returns these files, and those of `weaker` where these are missing.
    pub(crate) fn or(self, weaker: Self) -> Self {
        Self {
            ca: self.ca.or(weaker.ca),
            certificate: self.certificate.or(weaker.certificate),
            key: self.key.or(weaker.key),
        }
    }
}

impl Server {
    /// Reads a URL; `source` names the origin of the URL, for the error.
    ///
    /// # Errors
    ///
    /// The text is no URL, has a scheme other than `http`, `https` and `unix`, or names more than a
    /// server.
    pub(crate) fn parse(text: &str, source: &str, tls: TlsFiles) -> Result<Self, Failure> {
        let refuse = |why: &str| Failure::input(format!("{source}: \"{text}\" {why}")).with_remedy(FORMS);
        if let Some(path) = text.strip_prefix("unix://") {
            if !path.starts_with('/') || path.contains('\0') {
                return Err(refuse("has no absolute path"));
            }
            return Ok(Self { endpoint: Endpoint::Unix(path.into()), tls });
        }
        let make = if text.starts_with("https://") {
            Endpoint::Https
        } else if text.starts_with("http://") {
            Endpoint::Http
        } else {
            return Err(refuse("is not a URL of a server"));
        };
        let uri: Uri = text.parse().map_err(|error| refuse(&format!("is not a URL: {error}")))?;
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(refuse("has a user name, which the daemon does not know"));
        }
        if uri.path() != "/" || uri.query().is_some() {
            return Err(refuse("has more than a host and a port"));
        }
        Ok(Self { endpoint: make(uri), tls })
    }

    /// Returns true if the server is reached over a loopback address or a socket, so that the
    /// server's files are those of this host. A tunnel to another host has a loopback address, too.
    pub(crate) fn is_loopback(&self) -> bool {
        let (Endpoint::Http(uri) | Endpoint::Https(uri)) = &self.endpoint else { return true };
        let host = uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost")
            || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
    }

    /// Returns the URL for a client. On a unix socket the URL names this host, because a request
    /// needs a host and the daemon serves that name.
    pub(crate) fn uri(&self) -> Uri {
        match &self.endpoint {
            Endpoint::Http(uri) | Endpoint::Https(uri) => uri.clone(),
            Endpoint::Unix(_) => Uri::from_static("http://localhost"),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Http(uri) | Endpoint::Https(uri) => f.write_str(uri.to_string().trim_end_matches('/')),
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Server, Failure> {
        Server::parse(url, "--server", TlsFiles::default())
    }

    #[test]
    fn a_loopback_address_is_recognised_in_each_spelling() {
        let is_loopback = |url: &str| parse(url).unwrap().is_loopback();
        for url in [
            "http://127.0.0.1:8080",
            "https://127.0.0.2",
            "http://[::1]:80",
            "http://Localhost:1",
            "unix:///s",
        ] {
            assert!(is_loopback(url), "{url}");
        }
        for url in ["http://10.0.0.5:8080", "http://[fe80::1]", "http://localhost.example:1"] {
            assert!(!is_loopback(url), "{url}");
        }
    }

    #[test]
    fn a_url_that_names_no_server_is_refused_with_advice() {
        for url in [
            "http://localhost:8080",
            "http://[::1]:80/",
            "http://10.0.0.1",
            "https://a",
            "unix:///run/vmcp.sock",
        ] {
            assert_eq!(parse(url).unwrap().to_string(), url.trim_end_matches('/'), "{url}");
        }
        for (url, wanted) in [
            ("ftp://a:1", "is not a URL of a server"),
            ("unix://run/vmcp.sock", "has no absolute path"),
            ("localhost:8080", "is not a URL of a server"),
            ("https://a:1/vmm.v1", "more than a host and a port"),
            ("http://me@a:1", "has a user name"),
            ("http://a b", "is not a URL"),
        ] {
            let error = parse(url).unwrap_err();
            assert!(error.to_string().contains(wanted), "{url}: {error}");
            assert!(error.to_string().starts_with("--server: "), "{error}");
        }
    }
}
