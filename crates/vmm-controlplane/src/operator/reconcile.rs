//! The subcommand `reconcile`, which lists everything that bears the program's mark and removes the
//! items that are proven to have no owner.

use anyhow::bail;
use serde::Serialize;
use vmm_host::lock::{self, LockError, StateLock};
use vmm_host::run_dir;

use super::act::{REMOVED, carry_out};
use super::decide::{Item, ItemDecision, decide};
use super::facts::{ReconcileFacts, gather};
use super::{ATTENTION, CommandOutput, looked_at, refuse_another_user};
use crate::config::{DaemonConfig, ReconcileFlags};

/// The most items that the log of a start names.
const LOGGED: usize = 20;

/// The output of `--json`.
#[derive(Serialize)]
struct ReconcileReport<'a> {
    dry_run: bool,
    state_dir: String,
    runtime_dir: String,
    /// The identity of the state directory; null if there is no database.
    instance: Option<String>,
    /// The process id of the daemon that runs at the same time.
    daemon_pid: Option<u32>,
    items: &'a [Item],
    notes: &'a [String],
}

/// Lists all items, and removes those with the decision `Remove` unless `dry_run` is set.
///
/// # Errors
///
/// A daemon runs and this is no dry run, the database cannot be read, or the host cannot be read.
/// Nothing was changed in these cases.
pub(super) async fn run(config: &DaemonConfig, how: ReconcileFlags) -> anyhow::Result<CommandOutput> {
    // The lock is held to the end, because a daemon that started meanwhile would make and adopt the
    // items that are being judged.
    let _lock = if how.dry_run { None } else { take_lock(config)? };
    // Without the dry run this process itself holds the lock, so no daemon runs.
    let daemon = if how.dry_run { lock::holder(&config.state_dir).ok().flatten() } else { None };
    let facts = gather(config, daemon.is_some()).await?;
    let mut items = decide(&facts, how.kill_orphans);
    if !how.dry_run {
        carry_out(&mut items, &config.runtime_dir, &facts.programs).await;
    }
    let settled = |item: &&Item| match item.decision {
        ItemDecision::Keep => true,
        ItemDecision::Remove => item.outcome.as_deref() == Some(REMOVED),
        ItemDecision::Report => false,
    };
    let open = items.iter().filter(|item| !settled(item)).count();
    let code = if open == 0 { 0 } else { ATTENTION };
    let ledger = ReconcileReport {
        dry_run: how.dry_run,
        state_dir: config.state_dir.display().to_string(),
        runtime_dir: config.runtime_dir.display().to_string(),
        instance: facts.instance.map(|instance| instance.to_string()),
        daemon_pid: daemon.and_then(|holder| holder.pid),
        items: &items,
        notes: &facts.notes,
    };
    let text =
        if how.json { serde_json::to_string_pretty(&ledger)? } else { looked_at(config) + &table(&ledger) };
    Ok(CommandOutput { text, code })
}

/// Takes the lock, which keeps a daemon from starting, if there is a state directory.
fn take_lock(config: &DaemonConfig) -> anyhow::Result<Option<StateLock>> {
    if !config.state_dir.exists() {
        return Ok(None);
    }
    refuse_another_user(&config.state_dir)?;
    match StateLock::acquire(&config.state_dir) {
        Ok(lock) => Ok(Some(lock)),
        Err(LockError::Held { pid, .. }) => bail!(
            "the daemon {} runs on {}, and a thing that it is about to make would look like a leftover; nothing was touched. `reconcile --dry-run` lists beside a running daemon; to remove, stop the daemon first: its VMs go on running",
            pid.map_or_else(|| "of another process".to_owned(), |pid| format!("with process id {pid}")),
            config.state_dir.display()
        ),
        Err(error) => Err(error.into()),
    }
}

fn table(ledger: &ReconcileReport<'_>) -> String {
    let mut rows = vec![["DECISION", "KIND", "VM", "WHAT", "REASON"].map(str::to_owned)];
    rows.extend(ledger.items.iter().map(|item| {
        let decision = match (&item.decision, &item.outcome) {
            (ItemDecision::Remove, Some(outcome)) if outcome == REMOVED => "removed",
            (ItemDecision::Remove, Some(_)) => "failed",
            (ItemDecision::Remove, None) => "remove",
            (ItemDecision::Keep, _) => "keep",
            (ItemDecision::Report, _) => "report",
        };
        let failure = item.outcome.as_ref().filter(|outcome| *outcome != REMOVED);
        let reason = failure.map_or_else(|| item.reason.clone(), |why| format!("{}; {why}", item.reason));
        let kind = format!("{:?}", item.kind).to_ascii_lowercase();
        let vm = item.vm_id.clone().unwrap_or_else(|| "-".to_owned());
        [decision.to_owned(), kind, vm, item.name.clone(), reason]
    }));
    let count = |decision| ledger.items.iter().filter(|item| item.decision == decision).count();
    let (keep, remove, report) =
        (count(ItemDecision::Keep), count(ItemDecision::Remove), count(ItemDecision::Report));
    let mut text = if ledger.items.is_empty() { String::new() } else { columns(&rows) + "\n" };
    for note in ledger.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    let done = if ledger.dry_run { "to remove" } else { "removed, or tried to" };
    text.push_str(&format!("{keep} kept, {remove} {done}, {report} to look at\n"));
    text
}

/// Formats rows as a table. The last column is not padded.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N.saturating_sub(1)).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            match widths.get(column) {
                Some(width) => text.push_str(&format!("{cell:width$}  ")),
                None => text.push_str(cell),
            }
        }
        text.push('\n');
    }
    text
}

/// Marks the run folders of VMs on record that bear no mark, as those of an earlier release. The
/// record proves the owner. Blocks for a moment.
fn mark_known(facts: &ReconcileFacts) {
    let Some(instance) = facts.instance else { return };
    let unmarked = facts.survey.folders.iter().filter(|folder| folder.own && folder.owner.is_none());
    for folder in unmarked.filter(|folder| folder.uid.is_some_and(|uid| facts.records.contains_key(&uid))) {
        if let Err(error) = run_dir::own(&folder.path, instance) {
            tracing::debug!(%error, "a run folder could not be marked; its next boot marks it");
        }
    }
}

/// Logs the items that bear our mark and have no owner, at the start of the daemon. Changes nothing
/// but the marks of run folders.
pub async fn report_leftovers(config: DaemonConfig) {
    let facts: ReconcileFacts = match gather(&config, true).await {
        Ok(facts) => facts,
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "the things on this host that bear the program's mark could not be listed"
            );
            return;
        }
    };
    mark_known(&facts);
    let items = decide(&facts, false);
    let open: Vec<&Item> = items.iter().filter(|item| item.decision != ItemDecision::Keep).collect();
    if open.is_empty() {
        return;
    }
    for item in open.iter().take(LOGGED) {
        tracing::warn!(kind = ?item.kind, name = item.name, detail = item.reason, "a thing on this host bears the program's mark and has no owner; it is left alone");
    }
    tracing::warn!(
        count = open.len(),
        "things on this host bear the program's mark and have no owner; `vmm-controlplane reconcile --dry-run` lists them"
    );
}
