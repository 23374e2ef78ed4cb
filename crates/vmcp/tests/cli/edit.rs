//! `edit`: a person's editor, played by a script, in a terminal.

use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmm_testkit::guests::TinyGuest;

use crate::pty::{Redirect, Terminal};
use crate::trials;
use crate::world::{World, has_qemu};

trials![
    an_edit_sends_the_changed_parts_and_no_other,
    an_unchanged_or_empty_file_sends_nothing,
    a_refused_edit_is_opened_again_with_the_errors_and_the_text,
    a_text_that_is_refused_and_left_as_it_is_is_kept,
    a_faulty_text_is_opened_again_with_the_line_of_the_fault,
    a_change_by_another_client_meanwhile_keeps_the_text,
    a_running_vm_is_edited_in_the_parts_that_may_change,
    an_editor_that_fails_or_is_missing_sends_nothing,
    a_closed_terminal_keeps_the_text,
    an_edit_without_a_terminal_is_refused,
];

/// Makes a VM with labels.
fn with_a_vm() -> World {
    let world = World::started(&[]);
    let mut config = world.tiny(TinyGuest::Idle);
    config["metadata"] = json!({"team": "web"});
    world.call("CreateVm", &json!({"vm_id": "vm", "config": config}));
    world
}

fn info(world: &World) -> Value {
    world.call("GetVmInfo", &json!({"vm_id": "vm"}))
}

/// Runs `vmcp edit vm` with an editor of shell commands, which get the file as `$1` and the number of
/// the attempt as `$attempt`. Each attempt leaves a copy of the file that it was given.
fn edit(world: &World, script: &str) -> Terminal {
    let folder = world.dir.path().display();
    let head = format!(
        "#!/bin/sh\necho >> '{folder}/attempts'\nattempt=$(wc -l < '{folder}/attempts')\n\
         cp \"$1\" '{folder}/given-'$attempt\n"
    );
    let editor = world.write("editor.sh", &format!("{head}{script}\n"));
    edit_with(world, &format!("sh '{editor}'"))
}

fn edit_with(world: &World, editor: &str) -> Terminal {
    let mut command = world.command(&["edit", "vm"]);
    // VISUAL comes first, so that EDITOR is not used.
    command.env("VISUAL", editor).env("EDITOR", "false").env("TMPDIR", world.dir.path());
    Terminal::start(command, 160, Redirect::Nothing)
}

/// Returns the file as the editor got it at an attempt.
fn given(world: &World, attempt: u32) -> String {
    std::fs::read_to_string(world.dir.path().join(format!("given-{attempt}"))).unwrap()
}

/// Returns the files of edits that are left.
fn left(world: &World) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(world.dir.path()).unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| path.display().to_string().contains("vmcp-edit-")).collect()
}

/// Returns the text of the one file that is left, which the screen names.
#[track_caller]
fn kept(world: &World, terminal: &Terminal) -> String {
    let files = left(world);
    let [file] = files.as_slice() else { panic!("{files:?}\n{}", terminal.screen()) };
    let name = file.file_name().unwrap().to_str().unwrap();
    let sent = terminal.sent();
    assert!(sent.contains("vmcp: your text is kept in ") && sent.contains(name), "{sent}");
    std::fs::read_to_string(file).unwrap()
}

fn an_edit_sends_the_changed_parts_and_no_other() {
    let world = with_a_vm();
    let before = info(&world);
    let mut terminal = edit(&world, "sed -i 's/team: web/team: db/; s/\"67108864\"/100663296/' \"$1\"");
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
    assert!(terminal.screen().contains("vm: updated, created, generation "), "{}", terminal.screen());
    let text = given(&world, 1);
    assert!(text.starts_with("## vm: created, generation ") && text.contains("\nconfig:\n"), "{text}");
    assert!(text.contains("## Every part may change."), "{text}");
    let mut wanted = before["config"].clone();
    wanted["metadata"] = json!({"team": "db"});
    wanted["memory"]["size_bytes"] = json!("100663296");
    assert_eq!(info(&world)["config"], wanted);
    let events = world.call("ListVmEvents", &json!({"vm_id": "vm"}));
    let updates = events["events"].as_array().unwrap().iter().filter(|event| event["type"] == "updated");
    assert_eq!(updates.count(), 1, "{events}");
    assert_eq!(left(&world), Vec::<PathBuf>::new());
}

