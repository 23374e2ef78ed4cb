//! What a run prints: its figures, and of every violation the whole story of its VM.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use super::consoles::ConsoleVerdict;
use super::history::{Answer, Call, Event, Life, Micros, Op, SECOND};
use super::plan::Vm;

/// The figures of a run.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    kills: usize,
    vmms_killed: usize,
    vmms_stalled: usize,
    not_sent: u64,
    events: usize,
    /// Bytes that were read of consoles, and tokens that guests sent back.
    console_bytes: usize,
    echoed: usize,
    /// By operation: how many had each outcome, and the longest time until an answer.
    operations: BTreeMap<String, (BTreeMap<&'static str, usize>, Micros)>,
}

impl Figures {
    pub(crate) fn of<'a>(
        calls: impl Iterator<Item = &'a Call>,
        kills: usize,
        not_sent: u64,
        events: usize,
    ) -> Self {
        let mut figures = Self { kills, not_sent, events, ..Self::default() };
        for call in calls {
            if call.op == Op::KillVmm {
                figures.vmms_killed += 1;
                continue;
            }
            let name = match call.op {
                Op::Create { .. } => "CreateVm".to_owned(),
                Op::Read => "reads of a VM".to_owned(),
                Op::Update { guard: None, .. } => "UpdateVm".to_owned(),
                Op::Update { guard: Some(_), .. } => "UpdateVm with a generation".to_owned(),
                op => op.to_string(),
            };
            let (outcomes, longest) = figures.operations.entry(name).or_default();
            *outcomes.entry(outcome(&call.answer)).or_default() += 1;
            if !matches!(call.answer, Answer::Lost) {
                *longest = (*longest).max(call.end - call.begin);
            }
        }
        figures
    }

    /// Adds what was read of the consoles of one name.
    pub(crate) fn add_console(&mut self, verdict: &ConsoleVerdict) {
        self.console_bytes += verdict.bytes;
        self.echoed += verdict.echoed;
    }

    /// Adds how many VMMs stood still for a while.
    pub(crate) fn with_stalls(self, vmms_stalled: usize) -> Self {
        Self { vmms_stalled, ..self }
    }
}

const fn outcome(answer: &Answer) -> &'static str {
    match answer {
        Answer::Done(_) => "ok",
        Answer::Absent => "not found",
        Answer::Denied(_) => "not legal in the state",
        Answer::Exists => "already exists",
        Answer::Stale(_) => "of another generation",
        Answer::Runs => "not while it runs",
        Answer::Protected => "protected",
        Answer::Failed { .. } => "failed",
        Answer::Illegal(_) => "ILLEGAL",
        Answer::Lost => "lost",
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: usize = self.operations.values().flat_map(|(outcomes, _)| outcomes.values()).sum();
        writeln!(
            f,
            "{} kills of the daemon, {} VMMs killed, {} stopped for a while, {total} operations, {} not sent, {} events",
            self.kills, self.vmms_killed, self.vmms_stalled, self.not_sent, self.events
        )?;
        writeln!(f, "  {} bytes of consoles read, {} inputs sent back", self.console_bytes, self.echoed)?;
        for (name, (outcomes, longest)) in &self.operations {
            let counts: Vec<String> =
                outcomes.iter().map(|(outcome, count)| format!("{count} {outcome}")).collect();
            writeln!(
                f,
                "  {name}: {}; slowest answer {:.2} s",
                counts.join(", "),
                *longest as f64 / SECOND as f64
            )?;
        }
        Ok(())
    }
}

/// Everything that is known of one VM with which something is wrong.
pub(crate) struct Story {
    pub(crate) vm: Vm,
    /// When, where that is known, and what.
    pub(crate) violations: Vec<(Micros, String)>,
    pub(crate) calls: Vec<Call>,
    pub(crate) events: Vec<Event>,
    pub(crate) lives: Vec<Life>,
}

/// What is wrong.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) general: Vec<String>,
    pub(crate) stories: Vec<Story>,
}

impl Report {
    pub(crate) fn count(&self) -> usize {
        self.general.len() + self.stories.iter().map(|story| story.violations.len()).sum::<usize>()
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.count() == 0
    }

    /// Prints every violation, first those without a VM, then VM by VM with all that happened to it.
    pub(crate) fn print(&self, log: &Path) {
        println!("{} violations", self.count());
        for text in &self.general {
            println!("VIOLATION: {text}");
        }
        for story in &self.stories {
            println!("=== {} on {}:", story.vm.name, story.vm.backend);
            for (at, text) in &story.violations {
                println!("VIOLATION: {} at {}: {text}", story.vm.name, seconds(*at));
            }
        }
        let log = std::fs::read_to_string(log).unwrap_or_default();
        for story in &self.stories {
            story.print();
            let mark = format!("\"{}\"", story.vm.name);
            for line in log.lines().filter(|line| line.contains(&mark) || line.starts_with("---")) {
                println!("  daemon: {line}");
            }
        }
    }
}

impl Story {
    /// Prints calls, events and deaths in the order of time.
    fn print(&self) {
        println!("=== the story of {} on {}", self.vm.name, self.vm.backend);
        let mut lines: Vec<(Micros, String)> = Vec::new();
        for call in &self.calls {
            let until = if call.is_open() {
                format!(" (open until {})", seconds(call.settled))
            } else {
                String::new()
            };
            let text = format!(
                "client {} .. {} {}: {}{until}",
                call.client,
                seconds(call.end),
                call.op,
                call.answer
            );
            lines.push((call.begin, text));
        }
        for event in &self.events {
            let state = event.state.map_or("?", |state| state.name());
            lines.push((
                event.time,
                format!(
                    "        event {} {} {state}/{} cause {} actor {} reason {} {} {}",
                    event.token,
                    event.kind,
                    event.phase,
                    event.cause,
                    event.actor,
                    event.reason,
                    event.ended_by,
                    event.message
                ),
            ));
        }
        for life in &self.lives {
            lines.extend(life.serving.map(|at| (at, "    === the daemon serves".to_owned())));
            lines.extend(life.killed.map(|at| (at, "    === the daemon was killed".to_owned())));
        }
        lines.sort();
        for (at, text) in lines {
            println!("{} {text}", seconds(at));
        }
        for (at, text) in &self.violations {
            println!("VIOLATION: {} at {}: {text}", self.vm.name, seconds(*at));
        }
    }
}

/// The seconds of the day, for reading.
fn seconds(at: Micros) -> String {
    format!("{:.3}", (at % (86_400 * SECOND)) as f64 / SECOND as f64)
}
