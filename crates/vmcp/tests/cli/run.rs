//! `run`: from nothing to a guest's console, and away again.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use vmm_testkit::guests::TinyGuest;
use vmm_testkit::skip::{on_path, skipped};

use crate::pty::{Redirect, Terminal};
use crate::trials;
use crate::world::{Running, World, finish, has_qemu, vmcp};

trials![
    a_run_shows_the_console_until_the_guest_ends,
    a_run_with_rm_leaves_nothing,
    leaving_a_run_by_key_leaves_the_guest_running,
    a_run_with_rm_that_is_left_by_key_deletes_the_vm,
    a_run_that_cannot_be_created_leaves_nothing,
    a_run_that_cannot_boot_says_what_stays,
    a_signal_ends_a_run_and_leaves_the_guest_running,
    a_signal_ends_a_run_with_rm_and_deletes_the_vm,
    a_run_takes_keys_on_each_hypervisor,
    the_help_leads_to_a_shell_in_the_linux_guest,
];

/// Returns the arguments of a run of a tiny guest.
fn run(world: &World, guest: TinyGuest, more: &[&str]) -> Vec<String> {
    let kernel = world.kernel(guest).display().to_string();
    let own = ["run", "vm", "--memory", "64MiB", "--kernel", &kernel];
    own.iter().chain(more).map(|word| (*word).to_owned()).collect()
}

fn borrowed(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

fn names(world: &World) -> String {
    world.run(&["list", "-o", "name"]).ok()
}

fn a_run_shows_the_console_until_the_guest_ends() {
    if !has_qemu("run::a_run_shows_the_console_until_the_guest_ends") {
        return;
    }
    let world = World::started(&[]);
    let ran = world.run(&borrowed(&run(&world, TinyGuest::PowerOff, &[])));
    assert!(ran.stderr.contains("vmcp: vm: shutdown"), "{ran:?}");
    assert!(ran.ok().contains("kind=poweroff"));
    assert_eq!(world.run(&["list", "--state", "shutdown", "-o", "name"]).ok(), "vm\n");
}

fn a_run_with_rm_leaves_nothing() {
    if !has_qemu("run::a_run_with_rm_leaves_nothing") {
        return;
    }
    let world = World::started(&[]);
    let printed = world.run(&borrowed(&run(&world, TinyGuest::PowerOff, &["--rm"]))).ok();
    assert!(printed.contains("kind=poweroff"), "{printed:?}");
    assert_eq!(names(&world), "");
}

fn leaving_a_run_by_key_leaves_the_guest_running() {
    if !has_qemu("run::leaving_a_run_by_key_leaves_the_guest_running") {
        return;
    }
    let world = World::started(&[]);
    let arguments = run(&world, TinyGuest::Echo, &[]);
    let mut terminal = Terminal::run(&world, 100, &borrowed(&arguments), Redirect::Nothing);
    terminal.wait_for("kind=echo");
    terminal.type_in("hello\r");
    terminal.wait_for("hello");
    terminal.type_in("~.");
    assert_eq!(terminal.code(), 0);
    assert!(terminal.screen().contains("`vmcp console vm` shows its console again"), "{}", terminal.screen());
    assert_eq!(world.run(&["list", "--state", "running", "-o", "name"]).ok(), "vm\n");
}

fn a_run_with_rm_that_is_left_by_key_deletes_the_vm() {
    if !has_qemu("run::a_run_with_rm_that_is_left_by_key_deletes_the_vm") {
        return;
    }
    let world = World::started(&[]);
    let arguments = run(&world, TinyGuest::Echo, &["--rm"]);
    let mut terminal = Terminal::run(&world, 100, &borrowed(&arguments), Redirect::Nothing);
    terminal.wait_for("kind=echo");
    terminal.type_in("~.");
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
    assert_eq!(names(&world), "");
}

fn a_run_that_cannot_be_created_leaves_nothing() {
    let world = World::started(&[]);
    let error = world.run(&["run", "vm", "--kernel", "/nonexistent/kernel", "--rm"]).failed(13);
    assert!(error.contains("config.boot.kernel_path"), "{error}");
    assert_eq!(names(&world), "");
}

fn a_run_that_cannot_boot_says_what_stays() {
    let world = World::started(&[("UNKEY_VMCP_QEMU_BINARY", "/nonexistent/qemu-system-x86_64")]);
    let ran = world.run(&borrowed(&run(&world, TinyGuest::Idle, &[])));
    assert_ne!(ran.code, 0, "{ran:?}");
    assert!(ran.stderr.contains("vm stays on record"), "{ran:?}");
    assert_eq!(names(&world), "vm\n");
    world.run(&["delete", "vm"]).ok();
    let ran = world.run(&borrowed(&run(&world, TinyGuest::Idle, &["--rm"])));
    assert_ne!(ran.code, 0, "{ran:?}");
    assert_eq!(names(&world), "");
}

fn a_signal_ends_a_run_and_leaves_the_guest_running() {
    if !has_qemu("run::a_signal_ends_a_run_and_leaves_the_guest_running") {
        return;
    }
    let world = World::started(&[]);
    let mut running = Running::start(world.command(&borrowed(&run(&world, TinyGuest::Echo, &[]))));
    Running::until(&running.stdout, "kind=echo");
    running.signal(Signal::TERM);
    Running::until(&running.stderr, "vmcp: vm runs on; `vmcp console vm` shows its console again");
    assert_eq!(running.code(), 143);
    assert_eq!(world.run(&["list", "--state", "running", "-o", "name"]).ok(), "vm\n");
}

fn a_signal_ends_a_run_with_rm_and_deletes_the_vm() {
    if !has_qemu("run::a_signal_ends_a_run_with_rm_and_deletes_the_vm") {
        return;
    }
    let world = World::started(&[]);
    let arguments = run(&world, TinyGuest::Echo, &["--rm"]);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut running = Running::start(world.command(&borrowed(&arguments)));
        Running::until(&running.stdout, "kind=echo");
        running.signal(signal);
        assert_eq!(running.code(), code);
        assert_eq!(names(&world), "");
    }
}