fn an_unchanged_or_empty_file_sends_nothing() {
    let world = with_a_vm();
    let before = info(&world)["generation"].clone();
    for (script, reason) in [
        (":", "the file is unchanged"),
        ("> \"$1\"", "the file is empty"),
        ("echo '# nothing' > \"$1\"", "the file is empty"),
        ("sed -i '/^##/d' \"$1\"", "the file is unchanged"),
        ("echo '# a remark of mine' >> \"$1\"", "no value is changed"),
    ] {
        let mut terminal = edit(&world, script);
        assert_eq!(terminal.code(), 0, "{}", terminal.screen());
        let screen = terminal.screen();
        assert!(screen.contains(&format!("vmcp: {reason}; nothing was sent for vm")), "{script}: {screen}");
        assert_eq!(left(&world), Vec::<PathBuf>::new());
    }
    assert_eq!(info(&world)["generation"], before);
}

fn a_refused_edit_is_opened_again_with_the_errors_and_the_text() {
    let world = with_a_vm();
    let mut terminal = edit(
        &world,
        "if [ $attempt = 1 ]; then sed -i 's/team: web/team: db/; s/vcpu_count: 1/vcpu_count: -4/' \"$1\"
         else sed -i 's/vcpu_count: -4/vcpu_count: 2/' \"$1\"; fi",
    );
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
    let again = given(&world, 2);
    assert!(
        again.starts_with("## error: 1 field is wrong (invalid_argument)\n##   config.cpu.vcpu_count: "),
        "{again}"
    );
    assert!(
        again.contains("vcpu_count: -4") && again.contains("team: db"),
        "the text is the person's: {again}"
    );
    assert_eq!(again.matches("## vm: created").count(), 1, "{again}");
    let config = &info(&world)["config"];
    assert_eq!((&config["cpu"]["vcpu_count"], &config["metadata"]["team"]), (&json!(2), &json!("db")));
}

fn a_text_that_is_refused_and_left_as_it_is_is_kept() {
    let world = with_a_vm();
    let mut terminal = edit(&world, "[ $attempt != 1 ] || sed -i 's/vcpu_count: 1/vcpu_count: -4/' \"$1\"");
    assert_eq!(terminal.code(), 13, "{}", terminal.screen());
    assert!(terminal.sent().contains("config.cpu.vcpu_count"), "{}", terminal.screen());
    assert!(kept(&world, &terminal).contains("vcpu_count: -4"));
    assert_eq!(info(&world)["config"]["cpu"]["vcpu_count"], 1);
}

fn a_faulty_text_is_opened_again_with_the_line_of_the_fault() {
    let world = with_a_vm();
    let mut terminal = edit(
        &world,
        "case $attempt in
           1) sed -i 's/vcpu_count: 1/vcpus: 2/' \"$1\";;
           2) sed -i 's/vcpus: 2/vcpu_count: [/' \"$1\";;
           3) sed -i 's/vcpu_count: \\[/vcpu_count: 2/' \"$1\";;
         esac",
    );
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
    let unknown = given(&world, 2);
    let line = 1 + unknown.lines().position(|line| line.contains("vcpus: 2")).unwrap();
    let wanted = format!("## error: your text: line {line}, column 5: config.cpu.vcpus: no such field\n");
    assert!(unknown.starts_with(&wanted), "{wanted}{unknown}");
    let broken = given(&world, 3);
    assert!(broken.starts_with("## error: your text: line "), "{broken}");
    assert_eq!(broken.matches("## error").count(), 1, "{broken}");
    assert_eq!(info(&world)["config"]["cpu"]["vcpu_count"], 2);
}

