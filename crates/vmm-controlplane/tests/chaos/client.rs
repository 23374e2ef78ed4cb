//! One client: calls the API over HTTP from an address of its own, so that the audit trail tells clients apart.
//!
//! Whether a call was sent matters more here than anything else: one that never reached a daemon did nothing, one that was cut
//! off may have done anything. So every call has a connection of its own, and nothing is ever tried again.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpSocket, TcpStream};

use super::history::{Answer, Said, State};
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
        left_behind: left_for_good(body).join(", "),
    })
}

fn failure(status: StatusCode, body: &Value) -> Answer {
    let code = body["code"].as_str().unwrap_or_default();
    let message = body["message"].as_str().unwrap_or_default();
    let failed = || Answer::Failed { code: code.to_owned(), message: message.to_owned() };
    match code {
        "not_found" => Answer::Absent,
        "already_exists" => Answer::Exists,
        "failed_precondition" => refused_in(message).map_or_else(failed, Answer::Denied),
        "aborted" | "unavailable" => failed(),
        _ => Answer::Illegal(format!("HTTP {status} {code}: {message}{}", body.as_str().unwrap_or_default())),
    }
}

/// The state that a refusal names.
fn refused_in(message: &str) -> Option<State> {
    let (_, rest) = message.split_once(" in state ")?;
    State::from_name(rest.split_once("; legal now")?.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
        assert_eq!(understand(Reply::NotSent), None);
    }
}
