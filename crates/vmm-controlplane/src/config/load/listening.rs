//! Parses the settings of the listeners.

use std::path::PathBuf;

use super::super::error::ConfigError;
use super::super::settings::Setting;
use super::super::values::{self, ListenAddress};
use super::Loader;
use crate::rpc::{TlsFiles, UnixSocketOptions};

/// The listeners of the API, and the names that they serve.
pub(super) struct Listening {
    pub(super) listen: Option<ListenAddress>,
    pub(super) socket: Option<UnixSocketOptions>,
    pub(super) tls: Option<TlsFiles>,
    pub(super) allowed_hosts: Vec<String>,
}

impl Loader<'_> {
    /// Parses the settings in the table's order. Returns `None` if one is invalid or if two do not
    /// go together, and then an error about it was added.
    pub(super) fn listening(&mut self) -> Option<Listening> {
        use Setting as S;
        let host = self.text(S::Address, values::address);
        let port = self.text(S::Port, values::port);
        let path = self.optional(S::Socket, values::socket_path);
        let mode = self.text(S::SocketMode, values::socket_mode);
        let group =
            self.optional(S::SocketGroup, |text| values::socket_group(text, |name| self.host.group(name)));
        let certificate = self.optional(S::TlsCert, values::absolute_path);
        let key = self.optional(S::TlsKey, values::absolute_path);
        let client_ca = self.optional(S::TlsClientCa, values::absolute_path);
        let allowed_hosts = self.text(S::AllowedHosts, values::allowed_hosts);
        let tls = match (certificate, key, client_ca) {
            (Some(certificate), Some(key), Some(client_ca)) => self.tls(certificate, key, client_ca),
            _ => None,
        };
        let (host, path) = (host?, path?);
        if host.is_none() && path.is_none() {
            self.errors.push(ConfigError::new(
                "address: none leaves no listener, because no unix socket is named",
                self.given(S::Address).map(|(_, origin)| origin),
                format!("set {} to a path, or {} to an address", S::Socket.variable(), S::Address.variable()),
            ));
            return None;
        }
        let (mode, group, port) = (mode?, group?, port?);
        Some(Listening {
            listen: host.map(|host| ListenAddress { host, port }),
            socket: path.map(|path| UnixSocketOptions { path, mode, group }),
            tls: tls?,
            allowed_hosts: allowed_hosts?,
        })
    }

    /// Returns the files of TLS, or nothing where no certificate is named.
    fn tls(
        &mut self,
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
        client_ca: Option<PathBuf>,
    ) -> Option<Option<TlsFiles>> {
        use Setting as S;
        let (given, missing) = match (certificate, key) {
            (Some(certificate), Some(key)) => return Some(Some(TlsFiles { certificate, key, client_ca })),
            (None, None) if client_ca.is_none() => return Some(None),
            (Some(_), None) => (S::TlsCert, S::TlsKey),
            (None, Some(_)) => (S::TlsKey, S::TlsCert),
            (None, None) => (S::TlsClientCa, S::TlsCert),
        };
        self.errors.push(ConfigError::new(
            format!("{}: TLS needs {} too", given.key(), missing.key()),
            self.given(given).map(|(_, origin)| origin),
            format!(
                "set {} to the path of a file in PEM form, or unset {}",
                missing.variable(),
                given.variable()
            ),
        ));
        None
    }
}
