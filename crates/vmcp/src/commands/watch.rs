//! `vmcp watch`: events as they happen, across losses of the server.
//!
//! ```text
//!   no token ──► present…, synced(token) ──► changes(token)…
//!       ▲                                        │ the stream breaks
//!       │ out_of_range: the events are gone      ▼
//!       └──────────────────────────── resume with the last token
//! ```
//!
//! An event before "synced" has no token. A stream that breaks there begins anew, because the
//! client does not know of every VM yet.

use connectrpc::{ConnectError, ErrorCode};
use vmm_proto::v1 as pb;

use super::events::present_or_deleted;
use super::{Session, event};
use crate::cli::Watch;
use crate::connect::retry::{Retry, is_passing};
use crate::connect::{SILENCE_LIMIT, long_call};
use crate::failure::Failure;
use crate::output::{Format, escape, remark};

/// A watch that continues from its last event after a loss of the server.
struct Watcher {
    request: pb::WatchVmsRequest,
    retry: Retry,
    /// True once the server has accepted the watch. An earlier error is final, because only the
    /// user can remove its cause.
    was_taken: bool,
}

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
    let mut watcher = Watcher { request, retry: Retry::default(), was_taken: false };
    loop {
        match watcher.follow(session).await {
            Failure::Api(error) => watcher.recover(session, *error).await?,
            other => return Err(other),
        }
    }
}

impl Watcher {
    /// Prints events until the stream ends. Returns the reason of the end.
    async fn follow(&mut self, session: &mut Session) -> Failure {
        let call = session.client.watch_vms_with_options(self.request.clone(), long_call());
        let mut events = match call.await {
            Ok(events) => events,
            Err(error) => return error.into(),
        };
        self.was_taken = true;
        loop {
            let event: pb::VmEvent = match tokio::time::timeout(SILENCE_LIMIT, events.message()).await {
                Ok(Ok(Some(event))) => event.to_owned_message(),
                Ok(Ok(None)) => return ConnectError::unavailable("the stream ended").into(),
                Ok(Err(error)) => return error.into(),
                Err(_) => return ConnectError::unavailable("no sign of life came").into(),
            };
            if let Some(text) = self.retry.found(&session.server.to_string()) {
                remark(&text);
            }
            if let Err(failure) = show(session, &event) {
                return failure;
            }
            // The token is kept only after the event was shown, so that none is left out.
            if !event.token.is_empty() {
                self.request.resume_token = event.token;
            }
        }
    }

    /// Prepares the next attempt, and waits until it is time for it.
    ///
    /// # Errors
    ///
    /// The error itself, if another attempt would end like this one.
    async fn recover(&mut self, session: &Session, error: ConnectError) -> Result<(), Failure> {
        if !self.was_taken {
            return Err(error.into());
        }
        match error.code {
            // The deadline of the call has passed, so the server has not failed.
            ErrorCode::DeadlineExceeded => return Ok(()),
            ErrorCode::OutOfRange => {
                remark("vmcp: events since the last one are no longer kept; the present state follows");
                self.request.resume_token.clear();
                return Ok(());
            }
            _ if !is_passing(&error) => return Err(error.into()),
            _ => {}
        }
        let (pause, text) = self.retry.lost(&session.server.to_string(), &error);
        if let Some(text) = text {
            remark(&text);
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
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
