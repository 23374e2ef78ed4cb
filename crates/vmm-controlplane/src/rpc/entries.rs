//! The limit on list and map entries of one request.
//!
//! A request of 1 MB may hold 300,000 empty list entries. Later work on a configuration is not
//! linear in their number, and some of it happens before a deadline is checked. Therefore requests
//! with more entries than any VM needs are refused while they are still bytes, in time linear in
//! their length.

use buffa_descriptor::{DescriptorPool, FieldKind, MessageDescriptor, ScalarType, SingularKind};
use connectrpc::ConnectError;

use super::error::invalid_argument;

/// The entries that all lists and maps of one request may have together.
///
/// A configuration has at most 64 disks and 64 interfaces. This limit leaves 30 options for each.
pub(crate) const MAX_ENTRIES: usize = 4096;

/// The depth at which the count stops. The decoder refuses deeper messages.
const MAX_DEPTH: usize = 100;

/// Returns the error about the list or map whose entry exceeds the limit.
pub(super) fn too_many() -> String {
    format!("has too many entries: all lists and maps of a request may have {MAX_ENTRIES} together")
}

/// Refuses a message in the wire format that has too many entries. The decoder refuses a message
/// that is broken.
///
/// # Errors
///
/// INVALID_ARGUMENT, which names the list or map where the limit was passed.
pub(super) fn check(
    pool: &DescriptorPool,
    message: &MessageDescriptor,
    bytes: &[u8],
) -> Result<(), ConnectError> {
    let mut count = EntryCounter { pool, left: MAX_ENTRIES, path: Vec::new() };
    match count.message(message, bytes) {
        Ok(()) | Err(CountStop::Broken) => Ok(()),
        Err(CountStop::TooMany) => Err(invalid_argument([(count.path.join("."), too_many())])),
    }
}

/// The reason for which the count ended early.
enum CountStop {
    Broken,
    TooMany,
}

struct EntryCounter<'a> {
    pool: &'a DescriptorPool,
    left: usize,
    /// The path of the field that is being counted. It keeps its value when the limit is passed, so
    /// that the error can name it.
    path: Vec<&'a str>,
}

impl<'a> EntryCounter<'a> {
    fn message(&mut self, message: &'a MessageDescriptor, bytes: &[u8]) -> Result<(), CountStop> {
        // The path grows by one name for each level, so its length is the depth. It is shortened
        // only after success, so that it names the field at which the count stopped. Each byte is
        // looked at once, because a field of the message around skips the bytes of the message
        // inside.
        if self.path.len() > MAX_DEPTH {
            return Err(CountStop::Broken);
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let (number, value) = field(&mut rest)?;
            let Some(field) = message.field(number) else { continue };
            self.path.push(field.name());
            let (kind, is_entry) = match field.kind() {
                FieldKind::Singular(kind) => (Some(kind), false),
                FieldKind::List(kind) => (Some(kind), true),
                FieldKind::Map { .. } => (None, true),
            };
            if is_entry {
                let entries = kind.map_or(1, |kind| entries_of(kind, value));
                self.left = self.left.checked_sub(entries).ok_or(CountStop::TooMany)?;
            }
            if let (Some(SingularKind::Message(index)), Some(inner)) = (kind, value) {
                self.message(self.pool.message(index), inner)?;
            }
            self.path.pop();
        }
        Ok(())
    }
}

/// Counts the entries in one occurrence of a list. One occurrence holds many numbers, because
/// numbers are packed.
fn entries_of(kind: SingularKind, value: Option<&[u8]>) -> usize {
    match (kind, value) {
        (SingularKind::Message(_) | SingularKind::Scalar(ScalarType::String | ScalarType::Bytes), _)
        | (_, None) => 1,
        (SingularKind::Scalar(_) | SingularKind::Enum(_), Some(packed)) => {
            // A number of variable length ends with a byte whose highest bit is clear, and a number
            // of fixed length has at most 8 bytes.
            let ends = packed.iter().filter(|byte| **byte < 0x80).count();
            ends.max(packed.len().div_ceil(8))
        }
    }
}

