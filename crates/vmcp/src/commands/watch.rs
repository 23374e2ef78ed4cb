//! `vmcp watch`: events as they happen, across losses of the server.

use vmm_proto::v1 as pb;

use super::events::present_or_deleted;
use super::watcher::{self, WatchItem};
use super::{Session, event};
use crate::cli::Watch;
use crate::failure::Failure;
use crate::output::{Format, escape, remark};

pub(super) async fn run(session: &mut Session, arguments: &Watch) -> Result<(), Failure> {
    let vm_id = match &arguments.name {
        Some(name) => present_or_deleted(&session.client, name).await?,
        None => String::new(),
    };
    let request = pb::WatchVmsRequest {
        vm_id,
        resume_token: arguments.resume_token.clone(),
        metadata_filter: arguments
            .metadata
            .iter()
            .map(|pair| (pair.key.clone(), pair.value.clone()))
            .collect(),
        ..Default::default()
    };
    let mut items = watcher::start(&session.client, &session.server, request);
    while let Some(item) = items.recv().await {
        match item {
            WatchItem::Event(event) => show(session, &event)?,
            WatchItem::Remark(text) => remark(&text),
            WatchItem::Anew => {}
            WatchItem::Failed(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn show(session: &mut Session, event: &pb::VmEvent) -> Result<(), Failure> {
    match session.output.format() {
        Format::Json | Format::Yaml => session.output.item(event),
        // The marks of the stream itself are for programs.
        _ if event.vm_id.is_empty() => Ok(()),
        Format::Name => session.output.text(&escape::line(&event.vm_id)),
        Format::Table => session.output.text(&line(event)),
    }
}

/// Returns a line with the columns of `vmcp events`. The widths are fixed, because later events are
/// not known.
fn line(event: &pb::VmEvent) -> String {
    let [time, name, kind, state, status, cause] =
        event::cells(event).map(|cell| escape::line(&cell).into_owned());
    format!("{time}  {name:<16}  {kind:<17}  {state:<8}  {status:<20}  {cause}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_columns_are_aligned_and_control_bytes_are_escaped() {
        let event = |name: &str, cause: &str| pb::VmEvent {
            vm_id: name.into(),
            r#type: "created".into(),
            state: pb::VmState::Created.into(),
            cause: cause.into(),
            ..Default::default()
        };
        let line_of = |name, cause| line(&event(name, cause));
        let (a, b) = (line_of("a", "CreateVm"), line_of("web-1", "\u{1b}[2J"));
        assert_eq!(a.find("created"), b.find("created"));
        assert!(b.ends_with("\\u{1b}[2J"), "{b}");
    }
}
