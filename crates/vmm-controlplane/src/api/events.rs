//! The handlers of WatchVms, ListVmEvents and WaitVm.

use std::collections::BTreeMap;
use std::time::Duration;

use connectrpc::{ConnectError, RequestContext};
use futures::{Stream, stream};
use vmm_core::event::{NewEvent, VmSummary};
use vmm_core::id::{VmId, VmUid};
use vmm_core::report::FieldReport;
use vmm_core::state::{Status, VmState};
use vmm_core::store::VmRecord;
use vmm_host::clock::now_ms;
use vmm_proto::v1 as pb;
use vmm_service::{
    EventsPage, EventsQuery, PresentVm, RecordedEvent, ServiceError, VmService, WatchMessage, WatchQuery,
};

use super::convert::{count, seconds, state_to_pb, states_from_pb, status_to_pb};
use super::error::to_connect;
use super::{keepalive, size};

/// The longest wait that a client may ask for.
const MAX_WAIT_SECONDS: i32 = 3600;
/// The time before the call's deadline at which a wait gives up, so that the answer can still name
/// the VM's state.
const ANSWER_MARGIN_LIMIT: Duration = Duration::from_millis(250);

pub(super) async fn watch(
    service: &VmService,
    request: pb::WatchVmsRequest,
) -> Result<impl Stream<Item = Result<pb::VmEvent, ConnectError>> + Send + use<>, ConnectError> {
    let query = WatchQuery {
        resume_token: request.resume_token,
        vm_id: request.vm_id,
        metadata: request.metadata_filter,
    };
    let include_info = request.include_info;
    let watch = service.watch(query).await.map_err(to_connect)?;
    // The stream ends after the first error.
    let events = stream::unfold(Some(watch), move |watch| async move {
        let mut watch = watch?;
        match watch.next().await {
            Ok(notice) => Some((Ok(notice_to_pb(notice, include_info)), Some(watch))),
            Err(error) => Some((Err(to_connect(error)), None)),
        }
    });
    Ok(keepalive::with_signs_of_life(events, || Ok(sign_of_life())))
}

