//! The handler of StreamConsole.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use connectrpc::ConnectError;
use futures::{Stream, stream};
use vmm_proto::v1 as pb;
use vmm_service::{ConsoleChunk, ConsoleQuery, VmService};

use super::error::to_connect;
use super::keepalive;

pub(super) async fn stream(
    service: &VmService,
    request: pb::StreamConsoleRequest,
) -> Result<impl Stream<Item = Result<pb::StreamConsoleResponse, ConnectError>> + Send + use<>, ConnectError>
{
    let query = ConsoleQuery {
        vm_id: request.vm_id,
        offset: request.offset,
        tail_bytes: request.tail_bytes,
        follow: request.follow,
    };
    let console = service.stream_console(query).await.map_err(to_connect)?;
    let place = Arc::new(AtomicI64::new(request.offset.unwrap_or_default()));
    let sent = Arc::clone(&place);
    // The stream ends after the first error.
    let pieces = stream::unfold(Some(console), move |console| {
        let sent = Arc::clone(&sent);
        async move {
            let mut console = console?;
            match console.next().await {
                Ok(Some(piece)) => {
                    let piece = piece_to_pb(piece);
                    sent.store(end_of(&piece), Ordering::Relaxed);
                    Some((Ok(piece), Some(console)))
                }
                Ok(None) => None,
                Err(error) => Some((Err(to_connect(error)), None)),
            }
        }
    });
    // A sign of life has no data, and the position of the next byte.
    let sign = move || {
        let offset = place.load(Ordering::Relaxed);
        Ok(pb::StreamConsoleResponse { offset, ..Default::default() })
    };
    Ok(keepalive::with_signs_of_life(pieces, sign))
}

fn piece_to_pb(piece: ConsoleChunk) -> pb::StreamConsoleResponse {
    let offset = i64::try_from(piece.offset).unwrap_or(i64::MAX);
    pb::StreamConsoleResponse { offset, data: piece.data.into(), ..Default::default() }
}

/// Returns the position behind the last byte of `piece`.
fn end_of(piece: &pb::StreamConsoleResponse) -> i64 {
    piece.offset.saturating_add(i64::try_from(piece.data.len()).unwrap_or(i64::MAX))
}
