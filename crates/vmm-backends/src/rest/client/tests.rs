//! Tests the client against servers that send malformed, late and endless answers.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect};

use super::{CALL_TIMEOUT, RestClient};

const SHORT_TIMEOUT: Duration = Duration::from_millis(300);

/// Answers each request of each connection with the next of `answers`. With `endless` repeats the
/// last answer byte by byte. Counts the connections.
struct Fake {
    dir: tempfile::TempDir,
    server: tokio::task::JoinHandle<()>,
    connections: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Fake {
    fn new(answers: Vec<Vec<u8>>, endless: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let connections = std::sync::Arc::<std::sync::atomic::AtomicUsize>::default();
        let counted = connections.clone();
        let server = tokio::spawn(async move {
            let mut answers = answers.into_iter();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                serve(stream, &mut answers, endless).await;
            }
        });
        Self { dir, server, connections }
    }

    fn client(&self) -> RestClient {
        RestClient::new(&self.dir.path().join("s"), |body| Some(String::from_utf8_lossy(body).into_owned()))
    }

    fn connections(&self) -> usize {
        self.connections.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// Answers until the client closes the connection. Sends nothing when no answer is left.
async fn serve(mut stream: UnixStream, answers: &mut impl Iterator<Item = Vec<u8>>, endless: bool) {
    let mut request = Vec::new();
    loop {
        let mut some = [0; 4096];
        match stream.read(&mut some).await {
            Ok(0) | Err(_) => return,
            Ok(read) => request.extend_from_slice(&some[..read]),
        }
        let text = String::from_utf8_lossy(&request).to_lowercase();
        let Some(head) = text.find("\r\n\r\n") else { continue };
        let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        if request.len() < head + 4 + length {
            continue;
        }
        request.clear();
        let Some(answer) = answers.next() else { continue };
        if answer.is_empty() {
            return;
        }
        if stream.write_all(&answer).await.is_err() {
            return;
        }
        if endless {
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
            return;
        }
    }
}

fn answer(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn get(client: &RestClient) -> Result<Value, BackendError> {
    client.get("/x").await
}

async fn put(client: &RestClient) -> Result<(), BackendError> {
    client.put("/x", Some(&"body"), SHORT_TIMEOUT).await
}

#[tokio::test]
async fn one_connection_serves_several_calls() {
    let fake = Fake::new(
        vec![
            answer("200 OK", "1"),
            answer("400 Bad Request", "no"),
            b"HTTP/1.1 204 \r\n\r\n".to_vec(),
            answer("200 OK", "2"),
        ],
        false,
    );
    let client = fake.client();
    assert_eq!(get(&client).await.unwrap(), 1);
    let error = put(&client).await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert!(error.message.ends_with("no"), "{}", error.message);
    put(&client).await.unwrap();
    assert_eq!(get(&client).await.unwrap(), 2);
    assert_eq!(fake.connections(), 1);
}

#[tokio::test]
async fn a_disconnected_client_connects_again() {
    let fake = Fake::new(vec![answer("200 OK", "1"), answer("200 OK", "2")], false);
    let client = fake.client();
    client.hang_up();
    assert_eq!(get(&client).await.unwrap(), 1);
    client.hang_up();
    assert_eq!(get(&client).await.unwrap(), 2);
    assert_eq!(fake.connections(), 2);
}

#[tokio::test]
async fn a_call_without_an_answer_times_out_and_drops_its_connection() {
    let fake = Fake::new(vec![], false);
    let client = fake.client();
    for connections in 1..=2 {
        let error = put(&client).await.unwrap_err();
        assert_eq!((error.kind, error.effect), (BackendErrorKind::Timeout, Effect::Unknown));
        assert_eq!(fake.connections(), connections);
    }
}

#[tokio::test]
async fn the_wait_for_another_call_counts_against_the_timeout() {
    let fake = Fake::new(vec![], false);
    let client = fake.client();
    let slow = async {
        client.put("/slow", None::<&()>, CALL_TIMEOUT).await.unwrap_err();
    };
    let quick = async {
        tokio::task::yield_now().await;
        let error = put(&client).await.unwrap_err();
        assert_eq!(
            (error.kind, error.effect),
            (BackendErrorKind::Timeout, Effect::NotApplied),
            "it was never sent"
        );
    };
    tokio::select! {
        () = slow => panic!("the slow one cannot be first"),
        () = quick => {}
    }
}

/// Answers every request with its own path.
async fn echo(listener: UnixListener) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let mut request = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut request).await {
                let text = String::from_utf8_lossy(&request[..read]).into_owned();
                let path = text.split(' ').nth(1).unwrap();
                stream.write_all(&answer("200 OK", &format!("\"{path}\""))).await.unwrap();
            }
        });
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_leaves_no_answer_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = tokio::spawn(echo(UnixListener::bind(&path).unwrap()));
    for turns in 0..30 {
        let client = RestClient::new(&path, |_| None);
        assert_eq!(client.get::<Value>("/first").await.unwrap(), "/first");
        tokio::select! {
            biased;
            _ = client.get::<Value>("/dropped") => {}
            () = async { for _ in 0..turns { tokio::task::yield_now().await } } => {}
        }
        assert_eq!(client.get::<Value>("/next").await.unwrap(), "/next", "dropped after {turns} turns");
    }
    server.abort();
}