/// Returns the event that shows a client, and the proxies on the way, that the watch still runs.
/// The event has no token, because it changes nothing.
fn sign_of_life() -> pb::VmEvent {
    pb::VmEvent { time: now_ms(), r#type: "alive".to_owned(), ..Default::default() }
}

pub(super) async fn list(
    service: &VmService,
    request: pb::ListVmEventsRequest,
) -> Result<pb::ListVmEventsResponse, ConnectError> {
    let mut query =
        EventsQuery { vm_id: request.vm_id, page_size: request.page_size, page_token: request.page_token };
    loop {
        let EventsPage { events, next_page_token } = service.list_events(&query).await.map_err(to_connect)?;
        let events: Vec<_> = events.into_iter().map(|event| recorded_to_pb(event, false)).collect();
        let fitting = size::fitting(&events);
        if fitting == events.len() {
            return Ok(pb::ListVmEventsResponse { events, next_page_token, ..Default::default() });
        }
        // The page shrinks with each turn, and one event always fits, so the loop ends.
        query.page_size = i32::try_from(fitting).unwrap_or(1);
    }
}

pub(super) async fn wait(
    service: &VmService,
    ctx: &RequestContext,
    request: pb::WaitVmRequest,
) -> Result<pb::WaitVmResponse, ConnectError> {
    let states = states_from_pb("states", &request.states);
    let deadline = wait_deadline(request.timeout_seconds, ctx.time_remaining());
    let (states, deadline) = match (states, deadline) {
        (Ok(states), Ok(deadline)) => (states, deadline),
        (states, deadline) => {
            let mut violations = states.err().unwrap_or_default();
            violations.extend(deadline.err());
            return Err(to_connect(ServiceError::Invalid(violations)));
        }
    };
    let record = service.wait(&request.vm_id, &states, deadline).await.map_err(to_connect)?;
    Ok(reached_to_pb(&record))
}

/// Returns the time to wait: the requested time, but less than the call's own deadline.
fn wait_deadline(seconds: i32, remaining: Option<Duration>) -> Result<Duration, FieldReport> {
    let longest = Duration::from_secs(u64::from(MAX_WAIT_SECONDS.unsigned_abs()));
    let asked = match seconds {
        0 => longest,
        seconds @ 1..=MAX_WAIT_SECONDS => Duration::from_secs(u64::from(seconds.unsigned_abs())),
        other => {
            return Err(FieldReport::new(
                "timeout_seconds",
                format!("must be from 0 (until the call's own deadline) to {MAX_WAIT_SECONDS}, not {other}"),
            ));
        }
    };
    let remaining = remaining.unwrap_or(longest);
    Ok(asked.min(remaining - ANSWER_MARGIN_LIMIT.min(remaining / 10)))
}

fn reached_to_pb(record: &VmRecord) -> pb::WaitVmResponse {
    pb::WaitVmResponse {
        vm_id: record.vm_id.to_string(),
        state: state_to_pb(record.state).into(),
        status: status_to_pb(&record.status).into(),
        ..Default::default()
    }
}

/// Converts a notice. With `include_info` the event carries the VM as ListVms showed it.
fn notice_to_pb(notice: WatchMessage, include_info: bool) -> pb::VmEvent {
    match notice {
        WatchMessage::Present(present) => present_to_pb(present, include_info),
        WatchMessage::Synced { token, time_ms } => {
            pb::VmEvent { token, time: time_ms, r#type: "synced".to_owned(), ..Default::default() }
        }
        WatchMessage::Change(recorded) => recorded_to_pb(recorded, include_info),
    }
}

/// Converts a present state. The event has no token, because a client that is cut off before
/// "synced" has not received every VM and must begin again.
fn present_to_pb(present: PresentVm, include_info: bool) -> pb::VmEvent {
    let PresentVm { vm_id, uid, time_ms, state, status, ended_by, metadata, summary } = present;
    let info = summary.filter(|_| include_info).map(|summary| {
        let vm = VmAtEvent { vm_id: &vm_id, uid, time_ms, state, status: &status, metadata: &metadata };
        vm.info(&summary)
    });
    pb::VmEvent {
        time: time_ms,
        vm_id: vm_id.to_string(),
        uid: uid.to_string(),
        r#type: "present".to_owned(),
        state: state_to_pb(state).into(),
        status: status_to_pb(&status).into(),
        ended_by: ended_by.map(|rung| rung.as_str().to_owned()).unwrap_or_default(),
        info: info.into(),
        ..Default::default()
    }
}

fn recorded_to_pb(recorded: RecordedEvent, include_info: bool) -> pb::VmEvent {
    let RecordedEvent { token, event } = recorded;
    let event = &event.event;
    let info = event.summary.as_ref().filter(|_| include_info).map(|summary| {
        let NewEvent { vm_id, uid, time_ms, state, status, metadata, .. } = event;
        VmAtEvent { vm_id, uid: *uid, time_ms: *time_ms, state: *state, status, metadata }.info(summary)
    });
    pb::VmEvent {
        token,
        time: event.time_ms,
        vm_id: event.vm_id.to_string(),
        uid: event.uid.to_string(),
        r#type: event.kind.as_str().to_owned(),
        state: state_to_pb(event.state).into(),
        status: status_to_pb(&event.status).into(),
        cause: event.cause.to_string(),
        actor: event.caller.to_string(),
        ended_by: event.ended_by.map(|rung| rung.as_str().to_owned()).unwrap_or_default(),
        info: info.into(),
        fields: event.update.as_ref().map(|update| update.parts.clone()).unwrap_or_default(),
        ..Default::default()
    }
}

/// A VM at one event, without its summary.
struct VmAtEvent<'a> {
    vm_id: &'a VmId,
    uid: VmUid,
    /// The time of the event, which is the time of the last change, in Unix milliseconds.
    time_ms: i64,
    state: VmState,
    status: &'a Status,
    metadata: &'a BTreeMap<String, String>,
}

impl VmAtEvent<'_> {
    /// Returns the entry of ListVms at the event.
    fn info(&self, summary: &VmSummary) -> pb::VmInfo {
        let VmSummary { backend, vcpus, memory_bytes, created_ms, generation } = summary;
        pb::VmInfo {
            vm_id: self.vm_id.to_string(),
            state: state_to_pb(self.state).into(),
            vcpu_count: *vcpus,
            memory_size_bytes: *memory_bytes,
            created_timestamp: seconds(*created_ms),
            modified_timestamp: seconds(self.time_ms),
            metadata: self.metadata.clone(),
            backend: backend.to_string(),
            status: status_to_pb(self.status).into(),
            generation: count(*generation),
            uid: self.uid.to_string(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_before_the_deadline_of_its_call() {
        let seconds = Duration::from_secs;
        assert_eq!(wait_deadline(0, None).unwrap(), seconds(3600) - ANSWER_MARGIN_LIMIT);
        assert_eq!(wait_deadline(5, Some(seconds(60))).unwrap(), seconds(5));
        assert_eq!(wait_deadline(60, Some(seconds(5))).unwrap(), seconds(5) - ANSWER_MARGIN_LIMIT);
        assert_eq!(wait_deadline(0, Some(Duration::from_millis(100))).unwrap(), Duration::from_millis(90));
        assert_eq!(wait_deadline(0, Some(Duration::ZERO)).unwrap(), Duration::ZERO);
        for bad in [-1, MAX_WAIT_SECONDS + 1, i32::MIN] {
            assert!(wait_deadline(bad, None).is_err(), "{bad}");
        }
    }
}
