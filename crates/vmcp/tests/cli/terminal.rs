//! `vmcp` in a terminal: what stands on the screen, and what is sent to it.

use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::pty::{Redirect, Terminal};
use crate::trials;
use crate::world::{World, has_qemu};

trials![
    a_table_fits_into_the_terminal,
    a_long_operation_shows_its_phase_in_a_spinner_and_clears_the_line,
    a_warning_has_a_line_of_its_own_beside_the_spinner,
    ctrl_c_ends_the_command_and_not_the_operation,
    a_spinner_needs_two_terminal_outputs,
    control_bytes_do_not_reach_the_terminal,
];

/// Makes a VM run whose guest ignores the power button, so that a shutdown takes its whole time.
fn with_a_deaf_guest(vm_id: &str) -> World {
    let world = World::started(&[]);
    world.create(vm_id, TinyGuest::Idle);
    world.run(&["boot", vm_id]).ok();
    world
}

fn a_table_fits_into_the_terminal() {
    let world =
        World::started(&[("UNKEY_VMCP_QEMU_BINARY", "/nonexistent/a/long/way/to/qemu-system-x86_64")]);
    let mut narrow = Terminal::run(&world, 60, &["backends"], Redirect::Nothing);
    assert_eq!(narrow.code(), 0);
    let screen = narrow.screen();
    assert!(screen.starts_with("NAME"), "{screen}");
    // A cell that is too long goes on in its own column, so no line begins in the middle of one.
    let beginnings: Vec<_> = screen.lines().filter(|line| !line.starts_with(' ')).collect();
    assert!(
        beginnings.iter().all(|line| {
            ["NAME", "cloudhypervisor", "firecracker", "qemu"].iter().any(|name| line.starts_with(name))
                || line.is_empty()
        }),
        "{screen}"
    );
    assert!(screen.lines().count() > 4, "{screen}");
    let mut wide = Terminal::run(&world, 400, &["backends"], Redirect::Nothing);
    wide.code();
    assert_eq!(wide.screen().lines().count(), 4, "{}", wide.screen());
}

fn a_long_operation_shows_its_phase_in_a_spinner_and_clears_the_line() {
    if !has_qemu("terminal::a_long_operation_shows_its_phase_in_a_spinner_and_clears_the_line") {
        return;
    }
    let world = with_a_deaf_guest("deaf");
    let mut terminal = Terminal::run(&world, 80, &["shutdown", "deaf", "--timeout", "3s"], Redirect::Nothing);
    terminal.wait_for("deaf: stopping");
    assert_eq!(terminal.code(), 0);
    let screen = terminal.screen();
    assert!(screen.starts_with("deaf: shutdown, the guest was ended by "), "{screen}");
    assert_eq!(screen.trim_end().lines().count(), 1, "nothing of the spinner is left: {screen}");
    let sent = terminal.sent();
    assert!(!sent.contains("\u{1b}[?25l") || sent.ends_with("\u{1b}[?25h"), "the cursor is there: {sent:?}");
}

fn a_warning_has_a_line_of_its_own_beside_the_spinner() {
    let mut world = World::started(&[]);
    world.create("vm", TinyGuest::Idle);
    let terminal = Terminal::run(&world, 100, &["wait", "vm", "running"], Redirect::Nothing);
    terminal.wait_for("vm: created");
    world.stop(rustix::process::Signal::KILL);
    let screen = terminal.wait_for("connecting again");
    let remark =
        screen.lines().find(|line| line.contains("connecting again") || line.contains("vmcp: lost")).unwrap();
    assert!(remark.starts_with("vmcp: lost http://"), "{screen}");
}

fn ctrl_c_ends_the_command_and_not_the_operation() {
    if !has_qemu("terminal::ctrl_c_ends_the_command_and_not_the_operation") {
        return;
    }
    let world = with_a_deaf_guest("deaf");
    let mut terminal =
        Terminal::run(&world, 100, &["shutdown", "deaf", "--timeout", "5s"], Redirect::Nothing);
    terminal.wait_for("deaf: stopping");
    terminal.type_in("\u{3}");
    assert_eq!(terminal.code(), 130);
    let rows = terminal.rows();
    let remark = rows.iter().position(|row| row.starts_with("vmcp: the daemon goes on with the operation"));
    let remark = remark.unwrap_or_else(|| panic!("the remark has a row of its own: {rows:#?}"));
    assert!(rows[remark + 1].is_empty(), "the prompt comes on a clean row: {rows:#?}");
    assert_eq!(world.run(&["wait", "deaf", "shutdown", "-o", "name"]).ok(), "deaf\n");
    let mut wait = Terminal::run(&world, 100, &["wait", "deaf", "running"], Redirect::Nothing);
    wait.wait_for("deaf: stopped");
    wait.type_in("\u{3}");
    assert_eq!(wait.code(), 130);
}

fn a_spinner_needs_two_terminal_outputs() {
    if !has_qemu("terminal::a_spinner_needs_two_terminal_outputs") {
        return;
    }
    let world = with_a_deaf_guest("deaf");
    let arguments = ["shutdown", "deaf", "--timeout", "2s"];
    let mut piped = Terminal::run(&world, 80, &arguments, Redirect::Stdout);
    assert_eq!(piped.code(), 0);
    assert_eq!(piped.sent(), "", "standard output is no terminal");
    world.run(&["boot", "deaf"]).ok();
    let mut silent = Terminal::run(&world, 80, &arguments, Redirect::Stderr);
    assert_eq!(silent.code(), 0);
    let sent = silent.sent();
    assert!(!sent.contains('\u{1b}') && sent.starts_with("deaf: shutdown"), "{sent:?}");
}

fn control_bytes_do_not_reach_the_terminal() {
    let world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Idle);
    config["metadata"] = json!({"note": "\u{1b}[2J\u{1b}[Hforged\u{9b}7m", "\u{7}": "x"});
    world.call("CreateVm", &json!({"vm_id": "vm", "config": config}));
    for arguments in [&["get", "vm"][..], &["get", "vm", "-o", "json"], &["get", "vm", "-o", "yaml"]] {
        let mut terminal = Terminal::run(&world, 120, arguments, Redirect::Nothing);
        assert_eq!(terminal.code(), 0);
        assert!(
            !terminal.sent().contains(['\u{1b}', '\u{9b}', '\u{7}']),
            "{arguments:?}: {:?}",
            terminal.sent()
        );
        assert!(terminal.screen().contains("forged"), "{}", terminal.screen());
    }
}
