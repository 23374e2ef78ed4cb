//! The page for Prometheus, as Prometheus reads it.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::skip::skipped;

use crate::harness::{World, eventually, signal, vmm_pid};
use rustix::process::Signal;

const ENABLED: (&str, &str) = ("UNKEY_VMCP_OTEL_PROMETHEUS_ENABLED", "true");
const ANY_PORT: (&str, &str) = ("UNKEY_VMCP_OTEL_PROMETHEUS_PORT", "0");

/// The address of the page, from the log.
fn address(world: &World) -> String {
    let served = |line: &&Value| line["message"] == "the Prometheus page is served at /metrics";
    let log = world.log_at_start();
    log.iter().find(served).expect("the page is served")["address"].as_str().unwrap().to_owned()
}

fn page(world: &World) -> String {
    let url = format!("http://{}/metrics", address(world));
    ureq::get(&url).call().unwrap().body_mut().read_to_string().unwrap()
}

/// The value of the sample `name{labels}`, if the page has it.
fn sample(page: &str, name: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// The names of the page's metrics.
fn names(page: &str) -> BTreeSet<String> {
    page.lines()
        .filter_map(|line| Some(line.strip_prefix("# TYPE ")?.split(' ').next()?.to_owned()))
        .collect()
}

#[test]
fn the_page_counts_calls_vms_commits_and_events() {
    let world = World::started(&[ENABLED, ANY_PORT]);
    world.create_on("qemu", "vm", TinyGuest::Idle);
    world.boot("vm");
    world.call("BootVm", &json!({"vm_id": "none"})).error("not_found");
    let page_now = page(&world);
    for (name, value) in [
        (r#"rpc_server_requests_total{method="vmm.v1.VmService/BootVm",code="ok"}"#, 1.0),
        (r#"rpc_server_requests_total{method="vmm.v1.VmService/BootVm",code="not_found"}"#, 1.0),
        (r#"rpc_server_request_duration_seconds_count{method="vmm.v1.VmService/BootVm",code="ok"}"#, 1.0),
        (r#"rpc_server_active_requests{method="vmm.v1.VmService/BootVm"}"#, 0.0),
        (r#"vmcp_vms{state="RUNNING",backend="qemu"}"#, 1.0),
        (r#"vmcp_vms{state="SHUTDOWN",backend="qemu"}"#, 0.0),
        (r#"vmcp_unreachable_vms{backend="qemu"}"#, 0.0),
        (r#"vmcp_backend_available{backend="qemu"}"#, 1.0),
        (r#"vmcp_vmm_call_duration_seconds_count{backend="qemu",call="launch",outcome="done"}"#, 1.0),
        (r#"vmcp_events_total{kind="state-changed",cause="BootVm"}"#, 1.0),
        ("vmcp_log_lines_dropped_total", 0.0),
    ] {
        assert_eq!(sample(&page_now, name), Some(value), "{name} in\n{page_now}");
    }
    // CreateVm, and the beginning and the end of BootVm.
    let commits = sample(&page_now, r#"vmcp_store_commit_seconds_count{outcome="done"}"#);
    assert!(commits.is_some_and(|commits| commits >= 3.0), "{commits:?}");
    assert!(sample(&page_now, "process_resident_memory_bytes").is_some_and(|bytes| bytes > 1e6));
    let uid = world.info("vm")["uid"].as_str().unwrap().to_owned();
    let labels = format!(r#"{{vm_id="vm",uid="{uid}",backend="qemu"}}"#);
    eventually("a sample of the VM", || {
        let page = page(&world);
        sample(&page, &format!("vmcp_vm_cpu_seconds_total{labels}")).is_some_and(|time| time > 0.0)
            && sample(&page, &format!("vmcp_vm_memory_rss_bytes{labels}")).is_some_and(|bytes| bytes > 1e6)
    });
    let pid = vmm_pid(&world.info("vm"));
    signal(pid, Signal::STOP);
    eventually("the silent VMM", || {
        sample(&page(&world), r#"vmcp_unreachable_vms{backend="qemu"}"#) == Some(1.0)
    });
    signal(pid, Signal::CONT);
    world.call("DeleteVm", &json!({"vm_id": "vm", "force": true})).ok();
    let page = page(&world);
    assert_eq!(sample(&page, r#"vmcp_vms{state="RUNNING",backend="qemu"}"#), Some(0.0));
    assert!(!page.contains(r#"vm_id="vm""#), "a deleted VM has no samples");
}

#[test]
fn a_request_that_reaches_no_method_is_counted_without_its_path() {
    let world = World::started(&[ENABLED, ANY_PORT]);
    assert_eq!(world.get("/vmm.v1.VmService/Nothing").status, 404);
    let page = page(&world);
    assert!(!page.contains("Nothing"), "{page}");
    let refused = |line: &&str| line.starts_with(r#"rpc_server_requests_total{method="",code="#);
    assert_eq!(page.lines().filter(refused).count(), 1, "{page}");
}

#[test]
fn an_open_stream_is_active_until_its_client_leaves() {
    let world = World::started(&[ENABLED, ANY_PORT]);
    let active = r#"rpc_server_active_requests{method="vmm.v1.VmService/WatchVms"}"#;
    let host = world.url().strip_prefix("http://").unwrap();
    let mut client = TcpStream::connect(host).unwrap();
    let body = b"\0\0\0\0\x02{}";
    write!(
        client,
        "POST /vmm.v1.VmService/WatchVms HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/connect+json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    )
    .unwrap();
    client.write_all(body).unwrap();
    client.read_exact(&mut [0; 12]).unwrap();
    eventually("the open stream", || sample(&page(&world), active) == Some(1.0));
    drop(client);
    eventually("the end of the stream", || sample(&page(&world), active) == Some(0.0));
    let ended = r#"rpc_server_requests_total{method="vmm.v1.VmService/WatchVms",code="canceled"}"#;
    assert_eq!(sample(&page(&world), ended), Some(1.0));
}

#[test]
fn samples_of_each_vm_can_be_switched_off() {
    let world = World::started(&[ENABLED, ANY_PORT, ("UNKEY_VMCP_OTEL_PROMETHEUS_VMS", "false")]);
    world.create_on("qemu", "vm", TinyGuest::Idle);
    world.boot("vm");
    let page = page(&world);
    assert_eq!(sample(&page, r#"vmcp_vms{state="RUNNING",backend="qemu"}"#), Some(1.0));
    assert!(!page.contains("vmcp_vm_"), "{page}");
}

#[test]
fn a_named_port_that_is_taken_stops_the_start() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut world = World::new(&[ENABLED, ("UNKEY_VMCP_OTEL_PROMETHEUS_PORT", &port)]);
    let log = world.try_start().expect_err("the daemon does not start").join("\n");
    assert!(log.contains("UNKEY_VMCP_OTEL_PROMETHEUS_PORT to a free port"), "{log}");
}

#[test]
fn slow_clients_of_the_page_take_few_descriptors() {
    let world = World::started(&[ENABLED, ANY_PORT]);
    let address = address(&world);
    let open = || std::fs::read_dir(format!("/proc/{}/fd", world.pid())).unwrap().count();
    let before = open();
    let clients: Vec<_> = (0..100).map(|_| TcpStream::connect(&address).unwrap()).collect();
    assert!(open() <= before + 20, "{before} before, {} now", open());
    drop(clients);
    assert!(page(&world).contains("vmcp_build_info"));
}

#[test]
fn the_document_lists_the_metrics_of_the_page() {
    let world = World::started(&[ENABLED, ANY_PORT]);
    world.create_on("qemu", "vm", TinyGuest::Idle);
    world.boot("vm");
    let document = std::fs::read_to_string("../../docs/observability.md").unwrap();
    let listed: BTreeSet<String> = document
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| `")?.split('`').next()?.split('{').next()?.to_owned()))
        .filter(|name| ["rpc_", "vmcp_", "process_"].iter().any(|prefix| name.starts_with(prefix)))
        .collect();
    eventually("every listed metric", || {
        let shown = names(&page(&world));
        let unlisted: Vec<_> = shown.difference(&listed).collect();
        assert!(unlisted.is_empty(), "docs/observability.md lacks {unlisted:?}");
        // A QEMU without devices has no counters of networks and disks.
        listed.difference(&shown).all(|name| name.contains("_network_") || name.contains("_disk_"))
    });
}

/// A program that `make setup` unpacked, or that is installed.
fn tool(name: &str) -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/tools/bin").join(name);
    let installed =
        || std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|it| it.exists());
    if unpacked.exists() { Some(unpacked) } else { installed() }
}

#[test]
fn promtool_accepts_the_page() {
    let Some(promtool) = tool("promtool") else {
        return skipped("promtool_accepts_the_page", "promtool is missing; 'make setup' fetches it");
    };
    let world = World::started(&[ENABLED, ANY_PORT]);
    world.create_on("qemu", "vm", TinyGuest::Idle);
    world.boot("vm");
    eventually("a sample of the VM", || page(&world).contains("vmcp_vm_cpu_seconds_total"));
    let mut check = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    check.stdin.take().unwrap().write_all(page(&world).as_bytes()).unwrap();
    let output = check.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}

#[test]
fn prometheus_scrapes_the_daemon() {
    let Some(prometheus) = tool("prometheus") else {
        return skipped("prometheus_scrapes_the_daemon", "prometheus is missing; 'make setup' fetches it");
    };
    let world = World::started(&[ENABLED, ANY_PORT]);
    world.create_on("qemu", "vm", TinyGuest::Idle);
    let server = Prometheus::start(&prometheus, &address(&world));
    eventually("a scrape", || {
        server.query(r#"vmcp_vms{state="CREATED",backend="qemu"}"#) == Some("1".to_owned())
    });
    assert_eq!(server.query("up"), Some("1".to_owned()));
}

/// A Prometheus that scrapes one daemon each second. It ends with the value.
struct Prometheus {
    process: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    fn start(program: &Path, target: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: vmm\n  static_configs:\n  - targets: ['{target}']\n"
        );
        std::fs::write(&config, text).unwrap();
        // Prometheus does not report a port that it chose itself.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Command::new(program)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, url: format!("http://127.0.0.1:{port}"), _dir: dir }
    }

    /// The value of the first result of a query, if there is one.
    fn query(&self, query: &str) -> Option<String> {
        let url = format!("{}/api/v1/query", self.url);
        let text = ureq::get(&url).query("query", query).call().ok()?.body_mut().read_to_string().ok()?;
        let answer: Value = serde_json::from_str(&text).ok()?;
        answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
