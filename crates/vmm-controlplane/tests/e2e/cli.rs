//! The program's command line, its log and its health pages.

use rustix::process::Signal;
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::harness::World;

#[test]
fn a_bad_configuration_is_reported_completely_and_starts_nothing() {
    let world = World::new(&[("UNKEY_VMCP_BACKEND", "xen"), ("UNKEY_VMCP_PORT", "http")]);
    for subcommand in ["serve", "check-config"] {
        let output = world.command().arg(subcommand).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.contains("unsupported backend type: xen") && message.contains("UNKEY_VMCP_PORT"),
            "{message}"
        );
    }
    assert!(!world.dir.path().join("state").exists());
}

#[test]
fn unserved_settings_stop_the_start() {
    for (variable, value) in
        [("UNKEY_VMCP_OTEL_ENABLED", "true"), ("UNKEY_VMCP_CORS_ORIGINS", "https://example.org")]
    {
        let said = World::new(&[(variable, value)]).try_start().expect_err(variable);
        assert!(said.iter().any(|line| line.contains(variable)), "{variable}: {said:?}");
    }
}

#[test]
fn retired_variables_are_named_with_their_successors() {
    let world = World::new(&[]);
    let output = world.command().env_remove("UNKEY_VMCP_PORT").env("CHCP_PORT", "8080").output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("failed to load config: missing required environment variables"), "{message}");
    assert!(message.contains("UNKEY_VMCP_PORT"), "{message}");
    let exports = world
        .command()
        .arg("migrate-env")
        .env_remove("UNKEY_VMCP_PORT")
        .env("CHCP_PORT", "8080")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&exports.stdout).contains("export UNKEY_VMCP_PORT="));
}

#[test]
fn help_version_and_check_config_succeed() {
    let world = World::new(&[]);
    let text = |argument: &str| {
        let output = world.command().arg(argument).output().unwrap();
        assert!(output.status.success(), "{argument}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(text("--version").contains(env!("CARGO_PKG_VERSION")));
    assert!(text("--help").contains("UNKEY_VMCP_ADDRESS"));
    assert!(text("check-config").starts_with("OK"));
}

#[test]
fn every_log_line_of_a_request_has_its_id_and_the_vm() {
    let mut world = World::started(&[]);
    world.create("logged", &world.tiny(TinyGuest::Idle));
    world.call("PauseVm", &json!({"vm_id": "logged"})).error("failed_precondition");
    let (_, log) = world.stop(Signal::TERM);
    let lines: Vec<Value> =
        log.iter().map(|line| serde_json::from_str(line).expect("JSON on every line")).collect();
    for request in ["test-CreateVm", "test-PauseVm"] {
        let of_request: Vec<_> = lines.iter().filter(|line| line.to_string().contains(request)).collect();
        assert!(!of_request.is_empty(), "{request} left no line:\n{}", log.join("\n"));
        for line in of_request {
            assert_eq!(
                (&line["request_id"], &line["vm_id"]),
                (&json!(request), &json!("logged")),
                "{line:#}"
            );
        }
    }
}

#[test]
fn the_health_page_has_the_keys_of_the_contract() {
    let world = World::started(&[]);
    let health = world.get("/_/health");
    let expected =
        if crate::harness::on_path("qemu-system-x86_64") { (200, "healthy") } else { (503, "unhealthy") };
    assert_eq!((health.status, health.body["status"].as_str().unwrap()), expected);
    assert_eq!(health.body["backend"], "qemu");
    assert!(health.body["uptime_seconds"].is_u64());
    assert_eq!(health.body["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(world.get("/health").body["status"], expected.1);
    let old = world.get("/cloudhypervisor.v1.VmService/CreateVm");
    assert_eq!(old.status, 404);
    assert!(old.body.to_string().contains("/vmm.v1.VmService/CreateVm"), "{}", old.body);
}
