//! `vmcp list --watch`: a table of VMs that the events of one watch keep up to date.
//!
//! ```text
//!   WatchVms, include_info ──► events ──► LiveTable ──► a terminal: the screen, drawn again
//!                                                   └─► a pipe: a line for each changed VM
//! ```
//!
//! Each event has the VM as ListVms shows it, so that no other call is made.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use vmm_proto::v1 as pb;

use super::watcher::{self, WatchItem};
use super::{Session, list};
use crate::cli::List;
use crate::failure::Failure;
use crate::output::{escape, remark};

/// The time between two drawings without an event, because ages grow.
const TURN_INTERVAL: Duration = Duration::from_secs(1);
/// The rows and columns of a terminal that does not tell its size.
const USUAL_SIZE: (u16, u16) = (24, 80);
/// Moves to the first row and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

pub(super) async fn run(session: &mut Session, arguments: &List) -> Result<(), Failure> {
    if session.output.format().is_message() {
        return Err(Failure::input("list --watch is a table for people")
            .with_remedy("`vmcp watch -o json` prints each event as a message"));
    }
    let filter = Filter::new(arguments);
    let request = pb::WatchVmsRequest {
        metadata_filter: filter.metadata.clone(),
        include_info: true,
        ..Default::default()
    };
    let items = watcher::start(&session.client, &session.server, request);
    let table = LiveTable { filter, ..LiveTable::default() };
    if io::stdout().is_terminal() {
        on_a_screen(table, items).await
    } else {
        in_lines(session, table, items).await
    }
}

/// Draws the table again after each change, until the watch fails.
async fn on_a_screen(mut table: LiveTable, mut items: mpsc::Receiver<WatchItem>) -> Result<(), Failure> {
    let mut resized = signal(SignalKind::window_change())
        .map_err(|error| Failure::Local(format!("signals cannot be received: {error}")))?;
    let mut footer = String::new();
    let mut drawn = String::new();
    loop {
        tokio::select! {
            item = items.recv() => match item {
                Some(WatchItem::Failed(error)) => return Err(error.into()),
                Some(WatchItem::Remark(text)) => footer = escape::line(&text).into_owned(),
                Some(WatchItem::Anew) => table.begin(),
                Some(WatchItem::Event(event)) => {
                    table.apply(&event);
                    // Events that have come already are drawn at once.
                    if !items.is_empty() {
                        continue;
                    }
                }
                None => return Ok(()),
            },
            _ = resized.recv() => drawn.clear(),
            () = tokio::time::sleep(TURN_INTERVAL) => {}
        }
        let screen = table.screen(&footer, size(), SystemTime::now());
        if table.is_complete && screen != drawn {
            let clear = if drawn.is_empty() { CLEAR } else { "" };
            let mut out = io::stdout().lock();
            write!(out, "{clear}{screen}").and_then(|()| out.flush()).map_err(Failure::Output)?;
            drawn = screen;
        }
    }
}

/// Prints a line for each VM that is there and for each change of one.
async fn in_lines(
    session: &Session,
    mut table: LiveTable,
    mut items: mpsc::Receiver<WatchItem>,
) -> Result<(), Failure> {
    session.output.text(&line(list::HEADING.map(str::to_owned)))?;
    while let Some(item) = items.recv().await {
        match item {
            WatchItem::Failed(error) => return Err(error.into()),
            WatchItem::Remark(text) => remark(&text),
            WatchItem::Anew => table.begin(),
            WatchItem::Event(event) => {
                if let Some(cells) = table.apply(&event).and_then(|change| change.cells(SystemTime::now())) {
                    session.output.text(&line(cells))?;
                }
            }
        }
    }
    Ok(())
}

/// Returns a line whose columns have fixed widths, because later VMs are not known.
fn line(cells: [String; 7]) -> String {
    let [name, state, backend, cpus, memory, age, status] =
        cells.map(|cell| escape::line(&cell).into_owned());
    let text = format!("{name:<16}  {state:<8}  {backend:<15}  {cpus:<5}  {memory:<8}  {age:<4}  {status}");
    text.trim_end().to_owned()
}

