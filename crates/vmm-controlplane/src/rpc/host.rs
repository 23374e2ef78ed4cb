//! The check of the Host header, which keeps web pages from reaching a daemon without
//! authentication.
//!
//! A page from anywhere may point its own name at 127.0.0.1 (DNS rebinding) and then call the
//! daemon as its own origin, which no CORS rule stops. Its requests carry the page's name as Host.
//! Therefore only names are served that cannot belong to a foreign page: IP addresses, loopback
//! names, and the names that the operator configured.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use connectrpc::ConnectError;
use http::Version;
use http::header::HOST;
use http::uri::Authority;

use super::peer::Peer;
use super::{failure_log, vital};

/// The names that the server answers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPolicy {
    /// Every name, for servers that authenticate each request.
    Any,
    /// IP addresses, `localhost`, names that end in `.localhost`, and these names; ports do not
    /// matter.
    Known(Vec<String>),
}

impl Default for HostPolicy {
    fn default() -> Self {
        Self::Known(Vec::new())
    }
}

impl HostPolicy {
    /// Returns true if a request for `host` is served. `host` has no port, and IPv6 addresses stand
    /// in brackets.
    fn allows(&self, host: &str) -> bool {
        let Self::Known(names) = self else { return true };
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        if let Some(v6) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            return v6.parse::<Ipv6Addr>().is_ok();
        }
        host.parse::<IpAddr>().is_ok()
            || host == "localhost"
            || host.ends_with(".localhost")
            || names.iter().any(|name| name.trim_end_matches('.').eq_ignore_ascii_case(&host))
    }

    /// Returns the reason for which a request is refused, or nothing.
    fn objection(&self, request: &Request) -> Option<String> {
        if *self == Self::Any {
            return None;
        }
        // HTTP/2 puts the name into `:authority`, which hyper shows in the URI. An HTTP/2 client
        // may send Host as well.
        let in_uri = request.uri().authority().map(|authority| authority.as_str());
        let in_headers = request.headers().get_all(HOST).iter().map(|value| value.to_str().unwrap_or(""));
        let named: Vec<&str> = in_uri.into_iter().chain(in_headers).collect();
        if named.is_empty() {
            // HTTP/1.0 has no Host, and no browser uses it.
            let required = request.version() > Version::HTTP_10;
            return required.then(|| "the request names no Host".to_owned());
        }
        named.iter().find(|name| !self.allows_authority(name)).map(|name| {
            format!(
                "this daemon does not answer to the name {name:?}: use its IP address or localhost, or add the \
                 name to UNKEY_VMCP_ALLOWED_HOSTS"
            )
        })
    }

    fn allows_authority(&self, name: &str) -> bool {
        !name.contains('@') && name.parse::<Authority>().is_ok_and(|authority| self.allows(authority.host()))
    }
}

/// The standard health service of gRPC, all of whose methods report health.
const HEALTH_SERVICE: &str = "/grpc.health.v1.Health/";

/// Answers PERMISSION_DENIED, HTTP 403, to a request whose Host is not served.
///
/// A peer that cannot be a foreign page may use every name: programs on the unix socket have none to
/// send, and those with a client certificate check the server's. Health is reported under every name, because load balancers ask for it under names of their own,
/// and because a page that learns by a rebound name that the daemon is healthy gains nothing.
pub(super) async fn check(State(policy): State<Arc<HostPolicy>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let can_be_foreign_page =
        request.extensions().get::<Peer>().is_none_or(|peer| peer.can_be_foreign_page());
    if vital::is_health(path) || path.starts_with(HEALTH_SERVICE) || !can_be_foreign_page {
        return next.run(request).await;
    }
    let Some(objection) = policy.objection(&request) else { return next.run(request).await };
    failure_log::refuse(request, ConnectError::permission_denied(objection)).await
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn addresses_loopback_names_and_configured_hosts_are_served() {
        let policy = HostPolicy::Known(vec!["vmm.example.org".into()]);
        for good in [
            "localhost",
            "LOCALHOST:8080",
            "localhost.",
            "a.localhost",
            "127.0.0.1:8080",
            "10.1.2.3",
            "[::1]:8080",
            "[fe80::1]",
            "vmm.example.org:8080",
            "VMM.example.org.",
        ] {
            assert!(policy.allows_authority(good), "{good}");
        }
        for bad in [
            "evil.example",
            "localhost.evil.example",
            "notlocalhost",
            "127.0.0.1.evil.example",
            "localhost@evil.example",
            "evil.example@localhost",
            "sub.vmm.example.org",
            "",
            "[::1",
        ] {
            assert!(!policy.allows_authority(bad), "{bad}");
        }
    }

    fn request(version: Version, hosts: &[&str]) -> Request {
        let mut request = Request::new(Body::empty());
        *request.version_mut() = version;
        for host in hosts {
            request.headers_mut().append(HOST, host.parse().unwrap());
        }
        request
    }

    #[test]
    fn the_authority_and_the_host_header_are_both_checked() {
        let policy = HostPolicy::default();
        assert!(policy.objection(&request(Version::HTTP_11, &["localhost"])).is_none());
        assert!(policy.objection(&request(Version::HTTP_11, &["localhost", "evil.example"])).is_some());
        assert!(policy.objection(&request(Version::HTTP_11, &[])).is_some());
        assert!(policy.objection(&request(Version::HTTP_10, &[])).is_none());
        let mut absolute = request(Version::HTTP_11, &["localhost"]);
        *absolute.uri_mut() = "http://evil.example/".parse().unwrap();
        assert!(policy.objection(&absolute).is_some());
        assert!(HostPolicy::Any.objection(&absolute).is_none());
    }
}
