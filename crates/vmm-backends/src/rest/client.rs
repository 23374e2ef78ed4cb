//! An HTTP/1.1 client for the API socket of one VMM.
//!
//! ```text
//!   call ──► the kept connection, or a new one ──► request ─┬─► answer, whole and in time
//!                 ▲                                         │             │
//!                 └──────── kept, until hang_up ◄───────────┼─────────────┘
//!                                                           └─► late, broken, too long, or
//!                                                               dropped: connection closed
//! ```
//!
//! A VMM hosts a guest that may have taken it over, so its answers are not trusted: an answer has a
//! deadline that covers its last byte, a limit in bytes, and a strict form. A connection whose
//! answer was not read to its end is never used again, because the next answer on it would belong
//! to the call before.

use std::error::Error as StdError;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::Instrument;
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, GuestState};

use crate::{connect_errors, sanitize};

/// The time limit of a call, including its answer.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// The time limit of the start of a guest. The VMM loads the kernel and the initial RAM disk during
/// this call.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(20);

/// The most bytes of a successful answer.
const MAX_ANSWER: usize = 1 << 20;
/// The most bytes of an error answer.
const MAX_ERROR: usize = 64 << 10;
/// The most bytes of a request that the HTTP server of both VMMs accepts.
const MAX_REQUEST: usize = 51_200;
/// The most bytes of the head of an answer. hyper does not allow a smaller value.
const MAX_HEAD: usize = 8192;

/// Extracts the message from the body of a VMM's error answer, or returns `None` if there is none.
pub type ErrorText = fn(&[u8]) -> Option<String>;

/// The typed API of one VMM, built on [`RestClient`].
#[async_trait]
pub trait RestApi: From<RestClient> + fmt::Debug + Send + Sync + 'static {
    /// Reads an error answer of the VMM.
    const EXPLAIN: ErrorText;

    /// Returns the API at `socket`. The first call connects. A call fails if another process than
    /// `pid` listens there.
    fn of_process(socket: &Path, pid: u32) -> Self {
        RestClient::new(socket, Self::EXPLAIN).of_process(pid).into()
    }

    /// Returns the API at `socket` on the connection `stream`. A later connection fails if another
    /// process than `pid` listens there.
    ///
    /// # Errors
    /// Fails as [`RestClient::over`] does.
    async fn over(socket: &Path, stream: UnixStream, pid: u32) -> Result<Self, BackendError> {
        Ok(RestClient::over(socket, stream, Self::EXPLAIN).await?.of_process(pid).into())
    }

    /// Asks the VMM for its version.
    ///
    /// # Errors
    /// Fails as [`RestClient::get`] does.
    async fn version(&self) -> Result<String, BackendError>;

    /// Asks for the state of the guest and the VMM's version. A guest that was never started counts
    /// as ended.
    ///
    /// # Errors
    /// Fails as [`RestClient::get`] does.
    async fn instance(&self) -> Result<(GuestState, String), BackendError>;
}

/// An HTTP client for one VMM, with at most one connection.
#[derive(Debug)]
pub struct RestClient {
    socket: PathBuf,
    explain: ErrorText,
    /// The process that must listen at the socket, if it is known.
    listener: Option<u32>,
    kept: Mutex<Option<SendRequest<Full<Bytes>>>>,
}

/// One request with its time limit.
#[derive(Debug)]
struct RestCall {
    method: Method,
    path: String,
    body: Option<Bytes>,
    limit: Duration,
}

impl RestClient {
    /// Returns a client for `socket`. The first call connects. `explain` reads the VMM's errors.
    pub fn new(socket: &Path, explain: ErrorText) -> Self {
        Self { socket: socket.to_path_buf(), explain, listener: None, kept: Mutex::new(None) }
    }

    /// Restricts this client to the process `pid`: a call fails if another process has taken over
    /// the socket.
    pub fn of_process(mut self, pid: u32) -> Self {
        self.listener = Some(pid);
        self
    }

    /// Returns a client for `socket` on the existing connection `stream`.
    ///
    /// # Errors
    /// [`BackendErrorKind::Unreachable`] if the connection broke at once.
    pub async fn over(socket: &Path, stream: UnixStream, explain: ErrorText) -> Result<Self, BackendError> {
        let client = Self::new(socket, explain);
        let sender = client.handshake(stream).await?;
        *client.kept.lock().await = Some(sender);
        Ok(client)
    }

