use super::*;
use proptest::prelude::*;

/// Checks a parser against texts it must read as a value and texts it must refuse.
fn check<T: fmt::Debug + PartialEq>(
    parse: impl Fn(&str) -> Result<T, ValueError>,
    good: impl IntoIterator<Item = (&'static str, T)>,
    bad: &[&str],
) {
    for (text, value) in good {
        assert_eq!(parse(text), Ok(value), "{text:?}");
    }
    for text in bad {
        let fault = parse(text).expect_err(&format!("{text:?} was taken"));
        assert!(!fault.message.is_empty() && !fault.want.is_empty(), "{fault:?}");
    }
}

fn strings<const N: usize>(list: [&str; N]) -> Vec<String> {
    list.map(str::to_owned).into()
}

#[test]
fn backends() {
    check(
        backend,
        [
            ("cloudhypervisor", BackendChoice::CloudHypervisor),
            ("firecracker", BackendChoice::Firecracker),
            ("qemu", BackendChoice::Qemu),
        ],
        &["", "QEMU", "kvm", " qemu"],
    );
    assert_eq!(backend("your-backend").unwrap_err().message, "unsupported backend type: your-backend");
    assert!(backend("x").unwrap_err().verbatim);
}

#[test]
fn endpoints_of_cloud_hypervisor_and_firecracker() {
    let unix = |paths: &[&str]| Endpoint::Unix(paths.iter().map(PathBuf::from).collect());
    let long = format!("unix:///{}", "a".repeat(SOCKET_PATH_MAX));
    let bad = [
        "",
        ",",
        "unix://",
        "unix:///",
        "unix:///a/..",
        "unix://relative",
        "unix:///a,",
        "unix:///a,unix:///a",
        "unix:///a,/b",
        "unix:///a\u{0}b",
        "/tmp/ch.sock",
        "tcp://127.0.0.1:1",
        "http://localhost",
        "qemu:///system",
        &long,
    ];
    for name in [BackendChoice::CloudHypervisor, BackendChoice::Firecracker] {
        check(
            |text| endpoint(name, text),
            [("unix:///tmp/ch.sock", unix(&["/tmp/ch.sock"])), ("unix:///a, unix:///b", unix(&["/a", "/b"]))],
            &bad,
        );
    }
    for (name, text) in [
        (BackendChoice::CloudHypervisor, "cloud hypervisor endpoint is required"),
        (BackendChoice::Firecracker, "firecracker endpoint is required"),
        (BackendChoice::Qemu, "qemu endpoint is required"),
    ] {
        let fault = endpoint(name, "unix://").unwrap_err();
        assert!(fault.verbatim && fault.message.starts_with(text), "{fault:?}");
    }
}

#[test]
fn endpoints_of_qemu() {
    let libvirt = |uri: &str| Endpoint::Libvirt(uri.into());
    let good = [
        "qemu:///system",
        "qemu:///session",
        "qemu+unix:///system",
        "qemu+unix:///session?socket=/run/libvirt-sock",
    ];
    check(
        |text| endpoint(BackendChoice::Qemu, text),
        good.map(|uri| (uri, libvirt(uri)))
            .into_iter()
            .chain([("unix:///run/qmp.sock", Endpoint::Unix(vec!["/run/qmp.sock".into()]))]),
        &["qemu://", "qemu:///", "qemu+ssh://host/system", "qemu+unix://", "qemu:///system\n", "libvirt", ""],
    );
}

#[test]
fn addresses_and_ports() {
    check(
        address,
        [
            ("none", None),
            ("127.0.0.1", Some("127.0.0.1".to_owned())),
            ("::", Some("::".to_owned())),
            ("[::1]", Some("::1".to_owned())),
            ("localhost", Some("localhost".to_owned())),
            ("VMs.Example.com.", Some("vms.example.com".to_owned())),
        ],
        &[
            "",
            " ",
            "256.0.0.1",
            "1.2.3",
            "127.0.0.1:80",
            "[::1]:80",
            "localhost:80",
            "a b",
            "-a",
            "a..b",
            "http://a",
            "::g",
            ":",
            "*",
        ],
    );
    check(
        port,
        [("0", 0), ("1", 1), ("65535", 65_535)],
        &["", "-1", "65536", "http", "8080 ", "99999999999999999999"],
    );
}

#[test]
fn only_loopback_addresses_count_as_loopback() {
    for (host, loopback) in [
        ("127.0.0.1", true),
        ("127.9.9.9", true),
        ("::1", true),
        ("::ffff:127.0.0.1", true),
        ("localhost", true),
        ("0.0.0.0", false),
        ("::", false),
        ("192.0.2.1", false),
        ("vms.example.com", false),
    ] {
        let listen = ListenAddress { host: address(host).unwrap().unwrap(), port: 80 };
        assert_eq!(listen.is_loopback(), loopback, "{host}");
    }
    assert_eq!(ListenAddress { host: "::1".into(), port: 80 }.to_string(), "[::1]:80");
    assert_eq!(ListenAddress { host: "localhost".into(), port: 80 }.to_string(), "localhost:80");
}

#[test]
fn host_lists() {
    check(
        allowed_hosts,
        [
            ("", strings([])),
            ("A.example, b,a.example", strings(["a.example", "b"])),
            ("10.0.0.1,[::1]", strings(["10.0.0.1", "::1"])),
        ],
        &["a:80", "http://a", "*", "a b"],
    );
    check(
        cors_origins,
        [
            ("", strings([])),
            (
                "https://A.example,http://localhost:3000,http://[::1]:1",
                strings(["https://a.example", "http://localhost:3000", "http://[::1]:1"]),
            ),
        ],
        &[
            "*",
            "null",
            "a.example",
            "https://",
            "https://a/",
            "https://a/b",
            "ftp://a",
            "https://u@a",
            "https://a:0",
            "https://a:",
        ],
    );
}

#[test]
fn collectors() {
    let good = ["localhost:4318", "[::1]:4318", "http://collector:4318/v1/traces", "https://collector"];
    check(
        otel_endpoint,
        good.map(|text| (text, text.to_owned())),
        &[
            "",
            "localhost",
            "localhost:",
            "localhost:x",
            "ftp://a",
            "http://",
            "http://u:p@a",
            "a b:1",
            "localhost:0",
        ],
    );
}

#[test]
fn shares_and_switches() {
    check(
        sampling_rate,
        [("0", 0.0), ("0.25", 0.25), ("1.0", 1.0), ("1", 1.0)],
        &["", "1.1", "-0.1", "NaN", "inf", "50%"],
    );
    check(
        boolean,
        [("true", true), ("TRUE", true), ("1", true), ("off", false), ("no", false)],
        &["", "2", "ja"],
    );
    check(
        kvm,
        [
            ("auto", KvmSetting::Auto),
            ("true", KvmSetting::On),
            ("false", KvmSetting::Off),
            ("on", KvmSetting::On),
        ],
        &["", "maybe"],
    );
}

#[test]
fn durations() {
    let most = Duration::from_secs(10 * 86_400);
    check(
        |text| duration(text, most),
        [("1", 1), ("10s", 10), ("30m", 1_800), ("12h", 43_200), ("7d", 604_800), ("10d", 864_000)]
            .map(|(text, seconds)| (text, Duration::from_secs(seconds))),
        &[
            "",
            "0",
            "0d",
            "s",
            "-1",
            "1.5",
            "7w",
            "7 d",
            "7D",
            "11d",
            "9999999999999999999999d",
            "18446744073709551615d",
        ],
    );
}

#[test]
fn counts() {
    let bad = ["", "-1", "1.5", "17", "2 ", "many", "18446744073709551616"];
    check(|text| count(text, 16), [("0", 0), ("1", 1), ("16", 16)], &bad);
    assert!(count("17", 16).unwrap_err().want.contains("from 0 to 16"));
}

#[test]
fn paths() {
    check(absolute_path, [("/a b", PathBuf::from("/a b"))], &["", "a", "./a", "/a\0"]);
    check(
        binary,
        [("qemu", PathBuf::from("qemu")), ("/usr/bin/qemu", PathBuf::from("/usr/bin/qemu"))],
        &["", "/", "bin/qemu", "./qemu", "..", "/usr/bin/", "a\0"],
    );
    let longest = format!("/{}", "r".repeat(SOCKET_PATH_MAX - SOCKET_NAMES_MAX - 1));
    assert_eq!(runtime_dir(&longest), Ok(PathBuf::from(&longest)));
    let fault = runtime_dir(&format!("{longest}r")).unwrap_err();
    assert!(fault.message.contains("is 60 bytes long") && fault.want.contains("59 bytes"), "{fault:?}");
    check(
        single_line,
        [("console=ttyS0 quiet", "console=ttyS0 quiet".to_owned())],
        &["", " ", "a\nb", "a\0"],
    );
}

proptest! {
    #[test]
    fn every_text_is_parsed_without_a_panic(text in "\\PC*|[a-z0-9:/.,\\[\\]@+?-]{0,40}") {
        for name in BackendChoice::ALL {
            let _ = endpoint(name, &text);
        }
        let _ = (backend(&text), port(&text), address(&text), allowed_hosts(&text), cors_origins(&text));
        let _ = (otel_endpoint(&text), sampling_rate(&text), kvm(&text), duration(&text, Duration::MAX));
        let _ = (runtime_dir(&text), binary(&text), single_line(&text));
    }
}
