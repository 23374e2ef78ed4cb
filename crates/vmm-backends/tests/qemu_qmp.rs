//! The QMP client against scripted peers: honest ones, and those that a broken or hostile VMM could
//! be.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "clippy takes only the test functions for tests, not their helpers"
)]

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vmm_backends::program::Version;
use vmm_backends::qemu::client::RunState;
use vmm_backends::qemu::qmp::{CloseReason, MAX_LINE, Qmp, QmpError, QmpEvent};
use vmm_core::backend::{BackendError, BackendErrorKind, Effect, StorageCounters};

const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "#,
    r#""capabilities": ["oob"]}}"#,
    "\r\n"
);
const SHORT_TIMEOUT: Duration = Duration::from_millis(200);
const LONG_TIMEOUT: Duration = Duration::from_secs(20);

/// A peer that plays QEMU.
struct Peer {
    socket: BufReader<UnixStream>,
}

impl Peer {
    async fn say(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).await.unwrap();
    }

    async fn greet(&mut self) {
        self.say(GREETING).await;
        let (command, _, id) = self.hear().await;
        assert_eq!(command, "qmp_capabilities");
        self.answer(json!({}), id).await;
    }

    async fn hear(&mut self) -> (String, Value, u64) {
        let mut line = String::new();
        self.socket.read_line(&mut line).await.unwrap();
        let mut message: Value = serde_json::from_str(&line).unwrap();
        let command = message["execute"].as_str().unwrap().to_owned();
        (command, message["arguments"].take(), message["id"].as_u64().unwrap())
    }

    async fn answer(&mut self, value: Value, id: u64) {
        self.say(&format!("{}\r\n", json!({ "return": value, "id": id }))).await;
    }

    /// Keeps the connection open until the client closes it.
    async fn hold(mut self) {
        let mut line = Vec::new();
        while self.socket.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
            line.clear();
        }
    }
}

struct Stage {
    _dir: TempDir,
    path: PathBuf,
    play: JoinHandle<()>,
}

/// Lets `script` play QEMU on a socket.
fn stage<F: Future<Output = ()> + Send + 'static>(script: impl FnOnce(Peer) -> F + Send + 'static) -> Stage {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let play = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        script(Peer { socket: BufReader::new(socket) }).await;
    });
    Stage { _dir: dir, path, play }
}

impl Stage {
    async fn connect(&self, within: Duration) -> Result<(Qmp, mpsc::Receiver<QmpEvent>), QmpError> {
        let (sender, events) = mpsc::channel(4);
        Ok((Qmp::connect(&self.path, within, sender).await?, events))
    }
}

#[tokio::test]
async fn commands_events_and_answers_are_exchanged() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        let (command, arguments, id) = peer.hear().await;
        assert_eq!((command.as_str(), arguments), ("stop", Value::Null));
        peer.say("{\"timestamp\": {\"seconds\": 5, \"microseconds\": 250000}, \"event\": \"STOP\"}\r\n")
            .await;
        peer.answer(json!({}), id).await;
        let (command, _, id) = peer.hear().await;
        assert_eq!(command, "query-status");
        peer.answer(json!({ "status": "paused", "singlestep": false, "running": false }), id).await;
        let (command, _, id) = peer.hear().await;
        assert_eq!(command, "query-blockstats");
        let disk = |bytes: u64| {
            json!({ "device": "", "stats": {
            "rd_bytes": bytes, "wr_bytes": 2 * bytes, "rd_operations": 3, "wr_operations": 4, "other": 9 } })
        };
        peer.answer(json!([disk(10), disk(u64::MAX / 2)]), id).await;
        let (command, _, id) = peer.hear().await;
        assert_eq!(command, "system_reset");
        peer.say(&format!(
            "{}\n",
            json!({ "error": { "class": "GenericError", "desc": "not now" }, "id": id })
        ))
        .await;
        peer.hold().await;
    });
    let (qmp, mut events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    assert_eq!(qmp.version(), Version::new(7, 2, 22));
    assert_eq!(qmp.peer_pid().and_then(|pid| u32::try_from(pid).ok()), Some(std::process::id()));
    qmp.stop().await.unwrap();
    let event = events.recv().await.unwrap();
    assert_eq!(
        (event.name.as_str(), event.at, event.data),
        ("STOP", Duration::from_millis(5250), Value::Null)
    );
    assert_eq!(qmp.query_status().await.unwrap(), RunState::Paused);
    let counted = qmp.query_blockstats().await.unwrap();
    let expected = StorageCounters {
        bytes_read: u64::MAX / 2 + 10,
        bytes_written: u64::MAX,
        read_operations: 6,
        write_operations: 8,
    };
    assert_eq!(counted, expected);
    let error = BackendError::from(qmp.system_reset().await.unwrap_err());
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert!(error.message.contains("not now"), "{error}");
    drop(qmp);
    stage.play.await.unwrap();
}