fn a_run_takes_keys_on_each_hypervisor() {
    let test = "run::a_run_takes_keys_on_each_hypervisor";
    let world = World::started(&[]);
    for (backend, program) in [
        ("qemu", "qemu-system-x86_64"),
        ("cloudhypervisor", "cloud-hypervisor"),
        ("firecracker", "firecracker"),
    ] {
        if !on_path(program) {
            skipped(test, &format!("{program} is not on PATH"));
            continue;
        }
        if backend != "qemu" && !Path::new("/dev/kvm").exists() {
            skipped(test, &format!("{program} needs /dev/kvm"));
            continue;
        }
        let arguments = run(&world, TinyGuest::Echo, &["--rm", "--backend", backend]);
        let mut terminal = Terminal::run(&world, 100, &borrowed(&arguments), Redirect::Nothing);
        terminal.wait_for("kind=echo");
        terminal.type_in(&format!("typed into {backend}\r"));
        terminal.wait_for(&format!("typed into {backend}"));
        terminal.type_in("~.");
        assert_eq!(terminal.code(), 0, "{backend}: {}", terminal.screen());
        assert_eq!(names(&world), "", "{backend}");
    }
}

/// Returns the command that `vmcp --help` leads a newcomer to, with the program of this build.
fn command_of_the_help() -> String {
    let help = finish(vmcp(&["--help"]), "").ok();
    let (_, rest) = help.split_once("  ./vmcp run ").unwrap_or_else(|| panic!("{help}"));
    let whole = rest.replace("\\\n", " ");
    let arguments = whole.lines().next().unwrap();
    // The kernel's tests of ciphers and much memory take long on an emulated processor. The test of the
    // timer ends in a panic where the processor is too slow on a busy host.
    let quick = arguments.replace("console=ttyS0", "console=ttyS0 cryptomgr.notests no_timer_check");
    assert_ne!(quick, arguments);
    format!("exec '{}' run --memory 128MiB {quick}", env!("CARGO_BIN_EXE_vmcp"))
}

fn the_help_leads_to_a_shell_in_the_linux_guest() {
    let test = "run::the_help_leads_to_a_shell_in_the_linux_guest";
    if !has_qemu(test) {
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest");
    let file = |name: &str| folder.join(name).canonicalize();
    let (Ok(_), Ok(_)) = (file("vmlinuz"), file("initramfs.cpio.gz")) else {
        return skipped(test, "the Linux guest is not there; `make setup` makes it");
    };
    let world = World::started(&[]);
    let mut command = Command::new("sh");
    command.args(["-c", &command_of_the_help()]).current_dir(folder.join("../.."));
    command.env("VMCP_SERVER", world.url()).env("VMCP_CONTEXTS_FILE", "/nonexistent/contexts.toml");
    let mut terminal = Terminal::start(command, 120, Redirect::Nothing);
    terminal.wait_for("vmcp-guest: shell on /dev/ttyS0");
    terminal.wait_for("/ #");
    terminal.type_in("echo result=$((6 * 7))\r");
    terminal.wait_for("result=42");
    // Ctrl-C interrupts the command in the guest, and not `vmcp`.
    terminal.type_in("sleep 600; echo never\r");
    terminal.wait_for("sleep 600");
    terminal.type_in("\u{3}echo after=$((6 * 8))\r");
    terminal.wait_for("after=48");
    terminal.type_in("poweroff -f\r");
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
    assert_eq!(names(&world), "");
}
