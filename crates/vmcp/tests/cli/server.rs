//! The choice of the server, and servers that are not there.

use std::net::TcpListener;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{World, finish, vmcp};

trials![
    an_absent_server_is_named_with_advice,
    a_unix_socket_leads_to_the_daemon,
    tls_is_spoken_with_the_named_authority_and_certificate,
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

fn a_unix_socket_leads_to_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock").display().to_string();
    let world = World::started(&[("UNKEY_VMCP_SOCKET", &socket)]);
    world.create("vm", TinyGuest::Idle);
    let url = format!("unix://{socket}");
    let at_socket = |arguments: &[&str]| finish(vmcp(&[&["--server", &url], arguments].concat()), "");
    assert_eq!(at_socket(&["list", "-o", "name"]).ok(), "vm\n");
    at_socket(&["boot", "vm"]).ok();
    assert!(at_socket(&["events", "vm"]).ok().contains("uid:0"), "the user of the client is the actor");
    assert!(at_socket(&["api", "ListVms"]).ok().contains("\"vm\""));
    assert!(at_socket(&["health"]).ok().contains("healthy"));
    at_socket(&["delete", "vm", "--force"]).ok();
    let error = finish(vmcp(&["--server", "unix:///nonexistent/s", "list"]), "").failed(24);
    assert!(error.contains("No such file or directory"), "{error}");
    assert!(error.contains("hint: the server is unix:///nonexistent/s"), "{error}");
}

/// The files of an authority, and of a certificate of it, in a folder.
fn certify(folder: &Path) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write("ca.pem", authority.pem());
    write("cert.pem", certificate.pem());
    write("key.pem", key.serialize_pem());
}

fn tls_is_spoken_with_the_named_authority_and_certificate() {
    let folder = tempfile::tempdir().unwrap();
    certify(folder.path());
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
    let world = World::started(&[
        ("UNKEY_VMCP_TLS_CERT", &cert),
        ("UNKEY_VMCP_TLS_KEY", &key),
        ("UNKEY_VMCP_TLS_CLIENT_CA", &ca),
    ]);
    let url = world.url().replace("http://", "https://");
    let over_tls = |arguments: &[&str]| finish(vmcp(&[&["--server", &url], arguments].concat()), "");
    let all = ["--ca", &ca, "--cert", &cert, "--key", &key];
    assert_eq!(over_tls(&[&all[..], &["list", "-o", "name"]].concat()).ok(), "");
    assert!(over_tls(&[&all[..], &["health"]].concat()).ok().contains("healthy"));
    // By variables, and by a context.
    let mut by_variables = vmcp(&["--server", &url, "list", "-o", "name"]);
    by_variables.env("VMCP_CA", &ca).env("VMCP_CERT", &cert).env("VMCP_KEY", &key);
    assert_eq!(finish(by_variables, "").ok(), "");
    let context =
        format!("[contexts.far]\nserver = \"{url}\"\nca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"\n");
    let mut by_context = vmcp(&["--context", "far", "list", "-o", "name"]);
    by_context.env("VMCP_CONTEXTS_FILE", world.write("contexts.toml", &context));
    assert_eq!(finish(by_context, "").ok(), "");
    let error = over_tls(&["--cert", &cert, "--key", &key, "list"]).failed(24);
    assert!(error.contains("--ca names the authority of the server's certificate"), "{error}");
    let error = over_tls(&["--ca", &ca, "list"]).failed(24);
    assert!(error.contains("the server cannot be reached"), "{error}");
    let error = over_tls(&["--ca", &ca, "--cert", &cert, "list"]).failed(13);
    assert!(error.contains("--cert is given without --key"), "{error}");
    let error = over_tls(&["--ca", &file("none.pem"), "list"]).failed(13);
    assert!(error.contains("none.pem gives no certificate in PEM form"), "{error}");
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
