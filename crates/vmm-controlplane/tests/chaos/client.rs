//! One client: calls the API over HTTP from an address of its own, so that the audit trail tells clients apart.
//!
//! Whether a call was sent matters more here than anything else: one that never reached a daemon did nothing, one that was cut
//! off may have done anything. So every call has a connection of its own, and nothing is ever tried again.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpSocket, TcpStream};

use super::history::{Answer, Said, SeenParts, State};
use super::host::left_for_good;

/// The longest answer that the contract allows any call of this run takes half of this; only a hang reaches it.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// A way to the daemon.
pub(crate) struct Client {
    runtime: tokio::runtime::Runtime,
    daemon: SocketAddr,
    from: IpAddr,
}

/// What came back.
pub(crate) enum Reply {
    /// Nobody listens: the call was not sent.
    NotSent,
    /// The connection broke after it had been sent.
    Lost,
    /// Nothing came within the client's patience.
    Silence,
    Json(StatusCode, Value),
}

impl Client {
    pub(crate) fn new(daemon: SocketAddr, from: IpAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, daemon, from }
    }

    /// Calls a method of VmService.
    pub(crate) fn call(&self, method: &str, body: &Value) -> Reply {
        self.runtime.block_on(async {
            let Ok(stream) = self.connect().await else { return Reply::NotSent };
            match tokio::time::timeout(WAIT_TIMEOUT, exchange(stream, self.daemon, method, body)).await {
                Ok(Some((status, body))) => Reply::Json(status, body),
                Ok(None) => Reply::Lost,
                Err(_) => Reply::Silence,
            }
        })
    }

    async fn connect(&self) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(self.from, 0))?;
        socket.connect(self.daemon).await
    }
}

async fn exchange(
    stream: TcpStream,
    to: SocketAddr,
    method: &str,
    body: &Value,
) -> Option<(StatusCode, Value)> {
    let request = Request::post(format!("/vmm.v1.VmService/{method}"))
        .header(header::HOST, to.to_string())
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request).await;
    let answer = match response {
        Ok(response) => {
            let status = response.status();
            response.into_body().collect().await.ok().map(|body| (status, body.to_bytes()))
        }
        Err(_) => None,
    };
    driver.abort();
    let (status, body) = answer?;
    let text = || Value::String(String::from_utf8_lossy(&body).into_owned());
    Some((status, serde_json::from_slice(&body).unwrap_or_else(|_| text())))
}

/// What an answer says of one VM; `None` if the call was never sent.
pub(crate) fn understand(reply: Reply) -> Option<Answer> {
    Some(match reply {
        Reply::NotSent => return None,
        Reply::Lost => Answer::Lost,
        Reply::Silence => Answer::Illegal(format!("no answer within {} s", WAIT_TIMEOUT.as_secs())),
        Reply::Json(StatusCode::OK, body) => success(&body),
        Reply::Json(status, body) => failure(status, &body),
    })
}

/// What a message says of its VM.
pub(crate) fn success(body: &Value) -> Answer {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Answer::Done(Said {
        state: body["state"].as_str().and_then(State::from_wire),
        uid: text(&body["uid"]),
        phase: text(&body["status"]["phase"]),
        generation: body["generation"].as_str().and_then(|text| text.parse().ok()),
        parts: seen_parts(body),
        left_behind: left_for_good(body).join(", "),
    })
}

/// The parts of a configuration that GetVmInfo and a line of ListVms show. What is at its default is left out of both.
fn seen_parts(body: &Value) -> SeenParts {
    let number = |value: &Value| value.as_str().map_or(Some(0), |text| text.parse::<u64>().ok());
    let small = |value: u64| u8::try_from(value).ok();
    let label = |metadata: &Value| number(&metadata["mark"]).and_then(small);
    let memory = |bytes: &Value| number(bytes).and_then(|bytes| small((bytes >> 20).saturating_sub(64)));
    let config = &body["config"];
    if config.is_object() {
        let policy = config["restart_policy"]["max_restarts"].as_u64().unwrap_or(10_000);
        return SeenParts {
            label: label(&config["metadata"]),
            memory: memory(&config["memory"]["size_bytes"]),
            policy: small(policy.saturating_sub(10_000)),
            protected: Some(config["delete_protection"] == true),
        };
    }
    if body["memory_size_bytes"].is_string() {
        let (label, memory) = (label(&body["metadata"]), memory(&body["memory_size_bytes"]));
        return SeenParts { label, memory, ..SeenParts::default() };
    }
    SeenParts::default()
}

fn failure(status: StatusCode, body: &Value) -> Answer {
    let code = body["code"].as_str().unwrap_or_default();
    let message = body["message"].as_str().unwrap_or_default();
    let failed = || Answer::Failed { code: code.to_owned(), message: message.to_owned() };
    match code {
        "not_found" => Answer::Absent,
        "already_exists" => Answer::Exists,
        "failed_precondition" if message.contains(" can only change while it does not run") => Answer::Runs,
        "failed_precondition" if message.contains(" is protected against deletion") => Answer::Protected,
        "failed_precondition" => refused_in(message).map_or_else(failed, Answer::Denied),
        "aborted" => generation_in(message).map_or_else(failed, Answer::Stale),
        "unavailable" => failed(),
        _ => Answer::Illegal(format!("HTTP {status} {code}: {message}{}", body.as_str().unwrap_or_default())),
    }
}

/// The state that a refusal names.
fn refused_in(message: &str) -> Option<State> {
    let (_, rest) = message.split_once(" in state ")?;
    State::from_name(rest.split_once("; legal now")?.0)
}

