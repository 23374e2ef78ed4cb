//! `console`: history, input, the escape sequences, losses of the server, the terminal afterwards.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::pty::{Redirect, Terminal};
use crate::trials;
use crate::world::{Running, World, has_qemu};

trials![
    the_history_is_printed_without_follow,
    messages_are_printed_with_o_json,
    typed_keys_reach_the_guest_and_its_output_the_screen,
    the_escape_sequences_help_and_can_be_turned_off,
    a_console_goes_on_over_a_reboot,
    a_console_goes_on_after_a_restart_of_the_server,
    a_signal_restores_the_terminal,
    a_deletion_ends_the_console,
    keys_for_a_stopped_vm_are_refused_with_one_remark,
    a_vm_without_a_console_is_refused,
];

/// The line that the echo guest prints when it is up.
const UP: &str = "kind=echo";

/// Makes a VM run whose guest prints what it reads.
fn with_an_echo() -> World {
    let world = World::started(&[]);
    world.create("vm", TinyGuest::Echo);
    world.run(&["boot", "vm"]).ok();
    world
}

fn console(world: &World, arguments: &[&str]) -> Terminal {
    let arguments = [&["console", "vm"], arguments].concat();
    let terminal = Terminal::run(world, 100, &arguments, Redirect::Nothing);
    terminal.wait_for(UP);
    terminal
}

fn the_history_is_printed_without_follow() {
    if !has_qemu("console::the_history_is_printed_without_follow") {
        return;
    }
    let world = with_an_echo();
    let follow = Running::start(world.command(&["console", "vm"]));
    Running::until(&follow.stdout, UP);
    let printed = world.run(&["console", "vm", "--no-follow"]).ok();
    assert_eq!(printed.matches(UP).count(), 1, "{printed:?}");
    let tail = world.run(&["console", "v", "--no-follow", "--tail", "4"]).ok();
    assert_eq!(tail.len(), 4, "{tail:?}");
    assert!(printed.ends_with(&tail), "{tail:?}");
}

fn messages_are_printed_with_o_json() {
    if !has_qemu("console::messages_are_printed_with_o_json") {
        return;
    }
    let world = with_an_echo();
    let follow = Running::start(world.command(&["console", "vm", "-o", "json"]));
    let lines = Running::until(&follow.stdout, "\"data\"");
    let message: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert!(message["data"].is_string(), "{message}");
}

fn typed_keys_reach_the_guest_and_its_output_the_screen() {
    if !has_qemu("console::typed_keys_reach_the_guest_and_its_output_the_screen") {
        return;
    }
    let world = with_an_echo();
    let mut terminal = console(&world, &[]);
    terminal.wait_for("~. at the beginning of a line leaves it");
    // Ctrl-C is a key like any other.
    terminal.type_in("abc\u{3}def");
    terminal.wait_for("def");
    terminal.type_in("\r~.");
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
    let sent = terminal.sent();
    assert!(sent.contains("abc\u{3}def"), "{sent:?}");
    assert!(sent.ends_with("\u{1b}[0m\r"), "the terminal is left clean: {sent:?}");
    assert_eq!(world.run(&["list", "--state", "running", "-o", "name"]).ok(), "vm\n", "the guest runs on");
}

fn the_escape_sequences_help_and_can_be_turned_off() {
    if !has_qemu("console::the_escape_sequences_help_and_can_be_turned_off") {
        return;
    }
    let world = with_an_echo();
    let mut other = console(&world, &["--escape", "^]"]);
    other.type_in("~?\r\u{1d}?");
    other.wait_for("leave the console; the guest runs on");
    other.wait_for("~?");
    other.type_in("\u{1d}.");
    assert_eq!(other.code(), 0);
    let none = console(&world, &["--escape", "none"]);
    none.type_in("~.still here\r");
    none.wait_for("still here");
}

fn a_console_goes_on_over_a_reboot() {
    if !has_qemu("console::a_console_goes_on_over_a_reboot") {
        return;
    }
    let world = with_an_echo();
    let follow = Running::start(world.command(&["console", "vm"]));
    Running::until(&follow.stdout, UP);
    world.run(&["reboot", "vm", "--force"]).ok();
    Running::until(&follow.stdout, UP);
    world.run(&["shutdown", "vm", "--force"]).ok();
    world.run(&["boot", "vm"]).ok();
    Running::until(&follow.stdout, UP);
}

fn a_console_goes_on_after_a_restart_of_the_server() {
    if !has_qemu("console::a_console_goes_on_after_a_restart_of_the_server") {
        return;
    }
    let mut world = with_an_echo();
    let terminal = console(&world, &[]);
    for signal in [Signal::KILL, Signal::TERM] {
        let word = format!("word-{}", signal.as_raw());
        world.stop(signal);
        terminal.wait_for("connecting again");
        world.start();
        // The remark comes with the first message of the new server, so a key is needed.
        let deadline = std::time::Instant::now() + crate::world::WAIT_TIMEOUT;
        while !terminal.sent().contains(&word) {
            assert!(std::time::Instant::now() < deadline, "{}", terminal.screen());
            terminal.type_in(&format!("{word}\r"));
            crate::world::pause();
        }
    }
    let sent = terminal.sent();
    assert_eq!(sent.matches(UP).count(), 1, "no output is shown twice: {sent:?}");
    assert!(sent.contains("again"), "{sent:?}");
}

fn a_signal_restores_the_terminal() {
    if !has_qemu("console::a_signal_restores_the_terminal") {
        return;
    }
    let world = with_an_echo();
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut terminal = console(&world, &[]);
        assert!(terminal.is_raw());
        // Another size of the window changes nothing for the guest.
        let word = format!("sized-{code}");
        terminal.resize(70);
        terminal.type_in(&word);
        terminal.wait_for(&word);
        kill_process(Pid::from_child(terminal.child()), signal).unwrap();
        assert_eq!(terminal.code(), code);
        assert!(!terminal.is_raw(), "lines and signals are back");
        assert!(terminal.sent().ends_with("\u{1b}[0m\r"), "{:?}", terminal.sent());
    }
}

fn a_deletion_ends_the_console() {
    if !has_qemu("console::a_deletion_ends_the_console") {
        return;
    }
    let world = with_an_echo();
    let mut terminal = console(&world, &[]);
    world.run(&["delete", "vm", "--force"]).ok();
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
}

fn keys_for_a_stopped_vm_are_refused_with_one_remark() {
    if !has_qemu("console::keys_for_a_stopped_vm_are_refused_with_one_remark") {
        return;
    }
    let world = with_an_echo();
    let terminal = console(&world, &[]);
    world.run(&["shutdown", "vm", "--force"]).ok();
    terminal.type_in("a");
    terminal.wait_for("your keys do not reach the guest");
    terminal.type_in("b");
    world.run(&["boot", "vm"]).ok();
    let deadline = std::time::Instant::now() + crate::world::WAIT_TIMEOUT;
    while !terminal.sent().contains("xyz") {
        assert!(std::time::Instant::now() < deadline, "{}", terminal.screen());
        terminal.type_in("xyz");
        crate::world::pause();
    }
    assert_eq!(terminal.sent().matches("your keys do not reach").count(), 1, "{}", terminal.screen());
}

fn a_vm_without_a_console_is_refused() {
    let world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Idle);
    config["console"] = json!({"enabled": false});
    world.call("CreateVm", &json!({"vm_id": "vm", "config": config}));
    let error = world.run(&["console", "vm"]).failed(19);
    assert!(error.contains("console"), "{error}");
    world.run(&["console", "no-such-vm"]).failed(15);
}
