//! `list --watch`: a table that events keep up to date.

use rustix::process::Signal;
use serde_json::json;
use vmm_testkit::guests::TinyGuest;

use crate::pty::{Redirect, Terminal};
use crate::trials;
use crate::world::{Running, WAIT_TIMEOUT, World, has_qemu, pause};

trials![
    a_table_in_a_terminal_follows_the_vms,
    a_table_goes_on_after_a_restart_of_the_server,
    a_pipe_gets_a_line_for_each_change,
    a_live_table_is_no_message,
];

/// Waits until a row of the screen has all of these words, or until none has.
#[track_caller]
fn wait_for_row(terminal: &Terminal, words: &[&str], is_there: bool) {
    let deadline = std::time::Instant::now() + WAIT_TIMEOUT;
    loop {
        let found = terminal.rows().iter().any(|row| words.iter().all(|word| row.contains(word)));
        if found == is_there {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{words:?} {is_there}: {}", terminal.screen());
        pause();
    }
}

fn a_table_in_a_terminal_follows_the_vms() {
    if !has_qemu("live::a_table_in_a_terminal_follows_the_vms") {
        return;
    }
    let world = World::started(&[]);
    world.create("web-1", TinyGuest::Idle);
    let table = Terminal::run(&world, 100, &["list", "--watch"], Redirect::Nothing);
    wait_for_row(&table, &["NAME", "STATE", "AGE"], true);
    wait_for_row(&table, &["web-1", "created", "qemu", "64 MiB"], true);
    world.run(&["boot", "web-1"]).ok();
    wait_for_row(&table, &["web-1", "running"], true);
    world.create("web-2", TinyGuest::Idle);
    wait_for_row(&table, &["web-2", "created"], true);
    world.run(&["update", "web-2", "--memory=96MiB"]).ok();
    wait_for_row(&table, &["web-2", "96 MiB"], true);
    table.resize(60);
    world.run(&["delete", "web-1", "--force"]).ok();
    wait_for_row(&table, &["web-1"], false);
    wait_for_row(&table, &["web-2", "created"], true);
    assert_eq!(table.rows().iter().filter(|row| row.contains("NAME")).count(), 1, "{}", table.screen());
}

fn a_table_goes_on_after_a_restart_of_the_server() {
    let mut world = World::started(&[]);
    world.create("old", TinyGuest::Idle);
    let table = Terminal::run(&world, 100, &["list", "-w"], Redirect::Nothing);
    wait_for_row(&table, &["old", "created"], true);
    world.stop(Signal::KILL);
    wait_for_row(&table, &["vmcp: lost http://"], true);
    wait_for_row(&table, &["old", "created"], true);
    world.start();
    world.create("new", TinyGuest::Idle);
    wait_for_row(&table, &["new", "created"], true);
    wait_for_row(&table, &["vmcp: connected to http://", "again"], true);
    wait_for_row(&table, &["vmcp: lost"], false);
}

fn a_pipe_gets_a_line_for_each_change() {
    let world = World::started(&[]);
    let labelled = |vm_id: &str, team: &str| {
        let mut config = world.tiny(TinyGuest::Idle);
        config["metadata"] = json!({"team": team});
        world.call("CreateVm", &json!({"vm_id": vm_id, "config": config}));
    };
    labelled("a", "web");
    labelled("b", "db");
    let list = Running::start(world.command(&["list", "--watch", "--metadata", "team=web"]));
    let lines = Running::until(&list.stdout, "a  ");
    assert!(lines[0].starts_with("NAME ") && !lines.concat().contains('\u{1b}'), "{lines:?}");
    world.run(&["update", "b", "--metadata", "team=web"]).ok();
    Running::until(&list.stdout, "b  ");
    // A VM that leaves the filter goes, although it is still there.
    world.run(&["update", "a", "--metadata", "team=db"]).ok();
    let lines = Running::until(&list.stdout, "gone");
    assert!(lines.last().unwrap().starts_with("a  "), "{lines:?}");
    world.run(&["delete", "b"]).ok();
    let lines = Running::until(&list.stdout, "gone");
    assert!(lines.last().unwrap().starts_with("b  "), "{lines:?}");
}

fn a_live_table_is_no_message() {
    let world = World::started(&[]);
    let error = world.run(&["list", "--watch", "-o", "yaml"]).failed(13);
    assert!(error.contains("`vmcp watch -o json`"), "{error}");
}
