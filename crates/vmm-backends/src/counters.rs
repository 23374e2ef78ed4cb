//! Reads the counters that the host keeps of a VMM's process and TAPs, and limits the size of its
//! logs.

use std::io;
use std::path::PathBuf;

use vmm_core::backend::{BackendError, NetworkCounters, Sample};
use vmm_host::process::Process;
use vmm_host::tail;

/// The most bytes that are kept of a VMM's log, because a guest can make its VMM log without end.
const LOG_KEPT: u64 = 1 << 20;

/// Reads the CPU time and memory of `process` and, if `taps` are given, the counters of those TAPs,
/// seen from the guest.
///
/// Lists in [`Sample::missing`] each counter that could not be read. A TAP that was renamed,
/// deleted or moved into another network namespace is left out of the sum of the others.
pub(crate) async fn of_host(process: &Process, taps: Option<&[String]>) -> Sample {
    let (process, taps) = (process.clone(), taps.map(<[String]>::to_vec));
    let read = tokio::task::spawn_blocking(move || read(&process, taps.as_deref()));
    read.await.unwrap_or_else(|error| Sample {
        missing: vec![format!("reading the host's counters was interrupted: {error}")],
        ..Sample::default()
    })
}

/// Frees the disk space of all but the last [`LOG_KEPT`] bytes of each of a VMM's `logs`. A missing
/// log is skipped.
pub(crate) async fn trim_logs(logs: Vec<PathBuf>) {
    let trimmed = tokio::task::spawn_blocking(move || {
        for log in logs {
            if let Err(error) = tail::trim(&log, LOG_KEPT) {
                tracing::debug!(path = %log.display(), %error, "the VMM's log cannot be trimmed");
            }
        }
    });
    // The task fails only if the runtime is shutting down, and then no log matters.
    let _ = trimmed.await;
}

/// Returns the counters, or adds the error to [`Sample::missing`] under the name `what` and returns
/// `None`.
pub(crate) fn or_missing<T>(sample: &mut Sample, what: &str, counters: Result<T, BackendError>) -> Option<T> {
    counters.inspect_err(|error| sample.missing.push(format!("{what}: {error}"))).ok()
}

fn read(process: &Process, taps: Option<&[String]>) -> Sample {
    let mut sample = Sample::default();
    match process.usage() {
        Ok(usage) => {
            sample.cpu_time = Some(usage.cpu_time);
            sample.memory_bytes = Some(usage.resident_bytes);
        }
        Err(error) => sample.missing.push(format!("process {}: {error}", process.pid())),
    }
    if let Some(taps) = taps {
        sample.network = sum(taps, &vmm_host::net::counters, &mut sample.missing);
    }
    sample
}

/// Adds the counters of all `taps` that `counters` can read. Returns `None` if there are TAPs and
/// none can be read.
fn sum(
    taps: &[String],
    counters: &dyn Fn(&str) -> io::Result<NetworkCounters>,
    missing: &mut Vec<String>,
) -> Option<NetworkCounters> {
    let mut sum = taps.is_empty().then(NetworkCounters::default);
    for tap in taps {
        match counters(tap) {
            Ok(more) => {
                let sum = sum.get_or_insert_default();
                sum.bytes_received = sum.bytes_received.saturating_add(more.bytes_received);
                sum.bytes_transmitted = sum.bytes_transmitted.saturating_add(more.bytes_transmitted);
                sum.packets_received = sum.packets_received.saturating_add(more.packets_received);
                sum.packets_transmitted = sum.packets_transmitted.saturating_add(more.packets_transmitted);
            }
            Err(error) => missing.push(format!("TAP {tap}: {error}")),
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each(tap: &str) -> io::Result<NetworkCounters> {
        match tap {
            "there" => Ok(NetworkCounters { bytes_received: 1, ..NetworkCounters::default() }),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    #[test]
    fn a_missing_tap_is_left_out_of_the_sum() {
        for (taps, received, missing) in [
            (&["there", "there"][..], Some(2), 0),
            (&["there", "renamed"], Some(1), 1),
            (&["renamed"], None, 1),
            (&[], Some(0), 0),
        ] {
            let taps: Vec<_> = taps.iter().map(|tap| (*tap).to_owned()).collect();
            let mut reported = Vec::new();
            let sum = sum(&taps, &one_of_each, &mut reported);
            assert_eq!((sum.map(|sum| sum.bytes_received), reported.len()), (received, missing), "{taps:?}");
        }
    }
}