#[tokio::test]
async fn a_malformed_answer_is_a_protocol_error() {
    for garbage in [
        b"garbage\r\n\r\n".to_vec(),
        answer("200 OK", "not json"),
        answer("200 OK", "{\"a\":1} trailing"),
        answer("302 Found", "elsewhere"),
        [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 100_000], b"\r\n\r\n".to_vec()].concat(),
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n".to_vec(),
    ] {
        let fake = Fake::new(vec![garbage.clone()], false);
        let error = get(&fake.client()).await.unwrap_err();
        let start = String::from_utf8_lossy(&garbage[..garbage.len().min(60)]).into_owned();
        assert_eq!(error.kind, BackendErrorKind::Protocol, "{start}: {error}");
    }
}

#[tokio::test]
async fn overlong_and_endless_answers_are_refused() {
    let huge = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n".to_vec();
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n".to_vec();
    let closed = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
    let error = b"HTTP/1.1 500 Oops\r\nConnection: close\r\n\r\n".to_vec();
    for start in [huge, chunked, closed, error] {
        let fake = Fake::new(vec![start.clone()], true);
        let error = get(&fake.client()).await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::Protocol, "{}: {error}", String::from_utf8_lossy(&start));
        assert!(error.message.contains("longer than"), "{}", error.message);
    }
}

#[tokio::test]
async fn a_broken_connection_may_have_had_an_effect() {
    let fake = Fake::new(vec![vec![]], false);
    let error = put(&fake.client()).await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Unreachable, Effect::Unknown));
}

#[tokio::test]
async fn a_partial_answer_is_a_broken_connection_or_a_timeout() {
    let fake = Fake::new(vec![b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec()], false);
    let error = put(&fake.client()).await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Timeout, Effect::Unknown));
}

#[tokio::test]
async fn a_missing_socket_fails_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let client = RestClient::new(&dir.path().join("s"), |_| None);
    let error = put(&client).await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Unreachable, Effect::NotApplied));
}

#[tokio::test]
async fn an_overlong_request_is_not_sent() {
    let fake = Fake::new(vec![], false);
    let error = fake.client().put("/x", Some(&"x".repeat(60_000)), SHORT_TIMEOUT).await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert_eq!(fake.connections(), 0);
}

#[tokio::test]
async fn the_error_text_of_a_vmm_is_shortened_and_escaped() {
    let fake =
        Fake::new(vec![answer("500 Oops", &format!("\u{1b}[31mred\r\n{}", "x".repeat(60_000)))], false);
    let error = put(&fake.client()).await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::Unknown));
    assert!(!error.message.contains('\u{1b}') && error.message.len() < 4096, "{}", error.message.len());
}

#[tokio::test]
async fn an_unexpected_answer_is_quoted_shortened_and_escaped() {
    let text = serde_json::to_string(&format!("\u{1b}[31m{}", "x".repeat(60_000))).unwrap();
    let fake = Fake::new(vec![answer("200 OK", &text)], false);
    let error = fake.client().get::<bool>("/x").await.unwrap_err();
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Protocol, Effect::NotApplied));
    assert!(!error.message.contains('\u{1b}') && error.message.len() < 4096, "{}", error.message.len());
}

#[tokio::test]
async fn a_refusal_in_an_unknown_form_is_quoted_shortened_and_escaped() {
    let long = format!(r#"{{"why":"{}"}}"#, "x".repeat(10_000));
    for (body, quoted) in [
        (r#"{"error":{"reason":"no \u001b such disk"}}"#, "such disk"),
        ("<html>\u{1b}[31mBad Request</html>", "Bad Request"),
        (&long, "xxx"),
        ("", "without a reason"),
    ] {
        let fake = Fake::new(vec![answer("400 Bad Request", body)], false);
        let client = RestClient::new(&fake.dir.path().join("s"), |_| None);
        let error = put(&client).await.unwrap_err();
        assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied), "{body}");
        assert!(error.message.contains("400 Bad Request") && error.message.contains(quoted), "{error}");
        assert!(!error.message.contains('\u{1b}') && error.message.len() < 1024, "{error}");
    }
}
