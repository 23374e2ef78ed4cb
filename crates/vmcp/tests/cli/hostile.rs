//! A server whose every text has control bytes: none of them reaches a terminal.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use buffa::Message as _;
use serde_json::json;
use vmm_proto::v1 as pb;

use crate::pty::{Redirect, Terminal};
use crate::trials;
use crate::world::{finish, vmcp};

trials![
    control_bytes_of_a_hostile_server_reach_no_terminal,
    control_bytes_in_errors_are_escaped_in_each_form_of_output,
    control_bytes_in_watched_events_are_escaped,
];

/// A text that clears the screen, sets a title, colours, turns the direction and forges a line.
const NASTY: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}\r\nforged\u{7f}";

/// Serves answers with [`NASTY`] in every text, and returns the URL.
fn hostile() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // The thread ends with the test program.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream));
        }
    });
    url
}

/// Answers one request, and closes the connection. An error is a client that has gone.
fn answer(mut stream: TcpStream) {
    let mut request = Vec::new();
    let mut part = [0; 4096];
    let head = loop {
        match stream.read(&mut part) {
            Ok(length) if length > 0 => request.extend_from_slice(&part[..length]),
            _ => return,
        }
        if let Some(end) = request.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break String::from_utf8_lossy(&request[..end]).into_owned();
        }
    };
    let method = head.split_whitespace().nth(1).and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    let (status, kind, body) = match method {
        "ListVms" => {
            let list = pb::ListVmsResponse { vms: vec![vm()], total_count: 1, ..Default::default() };
            ("200 OK", "application/proto", list.encode_to_vec())
        }
        "GetVmInfo" => ("200 OK", "application/proto", info().encode_to_vec()),
        "ListVmEvents" => {
            let events = pb::ListVmEventsResponse { events: vec![event()], ..Default::default() };
            ("200 OK", "application/proto", events.encode_to_vec())
        }
        "WatchVms" => {
            let synced = pb::VmEvent { r#type: "synced".into(), token: "t".into(), ..Default::default() };
            let body = [framed(0, &event().encode_to_vec()), framed(0, &synced.encode_to_vec())].concat();
            ("200 OK", "application/connect+proto", [body, framed(2, b"{}")].concat())
        }
        _ if head.contains("application/connect+proto") => {
            let end = json!({"error": {"code": "failed_precondition", "message": NASTY}});
            ("200 OK", "application/connect+proto", framed(2, end.to_string().as_bytes()))
        }
        _ => {
            let error = json!({"code": "failed_precondition", "message": NASTY});
            ("400 Bad Request", "application/json", error.to_string().into_bytes())
        }
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _gone = stream.write_all(&[head.into_bytes(), body].concat());
}

fn framed(flags: u8, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[flags][..], &length, message].concat()
}

fn status() -> pb::VmStatus {
    pb::VmStatus { phase: NASTY.into(), reason: NASTY.into(), message: NASTY.into(), ..Default::default() }
}

fn vm() -> pb::VmInfo {
    pb::VmInfo {
        vm_id: NASTY.into(),
        uid: NASTY.into(),
        backend: NASTY.into(),
        state: pb::VmState::Running.into(),
        status: status().into(),
        metadata: [(NASTY.to_owned(), NASTY.to_owned())].into(),
        ..Default::default()
    }
}

fn info() -> pb::GetVmInfoResponse {
    let config = pb::VmConfig {
        boot: pb::BootConfig { kernel_path: NASTY.into(), kernel_args: NASTY.into(), ..Default::default() }
            .into(),
        storage: vec![pb::StorageDevice { id: NASTY.into(), path: NASTY.into(), ..Default::default() }],
        metadata: [(NASTY.to_owned(), NASTY.to_owned())].into(),
        ..Default::default()
    };
    pb::GetVmInfoResponse {
        vm_id: NASTY.into(),
        uid: NASTY.into(),
        backend: NASTY.into(),
        config: config.into(),
        status: status().into(),
        backend_info: [(NASTY.to_owned(), NASTY.to_owned())].into(),
        ..Default::default()
    }
}

fn event() -> pb::VmEvent {
    pb::VmEvent {
        r#type: NASTY.into(),
        vm_id: NASTY.into(),
        uid: NASTY.into(),
        cause: NASTY.into(),
        actor: NASTY.into(),
        ended_by: NASTY.into(),
        token: "t".into(),
        state: pb::VmState::Running.into(),
        status: status().into(),
        info: vm().into(),
        ..Default::default()
    }
}

/// Fails if a terminal would obey a character of the text.
#[track_caller]
fn assert_harmless(what: &str, text: &str, allowed: &[char]) {
    let obeyed = |letter: char| {
        (letter.is_control() || letter == '\u{202e}') && letter != '\n' && !allowed.contains(&letter)
    };
    assert!(!text.contains(obeyed), "{what}: {text:?}");
    assert!(text.contains("owned"), "{what} shows the text: {text:?}");
}

fn control_bytes_of_a_hostile_server_reach_no_terminal() {
    let url = hostile();
    for form in ["table", "json", "yaml", "name"] {
        for arguments in [&["list"][..], &["get", "x"], &["events"]] {
            let arguments = [&["--server", &url, "-o", form], arguments].concat();
            let mut terminal = Terminal::start(vmcp(&arguments), 200, Redirect::Nothing);
            assert_eq!(terminal.code(), 0, "{arguments:?}: {:?}", terminal.sent());
            assert_harmless(&format!("{arguments:?}"), &terminal.sent(), &['\r']);
        }
    }
}

fn control_bytes_in_errors_are_escaped_in_each_form_of_output() {
    let url = hostile();
    for form in ["table", "json", "yaml"] {
        for arguments in [
            &["boot", "x"][..],
            &["delete", "x"],
            &["update", "x", "--memory=64MiB"],
            &["create", "--kernel=/k"],
            &["backends"],
            &["console", "x", "--no-follow"],
        ] {
            let arguments = [&["--server", &url, "-o", form], arguments].concat();
            let ran = finish(vmcp(&arguments), "");
            assert_eq!(ran.code, 19, "{arguments:?}: {ran:?}");
            assert_harmless(&format!("{arguments:?}"), &format!("{}{}", ran.stdout, ran.stderr), &[]);
        }
    }
}

fn control_bytes_in_watched_events_are_escaped() {
    let url = hostile();
    for form in ["table", "json", "yaml", "name"] {
        let watch = Terminal::start(vmcp(&["--server", &url, "-o", form, "watch"]), 200, Redirect::Nothing);
        watch.wait_for("owned");
        watch.wait_for("connecting again");
        assert_harmless(&format!("watch -o {form}"), &watch.sent(), &['\r']);
    }
    let list = Terminal::start(vmcp(&["--server", &url, "list", "--watch"]), 200, Redirect::Nothing);
    list.wait_for("owned");
    // The table itself moves the cursor, so that the sequences of the server are looked for.
    let sent = list.sent();
    for sequence in ["\u{1b}]", "\u{7}", "\u{9b}", "\u{202e}", "\u{7f}"] {
        assert!(!sent.contains(sequence), "{sequence:?}: {sent:?}");
    }
    assert_eq!(sent.matches("\u{1b}[2J").count(), 1, "the screen is cleared once, by vmcp: {sent:?}");
}
