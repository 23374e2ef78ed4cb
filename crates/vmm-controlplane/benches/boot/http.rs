//! HTTP/1.1 calls on a connection that is kept.

use std::io::{Read, Write};

use serde_json::Value;

/// Makes one call, and returns the body of the answer. Panics unless the call succeeds.
pub(super) fn rest(stream: &mut (impl Read + Write), method: &str, path: &str, body: &Value) -> String {
    let (head, body) = exchange(stream, method, path, body);
    assert!(head.starts_with("HTTP/1.1 20"), "{path}: {head} {body}");
    body
}

/// Makes one call, and returns the head and the body of the answer.
pub(super) fn exchange(
    stream: &mut (impl Read + Write),
    method: &str,
    path: &str,
    body: &Value,
) -> (String, String) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !is_whole(&answer) {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "{path}: the VMM closed its connection");
        answer.extend_from_slice(&buffer[..read]);
    }
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.to_owned(), if is_chunked(head) { unchunked(body) } else { body.to_owned() })
}

/// Returns true if an answer has its head and as many bytes as the head announces.
fn is_whole(answer: &[u8]) -> bool {
    let Some(at) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&answer[..at]).to_ascii_lowercase();
    if is_chunked(&head) {
        return answer.ends_with(b"\r\n0\r\n\r\n");
    }
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    answer.len() >= at + 4 + length.unwrap_or(0)
}

fn is_chunked(head: &str) -> bool {
    head.to_ascii_lowercase().contains("\r\ntransfer-encoding: chunked")
}

/// Returns a body without the lengths of its chunks.
fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole.push_str(&rest[..length]);
        body = rest[length..].trim_start_matches("\r\n");
    }
    whole
}
