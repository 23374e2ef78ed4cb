//! `vmcp events`: the audit trail.

use connectrpc::{ConnectError, ErrorCode};
use vmm_proto::v1 as pb;

use super::{Session, event};
use crate::cli::Events;
use crate::connect::{Client, names};
use crate::failure::Failure;
use crate::output::Table;

/// The number of events in a page, which is the server's limit.
const PAGE_SIZE: i32 = 1000;

pub(super) async fn run(session: &mut Session, arguments: &Events) -> Result<(), Failure> {
    let vm_id = match &arguments.name {
        Some(name) => present_or_deleted(&session.client, name).await?,
        None => String::new(),
    };
    let mut answer = all(&session.client, &vm_id).await?;
    if !vm_id.is_empty() && answer.events.is_empty() {
        let message = format!("no VM is named \"{vm_id}\", and no event of one is kept");
        return Err(ConnectError::not_found(message).into());
    }
    if let Some(last) = arguments.last {
        answer.events.drain(..answer.events.len().saturating_sub(last));
    }
    let names: Vec<_> = answer.events.iter().map(|event| event.vm_id.as_str()).collect();
    session.output.answer(&answer, &names, |width| {
        // A uid is long, so it is shown only if two VMs have the same name.
        if !event::has_namesakes(&answer.events) {
            let mut table = Table::new(width, event::HEADING);
            answer.events.iter().for_each(|event| table.row(event::cells(event)));
            return table.render();
        }
        let [time, name, kind, state, status, cause] = event::HEADING;
        let mut table = Table::new(width, [time, name, "UID", kind, state, status, cause]);
        for event in &answer.events {
            let [time, name, kind, state, status, cause] = event::cells(event);
            table.row([time, name, event.uid.clone(), kind, state, status, cause]);
        }
        table.render()
    })
}

/// Returns the VM that a name means. The events of a deleted VM are still kept, so a name without a
/// VM is used unchanged.
pub(super) async fn present_or_deleted(client: &Client, name: &str) -> Result<String, Failure> {
    match names::resolve(client, name).await {
        Err(failure) if failure.code() == Some(ErrorCode::NotFound) => Ok(name.to_owned()),
        outcome => outcome,
    }
}

async fn all(client: &Client, vm_id: &str) -> Result<pb::ListVmEventsResponse, ConnectError> {
    let mut whole = pb::ListVmEventsResponse::default();
    let mut page_token = String::new();
    loop {
        let request = pb::ListVmEventsRequest {
            vm_id: vm_id.to_owned(),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        let page = client.list_vm_events(request).await?.into_owned();
        whole.events.extend(page.events);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(whole);
        }
    }
}
