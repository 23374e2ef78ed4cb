//! The calls that change something, and their idempotency keys.

use connectrpc::{ConnectError, RequestContext, Response};
use http::{HeaderName, HeaderValue};
use vmm_core::idempotency::VmAnswer;
use vmm_service::{Answered, Call, IdempotencyKey, VmService};

use super::error::to_connect;
use crate::rpc::caller;
use crate::rpc::error::invalid_argument;

/// The header with the key of a call.
const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The name of the key in errors, as the documents write it.
const KEY_NAME: &str = "Idempotency-Key";
/// The header of an answer that was given before. Its value is `true`.
pub(super) const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// Carries out a call, with its idempotency key if the request has one.
pub(super) async fn call(
    service: &VmService,
    ctx: &RequestContext,
    call: Call<'_>,
) -> Result<Answered, ConnectError> {
    let key = key_of(ctx)?;
    service.call(call, caller(ctx.extensions()), key).await.map_err(to_connect)
}

fn key_of(ctx: &RequestContext) -> Result<Option<IdempotencyKey>, ConnectError> {
    let mut values = ctx.headers().get_all(KEY).iter();
    let Some(first) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(invalid_argument([(KEY_NAME, "must be sent once")]));
    }
    // A value with other characters than ASCII is no key either.
    let key = first.to_str().unwrap_or_default().parse::<IdempotencyKey>();
    key.map(Some).map_err(|invalid| invalid_argument([(KEY_NAME, invalid.to_string())]))
}

/// Makes the response of a call, and marks an answer that was given before.
pub(super) fn response<B>(answered: Answered, body: impl FnOnce(VmAnswer) -> B) -> Response<B> {
    let Answered { answer, replayed } = answered;
    let mut response = Response::new(body(answer));
    if replayed {
        response.headers.insert(REPLAYED, HeaderValue::from_static("true"));
    }
    response
}