/// Returns the rows and columns of the terminal.
fn size() -> (u16, u16) {
    let size = rustix::termios::tcgetwinsize(io::stdout()).map(|size| (size.ws_row, size.ws_col));
    size.ok().filter(|(rows, columns)| *rows > 0 && *columns > 0).unwrap_or(USUAL_SIZE)
}

/// The VMs that are shown.
#[derive(Debug, Default)]
struct Filter {
    states: Vec<pb::VmState>,
    backend: Option<String>,
    metadata: BTreeMap<String, String>,
}

impl Filter {
    fn new(arguments: &List) -> Self {
        let metadata = arguments.metadata.iter().map(|pair| (pair.key.clone(), pair.value.clone()));
        Self {
            states: arguments.state.clone(),
            backend: arguments.backend.clone(),
            metadata: metadata.collect(),
        }
    }

    /// Returns true if ListVms would show the VM. An event is sent also if its VM has just left the
    /// filter.
    fn shows(&self, vm: &pb::VmInfo) -> bool {
        let state = vm.state.as_known();
        (self.states.is_empty() || self.states.iter().any(|wanted| state == Some(*wanted)))
            && self.backend.as_ref().is_none_or(|backend| *backend == vm.backend)
            && self.metadata.iter().all(|(key, value)| vm.metadata.get(key) == Some(value))
    }
}

/// A change of the table.
enum TableChange<'a> {
    Shown(&'a pb::VmInfo),
    Gone(Box<pb::VmInfo>),
}

impl TableChange<'_> {
    /// Returns the cells of a line about the change.
    fn cells(self, now: SystemTime) -> Option<[String; 7]> {
        match self {
            Self::Shown(vm) => Some(list::cells(vm, now)),
            Self::Gone(vm) => {
                let [name, _, backend, cpus, memory, age, _] = list::cells(&vm, now);
                Some([name, "gone".to_owned(), backend, cpus, memory, age, String::new()])
            }
        }
    }
}

/// The VMs that match the filter, by uid, which is the order of their creation.
#[derive(Debug, Default)]
struct LiveTable {
    filter: Filter,
    vms: BTreeMap<String, pb::VmInfo>,
    /// The VMs of a beginning that is not complete yet. The table of before is shown meanwhile.
    beginning: Option<BTreeMap<String, pb::VmInfo>>,
    /// True once the present state of every VM has come.
    is_complete: bool,
}

impl LiveTable {
    /// Notes that the present state of every VM follows.
    fn begin(&mut self) {
        self.beginning = Some(BTreeMap::new());
    }

