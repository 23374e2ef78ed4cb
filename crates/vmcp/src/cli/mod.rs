//! The command line. The comments on commands and arguments are what `--help` and the man pages
//! show.

mod console;
mod create;
mod hints;
mod lifecycle;
mod queries;
mod update;
mod values;

use std::path::PathBuf;

use clap::builder::styling::Styles;
use clap::{Args, Parser, Subcommand};

pub(crate) use console::{Console, EscapeKey, Run};
pub(crate) use create::{Config, Create, Flags, Validate};
pub(crate) use hints::hint;
pub(crate) use lifecycle::{Delete, Names, Reboot, Shutdown};
pub(crate) use queries::{Api, Backends, Events, Get, List, Man, Wait, Watch};
pub(crate) use update::{Changes, Edit, Update};
pub(crate) use values::{Disk, Pair};

use crate::config::TlsFiles;
use crate::output::Format;

const AFTER_HELP: &str = "\
A VM is named by its name, or by the beginning of its name or uid if no other VM begins like that.

Exit codes: 0 done; 1 a failure on this side; 2 a wrong command line; else 10 plus the number of the Connect code, as \
13 invalid_argument, 15 not_found, 19 failed_precondition, 24 unavailable.

From nothing to a shell in a guest, in the folder of the repository:
  make setup build
  UNKEY_VMCP_BACKEND=qemu UNKEY_VMCP_STATE_DIR=~/vmcp/state \\
    UNKEY_VMCP_RUNTIME_DIR=~/vmcp/run ./vmm-controlplane
And in a second terminal there:
  ./vmcp run --rm --kernel .cache/guest/vmlinuz --initrd .cache/guest/initramfs.cpio.gz \\
    --kernel-args 'console=ttyS0 vmcp.do=shell'
`poweroff -f` in the guest ends it, and so does ~. at the beginning of a line.

Examples:
  vmcp backends
  vmcp create web-1 --memory 1GiB --kernel /opt/kernels/vmlinux --disk /srv/web.img,root
  vmcp boot web-1
  vmcp console web-1
  vmcp list --watch
  vmcp events web-1
  vmcp update web-1 --metadata team=web --restart always
  vmcp delete web-1 --force";

/// Creates, runs and watches virtual machines through a vmm-controlplane daemon.
#[derive(Debug, Parser)]
#[command(name = "vmcp", version, after_help = AFTER_HELP, styles = Styles::plain())]
#[command(disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The daemon: http://HOST:PORT, https://HOST:PORT or unix:///PATH [env: VMCP_SERVER] [default:
    /// http://127.0.0.1:8080]
    #[arg(long, global = true, value_name = "URL", help_heading = "Everywhere")]
    pub(crate) server: Option<String>,
    /// A server by its name in the contexts file [env: VMCP_CONTEXT]
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "server", help_heading = "Everywhere")]
    pub(crate) context: Option<String>,
    /// The authorities that may certify an https server, in PEM; without it those of the system
    /// [env: VMCP_CA]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Everywhere")]
    pub(crate) ca: Option<PathBuf>,
    /// Your certificate for an https server, in PEM [env: VMCP_CERT]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Everywhere")]
    pub(crate) cert: Option<PathBuf>,
    /// The private key of your certificate, in PEM [env: VMCP_KEY]
    #[arg(id = "tls_key", long = "key", global = true, value_name = "FILE", help_heading = "Everywhere")]
    pub(crate) key: Option<PathBuf>,
    /// The form of the output; json and yaml are the API's messages
    #[arg(
        short = 'o',
        long,
        global = true,
        value_enum,
        value_name = "FORM",
        default_value = "table",
        hide_default_value = true,
        help_heading = "Everywhere"
    )]
    pub(crate) output: Format,
}