#[tokio::test]
async fn answers_in_any_order_reach_their_commands() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        let mut asked = Vec::new();
        for _ in 0..20 {
            asked.push(peer.hear().await);
        }
        asked.reverse();
        for (command, arguments, id) in asked {
            assert_eq!(command, "echo");
            peer.answer(arguments, id).await;
        }
        peer.hold().await;
    });
    let (qmp, _events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    let qmp = std::sync::Arc::new(qmp);
    for number in 0..20 {
        let qmp = qmp.clone();
        calls.spawn(async move { (number, qmp.execute::<u64>("echo", json!(number)).await.unwrap()) });
    }
    while let Some(call) = calls.join_next().await {
        let (asked, answered) = call.unwrap();
        assert_eq!(asked, answered);
    }
}

#[tokio::test]
async fn a_missing_and_a_refusing_socket_fail_to_connect() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().join("none"), dir.path().join("dead")] {
        if path.ends_with("dead") {
            drop(UnixListener::bind(&path).unwrap());
        }
        let error = Qmp::connect(&path, LONG_TIMEOUT, mpsc::channel(1).0).await.unwrap_err();
        assert!(matches!(error, QmpError::Connect(_)), "{error:?}");
        assert_eq!(BackendError::from(error).kind, BackendErrorKind::Unreachable);
    }
}

#[tokio::test]
async fn a_silent_peer_times_out() {
    let silent = stage(Peer::hold);
    let error = silent.connect(SHORT_TIMEOUT).await.unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting(_)), "{error:?}");
    assert_eq!(BackendError::from(error).kind, BackendErrorKind::Timeout);

    let greets = stage(|mut peer| async move {
        peer.say(GREETING).await;
        peer.hold().await;
    });
    let error = greets.connect(SHORT_TIMEOUT).await.unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting(_)), "{error:?}");
}

#[tokio::test]
async fn a_command_without_an_answer_times_out_and_a_late_answer_harms_nothing() {
    let (reported, tell) = tokio::sync::oneshot::channel::<()>();
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        let (_, _, first) = peer.hear().await;
        tell.await.unwrap();
        peer.answer(json!({}), first).await;
        let (_, _, second) = peer.hear().await;
        peer.answer(json!({}), second).await;
        peer.hold().await;
    });
    let (qmp, _events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    let error = qmp.stop().await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { command: "stop", sent: true, .. }), "{error:?}");
    let error = BackendError::from(error);
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Timeout, Effect::Unknown));
    reported.send(()).unwrap();
    qmp.cont().await.unwrap();
}

#[tokio::test]
async fn malformed_qmp_ends_the_connection_with_the_reason() {
    let lines = [
        "hello\n",
        "[1, 2]\n",
        "{}\n",
        "{\"return\": {}}\n",
        "{\"return\": {}, \"id\": \"2\"}\n",
        "{\"return\": {}, \"id\": 99}\n",
        "{\"return\": {}, \"error\": {\"desc\": \"x\"}, \"id\": 2}\n",
        "{\"event\": 5, \"timestamp\": {\"seconds\": 1, \"microseconds\": 1}}\n",
        "\u{0}\u{1}\n",
        "\n",
    ];
    for line in lines {
        let stage = stage(move |mut peer| async move {
            peer.greet().await;
            peer.hear().await;
            peer.say(line).await;
            peer.hold().await;
        });
        let (qmp, _events) = stage.connect(LONG_TIMEOUT).await.unwrap();
        let error = qmp.stop().await.unwrap_err();
        assert!(
            matches!(error, QmpError::Closed { reason: CloseReason::Garbage(_), sent: true }),
            "{line:?}: {error:?}"
        );
        let error = BackendError::from(error);
        assert_eq!((error.kind, error.effect), (BackendErrorKind::Protocol, Effect::Unknown));
        qmp.closed().await;
        let error = BackendError::from(qmp.stop().await.unwrap_err());
        assert_eq!((error.kind, error.effect), (BackendErrorKind::Protocol, Effect::NotApplied));
    }
}

