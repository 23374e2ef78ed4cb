//! The server's URL.

use std::fmt;
use std::net::IpAddr;

use http::Uri;

use crate::failure::Failure;

/// A server that this program can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Server(Uri);

impl Server {
    /// Reads a URL; `source` names the origin of the URL, for the error.
    ///
    /// # Errors
    ///
    /// The text is no URL, has a scheme other than `http`, or names more than a server.
    pub(crate) fn parse(text: &str, source: &str) -> Result<Self, Failure> {
        let refuse = |why: &str| Failure::input(format!("{source}: \"{text}\" {why}"));
        if text.starts_with("https://") || text.starts_with("unix:") {
            return Err(refuse("cannot be reached: this version of vmcp speaks http alone").with_remedy(
                "name an http:// address; reach another host through a tunnel, as `ssh -L` makes one",
            ));
        }
        if !text.starts_with("http://") {
            return Err(refuse("is not a URL of a server").with_remedy("write http://HOST:PORT"));
        }
        let uri: Uri = text.parse().map_err(|error| refuse(&format!("is not a URL: {error}")))?;
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(refuse("has a user name, which the daemon does not know")
                .with_remedy("write http://HOST:PORT"));
        }
        if uri.path() != "/" || uri.query().is_some() {
            return Err(refuse("has more than a host and a port").with_remedy("write http://HOST:PORT"));
        }
        Ok(Self(uri))
    }

    /// Returns true if the address is a loopback address, so that the server's files are those of
    /// this host. A tunnel to another host has a loopback address, too.
    pub(crate) fn is_loopback(&self) -> bool {
        let host = self.0.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost")
            || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
    }

    /// Returns the URL for a client.
    pub(crate) fn uri(&self) -> Uri {
        self.0.clone()
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_address_is_recognised_in_each_spelling() {
        let is_loopback = |url: &str| Server::parse(url, "--server").unwrap().is_loopback();
        for url in ["http://127.0.0.1:8080", "http://127.0.0.2", "http://[::1]:80", "http://Localhost:1"] {
            assert!(is_loopback(url), "{url}");
        }
        for url in ["http://10.0.0.5:8080", "http://[fe80::1]", "http://localhost.example:1"] {
            assert!(!is_loopback(url), "{url}");
        }
    }

    #[test]
    fn a_scheme_other_than_http_is_refused_with_advice() {
        for url in ["http://localhost:8080", "http://[::1]:80/", "http://10.0.0.1"] {
            assert!(Server::parse(url, "--server").is_ok(), "{url}");
        }
        for (url, wanted) in [
            ("https://a:1", "this version of vmcp speaks http alone"),
            ("unix:///run/vmcp.sock", "this version of vmcp speaks http alone"),
            ("localhost:8080", "is not a URL of a server"),
            ("http://a:1/vmm.v1", "more than a host and a port"),
            ("http://me@a:1", "has a user name"),
            ("http://a b", "is not a URL"),
        ] {
            let error = Server::parse(url, "--server").unwrap_err();
            assert!(error.to_string().contains(wanted), "{url}: {error}");
            assert!(error.to_string().starts_with("--server: "), "{error}");
        }
    }
}