    /// Applies an event. Returns the change of a VM's row.
    fn apply(&mut self, event: &pb::VmEvent) -> Option<TableChange<'_>> {
        if event.vm_id.is_empty() {
            if event.r#type == "synced" {
                self.vms = self.beginning.take().unwrap_or_default();
                self.is_complete = true;
            }
            return None;
        }
        let vms = self.beginning.as_mut().unwrap_or(&mut self.vms);
        // An event that an earlier release of the daemon recorded has no `info`.
        let mut vm = event.info.as_option().or_else(|| vms.get(&event.uid))?.clone();
        vm.state = event.state;
        vm.status.clone_from(&event.status);
        if event.r#type != "deleted" && self.filter.shows(&vm) {
            vms.insert(event.uid.clone(), vm);
            return vms.get(&event.uid).map(TableChange::Shown);
        }
        vms.remove(&event.uid).map(|vm| TableChange::Gone(Box::new(vm)))
    }

    /// Returns the bytes that draw the table from the first row on, with `footer` below.
    fn screen(&self, footer: &str, (rows, columns): (u16, u16), now: SystemTime) -> String {
        // One row is for the heading, one for the footer, and one for the cursor.
        let room = usize::from(rows.saturating_sub(3).max(1));
        let text = list::table(self.vms.values().take(room), Some(columns), now);
        let mut screen = "\x1b[H".to_owned();
        let mut draw = |line: &str| {
            let _infallible = write!(screen, "{line}\x1b[K\r\n");
        };
        text.lines().take(room + 1).for_each(&mut draw);
        let more = self.vms.len().saturating_sub(room);
        let footer = match (footer.is_empty(), more) {
            (true, 0) => String::new(),
            (true, more) => format!("… and {more} more; `vmcp list` shows all"),
            (false, _) => footer.to_owned(),
        };
        if !footer.is_empty() {
            draw(&footer.chars().take(usize::from(columns)).collect::<String>());
        }
        screen.push_str("\x1b[J");
        screen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, uid: &str, state: pb::VmState, team: &str) -> pb::VmEvent {
        let info = pb::VmInfo {
            vm_id: format!("vm-{uid}"),
            uid: uid.into(),
            metadata: [("team".to_owned(), team.to_owned())].into(),
            ..Default::default()
        };
        pb::VmEvent {
            r#type: kind.into(),
            vm_id: info.vm_id.clone(),
            uid: uid.into(),
            state: state.into(),
            info: info.into(),
            ..Default::default()
        }
    }

    fn mark() -> pb::VmEvent {
        pb::VmEvent { r#type: "synced".into(), ..Default::default() }
    }

    fn names(table: &LiveTable) -> Vec<&str> {
        table.vms.values().map(|vm| vm.vm_id.as_str()).collect()
    }

    #[test]
    fn a_vm_is_shown_while_it_matches_the_filter() {
        let filter = Filter {
            states: vec![pb::VmState::Running],
            metadata: [("team".to_owned(), "web".to_owned())].into(),
            ..Filter::default()
        };
        let mut table = LiveTable { filter, ..LiveTable::default() };
        for (kind, state, team, wanted) in [
            ("created", pb::VmState::Created, "web", &[][..]),
            ("state-changed", pb::VmState::Running, "web", &["vm-1"]),
            ("updated", pb::VmState::Running, "db", &[]),
            ("updated", pb::VmState::Running, "web", &["vm-1"]),
            ("deleted", pb::VmState::Running, "web", &[]),
        ] {
            table.apply(&event(kind, "1", state, team));
            assert_eq!(names(&table), wanted, "{kind} {team}");
        }
    }

    #[test]
    fn a_watch_that_begins_anew_drops_vms_that_went_meanwhile() {
        let mut table = LiveTable::default();
        table.begin();
        let present = |uid| event("present", uid, pb::VmState::Created, "");
        table.apply(&present("1"));
        table.apply(&present("2"));
        assert!(!table.is_complete && names(&table).is_empty());
        table.apply(&mark());
        assert_eq!(names(&table), ["vm-1", "vm-2"]);
        table.begin();
        table.apply(&present("2"));
        assert_eq!(names(&table), ["vm-1", "vm-2"], "the table of before stays until the new one is whole");
        table.apply(&mark());
        assert_eq!(names(&table), ["vm-2"]);
    }

    #[test]
    fn an_event_without_its_vm_changes_the_state_of_a_known_one() {
        let mut table = LiveTable::default();
        table.apply(&event("created", "1", pb::VmState::Created, ""));
        let old = pb::VmEvent { info: None.into(), ..event("state-changed", "1", pb::VmState::Running, "") };
        table.apply(&old);
        assert_eq!(table.vms["1"].state, pb::VmState::Running);
        assert!(table.apply(&pb::VmEvent { uid: "9".into(), ..old }).is_none());
    }

    #[test]
    fn a_screen_has_the_rows_that_fit_and_says_how_many_do_not() {
        let mut table = LiveTable::default();
        for number in 0..9 {
            table.apply(&event("created", &number.to_string(), pb::VmState::Created, ""));
        }
        let screen = table.screen("", (8, 60), SystemTime::UNIX_EPOCH);
        assert_eq!(screen.matches("vm-").count(), 5, "{screen:?}");
        assert!(screen.contains("… and 4 more") && screen.ends_with("\x1b[J"), "{screen:?}");
        let screen = table.screen("vmcp: lost", (40, 60), SystemTime::UNIX_EPOCH);
        assert!(screen.matches("vm-").count() == 9 && screen.contains("vmcp: lost"), "{screen:?}");
    }
}
