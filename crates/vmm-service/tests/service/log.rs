//! The log of the service: few lines at the start of a daemon, and one line for each operation.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use vmm_core::backend::ExitCause;
use vmm_core::state::Phase;

use crate::common::*;
use crate::recover::host_restarts;

/// A log line: its level and its keys, sorted, as `key=value`.
type Line = (Level, Vec<String>);

/// Collects the lines of one thread. A test on a paused clock has no other.
#[derive(Clone, Default)]
struct Log {
    lines: Arc<Mutex<Vec<Line>>>,
    spans: Arc<AtomicU64>,
}

#[derive(Default)]
struct Keys(Vec<String>);

impl Visit for Keys {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push(format!("{field}={}", format!("{value:?}").trim_matches('"')));
    }
}

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(self.spans.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut keys = Keys::default();
        event.record(&mut keys);
        keys.0.sort();
        self.lines.lock().unwrap().push((*event.metadata().level(), keys.0));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Log {
    /// Returns the lines of level INFO and above that `work` leaves.
    fn of<T>(work: impl FnOnce() -> T) -> Vec<Line> {
        let log = Self::default();
        tracing::subscriber::with_default(log.clone(), work);
        let lines = log.lines.lock().unwrap();
        lines.iter().filter(|(level, _)| *level <= Level::INFO).cloned().collect()
    }
}

fn with<'a>(lines: &'a [Line], key: &str) -> Vec<&'a Vec<String>> {
    lines.iter().map(|(_, keys)| keys).filter(|keys| keys.iter().any(|found| found == key)).collect()
}

const ADOPTED: &str = "message=the running VMM was taken over";
const SUMMARY: &str = "message=the VMs on record were recovered";

#[test]
fn an_adoption_leaves_one_line() {
    let bed = Bed::new();
    bed.life(async |vms| {
        vms.run("vm", bed.config()).await;
    });
    let lines = Log::of(|| bed.life(async |_| ()));
    let [adopted] = with(&lines, ADOPTED)[..] else { panic!("{lines:#?}") };
    for key in
        ["vm_id=vm", "backend=fake", "operation=adopted", "actor=system", "outcome=done", "state=RUNNING"]
    {
        assert!(adopted.iter().any(|found| found == key), "{key}: {adopted:?}");
    }
    let [summary] = with(&lines, SUMMARY)[..] else { panic!("{lines:#?}") };
    assert!(
        summary.contains(&"adopted=1".to_owned()) && summary.contains(&"vms=1".to_owned()),
        "{summary:?}"
    );
}

#[test]
fn a_daemon_start_with_a_thousand_vms_logs_counts_in_few_lines() {
    const VMS: usize = 1000;
    let bed = Bed::new();
    bed.life(async |vms| {
        for number in 0..VMS {
            vms.run(&format!("vm-{number}"), bed.config()).await;
        }
    });
    let lines = Log::of(|| bed.life(async |_| ()));
    assert!(lines.len() < 50, "{} lines: {lines:#?}", lines.len());
    assert_eq!(with(&lines, ADOPTED).len(), 20);
    let [summary] = with(&lines, SUMMARY)[..] else { panic!("{lines:#?}") };
    for key in ["vms=1000", "adopted=1000", "ended=0", "unreachable=0", "at_debug=980"] {
        assert!(summary.iter().any(|found| found == key), "{key}: {summary:?}");
    }

    // After a reboot of the host none of them runs.
    host_restarts(&bed);
    let lines = Log::of(|| bed.life(async |_| ()));
    assert!(lines.len() < 50, "{} lines: {lines:#?}", lines.len());
    let [summary] = with(&lines, SUMMARY)[..] else { panic!("{lines:#?}") };
    assert!(summary.iter().any(|found| found == "ended=1000"), "{summary:?}");
}

#[test]
fn every_end_after_the_daemon_start_has_its_own_log_line() {
    const VMS: usize = 30;
    let bed = Bed::new();
    let lines = Log::of(|| {
        bed.life(async |vms| {
            for number in 0..VMS {
                vms.run(&format!("vm-{number}"), bed.config()).await;
            }
            for number in 0..VMS {
                vms.machine(&format!("vm-{number}")).end(ExitCause::VmmFailed);
            }
            for number in 0..VMS {
                vms.until_phase(&format!("vm-{number}"), Phase::Failed).await;
            }
        });
    });
    assert_eq!(with(&lines, "message=the VM's run ended by a failure").len(), VMS, "{lines:#?}");
    assert_eq!(with(&lines, "operation=BootVm").len(), VMS, "{lines:#?}");
    assert_eq!(with(&lines, "operation=CreateVm").len(), VMS, "{lines:#?}");
}