/// The generation that a refusal names.
fn generation_in(message: &str) -> Option<u64> {
    let (_, rest) = message.split_once(" has generation ")?;
    rest.split_once(" and not ")?.0.parse().ok()
}

/// The bytes that StreamConsole sent until it ended, or until the client left.
#[derive(Debug, Default)]
pub(crate) struct Streamed {
    pub(crate) pieces: Vec<(u64, Vec<u8>)>,
    /// The end of the stream, as its last message tells; `None` if the client or the daemon left.
    pub(crate) end: Option<Value>,
}

impl Client {
    /// Calls StreamConsole, and reads for at most `time`. `None`: the call was never sent.
    pub(crate) fn stream_console(&self, request: &Value, time: Duration) -> Option<Streamed> {
        self.runtime.block_on(async {
            let stream = self.connect().await.ok()?;
            let mut streamed = Streamed::default();
            let reading = read_stream(stream, self.daemon, request, &mut streamed);
            let _left = tokio::time::timeout(time, reading).await;
            Some(streamed)
        })
    }
}

/// Reads the messages of a stream, each as soon as it is whole.
async fn read_stream(
    stream: TcpStream,
    to: SocketAddr,
    request: &Value,
    streamed: &mut Streamed,
) -> Option<()> {
    let body = request.to_string();
    let mut framed = vec![0];
    framed.extend(u32::try_from(body.len()).ok()?.to_be_bytes());
    framed.extend(body.as_bytes());
    let request = Request::post("/vmm.v1.VmService/StreamConsole")
        .header(header::HOST, to.to_string())
        .header(header::CONTENT_TYPE, "application/connect+json")
        .body(Full::new(Bytes::from(framed)))
        .ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    let _driver = AbortOnDrop(tokio::spawn(connection));
    let mut body = sender.send_request(request).await.ok()?.into_body();
    let mut read = Vec::new();
    while let Some(frame) = body.frame().await {
        read.extend_from_slice(frame.ok()?.data_ref()?);
        while let Some((flags, message)) = take_message(&mut read) {
            let message: Value = serde_json::from_slice(&message).ok()?;
            if flags & 2 != 0 {
                streamed.end = Some(message);
                return Some(());
            }
            let offset = message["offset"].as_str().map_or(Some(0), |text| text.parse().ok())?;
            let data = STANDARD.decode(message["data"].as_str().unwrap_or_default()).ok()?;
            if !data.is_empty() {
                streamed.pieces.push((offset, data));
            }
        }
    }
    Some(())
}

/// Takes the first message off what was read, if it is whole.
fn take_message(read: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let head: [u8; 5] = read.get(..5)?.try_into().ok()?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let message = read.get(5..5 + length)?.to_vec();
    read.drain(..5 + length);
    Some((head[0], message))
}

/// Ends the task of a connection.
struct AbortOnDrop(tokio::task::JoinHandle<hyper::Result<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::history::Parts;
    use super::*;

    #[test]
    fn answers_are_classified() {
        let answer = |status: u16, body: Value| {
            understand(Reply::Json(StatusCode::from_u16(status).unwrap(), body)).unwrap()
        };
        let fp = |message: &str| json!({"code": "failed_precondition", "message": message});
        assert_eq!(
            answer(400, fp("PauseVm is not legal for VM \"a\" in state CREATED; legal now: BootVm")),
            Answer::Denied(State::Created)
        );
        assert!(matches!(answer(400, fp("VM \"a\" cannot boot")), Answer::Failed { .. }));
        assert!(matches!(answer(500, json!({"code": "internal", "message": ""})), Answer::Illegal(_)));
        assert!(matches!(answer(500, json!("panic")), Answer::Illegal(_)));
        assert_eq!(answer(404, json!({"code": "not_found"})), Answer::Absent);
        let stale = "VM \"a\" has generation 7 and not 5: it has changed since it was read";
        assert_eq!(answer(409, json!({"code": "aborted", "message": stale})), Answer::Stale(7));
        let pre_empted = answer(409, json!({"code": "aborted", "message": "pre-empted by DeleteVm"}));
        assert!(matches!(pre_empted, Answer::Failed { .. }));
        let text = "VM \"a\" is RUNNING, and its memory can only change while it does not run: shut it down";
        assert_eq!(answer(400, fp(text)), Answer::Runs);
        assert_eq!(
            answer(400, fp("VM \"a\" is protected against deletion, also with force")),
            Answer::Protected
        );
        assert_eq!(understand(Reply::NotSent), None);
    }

    #[test]
    fn the_parts_of_a_configuration_are_read() {
        let config = json!({"memory": {"size_bytes": "69206016"}, "metadata": {"mark": "2"},
            "restart_policy": {"max_restarts": 10_003}, "delete_protection": true});
        let seen = seen_parts(&json!({"config": config}));
        assert_eq!(seen.or_default(), Parts { label: 2, memory: 2, policy: 3, protected: true });
        let line = seen_parts(&json!({"memory_size_bytes": "67108864", "metadata": {"config": "1"}}));
        assert_eq!(line, SeenParts { label: Some(0), memory: Some(0), ..SeenParts::default() });
        assert_eq!(seen_parts(&json!({"state": "VM_STATE_RUNNING"})), SeenParts::default());
    }

    #[test]
    fn messages_of_a_stream_are_taken_when_they_are_whole() {
        let mut read = vec![0, 0, 0, 0, 2, b'{', b'}', 2, 0, 0, 0];
        assert_eq!(take_message(&mut read), Some((0, b"{}".to_vec())));
        assert_eq!(take_message(&mut read), None);
        read.extend([1, b'x']);
        assert_eq!(take_message(&mut read), Some((2, b"x".to_vec())));
    }
}