impl Global {
    /// Returns the files of TLS that were typed.
    pub(crate) fn tls(&self) -> TlsFiles {
        TlsFiles { ca: self.ca.clone(), certificate: self.cert.clone(), key: self.key.clone() }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates a VM, boots it and shows its console until the guest ends
    Run(Box<Run>),
    /// Records a VM, from flags or from a file; starts nothing
    Create(Box<Create>),
    /// Makes the checks of create, and touches nothing
    Validate(Box<Validate>),
    /// Changes the configuration of a VM, by flags or by a file
    Update(Box<Update>),
    /// Opens the configuration of a VM in your editor, and sends the parts that you changed
    Edit(Edit),
    /// Starts VMs
    #[command(visible_alias = "start")]
    Boot(Names),
    /// Ends guests: asks them, and powers off those that do not go in time
    #[command(visible_alias = "stop")]
    Shutdown(Shutdown),
    /// Stops the processors of guests; memory and devices stay
    #[command(visible_alias = "suspend")]
    Pause(Names),
    /// Lets paused guests run on
    #[command(visible_alias = "unpause")]
    Resume(Names),
    /// Ends guests as shutdown does, and boots them again
    #[command(visible_alias = "restart")]
    Reboot(Reboot),
    /// Forgets VMs; files that you named stay
    #[command(visible_alias = "rm", alias = "remove")]
    Delete(Delete),
    /// Shows the serial console of a VM, and types into it
    Console(Console),
    /// Lists VMs, oldest first
    #[command(visible_alias = "ls", alias = "ps")]
    List(List),
    /// Shows all that is known of one VM
    #[command(visible_alias = "show", aliases = ["inspect", "info", "status", "describe"])]
    Get(Get),
    /// Waits until a VM is in a state
    Wait(Wait),
    /// Shows what happens to VMs, as it happens
    Watch(Watch),
    /// Shows what happened to VMs, deleted ones included
    Events(Events),
    /// Lists the hypervisors of the daemon, or shows one
    Backends(Backends),
    /// Says whether the daemon can serve
    Health,
    /// Calls a method of the API with JSON
    Api(Api),
    /// Prints what makes a shell complete commands and names of VMs
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Prints the manual page of vmcp, or writes all pages
    Man(Man),
}

/// A shell that can complete.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Shell {
    /// GNU Bash
    Bash,
    /// Z shell
    Zsh,
    /// fish
    Fish,
    /// Elvish
    Elvish,
}

impl Shell {
    /// Returns the name that the completion library knows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bash => "bash",
            Self::Zsh => "zsh",
            Self::Fish => "fish",
            Self::Elvish => "elvish",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn clap_accepts_the_definition_of_the_command_line() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_argument_has_a_help_text() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn the_document_of_vmcp_lists_every_command() {
        let page = include_str!("../../../../docs/vmcp.md");
        let rows: Vec<_> = page.lines().filter(|line| line.starts_with("| `")).collect();
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            let is_word =
                |word: &str| word.trim_matches(|letter: char| !letter.is_ascii_alphanumeric()) == name;
            assert!(rows.iter().any(|row| row.split_whitespace().any(is_word)), "{name}");
        }
    }

    #[test]
    fn the_words_of_other_tools_mean_the_same_here() {
        for (word, name) in [
            ("start", "boot"),
            ("stop", "shutdown"),
            ("suspend", "pause"),
            ("unpause", "resume"),
            ("restart", "reboot"),
            ("rm", "delete"),
            ("remove", "delete"),
            ("ls", "list"),
            ("ps", "list"),
            ("show", "get"),
            ("inspect", "get"),
        ] {
            let commands = Cli::command();
            let found = commands.find_subcommand(word).map(|command| command.get_name());
            assert_eq!(found, Some(name), "{word}");
        }
    }

    #[test]
    fn global_options_are_accepted_before_and_after_the_command() {
        for line in [["vmcp", "-o", "json", "list"], ["vmcp", "list", "-o", "json"]] {
            assert_eq!(Cli::try_parse_from(line).unwrap().global.output, Format::Json);
        }
    }

    #[test]
    fn unknown_commands_and_options_are_refused() {
        for line in [&["vmcp"][..], &["vmcp", "lst"], &["vmcp", "list", "--oputput=json"], &["vmcp", "boot"]]
        {
            assert!(Cli::try_parse_from(line).is_err(), "{line:?}");
        }
    }
}