fn a_change_by_another_client_meanwhile_keeps_the_text() {
    let world = with_a_vm();
    let vmcp = env!("CARGO_BIN_EXE_vmcp");
    let mut terminal = edit(
        &world,
        &format!("'{vmcp}' update vm --memory=96MiB > /dev/null && sed -i 's/team: web/team: db/' \"$1\""),
    );
    assert_eq!(terminal.code(), 20, "{}", terminal.screen());
    let sent = terminal.sent();
    assert!(sent.contains("it has changed since it was read") && sent.contains("(aborted)"), "{sent}");
    assert!(kept(&world, &terminal).contains("team: db"));
    let config = &info(&world)["config"];
    assert_eq!(config["metadata"]["team"], "web");
    assert_eq!(config["memory"]["size_bytes"], (96 << 20).to_string());
}

fn a_running_vm_is_edited_in_the_parts_that_may_change() {
    if !has_qemu("edit::a_running_vm_is_edited_in_the_parts_that_may_change") {
        return;
    }
    let world = with_a_vm();
    world.run(&["boot", "vm"]).ok();
    let mut terminal = edit(
        &world,
        "if [ $attempt = 1 ]; then sed -i 's/team: web/team: db/; s/vcpu_count: 1/vcpu_count: 2/' \"$1\"
         else sed -i 's/vcpu_count: 2/vcpu_count: 1/' \"$1\"; fi",
    );
    assert_eq!(terminal.code(), 0, "{}", terminal.screen());
    assert!(
        given(&world, 1).contains("## Now only metadata, restart_policy and delete_protection may change")
    );
    let again = given(&world, 2);
    assert!(again.contains("its cpu can only change while it does not run"), "{again}");
    let info = info(&world);
    assert_eq!(
        (&info["state"], &info["config"]["metadata"]["team"]),
        (&json!("VM_STATE_RUNNING"), &json!("db"))
    );
}

fn an_editor_that_fails_or_is_missing_sends_nothing() {
    let world = with_a_vm();
    let before = info(&world)["generation"].clone();
    let mut missing = edit_with(&world, "/nonexistent/editor --wait");
    assert_eq!(missing.code(), 1);
    let screen = missing.screen();
    assert!(screen.contains("the editor \"/nonexistent/editor --wait\" cannot be run"), "{screen}");
    assert!(screen.contains("VISUAL or EDITOR"), "{screen}");
    let mut failing = edit_with(&world, "false");
    assert_eq!(failing.code(), 1);
    assert!(
        failing.screen().contains("the editor \"false\" failed (exit status: 1)"),
        "{}",
        failing.screen()
    );
    assert_eq!(left(&world), Vec::<PathBuf>::new(), "a text without a change is not kept");
    let mut halfway = edit(&world, "sed -i 's/team: web/team: db/' \"$1\"; exit 3");
    assert_eq!(halfway.code(), 1);
    assert!(kept(&world, &halfway).contains("team: db"));
    assert_eq!(info(&world)["generation"], before);
}

fn a_closed_terminal_keeps_the_text() {
    let world = with_a_vm();
    let mut terminal = edit(&world, "sed -i 's/team: web/team: db/' \"$1\"; echo edited; exec sleep 600");
    terminal.wait_for("edited");
    // Ctrl-C is a key of the editor, which ends the script here and not `vmcp`'s care for the text.
    kill_process(Pid::from_child(terminal.child()), Signal::HUP).unwrap();
    assert_eq!(terminal.code(), 129, "{}", terminal.screen());
    assert!(kept(&world, &terminal).contains("team: db"));
    assert_eq!(info(&world)["config"]["metadata"]["team"], "web");
}

fn an_edit_without_a_terminal_is_refused() {
    let world = with_a_vm();
    let error = world.run(&["edit", "vm"]).failed(13);
    assert!(
        error.contains("edit needs a terminal") && error.contains("`vmcp update NAME -f FILE`"),
        "{error}"
    );
}
