//! Hints for commands that this program does not have: the words that other tools use, and the
//! commands of the daemon.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Words of other tools whose meaning here depends on what the user wants, with the commands that
/// can be meant.
const WORDS: [(&[&str], &str); 8] = [
    (
        &["log", "logs"],
        "`vmcp console NAME --no-follow` prints the guest's console, and `vmcp events NAME` shows what happened to the VM",
    ),
    (
        &["attach", "exec", "ssh", "serial", "shell"],
        "`vmcp console NAME` shows the guest's console, and types into it",
    ),
    (&["kill", "stop-force", "poweroff", "off"], "`vmcp shutdown NAME --force` powers a VM off at once"),
    (&["destroy"], "`vmcp shutdown NAME --force` powers a VM off, and `vmcp delete NAME` forgets it"),
    (&["up"], "`vmcp run NAME` creates a VM, boots it and shows its console"),
    (&["stats", "top", "metrics", "usage"], "`vmcp get NAME -o json` has the metrics of a VM"),
    (&["help", "version"], "`vmcp --help` and `vmcp --version`; `vmcp COMMAND --help` for one command"),
    (
        &["serve", "doctor", "check-config", "reconcile", "backup", "restore", "migrate-env"],
        "this is a command of the daemon's program: run `vmm-controlplane COMMAND` on the daemon's host",
    ),
];

/// Returns the hint for an error of the command line, if the command is one that other tools have.
pub(crate) fn hint(error: &clap::Error) -> Option<&'static str> {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return None;
    }
    let Some(ContextValue::String(typed)) = error.get(ContextKind::InvalidSubcommand) else { return None };
    WORDS.iter().find(|(words, _)| words.contains(&typed.as_str())).map(|(_, hint)| *hint)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;
    use crate::cli::Cli;

    fn hint_for(word: &str) -> Option<&'static str> {
        hint(&Cli::try_parse_from(["vmcp", word, "web-1"]).expect_err(word))
    }

    #[test]
    fn a_command_of_another_tool_leads_to_the_one_of_this_program() {
        for (word, command) in
            [("logs", "`vmcp events"), ("kill", "`vmcp shutdown"), ("doctor", "vmm-controlplane")]
        {
            assert!(hint_for(word).unwrap().contains(command), "{word}");
        }
        assert_eq!(hint_for("lst"), None, "clap suggests `list` itself");
    }

    #[test]
    fn every_hint_names_an_existing_command_and_replaces_none() {
        let names: Vec<_> =
            Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
        for (words, hint) in WORDS {
            for (at, _) in hint.match_indices("`vmcp ") {
                let command = hint[at..].trim_start_matches("`vmcp ").split([' ', '`']).next().unwrap();
                assert!(
                    command.starts_with("--")
                        || command == "COMMAND"
                        || names.iter().any(|name| name == command),
                    "{command}"
                );
            }
            for word in words {
                assert!(
                    Cli::command().find_subcommand(word).is_none(),
                    "{word} is a command and needs no hint"
                );
            }
        }
    }
}
