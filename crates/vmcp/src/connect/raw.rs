//! Requests without generated messages: JSON as it was typed, and the pages beside the API.

use bytes::{Buf as _, Bytes};
use connectrpc::ConnectError;
use connectrpc::client::{ClientBody, ClientTransport as _, full_body};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Limited};

use super::transport::Transport;
use crate::config::Server;
use crate::failure::Failure;

/// The longest answer that is read, above the 4 MiB that the server sends at most.
const ANSWER_LIMIT: usize = 16 << 20;
/// The bytes before each message of a stream: flags, and the length.
const FRAME_HEAD: usize = 5;
/// The flag of the frame that ends a stream.
const END_FLAG: u8 = 2;

/// An answer as it came.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

/// Gets a page.
///
/// # Errors
///
/// The server does not answer.
pub(crate) async fn get(server: &Server, path: &str) -> Result<Answer, Failure> {
    let request = Request::get(uri(server, path)?).body(full_body(Bytes::new()));
    whole(&Transport::to(server)?, request.map_err(ConnectError::from)?).await
}

/// Calls a method with JSON, and hands each message of the answer to `each`.
///
/// The method is called as one of one answer. The server refuses the content type where the answer
/// is a stream, and the call is then made as a stream. Nothing was carried out by the first call.
///
/// # Errors
///
/// The server refuses the call or does not answer, or `each` fails.
pub(crate) async fn call(
    server: &Server,
    method: &str,
    json: String,
    mut each: impl FnMut(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let json = Bytes::from(json);
    let uri = uri(server, &format!("/vmm.v1.VmService/{method}"))?;
    let transport = Transport::to(server)?;
    let answer = whole(&transport, post(&uri, "application/json", json.clone())?).await?;
    match answer.status {
        StatusCode::OK => each(&text_of(&answer.body)?),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            stream(&transport, post(&uri, "application/connect+json", framed(&json)?)?, each).await
        }
        status => Err(error_of(status, &answer.body).into()),
    }
}

fn uri(server: &Server, path: &str) -> Result<Uri, Failure> {
    let mut parts = server.uri().into_parts();
    let path = path.parse().map_err(|error| Failure::input(format!("\"{path}\" is no path: {error}")))?;
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).map_err(|error| Failure::input(error.to_string()))
}

fn post(uri: &Uri, content_type: &str, body: Bytes) -> Result<Request<ClientBody>, ConnectError> {
    let request = Request::builder().method(Method::POST).uri(uri);
    let request = request.header("content-type", content_type).header("connect-protocol-version", "1");
    Ok(request.body(full_body(body))?)
}

async fn whole(transport: &Transport, request: Request<ClientBody>) -> Result<Answer, Failure> {
    let response = transport.send(request).await.map_err(unreached)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
    let body = body.map_err(|error| ConnectError::unavailable(format!("the answer was cut: {error}")))?;
    Ok(Answer { status, body: body.to_bytes() })
}

async fn stream(
    transport: &Transport,
    request: Request<ClientBody>,
    mut each: impl FnMut(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut body = transport.send(request).await.map_err(unreached)?.into_body();
    let mut frames = Frames::default();
    loop {
        while let Some((flags, message)) = frames.next()? {
            if flags & END_FLAG != 0 {
                return end_of(&message);
            }
            each(&text_of(&message)?)?;
        }
        let cut = |reason: String| ConnectError::unavailable(format!("the stream was cut: {reason}"));
        let part = body.frame().await.ok_or_else(|| cut("it has no end".to_owned()))?;
        if let Ok(data) = part.map_err(|error| cut(error.to_string()))?.into_data() {
            frames.0.extend_from_slice(&data);
        }
    }
}

/// Returns the error of a request that had no answer, as the generated client makes it.
fn unreached(error: impl std::error::Error + Send + Sync + 'static) -> ConnectError {
    ConnectError::unavailable_from_transport("the request failed", error)
}

/// The bytes of a stream that were received and not taken yet.
#[derive(Default)]
struct Frames(bytes::BytesMut);

impl Frames {
    /// Takes the next whole frame, if it is there: its flags and its message.
    fn next(&mut self) -> Result<Option<(u8, Bytes)>, ConnectError> {
        let [flags, a, b, c, d] = match self.0.first_chunk::<FRAME_HEAD>() {
            Some(head) => *head,
            None => return Ok(None),
        };
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > ANSWER_LIMIT {
            return Err(ConnectError::internal(format!("a message of {length} bytes is too long")));
        }
        if self.0.len() < FRAME_HEAD + length {
            return Ok(None);
        }
        self.0.advance(FRAME_HEAD);
        Ok(Some((flags, self.0.split_to(length).freeze())))
    }
}

fn framed(message: &Bytes) -> Result<Bytes, Failure> {
    let length = u32::try_from(message.len()).map_err(|_| Failure::input("the request is too long"))?;
    Ok([&[0][..], &length.to_be_bytes(), message].concat().into())
}

/// Returns the outcome that the last frame of a stream tells.
fn end_of(message: &[u8]) -> Result<(), Failure> {
    #[derive(serde::Deserialize)]
    struct End {
        error: Option<ConnectError>,
    }
    let end: End = serde_json::from_slice(message)
        .map_err(|error| ConnectError::internal(format!("the end of the stream is not JSON: {error}")))?;
    end.error.map_or(Ok(()), |error| Err(error.into()))
}

fn error_of(status: StatusCode, body: &[u8]) -> ConnectError {
    serde_json::from_slice(body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(body);
        ConnectError::unknown(format!("HTTP {status}: {}", text.chars().take(300).collect::<String>()))
    })
}

fn text_of(body: &[u8]) -> Result<String, ConnectError> {
    String::from_utf8(body.to_vec()).map_err(|_| ConnectError::internal("the answer is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_decoded_after_its_last_byte() {
        let mut frames = Frames::default();
        let bytes = [&framed(&Bytes::from_static(b"{}")).unwrap()[..], &[2, 0, 0, 0, 1, b'x']].concat();
        for byte in &bytes[..6] {
            frames.0.extend_from_slice(&[*byte]);
            assert!(frames.next().unwrap().is_none());
        }
        frames.0.extend_from_slice(&bytes[6..]);
        assert_eq!(frames.next().unwrap(), Some((0, Bytes::from_static(b"{}"))));
        assert_eq!(frames.next().unwrap(), Some((2, Bytes::from_static(b"x"))));
        assert!(frames.next().unwrap().is_none());
    }

    #[test]
    fn a_frame_beyond_the_size_limit_is_refused() {
        let mut frames = Frames::default();
        frames.0.extend_from_slice(&[0, 0xff, 0xff, 0xff, 0xff]);
        assert!(frames.next().is_err());
    }

    #[test]
    fn an_error_in_the_end_frame_is_returned() {
        assert!(end_of(b"{}").is_ok());
        let error = end_of(br#"{"error": {"code": "out_of_range", "message": "gone"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "out_of_range: gone");
        assert!(end_of(b"x").is_err());
    }
}