#[tokio::test]
async fn a_refusal_in_an_unknown_form_is_quoted() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        let (_, _, id) = peer.hear().await;
        let error = json!({ "class": "GenericError", "because": "the \u{1b}[31mmoon" });
        peer.say(&format!("{}\n", json!({ "error": error, "id": id }))).await;
        peer.hold().await;
    });
    let (qmp, _events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    let error = BackendError::from(qmp.stop().await.unwrap_err());
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Rejected, Effect::NotApplied));
    assert!(error.message.contains("because") && error.message.contains("moon"), "{error}");
    assert!(!error.message.contains('\u{1b}'), "{error}");
}

#[tokio::test]
async fn the_text_of_a_refusal_is_shortened_and_escaped() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        let (_, _, id) = peer.hear().await;
        let desc = format!("\u{1b}[31mred\n{}", "x".repeat(100_000));
        peer.say(&format!("{}\r\n", json!({ "error": { "class": "GenericError", "desc": desc }, "id": id })))
            .await;
        peer.hold().await;
    });
    let (qmp, _events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    let error = BackendError::from(qmp.stop().await.unwrap_err());
    assert_eq!(error.kind, BackendErrorKind::Rejected);
    assert!(!error.message.contains('\u{1b}') && error.message.len() < 4096, "{}", error.message.len());
}

#[tokio::test]
async fn an_invalid_greeting_is_refused() {
    for greeting in ["{}\n", "SSH-2.0-x\n", "{\"QMP\": {\"version\": {\"qemu\": {\"major\": \"7\"}}}}\n"] {
        let stage = stage(move |mut peer| async move {
            peer.say(greeting).await;
            peer.hold().await;
        });
        let error = stage.connect(LONG_TIMEOUT).await.unwrap_err();
        assert!(
            matches!(error, QmpError::Closed { reason: CloseReason::Garbage(_), .. }),
            "{greeting:?}: {error:?}"
        );
    }
}

#[tokio::test]
async fn an_answer_of_the_wrong_type_is_a_protocol_error() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        for answer in [json!({ "status": "dancing" }), json!([]), json!({ "status": "running" })] {
            let (_, _, id) = peer.hear().await;
            peer.answer(answer, id).await;
        }
        peer.hold().await;
    });
    let (qmp, _events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    for _ in 0..2 {
        let error = qmp.query_status().await.unwrap_err();
        assert!(matches!(error, QmpError::Malformed { command: "query-status", .. }), "{error:?}");
    }
    assert_eq!(qmp.query_status().await.unwrap(), RunState::Running);
}

/// 100 MB without a line end: the client hangs up after [`MAX_LINE`] bytes, and the peer notices.
#[tokio::test]
async fn an_endless_line_is_cut_off() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        let chunk = vec![b'x'; 64 << 10];
        let mut written = 0_usize;
        while written < 100_000_000 && peer.socket.write_all(&chunk).await.is_ok() {
            written += chunk.len();
        }
        assert!(written < 2 * MAX_LINE, "{written} bytes were taken");
    });
    let (qmp, _events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    tokio::time::timeout(LONG_TIMEOUT, qmp.closed()).await.unwrap();
    let error = qmp.stop().await.unwrap_err();
    assert!(matches!(error, QmpError::Closed { reason: CloseReason::LineTooLong, .. }), "{error:?}");
    drop(qmp);
    tokio::time::timeout(LONG_TIMEOUT, stage.play).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_closed_connection_fails_pending_and_later_commands() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        peer.hear().await;
        peer.say("{\"event\": \"SHUTDOWN\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 0}, \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n").await;
    });
    let (qmp, mut events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    let error = qmp.cont().await.unwrap_err();
    assert!(matches!(error, QmpError::Closed { reason: CloseReason::Eof, sent: true }), "{error:?}");
    assert_eq!(BackendError::from(error).effect, Effect::Unknown);
    qmp.closed().await;
    assert_eq!(events.try_recv().unwrap().name, "SHUTDOWN", "what came before the end was handed out");
    let error = BackendError::from(qmp.cont().await.unwrap_err());
    assert_eq!((error.kind, error.effect), (BackendErrorKind::Unreachable, Effect::NotApplied));
}

#[tokio::test]
async fn answers_arrive_during_a_flood_of_events() {
    let stage = stage(|mut peer| async move {
        peer.greet().await;
        let (_, _, id) = peer.hear().await;
        for _ in 0..1000 {
            peer.say("{\"event\": \"RESET\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 0}}\n").await;
        }
        peer.answer(json!({}), id).await;
        peer.hold().await;
    });
    let (qmp, mut events) = stage.connect(LONG_TIMEOUT).await.unwrap();
    qmp.stop().await.unwrap();
    let mut kept = 0;
    while events.try_recv().is_ok() {
        kept += 1;
    }
    assert_eq!(kept, 4, "the channel's room");
}
