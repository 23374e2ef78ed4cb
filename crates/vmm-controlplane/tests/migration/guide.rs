//! The guide as a list of steps.
//!
//! Behind the language of a command block stand words that readers do not see:
//!
//! | word | |
//! |---|---|
//! | none of the next three | in the reader's terminal |
//! | `settings` | in the daemon's terminal |
//! | `daemon` | as well; the last line is the daemon, which takes the place of the one before |
//! | `vmm` | in a terminal of its own; the last line is a VMM |
//! | `stop` | the daemon is stopped first, with Ctrl-C |
//! | `fails` | the exit code is not 0 |
//! | `cloudhypervisor`, `firecracker`, `libvirt`, `linux` | what must be there; else the block is skipped |
//!
//! The language is `bash`, or `sh` where a request is wrong on purpose, which tests/docs.rs would complain of. A block of `text` or
//! `json` behind it is what it prints.

use crate::compare::Shown;
use crate::repository;

const PAGE: &str = "docs/migration-guide.md";

/// Where a block is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the reader's terminal.
    Reader,
    /// In the daemon's, while it does not run.
    Settings,
    /// There, and the daemon runs from then on.
    Daemon,
    /// In one of its own.
    Vmm,
}

/// Something that may be missing here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    CloudHypervisor,
    Firecracker,
    Libvirt,
    /// The Linux guest of `make setup`.
    Linux,
}

/// One command block.
#[derive(Debug)]
pub(crate) struct Step {
    /// Page and line.
    pub(crate) at: String,
    pub(crate) place: Place,
    pub(crate) stops: bool,
    pub(crate) fails: bool,
    pub(crate) needs: Vec<Need>,
    pub(crate) text: String,
    pub(crate) shown: Option<Shown>,
}

impl Step {
    fn new(at: &str, words: &str) -> Self {
        let mut step = Self {
            at: at.to_owned(),
            place: Place::Reader,
            stops: false,
            fails: false,
            needs: Vec::new(),
            text: String::new(),
            shown: None,
        };
        for word in words.split_whitespace() {
            match word {
                "settings" => step.place = Place::Settings,
                "daemon" => step.place = Place::Daemon,
                "vmm" => step.place = Place::Vmm,
                "stop" => step.stops = true,
                "fails" => step.fails = true,
                "cloudhypervisor" => step.needs.push(Need::CloudHypervisor),
                "firecracker" => step.needs.push(Need::Firecracker),
                "libvirt" => step.needs.push(Need::Libvirt),
                "linux" => step.needs.push(Need::Linux),
                _ => panic!("{at}: nobody knows what {word:?} means"),
            }
        }
        step
    }

    /// The methods of the API that it calls.
    pub(crate) fn methods(&self) -> Vec<&str> {
        let calls = self.text.split("/vmm.v1.VmService/").skip(1);
        calls
            .map(|call| call.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default())
            .collect()
    }

    /// Whether it can be run again until it prints what is shown: it changes nothing.
    pub(crate) fn only_reads(&self) -> bool {
        let reads = ["GetVmInfo", "ListVms", "ListBackends", "WaitVm"];
        self.place == Place::Reader
            && self.text.starts_with("curl ")
            && !self.text.contains("cloudhypervisor.v1")
            && self.methods().iter().all(|method| reads.contains(method))
    }
}

/// Returns every command block, in order.
pub(crate) fn steps() -> Vec<Step> {
    let text = std::fs::read_to_string(repository().join(PAGE)).unwrap();
    let mut steps: Vec<Step> = Vec::new();
    let mut lines = text.lines().zip(1..);
    while let Some((line, number)) = lines.next() {
        let Some(info) = line.strip_prefix("```") else {
            assert!(!line.trim_start().starts_with("```"), "{PAGE}:{number}: blocks are not indented here");
            continue;
        };
        let at = format!("{PAGE}:{number}");
        let body = lines.by_ref().map(|(line, _)| line).take_while(|line| *line != "```");
        let body: String = body.flat_map(|line| [line, "\n"]).collect();
        let (language, words) = info.split_once(' ').unwrap_or((info, ""));
        match language {
            "bash" | "sh" => steps.push(Step { text: body, ..Step::new(&at, words) }),
            "text" | "json" => {
                let step = steps.last_mut().filter(|step| step.shown.is_none());
                let step = step.unwrap_or_else(|| panic!("{at}: what prints this?"));
                step.shown = Some(if language == "text" {
                    Shown::Text(body)
                } else {
                    Shown::Json(serde_json::from_str(&body).unwrap_or_else(|error| panic!("{at}: {error}")))
                });
            }
            // A drawing is neither run nor printed.
            "mermaid" => {}
            _ => panic!("{at}: nothing runs a block of {language:?}"),
        }
    }
    steps
}
