//! The choice of the server, and servers that are not there.

use std::net::TcpListener;

use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{World, finish, vmcp};

trials![
    an_absent_server_is_named_with_advice,
    an_unserved_scheme_is_refused,
    a_context_selects_a_server,
    a_server_that_is_no_daemon_is_recognised,
    a_wrong_command_line_exits_with_code_2,
];

/// Returns a URL at which nothing listens.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn an_absent_server_is_named_with_advice() {
    let url = nowhere();
    for arguments in [&["list"][..], &["boot", "a"], &["watch"], &["wait", "a", "running"], &["health"]] {
        let error = finish(vmcp(&[&["--server", &url], arguments].concat()), "").failed(24);
        assert!(error.starts_with("error: the server cannot be reached: Connection refused"), "{error}");
        assert!(error.contains("(unavailable)"), "{error}");
        assert!(error.contains(&format!("hint: the server is {url}")), "{error}");
    }
    let error = finish(vmcp(&["--server", &url, "list", "-o", "json"]), "").failed(24);
    let error: serde_json::Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["code"], "unavailable");
}

fn an_unserved_scheme_is_refused() {
    for url in ["https://127.0.0.1:1", "unix:///run/vmcp.sock"] {
        let error = finish(vmcp(&["--server", url, "list"]), "").failed(13);
        assert!(error.contains("this version of vmcp speaks http alone"), "{error}");
        assert!(error.contains("hint: name an http:// address"), "{error}");
    }
}

fn a_context_selects_a_server() {
    let world = World::started(&[]);
    world.create("here", TinyGuest::Idle);
    let contexts = format!(
        "current = \"off\"\n[contexts.lab]\nserver = \"{}\"\n[contexts.off]\nserver = \"{}\"\n",
        world.url(),
        nowhere()
    );
    let file = world.write("contexts.toml", &contexts);
    let with_file = |arguments: &[&str]| {
        let mut command = vmcp(arguments);
        command.env("VMCP_CONTEXTS_FILE", &file);
        command
    };
    assert_eq!(finish(with_file(&["--context", "lab", "list", "-o", "name"]), "").ok(), "here\n");
    let mut by_variable = with_file(&["list", "-o", "name"]);
    by_variable.env("VMCP_CONTEXT", "lab");
    assert_eq!(finish(by_variable, "").ok(), "here\n");
    finish(with_file(&["list"]), "").failed(24);
    let error = finish(with_file(&["--context", "lap", "list"]), "").failed(13);
    assert!(error.contains("no context is named \"lap\"\nhint: the contexts there are: lab, off"), "{error}");
}

fn a_server_that_is_no_daemon_is_recognised() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let page = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\nconnection: close\r\n\r\n<html>";
            stream.write_all(page.as_bytes()).unwrap();
        }
    });
    let error = finish(vmcp(&["--server", &url, "health"]), "").failed(12);
    assert!(error.contains("no health page"), "{error}");
    let ran = finish(vmcp(&["--server", &url, "list"]), "");
    assert!(ran.code > 10 && ran.stdout.is_empty(), "{ran:#?}");
    server.join().unwrap();
}

fn a_wrong_command_line_exits_with_code_2() {
    for arguments in
        [&["lst"][..], &["boot"], &["list", "--state", "ill"], &["shutdown", "a", "--timeout", "2h"]]
    {
        let error = finish(vmcp(arguments), "").failed(2);
        assert!(error.starts_with("error: "), "{error}");
    }
    let help = finish(vmcp(&["--help"]), "").ok();
    assert!(help.contains("Exit codes:") && help.contains("vmcp create web-1"), "{help}");
}