/// Takes one field off the front of `rest`. Returns its number, and its bytes if it has a length.
///
/// The fields of a group count as those of the message around it, so a group cannot bypass the
/// limit.
fn field<'b>(rest: &mut &'b [u8]) -> Result<(u32, Option<&'b [u8]>), CountStop> {
    let tag = varint(rest)?;
    let number = u32::try_from(tag >> 3).map_err(|_| CountStop::Broken)?;
    let value = match tag & 7 {
        0 => {
            varint(rest)?;
            None
        }
        1 => take(rest, 8).map(|_| None)?,
        2 => {
            let length = usize::try_from(varint(rest)?).map_err(|_| CountStop::Broken)?;
            Some(take(rest, length)?)
        }
        3 | 4 => None,
        5 => take(rest, 4).map(|_| None)?,
        _ => return Err(CountStop::Broken),
    };
    Ok((number, value))
}

fn take<'b>(rest: &mut &'b [u8], length: usize) -> Result<&'b [u8], CountStop> {
    let (taken, left) = rest.split_at_checked(length).ok_or(CountStop::Broken)?;
    *rest = left;
    Ok(taken)
}

fn varint(rest: &mut &[u8]) -> Result<u64, CountStop> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let [byte] = take(rest, 1)? else { return Err(CountStop::Broken) };
        value |= u64::from(byte & 0x7f) << shift;
        if *byte < 0x80 {
            return Ok(value);
        }
    }
    Err(CountStop::Broken)
}

#[cfg(test)]
mod tests {
    use buffa::Message as _;
    use vmm_proto::v1 as pb;

    use super::*;

    fn checked(message: &str, bytes: &[u8]) -> Option<String> {
        let pool = DescriptorPool::decode(vmm_proto::FILE_DESCRIPTOR_SET).unwrap();
        let message = pool.message_by_name(message).unwrap();
        check(&pool, message, bytes).err().and_then(|error| error.message)
    }

    fn create(disks: usize, options: usize) -> Vec<u8> {
        let disk = pb::StorageDevice {
            options: (0..options).map(|n| (n.to_string(), String::new())).collect(),
            ..Default::default()
        };
        let config = pb::VmConfig { storage: vec![disk; disks], ..Default::default() };
        pb::CreateVmRequest { config: config.into(), ..Default::default() }.encode_to_vec()
    }

    #[test]
    fn entries_of_lists_and_maps_are_counted_together() {
        let request = "vmm.v1.CreateVmRequest";
        assert_eq!(checked(request, &create(MAX_ENTRIES, 0)), None);
        assert_eq!(checked(request, &create(64, 63)), None);
        let message = checked(request, &create(300_000, 0)).unwrap();
        assert!(message.starts_with("config.storage: has too many entries"), "{message}");
        let message = checked(request, &create(64, 64)).unwrap();
        assert!(message.starts_with("config.storage.options: has too many entries"), "{message}");
    }

    #[test]
    fn packed_numbers_and_groups_count_against_the_limit() {
        let states = pb::ListVmsRequest {
            state_filter: vec![pb::VmState::Running.into(); MAX_ENTRIES + 1],
            ..Default::default()
        };
        let message = checked("vmm.v1.ListVmsRequest", &states.encode_to_vec()).unwrap();
        assert!(message.starts_with("state_filter: has too many entries"), "{message}");
        // The request is wrapped into field 1000 as a group.
        let grouped = [&[0xc3, 0x3e][..], &create(MAX_ENTRIES + 1, 0), &[0xc4, 0x3e]].concat();
        assert!(checked("vmm.v1.CreateVmRequest", &grouped).is_some());
    }

    #[test]
    fn malformed_bytes_are_left_to_the_decoder() {
        for broken in
            [&b"\x22\xff"[..], b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x07", b"\x12\x05\x22"]
        {
            assert_eq!(checked("vmm.v1.CreateVmRequest", broken), None);
        }
    }
}
