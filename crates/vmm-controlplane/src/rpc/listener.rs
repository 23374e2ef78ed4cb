//! The listeners of the server, and the step from an accepted socket to a stream of bytes.
//!
//! ```text
//!   TCP ────────────────────────────┐
//!   TCP with TLS ─ handshake ───────┼──► Transport ──► connection.rs
//!   unix socket ─ peer credentials ─┘
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use super::peer::Peer;
use super::tls::TlsServer;
use super::unix_socket::UnixSocket;

/// The TCP keep-alive settings: the silence before the first probe, the interval between probes,
/// and the number of unanswered probes after which the kernel closes the connection.
const TCP_KEEPALIVE_DELAY: Duration = Duration::from_secs(60);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const PEER_TRIES: u32 = 3;

/// A socket on which the server accepts connections.
pub enum Listener {
    /// TCP in clear text.
    Tcp(TcpListener),
    /// TCP with TLS.
    Tls(TcpListener, Arc<TlsServer>),
    /// A unix socket, which is removed when the listener is dropped.
    Unix(UnixSocket),
}

impl Listener {
    /// Waits for a connection. The future may be dropped at any point, because nothing that was
    /// accepted is lost.
    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                let peer = Peer::Network { address, has_certificate: false };
                Ok(Accepted { socket: AcceptedSocket::Tcp(stream), peer })
            }
            Self::Tls(listener, tls) => {
                let (stream, address) = listener.accept().await?;
                // A handshake under this configuration ends only with a valid client certificate,
                // so the peer has one as soon as there is a request.
                let (config, has_certificate) = tls.current();
                let peer = Peer::Network { address, has_certificate };
                Ok(Accepted { socket: AcceptedSocket::Tls(stream, config), peer })
            }
            Self::Unix(socket) => {
                let (stream, _unnamed) = socket.listener().accept().await?;
                let credentials = stream.peer_cred()?;
                let peer = Peer::LocalUser { uid: credentials.uid(), pid: credentials.pid() };
                Ok(Accepted { socket: AcceptedSocket::Unix(stream), peer })
            }
        }
    }

    /// Returns the certificates that this listener serves, which change with their files.
    pub(super) fn tls(&self) -> Option<Arc<TlsServer>> {
        match self {
            Self::Tls(_, tls) => Some(Arc::clone(tls)),
            Self::Tcp(_) | Self::Unix(_) => None,
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

/// A connection on which no byte has been exchanged yet.
pub(super) struct Accepted {
    socket: AcceptedSocket,
    pub(super) peer: Peer,
}

enum AcceptedSocket {
    Tcp(TcpStream),
    Tls(TcpStream, Arc<ServerConfig>),
    Unix(UnixStream),
}

/// The bytes of a connection, in clear text.
pub(super) type Transport = Box<dyn ByteStream>;

/// A stream that can be read and written.
pub(super) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

impl Accepted {
    /// Shakes hands where the listener has TLS. The caller bounds this wait.
    ///
    /// # Errors
    ///
    /// The peer does not speak TLS, or has no certificate that is accepted, or closed the
    /// connection.
    pub(super) async fn open(self) -> io::Result<Transport> {
        let peer = self.peer;
        let set = |stream: &TcpStream| {
            if let Err(error) = set_socket_options(stream) {
                tracing::debug!(%peer, %error, "the options of a socket could not be set");
            }
        };
        match self.socket {
            AcceptedSocket::Tcp(stream) => {
                set(&stream);
                Ok(Box::new(stream))
            }
            AcceptedSocket::Tls(stream, config) => {
                set(&stream);
                Ok(Box::new(TlsAcceptor::from(config).accept(stream).await?))
            }
            AcceptedSocket::Unix(stream) => Ok(Box::new(stream)),
        }
    }
}

/// Sets the options of an accepted TCP socket.
fn set_socket_options(stream: &TcpStream) -> io::Result<()> {
    // Answers are small, and without this option the kernel would hold some back for 40 ms.
    stream.set_nodelay(true)?;
    // A peer that lost its power closes nothing. HTTP/2 has pings to detect that, but a watch over
    // HTTP/1.1 has only TCP keep-alive.
    sockopt::set_tcp_keepidle(stream, TCP_KEEPALIVE_DELAY)?;
    sockopt::set_tcp_keepintvl(stream, TCP_KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, PEER_TRIES)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}
