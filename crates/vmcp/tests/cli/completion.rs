//! Completion in a real shell, and the manual pages.

use std::process::Command;

use vmm_testkit::guests::TinyGuest;

use crate::trials;
use crate::world::{World, finish, vmcp};

trials![
    bash_completes_commands_options_and_names_of_vms,
    an_unreachable_server_completes_no_names_and_prints_nothing,
    every_shell_has_a_registration,
    every_command_has_a_manual_page,
];

/// Returns what bash would offer for a line, whose last word is the one to complete.
fn offered(server: &str, words: &[&str]) -> Vec<String> {
    let registration = finish(vmcp(&["completion", "bash"]), "").ok();
    let line = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let script = format!(
        "{registration}\nCOMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_TYPE=9\n\
         _clap_complete_vmcp vmcp \"${{COMP_WORDS[COMP_CWORD]}}\"\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let output = Command::new("bash")
        .args(["--norc", "-c", &script])
        .env("VMCP_SERVER", server)
        .env("VMCP_CONTEXTS_FILE", "/nonexistent/contexts.toml")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "a prompt is no place for an error");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
}

fn bash_completes_commands_options_and_names_of_vms() {
    let world = World::started(&[]);
    world.create("web-1", TinyGuest::Idle);
    world.create("web-2", TinyGuest::Idle);
    world.create("db", TinyGuest::Idle);
    assert_eq!(offered(&world.url(), &["vmcp", "shut"]), ["shutdown"]);
    for command in [
        "boot", "shutdown", "pause", "resume", "reboot", "delete", "get", "wait", "watch", "events",
        "update", "edit",
    ] {
        assert_eq!(offered(&world.url(), &["vmcp", command, "web"]), ["web-1", "web-2"], "{command}");
    }
    assert_eq!(offered(&world.url(), &["vmcp", "boot", "web-1", "d"]), ["db"]);
    assert_eq!(offered(&world.url(), &["vmcp", "list", "--st"]), ["--state"]);
    assert_eq!(offered(&world.url(), &["vmcp", "list", "--state", "run"]), ["running"]);
    // A server that is typed counts before the one of the environment.
    let typed = ["vmcp", "--server", &world.url(), "get", "d"];
    assert_eq!(offered("http://127.0.0.1:1", &typed), ["db"]);
}

fn an_unreachable_server_completes_no_names_and_prints_nothing() {
    assert_eq!(offered("http://127.0.0.1:1", &["vmcp", "boot", "web"]), Vec::<String>::new());
}

fn every_shell_has_a_registration() {
    for shell in ["bash", "zsh", "fish", "elvish"] {
        let code = finish(vmcp(&["completion", shell]), "").ok();
        assert!(code.contains("VMCP_COMPLETE"), "{shell}: {code}");
    }
}

fn every_command_has_a_manual_page() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man1");
    finish(vmcp(&["man", "--dir", pages.to_str().unwrap()]), "").ok();
    let help = finish(vmcp(&["--help"]), "").ok();
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands: Vec<_> = commands.map_while(|line| line.split_whitespace().next()).collect();
    assert!(commands.len() > 15, "{commands:?}");
    for command in commands {
        let page = std::fs::read_to_string(pages.join(format!("vmcp-{command}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{command}");
    }
    let page = finish(vmcp(&["man"]), "").ok();
    assert!(page.contains(".TH vmcp 1") && page.contains("Exit codes"), "{page}");
}
