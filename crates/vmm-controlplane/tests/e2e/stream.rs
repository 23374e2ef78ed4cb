//! A stream of the Connect protocol, for WatchVms and StreamConsole.

use std::io::Read;
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};

use crate::harness::{WAIT_TIMEOUT, World};

/// The flag of the frame that ends a stream.
const END_FLAG: u8 = 2;

/// A stream, read by a thread of its own.
pub(crate) struct Stream {
    /// The messages; `{"end": …}` is the last one. The end of the connection, expected or not, is the
    /// end of the channel.
    pub(crate) messages: Receiver<Value>,
}

impl World {
    /// Calls a method whose answer is a stream.
    pub(crate) fn stream(&self, method: &str, request: &Value) -> Stream {
        let (read, stream) = self.unread_stream(method, request);
        read.send(()).unwrap();
        stream
    }

    /// Begins a stream like [`World::stream`], and reads nothing of the answer until the sender is used.
    pub(crate) fn unread_stream(&self, method: &str, request: &Value) -> (Sender<()>, Stream) {
        let body = request.to_string().into_bytes();
        let mut framed = vec![0];
        framed.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        framed.extend(body);
        let url = format!("{}/vmm.v1.VmService/{method}", self.url());
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // A stream lasts as long as its test.
            .timeout_global(Some(4 * WAIT_TIMEOUT))
            .build()
            .into();
        let response =
            agent.post(&url).header("content-type", "application/connect+json").send(&framed[..]).unwrap();
        let mut reader = response.into_body().into_reader();
        let (tell, messages) = channel();
        let (read, may_read) = channel();
        std::thread::spawn(move || {
            if may_read.recv().is_err() {
                return;
            }
            while let Some(message) = next_message(&mut reader) {
                if tell.send(message).is_err() {
                    return;
                }
            }
        });
        (read, Stream { messages })
    }
}

/// Reads one frame. Returns nothing at the end of the connection.
fn next_message(reader: &mut impl Read) -> Option<Value> {
    let mut head = [0; 5];
    reader.read_exact(&mut head).ok()?;
    let [flags, length @ ..] = head;
    let mut message = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap()];
    reader.read_exact(&mut message).ok()?;
    let message: Value = serde_json::from_slice(&message).unwrap();
    Some(if flags & END_FLAG == 0 { message } else { json!({"end": message}) })
}

impl Stream {
    /// Returns the next message; `{"end": …}` is the last.
    #[track_caller]
    pub(crate) fn next(&self) -> Value {
        self.messages.recv_timeout(WAIT_TIMEOUT).expect("a message comes")
    }

    /// Returns all messages up to one that is `wanted`, which is the last of them.
    #[track_caller]
    pub(crate) fn until(&self, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
        let mut seen = Vec::new();
        loop {
            let message = self.next();
            assert!(message.get("end").is_none(), "{message} after {seen:#?}");
            let done = wanted(&message);
            seen.push(message);
            if done {
                return seen;
            }
        }
    }

    /// Returns the error that the stream ends with.
    #[track_caller]
    pub(crate) fn error(&self) -> Value {
        let last = self.messages.iter().last().expect("the stream ends with a message");
        last["end"]["error"].clone()
    }
}
