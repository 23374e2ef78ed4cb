//! `vmcp completion`, and the names of VMs that a shell offers.

use std::ffi::OsStr;
use std::io::Write as _;
use std::time::Duration;

use clap_complete::CompletionCandidate;
use clap_complete::env::Shells;
use vmm_proto::v1 as pb;

use crate::cli::Shell;
use crate::config::{self, Environment, TlsFiles};
use crate::connect::{self, names as connect_names};
use crate::failure::Failure;
use crate::output::words;

/// The variable by which a shell asks for completions.
pub(crate) const VARIABLE: &str = "VMCP_COMPLETE";
/// The longest time that a person at a prompt waits for names.
const NAMES_TIMEOUT: Duration = Duration::from_secs(2);

/// Prints the code that makes a shell ask this program for completions.
pub(crate) fn registration(shell: Shell) -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::Local(error.to_string()))?;
    let program = program.to_str().ok_or_else(|| Failure::Local("the program's path is not UTF-8".into()))?;
    let shells = Shells::builtins();
    let Some(completer) = shells.completer(shell.name()) else {
        return Err(Failure::Local(format!("no completion is known for {}", shell.name())));
    };
    let mut code = Vec::new();
    completer.write_registration(VARIABLE, "vmcp", "vmcp", program, &mut code).map_err(Failure::Output)?;
    std::io::stdout().lock().write_all(&code).map_err(Failure::Output)
}

/// Returns the VMs whose names begin as `typed` does. The list is empty if the server does not
/// answer, because an error must not appear at a prompt.
pub(crate) fn names(typed: &OsStr) -> Vec<CompletionCandidate> {
    let Some(typed) = typed.to_str() else { return Vec::new() };
    let words: Vec<_> = std::env::args_os().filter_map(|word| word.into_string().ok()).collect();
    let vms = ask(&words).unwrap_or_default();
    let matching = vms.into_iter().filter(|vm| vm.vm_id.starts_with(typed));
    matching
        .map(|vm| CompletionCandidate::new(&vm.vm_id).help(Some(words::state(&vm.state).into())))
        .collect()
}

/// Returns the VMs of the server that the words on the command line choose.
fn ask(words: &[String]) -> Option<Vec<pb::VmInfo>> {
    let (server, context) = (option(words, "--server"), option(words, "--context"));
    let environment = Environment::of_this_process();
    let file = |name| option(words, name).map(Into::into);
    let tls = TlsFiles { ca: file("--ca"), certificate: file("--cert"), key: file("--key") };
    let server = config::choose(server.as_deref(), context.as_deref(), tls, &environment).ok()?;
    let client = connect::client(&server).ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let list = connect_names::all(&client, pb::ListVmsRequest::default());
    runtime
        .block_on(async { tokio::time::timeout(NAMES_TIMEOUT, list).await })
        .ok()?
        .ok()
        .map(|list| list.vms)
}

/// Returns the value of an option among words. Bash breaks words at `=` and `:` and passes the
/// parts, which this function joins again.
fn option(words: &[String], name: &str) -> Option<String> {
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let rest = match word.strip_prefix(name) {
            Some("") => "",
            Some(rest) => rest.strip_prefix('=').unwrap_or_default(),
            None => continue,
        };
        let mut value = rest.to_owned();
        if value.is_empty() {
            let _broken_at_equals = words.next_if_eq(&"=");
            value.push_str(words.next()?);
        }
        while words.next_if_eq(&":").is_some() {
            value.push(':');
            value.push_str(words.next().unwrap_or_default());
        }
        return Some(value);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_found_in_every_word_splitting_of_the_shell() {
        for line in [
            "vmcp --server http://a:1 boot",
            "vmcp --server=http://a:1 boot",
            "vmcp --server http : //a : 1 boot",
            "vmcp --server = http : //a : 1 boot",
        ] {
            let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(option(&words, "--server").as_deref(), Some("http://a:1"), "{line}");
            assert_eq!(option(&words, "--context"), None);
        }
        assert_eq!(option(&["--server".to_owned()], "--server"), None);
    }
}