    /// Reads `path`.
    ///
    /// # Errors
    /// Fails as [`Self::put`] does; [`BackendErrorKind::Protocol`] if the answer has another form
    /// than `T`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, BackendError> {
        self.get_within(path, CALL_TIMEOUT).await
    }

    /// Reads `path` as [`Self::get`] does. The call may take `limit`.
    ///
    /// # Errors
    /// Fails as [`Self::get`] does.
    pub async fn get_within<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: Duration,
    ) -> Result<T, BackendError> {
        let call = RestCall { method: Method::GET, path: path.to_owned(), body: None, limit };
        let answer = self.call(&call).await?;
        serde_json::from_slice(&answer).map_err(|error| {
            // The message of serde quotes the answer, so it is sanitized.
            let why = sanitize::sentence(&error.to_string());
            let message = format!("the VMM's answer to {} cannot be parsed: {why}", call.name());
            BackendError::new(BackendErrorKind::Protocol, Effect::NotApplied, message).caused_by(error)
        })
    }

    /// Sends a PUT request for `path` with `body`, if there is one. The call may take `limit`.
    ///
    /// # Errors
    /// [`BackendErrorKind::Rejected`] with the VMM's own message; [`BackendErrorKind::Timeout`];
    /// [`BackendErrorKind::Unreachable`]; [`BackendErrorKind::Protocol`].
    pub async fn put<T: Serialize + Sync>(
        &self,
        path: &str,
        body: Option<&T>,
        limit: Duration,
    ) -> Result<(), BackendError> {
        self.send(Method::PUT, path, body, limit).await
    }

    /// Sends a PATCH request for `path` with `body`.
    ///
    /// # Errors
    /// Fails as [`Self::put`] does.
    pub async fn patch<T: Serialize + Sync>(&self, path: &str, body: &T) -> Result<(), BackendError> {
        self.send(Method::PATCH, path, Some(body), CALL_TIMEOUT).await
    }

    async fn send<T: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: Option<&T>,
        limit: Duration,
    ) -> Result<(), BackendError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(|error| {
            let message = format!("the request to {path} cannot be written as JSON: {error}");
            BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message).caused_by(error)
        })?;
        if let Some(body) = &body
            && body.len() > MAX_REQUEST
        {
            let message = format!(
                "the configuration takes {} bytes and the VMM reads {MAX_REQUEST}: shorten paths and kernel_args, or name fewer devices",
                body.len()
            );
            return Err(BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message));
        }
        let call = RestCall { method, path: path.to_owned(), body: body.map(Bytes::from), limit };
        self.call(&call).await.map(drop)
    }

    /// Closes the kept connection unless a call uses it. The caller should do so if its next call
    /// is a while away, because the buffers of an open connection take 27 kB.
    pub fn hang_up(&self) {
        if let Ok(mut kept) = self.kept.try_lock() {
            *kept = None;
        }
    }

    async fn call(&self, call: &RestCall) -> Result<Bytes, BackendError> {
        let deadline = Instant::now() + call.limit;
        let connected = tokio::time::timeout_at(deadline, async {
            // The deadline covers the wait for the connection, because the caller's time limit
            // counts from its call.
            let mut kept = self.kept.lock().await;
            let sender = match kept.take() {
                Some(sender) if !sender.is_closed() => sender,
                Some(_) | None => self.connect().await?,
            };
            Ok::<_, BackendError>((kept, sender))
        });
        let (mut kept, mut sender) = match connected.await {
            Ok(connected) => connected?,
            Err(_) => return Err(self.too_late(call, Effect::NotApplied)),
        };
        match tokio::time::timeout_at(deadline, self.exchange(&mut sender, call)).await {
            Ok(Ok((status, answer))) => {
                // The connection is kept only here, because the answer was read to its end. On
                // every other path `sender` is dropped, which closes the connection, so the next
                // call cannot read the rest of this answer.
                *kept = Some(sender);
                self.check_status(call, status, answer)
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.too_late(call, call.effect())),
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, BackendError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            let message = format!("the VMM's socket {} cannot be reached: {error}", self.socket.display());
            BackendError::new(connect_errors::failure(&error), Effect::NotApplied, message).caused_by(error)
        })?;
        self.check_listener(&stream)?;
        self.handshake(stream).await
    }

    fn check_listener(&self, stream: &UnixStream) -> Result<(), BackendError> {
        // The path of a socket names no process. After the VMM has ended, another program may
        // listen there, and the VM's configuration must not be sent to it.
        let Some(expected) = self.listener else { return Ok(()) };
        match vmm_host::endpoint::listener(stream, &self.socket) {
            Ok(pid) if pid == expected => Ok(()),
            Ok(pid) => {
                let message = format!(
                    "process {pid} listens on {} now, not the VM's VMM ({expected}); nothing was sent to it",
                    self.socket.display()
                );
                Err(BackendError::new(BackendErrorKind::Unreachable, Effect::NotApplied, message))
            }
            Err(error) => {
                let message = error.to_string();
                Err(BackendError::new(BackendErrorKind::Unreachable, Effect::NotApplied, message)
                    .caused_by(error))
            }
        }
    }

    async fn handshake(&self, stream: UnixStream) -> Result<SendRequest<Full<Bytes>>, BackendError> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_HEAD);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(|error| {
            let message = format!("the connection to {} broke: {error}", self.socket.display());
            BackendError::new(BackendErrorKind::Unreachable, Effect::NotApplied, message).caused_by(error)
        })?;
        let span = tracing::debug_span!(parent: None, "vmm-connection", socket = %self.socket.display());
        // The task ends when the sender is dropped or the VMM closes the connection. The error is
        // only logged at the debug level, because the call that it interrupted returns it as well.
        tokio::spawn(
            async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "the connection to a VMM ended");
                }
            }
            .instrument(span),
        );
        Ok(sender)
    }

    /// Sends the request and reads the whole answer.
    async fn exchange(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        call: &RestCall,
    ) -> Result<(StatusCode, Bytes), BackendError> {
        sender.ready().await.map_err(|error| self.broken(call, Effect::NotApplied, error))?;
        let request = call.request()?;
        let answer = sender.send_request(request).await.map_err(|error| {
            // A server that closes an idle connection has read nothing of this request.
            let effect = if error.is_canceled() { Effect::NotApplied } else { call.effect() };
            self.broken(call, effect, error)
        })?;
        // An error answer carries only a message, so its limit is smaller.
        let status = answer.status();
        let limit = if status.is_success() { MAX_ANSWER } else { MAX_ERROR };
        match Limited::new(answer.into_body(), limit).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => {
                let message = format!("the VMM's answer to {} is longer than {limit} bytes", call.name());
                Err(BackendError::new(BackendErrorKind::Protocol, call.effect(), message))
            }
            Err(error) => Err(self.broken(call, call.effect(), error)),
        }
    }

    fn check_status(
        &self,
        call: &RestCall,
        status: StatusCode,
        answer: Bytes,
    ) -> Result<Bytes, BackendError> {
        if status.is_success() {
            return Ok(answer);
        }
        let said = match (self.explain)(&answer) {
            Some(said) => sanitize::sentence(&said),
            None if answer.trim_ascii().is_empty() => format!("{status}, without a reason"),
            None => format!("{status}, {}", sanitize::quote(&answer)),
        };
        let message = format!("the VMM refused {}: {said}", call.name());
        // A client error (4xx) means that the request was not carried out. A server that failed
        // (5xx) may have begun.
        let effect = if status.is_client_error() { Effect::NotApplied } else { call.effect() };
        Err(if status.is_client_error() || status.is_server_error() {
            BackendError::refused(effect, message)
        } else {
            BackendError::new(BackendErrorKind::Protocol, effect, message)
        })
    }

    fn too_late(&self, call: &RestCall, effect: Effect) -> BackendError {
        let message = format!(
            "the VMM did not answer {} on {} within {} s; it may be busy, stopped or stuck",
            call.name(),
            self.socket.display(),
            call.limit.as_secs()
        );
        BackendError::new(BackendErrorKind::Timeout, effect, message)
    }

    fn broken(
        &self,
        call: &RestCall,
        effect: Effect,
        error: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> BackendError {
        let error = error.into();
        let parse = error
            .downcast_ref::<hyper::Error>()
            .is_some_and(|error| error.is_parse() || error.is_parse_too_large());
        let (kind, what) = if parse {
            (BackendErrorKind::Protocol, "is not HTTP")
        } else {
            (BackendErrorKind::Unreachable, "broke off")
        };
        let message =
            format!("the VMM's answer to {} on {} {what}: {error}", call.name(), self.socket.display());
        BackendError::new(kind, effect, message).caused_by(error)
    }
}

impl RestCall {
    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    /// Returns the known effect of a call that was sent and not answered.
    fn effect(&self) -> Effect {
        if self.method == Method::GET { Effect::NotApplied } else { Effect::Unknown }
    }

    fn request(&self) -> Result<Request<Full<Bytes>>, BackendError> {
        let mut request = Request::builder()
            .method(&self.method)
            .uri(&self.path)
            .header(HOST, HeaderValue::from_static("localhost"))
            .header(ACCEPT, HeaderValue::from_static("application/json"));
        if self.body.is_some() {
            request = request.header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        request.body(Full::new(self.body.clone().unwrap_or_default())).map_err(|error| {
            let message = format!("{} is no legal request: {error}", self.name());
            BackendError::new(BackendErrorKind::Rejected, Effect::NotApplied, message).caused_by(error)
        })
    }
}

#[cfg(test)]
mod tests;
