//! Tests of the settings of the listeners.

use super::*;
use crate::rpc::{TlsFiles, UnixSocketOptions};

#[test]
fn a_unix_socket_may_serve_beside_tcp_or_alone() {
    let config = good(&["--socket=/run/s"], &[]).config;
    let socket = UnixSocketOptions { path: "/run/s".into(), mode: 0o660, group: None };
    assert_eq!((config.socket, config.listen.is_some()), (Some(socket), true));
    let args = ["--address=none", "--socket=/run/s", "--socket-mode=0600", "--socket-group=7"];
    let loaded = good(&args, &[]);
    let socket = UnixSocketOptions { path: "/run/s".into(), mode: 0o600, group: Some(7) };
    assert_eq!((loaded.config.socket, loaded.config.listen, loaded.warnings), (Some(socket), None, vec![]));
    let text = bad(&["--address=none"], &[]);
    assert!(text.contains("leaves no listener") && text.contains("UNKEY_VMCP_SOCKET"), "{text}");
}

#[test]
fn wrong_values_of_the_socket_are_refused() {
    let long = format!("--socket=/{}", "x".repeat(107));
    for (arg, want) in [
        ("--socket=run/s", "not an absolute path"),
        ("--socket=/run/s/", "no path of a file"),
        ("--socket=/run/s.lock", "the name of a lock"),
        (&long, "108 bytes long"),
        ("--socket-mode=888", "octal digits"),
        ("--socket-mode=0060", "octal digits"),
        ("--socket-mode=1777", "octal digits"),
        ("--socket-mode=+660", "octal digits"),
        ("--socket-group=nobody-has-it", "no group of this host"),
        ("--socket-group=4294967295", "no group of this host"),
    ] {
        let text = bad(&[arg], &[("UNKEY_VMCP_SOCKET", "/s")]);
        assert!(text.contains(want), "{arg}: {text}");
    }
}

#[test]
fn tls_needs_a_certificate_and_a_key() {
    let files = |client_ca: Option<&str>| TlsFiles {
        certificate: "/c".into(),
        key: "/k".into(),
        client_ca: client_ca.map(Into::into),
    };
    assert_eq!(good(&["--tls-cert=/c", "--tls-key=/k"], &[]).config.tls, Some(files(None)));
    let demanding = good(&["--tls-cert=/c", "--tls-key=/k", "--tls-client-ca=/a"], &[]).config;
    assert_eq!(demanding.tls, Some(files(Some("/a"))));
    assert!(demanding.demands_certificates());
    for (args, want) in [
        (&["--tls-cert=/c"][..], "tls_cert: TLS needs tls_key too"),
        (&["--tls-key=/k"], "tls_key: TLS needs tls_cert too"),
        (&["--tls-client-ca=/a"], "tls_client_ca: TLS needs tls_cert too"),
    ] {
        let text = bad(args, &[]);
        assert!(text.contains(want), "{args:?}: {text}");
    }
}

#[test]
fn open_and_ineffective_listeners_cause_warnings() {
    let tls = ["--tls-cert=/c", "--tls-key=/k"];
    for (args, want) in [
        (&["--socket=/s", "--socket-mode=0666"][..], "every local user may connect to /s"),
        (&["--socket-mode=0600"], "no effect: UNKEY_VMCP_SOCKET_MODE"),
        (&["--address=none", "--socket=/s", "--port=1"], "no effect: UNKEY_VMCP_PORT"),
        (&["--address=0.0.0.0", tls[0], tls[1]], "with no authentication"),
    ] {
        let warnings = good(args, &[]).warnings;
        assert!(warnings.len() == 1 && warnings[0].contains(want), "{args:?}: {warnings:?}");
    }
    let demanding = ["--address=0.0.0.0", tls[0], tls[1], "--tls-client-ca=/a"];
    assert_eq!(good(&demanding, &[]).warnings, [""; 0]);
}
