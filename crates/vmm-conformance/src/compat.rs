//! The messages between the suite's runner and this program: a length of four bytes, big endian,
//! and a message.

use std::io::{Read, Write};

use anyhow::{Context as _, ensure};
use buffa::Message as _;

use crate::pb;

/// The longest request that is read. A request has two certificates and a key at most.
const REQUEST_LIMIT: u32 = 1 << 20;

/// Reads the runner's request.
///
/// # Errors
///
/// The input ends early, the length is beyond [`REQUEST_LIMIT`], or the bytes are no request.
pub(crate) fn read_request(mut input: impl Read) -> anyhow::Result<pb::ServerCompatRequest> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    ensure!(length <= REQUEST_LIMIT, "a request of {length} bytes is too long");
    let mut bytes = vec![0; usize::try_from(length)?];
    input.read_exact(&mut bytes)?;
    pb::ServerCompatRequest::decode_from_slice(&bytes).context("the bytes are no ServerCompatRequest")
}

/// Writes the answer to the runner, and flushes it.
///
/// # Errors
///
/// The output is closed.
pub(crate) fn write_response(
    mut output: impl Write,
    response: &pb::ServerCompatResponse,
) -> anyhow::Result<()> {
    let bytes = response.encode_to_vec();
    output.write_all(&u32::try_from(bytes.len())?.to_be_bytes())?;
    output.write_all(&bytes)?;
    Ok(output.flush()?)
}
